"""The forecast against counting by hand and against scipy."""

import numpy as np
import pytest
from scipy.special import ndtr, ndtri
from scipy.stats import beta, norm

from lens_pipeline.errors import InputError
from lens_pipeline.evaluation.forecast import forecast, purity, threshold_curve
from lens_pipeline.evaluation.fractions import fraction
from lens_pipeline_tests.evaluation.test_selection import sample


class TestForecast:
    def test_expected_numbers_by_hand(self) -> None:
        # 80 of 100 lenses and 10 of 1000 non-lenses above 0.5: of a million objects, a thousand of
        # them lenses, 800 are found. Of the others the threshold, which was chosen for ten of a
        # thousand to remain, lets 11/1001 pass, 10978.
        label = np.r_[np.ones(100), np.zeros(1000)]
        score = np.r_[np.full(80, 0.6), np.full(20, 0.1), np.full(10, 0.6), np.full(990, 0.2)]
        got = forecast(label, score, prevalence=1e-3, n_objects=1_000_000)
        row = got["rows"][-1]
        assert (row["found"], row["false_positives"]) == (80, 10)
        assert row["lenses"]["value"] == pytest.approx(800)
        assert row["false_positive_rate"]["value"] == pytest.approx(11 / 1001)
        assert row["candidates"]["value"] == pytest.approx(11_778, abs=1)
        assert row["purity"]["value"] == pytest.approx(800 / 11_778, rel=1e-4)
        for name in ("lenses", "candidates", "purity", "completeness", "false_positive_rate"):
            assert row[name]["low"] < row[name]["value"] < row[name]["high"], name
        # One threshold serves 10 % and 1 %; none with fewer false positives finds a lens.
        assert [row["fpr"] for row in got["rows"]] == [1e-2]

    def test_without_a_false_positive_the_purity_is_a_lower_bound_by_the_rule_of_three(
        self,
    ) -> None:
        label = np.r_[np.ones(100), np.zeros(1000)]
        score = np.r_[np.full(80, 0.9), np.full(20, 0.1), np.full(1000, 0.2)]
        row = forecast(label, score)["rows"][-1]
        assert row["false_positives"] == 0
        assert row["false_positive_rate"]["high"] == pytest.approx(3 / 1000, rel=0.005)
        assert row["purity"]["value"] is None
        assert row["purity"]["low"] == pytest.approx(800 / (800 + 999_000 * 0.003), rel=0.005)
        assert row["candidates"]["value"] is None
        low, high = (1000 * fraction(80, 100)[end] for end in ("low", "high"))
        assert row["candidates"]["low"] == pytest.approx(low)
        assert row["candidates"]["high"] == pytest.approx(high + 2997, rel=0.005)

    def test_one_false_positive_gives_a_value_and_a_wide_interval(self) -> None:
        label = np.r_[np.ones(100), np.zeros(1000)]
        score = np.r_[np.full(100, 0.9), 0.9, np.full(999, 0.2)]
        row = forecast(label, score)["rows"][-1]
        assert row["false_positives"] == 1
        assert row["purity"]["value"] == pytest.approx(1000 / (1000 + 999_000 * 2 / 1001))
        # Nearly all lenses are found: what is left open is the rate, a Beta(2, 999).
        least = purity(1.0, beta(2, 999).ppf(0.975), 1e-3)
        assert row["purity"]["low"] == pytest.approx(least, rel=0.04)
        # The exact 97.5 % limit of one count is 5.57; resamplings never show more than 3 to 4.
        assert row["purity"]["low"] < 1000 / (1000 + 4 * 999)
        assert row["purity"]["high"] < 1

    def test_rates_at_thresholds_that_were_chosen_on_the_sample_are_the_true_ones(self) -> None:
        """Not k of n, which are those that a threshold just above the next non-lens leaves."""
        prevalence, trials = 1e-3, 300
        label = np.r_[np.ones(3000), np.zeros(1000)]
        random = np.random.default_rng(0)
        found: dict[float, list[tuple[float, ...]]] = {1e-2: [], 1e-3: []}  # by the rate chosen for
        for _ in range(trials):
            score = ndtr(np.r_[random.normal(2, 1, 3000), random.normal(0, 1, 1000)])
            for row in forecast(label, score, prevalence=prevalence)["rows"]:
                if row["fpr"] not in found:
                    continue
                at = ndtri(row["threshold"])
                tpr, fpr = norm.sf(at - 2), norm.sf(at)
                truth = {"false_positive_rate": fpr, "purity": purity(tpr, fpr, prevalence)}
                held = [row[name]["low"] <= v <= row[name]["high"] for name, v in truth.items()]
                found[row["fpr"]].append((row["false_positive_rate"]["value"], fpr, *held))
        for rows in found.values():
            assert len(rows) > 0.8 * trials  # in others no lens lies between two non-lenses
            claimed, true, *covered = np.mean(rows, axis=0)
            assert claimed == pytest.approx(true, rel=0.1)
            assert all(0.92 < share < 0.98 for share in covered), covered

    @pytest.mark.parametrize("prevalence", [0.0, 1.0, -0.1, float("nan")])
    def test_a_prevalence_that_is_none_is_refused(self, prevalence: float) -> None:
        table = sample()
        with pytest.raises(InputError, match="prevalence"):
            forecast(table["label"], table["probability"], prevalence=prevalence)
        with pytest.raises(InputError, match="prevalence"):
            threshold_curve(table["label"], table["probability"], prevalence)

    def test_purity_at_the_samples_own_mixture_is_its_precision(self) -> None:
        table = sample()
        curve = threshold_curve(table["label"], table["probability"])
        assert (np.diff(curve["threshold"]) < 0).all()
        for row in curve.itertuples():
            chosen = table[table["probability"] >= row.threshold]
            assert row.purity_of_sample == pytest.approx((chosen["label"] == 1).mean())
            assert row.false_positives == (chosen["label"] == 0).sum()
        assert curve["completeness"].iloc[-1] == 1
        assert curve["purity"].iloc[-1] == pytest.approx(1e-3)

    def test_a_curve_of_purity_says_what_the_table_of_thresholds_says(self) -> None:
        table = sample().round({"probability": 2})
        curve = threshold_curve(table["label"], table["probability"]).set_index("threshold")
        rows = forecast(table["label"], table["probability"])["rows"]
        same = [row for row in rows if row["threshold"] in curve.index and row["false_positives"]]
        assert same
        for row in same:
            drawn = curve.loc[row["threshold"]]
            assert drawn["purity"] == pytest.approx(row["purity"]["value"])
            assert drawn["purity_low"] > 0.9 * row["purity"]["low"]

    def test_of_few_distinct_scores_each_is_in_the_curve(self) -> None:
        score = np.tile(np.linspace(0.01, 1, 100), 20)
        label = np.random.default_rng(0).random(2000) < score
        curve = threshold_curve(label.astype(int), score)
        assert len(curve) == 100
        none = curve["false_positives"] == 0
        assert none.any()
        assert (curve["purity"].isna() == none).all()
        some = curve[~none]
        assert (some["purity_low"] <= some["purity"]).all()
        assert (some["purity"] <= some["purity_high"]).all()
        assert curve["purity_low"].notna().all()

    def test_bayes(self) -> None:
        assert purity(1.0, 0.0, 0.5) == 1
        assert purity(0.5, 0.5, 0.001) == pytest.approx(0.001)
        assert np.isnan(purity(0.0, 0.0, 0.5))
