"""Real and simulated cutouts of one test split."""

import pandas as pd
import pytest

from lens_pipeline.evaluation.origins import basis, by_origin, described


def table(simulated: list[object], label: list[int]) -> pd.DataFrame:
    return pd.DataFrame({"label": label, "simulated": simulated})


def test_real_ones_come_first_and_what_is_not_said_is_real() -> None:
    parts = by_origin(table([True, None, False, pd.NA], [1, 1, 0, 0]), simulation=False)
    assert {name: list(part.index) for name, part in parts.items()} == {
        "real": [1, 2, 3],
        "simulated": [0],
    }
    assert list(parts) == ["real", "simulated"]


@pytest.mark.parametrize("simulation", [True, False])
def test_without_the_column_all_are_what_the_dataset_is(simulation: bool) -> None:
    cutouts = table([None] * 3, [1, 0, 0]).drop(columns="simulated")
    (only,) = by_origin(cutouts, simulation).items()
    assert only[0] == ("simulated" if simulation else "real")
    assert len(only[1]) == 3


def test_figures_rest_on_the_real_ones_where_both_classes_are_among_them() -> None:
    both = by_origin(table([True, True, False, False], [1, 0, 1, 0]), simulation=False)
    origin, rows = basis(both)
    assert (origin, list(rows.index)) == ("real", [2, 3])
    # The usual case: simulated lenses, real galaxies.
    origin, rows = basis(by_origin(table([False, True, False], [0, 1, 0]), simulation=False))
    assert (origin, list(rows.index)) == ("real and simulated", [0, 1, 2])
    assert basis(by_origin(table([True, True], [0, 0]), simulation=False))[0] == "simulated"


def test_they_are_described_by_their_counts() -> None:
    text = described(table([True] * 1003, [1, 1] + [0] * 1001), "simulated")
    assert text == "simulated cutouts: 2 lenses, 1,001 non-lenses"
