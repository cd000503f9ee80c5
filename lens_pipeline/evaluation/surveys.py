"""The surveys that a test split holds, each by itself."""

import pandas as pd

UNSTATED, OTHERS = "not stated", "others"
MOST = 10  # that are told apart


def by_survey(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """{survey: its rows}, by name, from the column `survey`; empty where there are not several. Of
    many, those with the fewest rows are together, `others`."""
    if "survey" not in table or table["survey"].nunique() < 2:
        return {}
    survey = table["survey"].map(str, na_action="ignore").astype(object).fillna(UNSTATED)
    counts = survey.value_counts()
    if len(counts) > MOST:
        survey = survey.where(survey.isin(counts.index[: MOST - 1]), OTHERS)
    return {str(name): rows for name, rows in table.groupby(survey)}
