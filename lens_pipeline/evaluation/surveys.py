"""The surveys that a test split holds, each by itself."""

from collections.abc import Mapping

import pandas as pd

UNSTATED, OTHERS = "not stated", "others"
MOST = 10  # that are told apart


def by_survey(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """{survey: its rows}, by name, from the column `survey`; empty where there are not several. Of
    many, those with the fewest rows are together, `others`."""
    survey = told_apart(table)
    if survey.nunique() < 2:
        return {}
    return {str(name): rows for name, rows in table.groupby(survey)}


def told_apart(table: pd.DataFrame) -> pd.Series:
    """Of each row the survey as `by_survey` has it; of all the same where there are not several."""
    if "survey" not in table or table["survey"].nunique() < 2:
        return pd.Series(UNSTATED, index=table.index)
    survey = _names(table)
    counts = survey.value_counts()
    if len(counts) > MOST:
        survey = survey.where(survey.isin(counts.index[: MOST - 1]), OTHERS)
    return survey


def of_same_surveys(
    table: pd.DataFrame, parts: Mapping[str, pd.DataFrame]
) -> dict[str, pd.DataFrame]:
    """The rows of a table that are of the surveys of each part that `by_survey` has made of
    another: of itself it may put others together."""
    return {name: table[_names(table).isin(_names(part))] for name, part in parts.items()}


def _names(table: pd.DataFrame) -> pd.Series:
    return table["survey"].map(str, na_action="ignore").astype(object).fillna(UNSTATED)
