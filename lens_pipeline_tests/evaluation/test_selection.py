"""The selection function against counting by hand."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from lens_pipeline.evaluation.forecast import forecast, threshold_curve
from lens_pipeline.evaluation.fractions import fraction
from lens_pipeline.evaluation.metrics import lens_metrics, threshold_at_fpr
from lens_pipeline.evaluation.selection import (
    QUANTITIES,
    false_positives_by_kind,
    selection_function,
    working_fpr,
)
from lens_pipeline.evaluation.tables import threshold_text


def sample(n_lens: int = 400, n_nonlens: int = 600, seed: int = 0) -> pd.DataFrame:
    """Lenses with truths, the wider the better scored; non-lenses of two kinds."""
    random = np.random.default_rng(seed)
    n = n_lens + n_nonlens
    is_lens = np.arange(n) < n_lens
    radius = np.where(is_lens, random.uniform(0.5, 3, n), np.nan)
    table = pd.DataFrame(
        {
            "label": is_lens.astype(int),
            "kind": np.where(is_lens, "lens", np.where(np.arange(n) % 3 == 0, "ring", "star")),
            "einstein_radius": radius,
            "arc_snr": np.where(is_lens, random.uniform(20, 200, n), np.nan),
            "arc_contrast": np.where(is_lens, np.linspace(0.1, 5, n), np.nan),
            "source_magnitude": np.where(is_lens, random.uniform(20, 26, n), np.nan),
            "z_source": np.where(is_lens, random.uniform(1, 3, n), np.nan),
            "z_lens": random.uniform(0.1, 0.9, n),
            "magnification": np.where(is_lens, random.uniform(3, 20, n), np.nan),
            "lens_magnitude": random.uniform(17, 21, n),
        }
    )
    logit = random.normal(size=n) + np.where(is_lens, radius, -1.0)
    return table.assign(probability=1 / (1 + np.exp(-logit)))


class TestThreshold:
    @pytest.mark.parametrize("decimals", [8, 2, 1])
    @pytest.mark.parametrize(("name", "fpr"), [("tpr_at_fpr_1e-2", 0.01), ("tpr0", 0.0)])
    def test_it_reaches_the_rate_of_the_metric(self, decimals: int, name: str, fpr: float) -> None:
        table = sample()
        label, score = table["label"], table["probability"].round(decimals)
        chosen = score >= threshold_at_fpr(label, score, fpr)
        assert chosen[label == 0].mean() <= fpr
        assert chosen[label == 1].mean() == lens_metrics(label, score, 0)[name]["value"]

    def test_of_thresholds_that_find_as_much_the_one_with_fewest_false_positives(self) -> None:
        label, score = [1, 0, 0, 0, 0], [0.9, 0.8, 0.7, 0.2, 0.1]
        assert threshold_at_fpr(label, score, 0.5) == 0.9

    def test_a_non_lens_above_all_lenses_leaves_nothing_to_choose(self) -> None:
        assert threshold_at_fpr([1, 1, 0], [0.5, 0.6, 0.7], 0.0) == np.inf
        assert threshold_at_fpr([1, 1, 0], [0.7, 0.6, 0.7], 0.0) == np.inf  # nor does a tie

    @pytest.mark.parametrize(
        ("n", "fpr"), [(9, 0), (10, 1e-1), (99, 1e-1), (100, 1e-2), (9999, 1e-3), (10**6, 1e-4)]
    )
    def test_the_smallest_rate_that_the_sample_resolves(self, n: int, fpr: float) -> None:
        assert working_fpr(n) == fpr


class TestSelectionFunction:
    def test_bins_hold_equal_counts_and_what_was_found_in_each(self) -> None:
        table = sample()
        got = selection_function(table)
        lenses = table[table["label"] == 1]
        assert got["fpr"] == 1e-2
        assert got["false_positives"] <= 6
        assert list(got["quantities"]) == list(QUANTITIES)
        bins = got["quantities"]["einstein_radius"]["bins"]
        assert [b["n"] for b in bins] == [50] * 8
        by_pandas = lenses.groupby(pd.qcut(lenses["einstein_radius"], 8), observed=True)
        found = by_pandas["probability"].apply(lambda p: (p >= got["threshold"]).sum())
        assert [b["found"] for b in bins] == found.tolist()
        assert bins[0]["completeness"]["value"] < bins[-1]["completeness"]["value"]
        assert sum(b["found"] for b in bins) == round(got["completeness"]["value"] * 400)

    def test_the_flux_ratio_is_that_of_the_lensed_source_to_the_lens(self) -> None:
        table = sample()
        # Five magnitudes are a factor of a hundred: 8 x 0.01.
        table["magnification"] = 8.0
        table["lens_magnitude"], table["source_magnitude"] = 19.0, 24.0
        (only,) = selection_function(table)["quantities"]["flux_ratio"]["bins"]
        assert only["median"] == pytest.approx(0.08)
        assert only["n"] == 400

    def test_what_is_not_known_is_left_out_and_counted(self) -> None:
        table = sample().drop(columns=["z_source", "magnification", "arc_contrast"])
        table["z_lens"] = np.nan
        table.loc[:99, "arc_snr"] = np.nan
        table.loc[100, "arc_snr"] = np.inf
        table["source_magnitude"] = "not measured"
        got = selection_function(table)
        assert list(got["quantities"]) == ["einstein_radius", "arc_snr"]
        assert got["quantities"]["einstein_radius"]["missing"] == 0
        snr = got["quantities"]["arc_snr"]
        assert snr["missing"] == 101
        assert sum(b["n"] for b in snr["bins"]) == 299
        assert got["map"] is None

    def test_without_any_truth_there_is_the_completeness_alone(self) -> None:
        got = selection_function(sample()[["label", "probability"]])
        assert got["quantities"] == {}
        assert got["map"] is None
        assert got["completeness"]["value"] > 0

    def test_what_is_known_of_non_lenses_does_not_count(self) -> None:
        table = sample()
        table.loc[table["label"] == 1, "z_lens"] = np.nan
        assert "z_lens" not in selection_function(table)["quantities"]

    def test_equal_values_share_a_bin(self) -> None:
        table = sample()
        table["z_lens"] = table["z_lens"].round(1)
        bins = selection_function(table)["quantities"]["z_lens"]["bins"]
        assert len(bins) > 1
        assert all(a["high"] < b["low"] for a, b in pairwise(bins))
        assert sum(b["n"] for b in bins) == 400

    @pytest.mark.parametrize("decimals", [8, 1])
    def test_the_order_of_the_cutouts_changes_nothing(self, decimals: int) -> None:
        table = sample().round({"probability": decimals, "z_lens": 1})
        turned = table.sample(frac=1, random_state=1)
        assert selection_function(turned) == selection_function(table)
        assert false_positives_by_kind(turned, 0.5) == false_positives_by_kind(table, 0.5)
        a, b = (forecast(t["label"], t["probability"]) for t in (turned, table))
        assert a == b

    def test_the_map_counts_every_lens_once(self) -> None:
        table = sample()
        table.loc[0, "source_magnitude"] = np.nan
        table.loc[1, ["einstein_radius", "source_magnitude"]] = [9.0, 20.0]  # far from all others
        got = selection_function(table)
        n, found = np.array(got["map"]["n"]), np.array(got["map"]["found"])
        assert n.shape == (6, 6)
        assert n.sum() == 399
        assert (found <= n).all()
        assert n[0, -1] == 1  # rows are of source magnitude, columns of Einstein radius
        assert (n == 0).any()
        chosen = table["probability"] >= got["threshold"]
        assert found.sum() == (chosen & (table["label"] == 1))[1:].sum()

    def test_a_map_needs_forty_lenses(self) -> None:
        assert selection_function(sample(39))["map"] is None
        assert np.shape(selection_function(sample(40))["map"]["n"]) == (2, 2)

    def test_where_no_threshold_is_pure_enough_nothing_is_found(self) -> None:
        table = sample(20, 5)
        table.loc[24, "probability"] = 1.0
        got = selection_function(table)
        assert (got["fpr"], got["threshold"], got["false_positives"]) == (0, None, 0)
        assert got["completeness"]["value"] == 0
        assert false_positives_by_kind(table, got["threshold"])["ring"]["false_positives"] == 0


def test_false_positives_are_counted_by_kind() -> None:
    table = sample()
    # The one at the threshold counts: chosen is what is not below it.
    threshold = table.loc[table["kind"] == "ring", "probability"].nlargest(5).min()
    got = false_positives_by_kind(table, threshold)
    assert got.keys() == {"ring", "star"}
    assert got["ring"]["n"] == (table["kind"] == "ring").sum()
    assert got["ring"]["false_positives"] == 5
    assert false_positives_by_kind(table.drop(columns="kind"), threshold) == {}
    table.loc[table["kind"] == "star", "kind"] = None  # as of real galaxies beside simulated ones
    n_star = got["star"]["n"]
    assert false_positives_by_kind(table, threshold)["not stated"]["n"] == n_star
    assert false_positives_by_kind(table.assign(kind=None), threshold) == {}
    alone = false_positives_by_kind(table[table["label"] == 0], threshold)
    assert alone["ring"]["auroc"] is None


@pytest.mark.parametrize("shown", [1, 10])
def test_cutouts_of_one_galaxy_are_one_case(shown: int) -> None:
    """Ten alike of each of two hundred galaxies tell no more than one of each."""
    random = np.random.default_rng(0)
    label = np.arange(200) % 2
    score = np.clip(0.3 * label + random.uniform(0, 0.7, 200), 0, 1)
    table = pd.DataFrame({"label": label, "probability": score, "group": np.arange(200)})
    many = table.loc[table.index.repeat(shown)].assign(kind="ring")
    once = fraction(*[int(n) for n in _counts(table)])
    found = selection_function(many)["completeness"]
    width = found["high"] - found["low"]
    if shown == 1:
        assert found == once
    else:
        assert width == pytest.approx(once["high"] - once["low"], rel=0.02)
        alone = selection_function(many.drop(columns="group"))["completeness"]
        assert width > 2.5 * (alone["high"] - alone["low"])
    rows = forecast(many["label"], many["probability"], group=many["group"])["rows"]
    least = forecast(label, score)["rows"]
    for row, expected in zip(rows[-1:], least[-1:], strict=True):
        assert row["false_positives"] == 0
        rate = row["false_positive_rate"]["high"]
        assert rate == pytest.approx(expected["false_positive_rate"]["high"], rel=0.02)
        assert row["candidates"]["low"] == row["lenses"]["low"]
        assert row["candidates"]["high"] > row["lenses"]["high"]
    curve = threshold_curve(many["label"], many["probability"], group=many["group"])
    assert curve["purity_low"].iloc[0] == pytest.approx(
        threshold_curve(label, score)["purity_low"].iloc[0], rel=0.02
    )


def _counts(table: pd.DataFrame) -> tuple[int, int]:
    """(found, all) lenses at the threshold of `selection_function`."""
    threshold = selection_function(table)["threshold"]
    lenses = table[table["label"] == 1]["probability"]
    return (lenses >= threshold).sum(), len(lenses)


@pytest.mark.parametrize(
    "threshold", [0.5, 0.12345678, 0.99998595, 1 - 1e-9, 0.9999, 0.00004, 1.0, 0.0]
)
def test_a_threshold_as_it_is_printed_chooses_what_it_says(threshold: float) -> None:
    printed = float(threshold_text(threshold))
    assert printed <= threshold
    assert 1 - printed <= 1.1 * (1 - threshold) + 1e-4 * (threshold < 0.99)
    assert printed >= 0.9 * threshold
