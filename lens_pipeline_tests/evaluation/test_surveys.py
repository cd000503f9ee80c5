"""The surveys of one test split, compared."""

import numpy as np
import pandas as pd

from lens_pipeline.evaluation.metrics import lens_metrics
from lens_pipeline.evaluation.sections import survey_sections
from lens_pipeline.evaluation.surveys import MOST, UNSTATED, by_survey, of_same_surveys
from lens_pipeline.evaluation.tables import format_surveys, surveys_table


def table(survey: list[str | None], label: list[int]) -> pd.DataFrame:
    score = np.random.default_rng(0).random(len(label))
    return pd.DataFrame({"survey": survey, "label": label, "probability": score})


def test_each_survey_by_itself_and_what_is_of_none_together() -> None:
    parts = by_survey(table(["hsc", "des", None, "hsc"], [1, 0, 1, 0]))
    assert {name: list(part.index) for name, part in parts.items()} == {
        "des": [1],
        "hsc": [0, 3],
        UNSTATED: [2],
    }


def test_of_many_surveys_the_largest_are_told_apart() -> None:
    names = [f"s{n:02d}" for n in range(30) for _ in range(n + 1)]
    parts = by_survey(table([*names], [0] * len(names)))
    assert list(parts) == ["others", *(f"s{n}" for n in range(30 - MOST + 1, 30))]
    assert sum(map(len, parts.values())) == len(names)


def test_another_table_is_divided_as_the_first_is() -> None:
    """Whichever surveys are large in it; of some it may have nothing."""
    test = [f"s{n:02d}" for n in range(12) for _ in range(20 - n)] + [None]
    val = [f"s{n:02d}" for n in range(12) for _ in range(9 + n)] + ["unseen", None]
    parts = by_survey(table([*test], [0] * len(test)))
    found = of_same_surveys(table([*val], [0] * len(val)), parts)
    assert list(found) == list(parts)
    assert set(found["others"]["survey"].dropna()) == {"s09", "s10", "s11"}
    assert found["others"]["survey"].isna().sum() == 1
    assert sum(map(len, found.values())) == len(val) - 1
    assert found["s00"]["survey"].tolist() == ["s00"] * 9
    (of_one,) = of_same_surveys(table(["des"], [1]), {"hsc": table(["hsc"], [1])}).values()
    assert of_one.empty


def test_one_survey_alone_is_no_comparison() -> None:
    rows = table(["des", "des", None], [1, 0, 1])
    assert by_survey(rows) == {}
    assert by_survey(rows.drop(columns="survey")) == {}
    assert survey_sections({}, {}, "probability") == []


def test_the_section_shows_what_each_survey_can_tell() -> None:
    """One without lenses has a row, and no curve."""
    rows = table(["des"] * 40 + ["hsc"] * 40 + ["sdss"] * 5, [1, 0] * 40 + [0] * 5)
    parts = by_survey(rows)
    metrics = {n: lens_metrics(p["label"], p["probability"], 100) for n, p in parts.items()}
    (section,) = survey_sections(parts, metrics, "probability")
    (shown,) = section.tables.values()
    assert shown[["survey", "lenses", "non-lenses"]].to_numpy().tolist() == [
        ["des", 20, 20],
        ["hsc", 20, 20],
        ["sdss", 0, 5],
    ]
    (picture,) = section.pictures
    (axes,) = picture.figure.axes
    named = {str(line.get_label()) for line in axes.get_lines()}
    assert {"des", "hsc", "all together"} <= named
    assert "sdss" not in named
    assert list(surveys_table(metrics)["AUROC"])[-1] == "–"
    assert format_surveys(metrics).startswith(f"AUROC by survey: des {shown['AUROC'][0]}, hsc ")
