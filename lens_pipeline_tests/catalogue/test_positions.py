"""Cutouts of one place on the sky, told by their coordinates."""

import numpy as np
import pandas as pd
import pytest
from astropy.coordinates import angular_separation

from lens_pipeline.catalogue.positions import RADIUS, positions_in_two_splits, with_position


def rows(**columns: list[object]) -> pd.DataFrame:
    n = len(next(iter(columns.values())))
    return pd.DataFrame({"id": [f"c{k}" for k in range(n)], **columns})


def test_pairs_are_those_of_every_separation_by_itself() -> None:
    """Across the meridian and near the pole, too, against a formula over all pairs."""
    random = np.random.default_rng(0)
    n = 300
    ra = (random.normal(scale=3e-3, size=n)) % 360
    dec = np.where(random.random(n) < 0.5, 89.99, 12) + random.normal(scale=5e-4, size=n)
    table = rows(ra=list(ra), dec=list(dec))
    split = pd.Series(random.choice(["train", "val", "test", "unlabelled"], n))
    a, d = np.radians(ra), np.radians(dec)
    apart = np.degrees(angular_separation(a[:, None], d[:, None], a, d))
    expected = {
        frozenset((f"c{m}", f"c{n}"))
        for m, n in zip(*np.nonzero(apart * 3600 <= RADIUS), strict=True)
        if split[m] != split[n] and "unlabelled" not in (split[m], split[n])
    }
    assert len(expected) > 50
    found = positions_in_two_splits(table, split)
    assert {frozenset(pair) for pair in found[["id", "other_id"]].to_numpy()} == expected
    assert len(found) == len(expected)
    first = found.iloc[0]
    one, other = (int(first[name][1:]) for name in ("id", "other_id"))
    assert first["separation"] == pytest.approx(apart[one, other] * 3600, abs=1e-6)
    assert found["separation"].is_monotonic_increasing
    assert (first["split"], first["other_split"]) == (split[one], split[other])


def test_many_rows_at_one_place_are_one_pair() -> None:
    """As where 0, 0 stands for what is not known."""
    n = 2_000
    table = rows(ra=[0.0] * n, dec=[0.0] * n)
    found = positions_in_two_splits(table, pd.Series(np.resize(["train", "test"], n)))
    assert found[["id", "other_id"]].to_numpy().tolist() == [["c0", "c1"]]


def test_rows_without_a_position_are_in_no_pair() -> None:
    table = rows(ra=[10.0, None, 10.0, np.nan, -99.0], dec=[1.0, 1.0, -99.0, 1.0, np.nan])
    assert with_position(table).tolist() == [True, False, False, False, False]
    split = pd.Series(["train", "test", "test", "test", "val"])
    assert positions_in_two_splits(table, split).empty
    assert positions_in_two_splits(table[["id", "ra"]], split).empty
    assert not with_position(table[["id"]]).any()
