"""The surveys that a test split holds, each by itself."""

import pandas as pd

UNSTATED = "not stated"


def by_survey(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """{survey: its rows}, by name, from the column `survey`; empty where there are not several."""
    if "survey" not in table or table["survey"].nunique() < 2:
        return {}
    return {str(name): rows for name, rows in table.groupby(table["survey"].fillna(UNSTATED))}
