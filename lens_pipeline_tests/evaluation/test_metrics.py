"""The metrics against scikit-learn and against counting by hand."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from lens_pipeline import evaluation
from lens_pipeline.errors import InputError
from lens_pipeline.evaluation.forecast import forecast, threshold_curve
from lens_pipeline.evaluation.metrics import (
    lens_metrics,
    paired_bootstrap,
    ranking_metric,
    roc,
)

RATES = ("tpr0", "tpr10", "tpr_at_fpr_1e-2", "tpr_at_fpr_1e-3", "tpr_at_fpr_1e-4")


def sample(n: int = 400, seed: int = 0, decimals: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Labels, a third of them lenses, and scores that lenses tend to have higher."""
    random = np.random.default_rng(seed)
    label = (np.arange(n) % 3 == 0).astype(int)
    score = 1 / (1 + np.exp(-random.normal(1.5 * label - 0.7)))
    return label, score.round(decimals)


def values(label: np.ndarray, score: np.ndarray) -> dict[str, float | None]:
    metrics = lens_metrics(label, score, bootstrap=0)
    return {name: v["value"] for name, v in metrics.items() if isinstance(v, dict)}


def highest_rate(label: np.ndarray, score: np.ndarray, allowed: float) -> float:
    """The highest TPR over realised thresholds with at most so many false positives."""
    best = 0.0
    for threshold in np.unique(score):
        chosen = score >= threshold
        if chosen[label == 0].sum() <= allowed:
            best = max(best, chosen[label == 1].mean())
    return best


# One decimal makes many ties, within and between the classes.
@pytest.mark.parametrize("decimals", [3, 2, 1])
@pytest.mark.parametrize("seed", range(3))
class TestValues:
    def test_ranking_and_brier_are_those_of_scikit_learn(self, decimals: int, seed: int) -> None:
        label, score = sample(seed=seed, decimals=decimals)
        got = values(label, score)
        assert got["auroc"] == pytest.approx(roc_auc_score(label, score), abs=1e-12)
        assert got["average_precision"] == pytest.approx(
            average_precision_score(label, score), abs=1e-12
        )
        assert got["brier"] == pytest.approx(brier_score_loss(label, score), abs=1e-12)

    def test_rates_are_counted_over_realised_thresholds(self, decimals: int, seed: int) -> None:
        label, score = sample(15_100, seed=seed, decimals=decimals)
        n_nonlens = int((label == 0).sum())
        allowed = {
            "tpr0": 0,
            "tpr10": 9,
            "tpr_at_fpr_1e-2": 0.01 * n_nonlens,
            "tpr_at_fpr_1e-3": 0.001 * n_nonlens,
            "tpr_at_fpr_1e-4": 0.0001 * n_nonlens,
        }
        got = values(label, score)
        for name, limit in allowed.items():
            assert got[name] == highest_rate(label, score, limit), name

    def test_the_order_of_the_cutouts_changes_nothing(self, decimals: int, seed: int) -> None:
        label, score = sample(seed=seed, decimals=decimals)
        turned = np.random.default_rng(seed).permutation(len(label))
        assert lens_metrics(label[turned], score[turned], 20) == lens_metrics(label, score, 20)


def test_tpr10_is_fewer_than_ten_false_positives_not_ten_per_cent() -> None:
    # 1000 non-lenses, ten of them above the fainter half of the lenses.
    label = np.r_[np.ones(100), np.zeros(1000)]
    score = np.r_[np.full(50, 0.9), np.full(50, 0.7), np.full(10, 0.8), np.full(990, 0.1)]
    assert values(label, score)["tpr10"] == 0.5
    # 1 % of 1000 allows all ten.
    assert values(label, score)["tpr_at_fpr_1e-2"] == 1.0


def test_equal_scores_of_lenses_and_non_lenses_find_nothing_without_false_positives() -> None:
    got = values(np.array([1, 0] * 50), np.full(100, 0.5))
    assert got["tpr0"] == 0
    assert got["auroc"] == 0.5
    assert got["precision_at_k"] == pytest.approx(0.5)


def test_precision_among_the_highest_hundred() -> None:
    label, score = sample(900, decimals=8)
    best = np.argsort(-score)[:100]
    assert values(label, score)["precision_at_k"] == pytest.approx(label[best].mean())


def test_calibration_error_over_fifteen_bins_of_equal_counts() -> None:
    label, score = sample(1500)
    order = np.argsort(score)
    bins = order.reshape(15, 100)
    by_hand = np.mean([abs(label[b].mean() - score[b].mean()) for b in bins])
    assert values(label, score)["ece"] == pytest.approx(by_hand, abs=1e-12)


def test_what_chance_makes_of_the_calibration_error_depends_on_no_order() -> None:
    label, probability = sample(300, decimals=8)
    one, other = (
        lens_metrics(label[::step], probability[::step], bootstrap=2)["ece_by_chance"]
        for step in (1, -1)
    )
    assert one == other > 0


def test_probabilities_that_are_right_show_no_calibration_error_for_certain() -> None:
    """Also of galaxies that are seen several times: ten cutouts are then one."""
    random, certain, excess = np.random.default_rng(3), 0, []
    for _ in range(40):
        probability = np.repeat(random.uniform(size=100), 10)
        label = np.repeat(random.random(100), 10) < probability
        found = lens_metrics(label, probability, bootstrap=50, group=np.repeat(np.arange(100), 10))
        certain += found["ece"]["low"] > 0
        excess.append(found["ece"]["value"] - found["ece_by_chance"])
    assert certain <= 6  # 5 % of 40, and what chance may add
    assert abs(np.mean(excess)) < 0.02


def test_a_calibration_error_is_certain_where_chance_makes_none_like_it() -> None:
    random = np.random.default_rng(4)
    probability = random.uniform(size=2000)
    label = random.random(2000) < np.clip(probability - 0.2, 0, 1)
    assert lens_metrics(label, probability, bootstrap=50)["ece"]["low"] > 0.1


@pytest.mark.parametrize("overconfident", [False, True])
def test_an_error_that_all_groups_share_is_none_of_chance(overconfident: bool) -> None:
    """Labels are independent here: by groups, chance makes what it makes without them."""
    random = np.random.default_rng(5)
    probability = random.uniform(size=2000)
    if overconfident:  # in groups that score alike
        probability.sort()
    true = 0.3 + 0.4 * probability if overconfident else np.clip(probability - 0.2, 0, 1)
    label = random.random(2000) < true
    alone, grouped = (
        lens_metrics(label, probability, bootstrap=50, group=group)["ece_by_chance"]
        for group in (np.arange(2000), np.repeat(np.arange(40), 50))
    )
    assert grouped < 2 * alone


class TestCalibrationWithBothClassesWeighingTheSame:
    def test_by_hand(self) -> None:
        label, score = sample(2000)
        share = label.mean()
        weight = np.where(label == 1, 0.5 / share, 0.5 / (1 - share))
        odds = score / (1 - score) * (1 - share) / share
        order = np.argsort(-score)
        excess = np.cumsum((weight * (label - odds / (1 + odds)))[order])
        weights = np.concatenate([[0], np.cumsum(weight[order])])
        at_edges = np.interp(np.linspace(0, 2000, 16), weights, np.concatenate([[0], excess]))
        by_hand = np.abs(np.diff(at_edges)).sum() / 2000
        found = lens_metrics(label, score, bootstrap=50)
        assert found["ece_balanced"]["value"] == pytest.approx(by_hand, abs=1e-12)
        assert found["ece_balanced"]["low"] <= by_hand <= found["ece_balanced"]["high"]
        assert 0 < found["ece_balanced_by_chance"] < 0.1

    def test_who_promises_fewer_lenses_is_not_allowed_more_by_chance(self) -> None:
        random = np.random.default_rng(0)
        label = np.repeat([1, 0], [60, 3000])
        evidence = 2 * random.normal(np.where(label == 1, 2, 0)) - 2 + np.log(0.02)
        right, fewer = (
            lens_metrics(label, 1 / (1 + np.exp(-logit)), bootstrap=5)["ece_balanced_by_chance"]
            for logit in (evidence, evidence - 3)
        )
        assert fewer < 1.3 * right

    def test_of_as_many_lenses_as_others_it_is_the_error_over_all(self) -> None:
        label, score = np.repeat([1, 0], 300), np.random.default_rng(0).uniform(size=600)
        found = lens_metrics(label, score, bootstrap=20)
        assert found["ece_balanced"]["value"] == pytest.approx(found["ece"]["value"])

    def test_of_one_class_there_is_none(self) -> None:
        found = lens_metrics(np.zeros(100), np.linspace(0, 1, 100), bootstrap=20)
        assert found["ece_balanced"] == {"value": None, "low": None, "high": None}
        assert found["ece_balanced_by_chance"] is None
        assert found["ece_by_chance"] is not None


def test_calibration_error_of_true_probabilities_is_small_and_of_overconfident_ones_not() -> None:
    random = np.random.default_rng(1)
    probability = random.uniform(size=20_000)
    label = (random.uniform(size=20_000) < probability).astype(int)
    assert values(label, probability)["ece"] < 0.02
    assert values(label, np.where(probability > 0.5, 0.999, 0.001))["ece"] > 0.2


@pytest.mark.parametrize(
    ("n_nonlens", "unresolved"),
    [
        (9, {"tpr10", "tpr_at_fpr_1e-2", "tpr_at_fpr_1e-3", "tpr_at_fpr_1e-4"}),
        (99, {"tpr_at_fpr_1e-2", "tpr_at_fpr_1e-3", "tpr_at_fpr_1e-4"}),
        (100, {"tpr_at_fpr_1e-3", "tpr_at_fpr_1e-4"}),
        (1000, {"tpr_at_fpr_1e-4"}),
        (10_000, set()),
    ],
)
def test_what_the_sample_cannot_resolve_is_null(n_nonlens: int, unresolved: set[str]) -> None:
    label = np.r_[np.ones(20), np.zeros(n_nonlens)]
    score = np.random.default_rng(0).uniform(size=len(label))
    metrics = lens_metrics(label, score, bootstrap=5)
    assert {n for n in RATES if metrics[n]["value"] is None} == unresolved
    assert {n for n in RATES if metrics[n]["low"] is None} == unresolved
    assert (metrics["n_lens"], metrics["n_nonlens"]) == (20, n_nonlens)


def test_one_class_alone_has_no_ranking_but_an_error() -> None:
    metrics = lens_metrics(np.ones(50), np.linspace(0, 1, 50), bootstrap=5)
    assert metrics["auroc"] == {"value": None, "low": None, "high": None}
    assert metrics["brier"]["value"] is not None


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    # Scores normal around 0 and 1: the AUROC is Phi(1 / sqrt 2) = 0.7602.
    covered = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        label = np.repeat([1, 0], 60)
        score = 1 / (1 + np.exp(-(random.normal(size=120) + label)))
        interval = lens_metrics(label, score, bootstrap=100, seed=seed)["auroc"]
        assert interval["low"] <= interval["value"] <= interval["high"]
        covered += interval["low"] <= 0.7602 <= interval["high"]
    # 95 expected; a binomial of 100 is within 88 and 100 all but always.
    assert covered >= 88


@pytest.mark.parametrize("n_nonlens", [1000, 4000])
def test_intervals_at_a_small_rate_cover_the_truth(n_nonlens: int) -> None:
    """The truth: the TPR at the threshold beyond which one non-lens in a thousand lies; of TPR0, at
    the median of where the highest-scored of so many non-lenses lies."""
    rates = {"tpr_at_fpr_1e-3": 1e-3, "tpr0": 1 - 0.5 ** (1 / n_nonlens)}
    truths = {name: stats.norm.sf(stats.norm.isf(rate) - 2.3) for name, rate in rates.items()}
    random, covered, trials = np.random.default_rng(0), dict.fromkeys(rates, 0), 100
    label = np.r_[np.ones(200), np.zeros(n_nonlens)]
    for seed in range(trials):
        score = stats.norm.cdf(np.r_[random.normal(2.3, 1, 200), random.normal(0, 1, n_nonlens)])
        found = lens_metrics(label, score, bootstrap=100, seed=seed)
        for name, truth in truths.items():
            covered[name] += found[name]["low"] <= truth <= found[name]["high"]
    assert min(covered.values()) / trials > 0.9, covered


def test_copies_of_a_group_make_no_interval_narrower() -> None:
    label, score = sample(900)
    copies = (np.repeat(label, 9), np.repeat(score, 9))
    once = lens_metrics(label, score)
    together = lens_metrics(*copies, group=np.repeat(np.arange(900), 9))
    apart = lens_metrics(*copies)
    for name in ("auroc", "average_precision", "tpr_at_fpr_1e-2", "brier"):
        width, grouped, ungrouped = (
            of[name]["high"] - of[name]["low"] for of in (once, together, apart)
        )
        assert grouped == pytest.approx(width, rel=0.15), name
        assert ungrouped < 0.5 * width, name


def test_few_regions_are_not_drawn_whole() -> None:
    """Of one, every resampling would be the sample itself."""
    label, score = sample(900)
    apart = lens_metrics(label, score, 50)
    assert lens_metrics(label, score, 50, group=np.zeros(900)) == apart
    assert lens_metrics(label, score, 50, group=np.arange(900) // 50) == apart
    assert lens_metrics(label, score, 50, group=np.arange(900) // 45) != apart


@pytest.mark.parametrize(
    ("n_nonlens", "groups", "n"), [(300, 30, 30), (40, 190, 40), (300, 10, 150)]
)
def test_what_no_resampling_doubts_is_not_certain(n_nonlens: int, groups: int, n: int) -> None:
    """Every lens above every non-lens, or below. Ten groups are not drawn whole."""
    label = np.repeat([1, 0], [150, n_nonlens])
    group = np.arange(len(label)) % groups
    right = lens_metrics(label, np.where(label, 0.8, 0.3), bootstrap=50, group=group)
    wrong = lens_metrics(label, np.where(label, 0.3, 0.8), bootstrap=50, group=group)
    low = stats.beta(n + 0.5, 0.5).ppf(0.025)  # Brown, Cai & DasGupta 2001
    # A third of all samples lacks the highest-scored non-lens, and as many of 30 groups those ten.
    unseen = {"auroc": False, "tpr0": True, "tpr10": groups == 30}
    for name, none in unseen.items():
        least = 0.0 if none else pytest.approx(low)
        assert right[name] == {"value": 1.0, "low": least, "high": 1.0}
        assert wrong[name] == {"value": 0.0, "low": 0.0, "high": pytest.approx(1 - low)}
    if n_nonlens > 100:
        # Of 30 groups that are alike three in four samples have none beyond the threshold of 1 %,
        # of 300 cutouts 4.9 %.
        low = 0.0 if groups == 30 else low
        assert right["tpr_at_fpr_1e-2"] == {"value": 1.0, "low": pytest.approx(low), "high": 1.0}
    assert right["brier"]["high"] == pytest.approx(right["brier"]["value"], rel=0.1)


def test_there_is_a_group_for_each_cutout() -> None:
    label, score = sample()
    for metrics in (lens_metrics, forecast, threshold_curve):
        with pytest.raises(InputError, match=r"group has the shape \(2,\); \(400,\), one"):
            metrics(label, score, group=["a", "b"])
    with pytest.raises(InputError, match="group has the shape"):
        paired_bootstrap(label, {"a": score}, "auroc", group=["a", "b"])


def test_the_seed_decides_the_intervals() -> None:
    label, score = sample()
    assert lens_metrics(label, score, 50, seed=3) == lens_metrics(label, score, 50, seed=3)
    assert lens_metrics(label, score, 50, seed=3) != lens_metrics(label, score, 50, seed=4)


@pytest.mark.parametrize(
    ("label", "score", "message"),
    [
        ([1, 0], [0.5], "shape"),
        ([], [], "no cutout"),
        ([1, 2], [0.5, 0.5], "label"),
        ([1, 0], [0.5, 1.2], "score"),
        ([1, 0], ["high", 0.2], "score: must be a probability"),
        ([1, 0], [0.5, float("nan")], "score"),
    ],
)
def test_bad_input_is_refused(label: list[int], score: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lens_metrics(label, score)


def test_roc_starts_at_the_origin_and_ends_at_one() -> None:
    label, score = sample(decimals=1)
    fpr, tpr, threshold = roc(label, score)
    assert (fpr[0], tpr[0], threshold[0]) == (0, 0, np.inf)
    assert (fpr[-1], tpr[-1]) == (1, 1)
    assert (np.diff(threshold) < 0).all()
    for rate, t in zip(tpr, threshold, strict=True):
        assert rate == (score[label == 1] >= t).mean()


def test_the_entry_point_of_the_library() -> None:
    assert evaluation.lens_metrics is lens_metrics


class TestCalibrationOfTheTop:
    def test_by_hand_over_five_bins_of_the_highest_tenth(self) -> None:
        label, score = sample(1500)
        bins = np.argsort(-score)[:150].reshape(5, 30)
        by_hand = np.mean([abs(label[b].mean() - score[b].mean()) for b in bins])
        assert values(label, score)["ece_top"] == pytest.approx(by_hand, abs=1e-12)

    def test_a_tenth_that_is_no_whole_number_is_rounded_up(self) -> None:
        label, score = sample(501)
        highest = np.argsort(-score)[:51]
        excess = np.concatenate([[0], np.cumsum(label[highest] - score[highest])])
        edges = np.interp(np.linspace(0, 51, 6), np.arange(52), excess)
        by_hand = np.abs(np.diff(edges)).sum() / 51
        assert values(label, score)["ece_top"] == pytest.approx(by_hand, abs=1e-12)

    def test_it_sees_what_the_error_over_all_does_not(self) -> None:
        # Of 100 cutouts that are called certain, half are lenses; the other 9900 are as they say.
        label = np.r_[np.tile([1, 0], 50), np.zeros(9900)]
        score = np.r_[np.ones(100), np.zeros(9900)]
        got = values(label, score)
        assert got["ece"] == pytest.approx(0.005)
        assert got["ece_top"] == pytest.approx(0.05)

    def test_at_least_fifty_cutouts(self) -> None:
        label, score = sample(60)
        highest = np.argsort(-score)[:50].reshape(5, 10)
        by_hand = np.mean([abs(label[b].mean() - score[b].mean()) for b in highest])
        metric = lens_metrics(label, score, bootstrap=20)["ece_top"]
        assert metric["value"] == pytest.approx(by_hand, abs=1e-12)
        assert metric["low"] <= metric["value"] <= metric["high"]
        few = lens_metrics(*sample(49), bootstrap=5)["ece_top"]
        assert few == {"value": None, "low": None, "high": None}

    def test_cutouts_that_tie_at_the_edge_are_shared(self) -> None:
        # 1000 equal scores, half of them lenses: every bin holds half, whatever the order.
        assert values(np.tile([1, 0], 500), np.full(1000, 0.8))["ece_top"] == pytest.approx(0.3)


def test_models_are_ranked_by_the_rarest_false_positives_that_can_be_told() -> None:
    by_count = {n: ranking_metric(n) for n in (5, 99, 100, 9_999, 10_000, 99_999, 100_000)}
    assert by_count == {
        5: "auroc",
        99: "auroc",
        100: "tpr_at_fpr_1e-2",  # one false positive: better than none
        9_999: "tpr_at_fpr_1e-2",
        10_000: "tpr_at_fpr_1e-3",
        99_999: "tpr_at_fpr_1e-3",
        100_000: "tpr_at_fpr_1e-4",
    }


def test_a_paired_bootstrap_draws_the_same_cutouts_for_all() -> None:
    random = np.random.default_rng(0)
    label = np.arange(400) % 2
    good = expit(random.normal(2 * label - 1))
    # Better by little: alone, either interval holds the other's value; the difference is sure.
    better = expit(logit(good) + 0.12 * (2 * label - 1))
    drawn = paired_bootstrap(label, {"good": good, "better": better, "again": good}, "auroc")
    np.testing.assert_array_equal(drawn["good"], drawn["again"])
    assert np.percentile(drawn["good"], 97.5) > roc_auc_score(label, better)
    assert (drawn["better"] > drawn["good"]).all()
    assert drawn["good"].mean() == pytest.approx(roc_auc_score(label, good), abs=0.005)
    # As wide as the formula of Hanley & McNeil (1982) has it.
    a = roc_auc_score(label, good)
    q1, q2 = a / (2 - a), 2 * a**2 / (1 + a)
    error = np.sqrt((a * (1 - a) + 199 * (q1 + q2 - 2 * a**2)) / 200**2)
    assert drawn["good"].std() == pytest.approx(error, rel=0.15)
    # Nothing depends on the order of the cutouts but which are drawn.
    order = random.permutation(400)
    shuffled = paired_bootstrap(label[order], {"good": good[order]}, "auroc")
    assert shuffled["good"].std() == pytest.approx(error, rel=0.15)


def test_groups_are_drawn_whole() -> None:
    """Ten copies of each cutout say no more than one, and the interval must know."""
    random = np.random.default_rng(0)
    label = np.arange(100) % 2
    score = expit(random.normal(label))
    once = paired_bootstrap(label, {"s": score}, "auroc")["s"]
    copies = np.tile(label, 10), {"s": np.tile(score, 10)}
    grouped = paired_bootstrap(*copies, "auroc", group=np.tile(np.arange(100), 10))["s"]
    alone = paired_bootstrap(*copies, "auroc")["s"]
    assert grouped.std() == pytest.approx(once.std(), rel=0.1)
    assert alone.std() == pytest.approx(once.std() / np.sqrt(10), rel=0.1)


def test_a_resampling_that_resolves_nothing_is_no_number() -> None:
    drawn = paired_bootstrap([1, 0, 1, 0], {"s": [0.9, 0.1, 0.8, 0.2]}, "tpr_at_fpr_1e-2", times=3)
    assert np.isnan(drawn["s"]).all()


def test_every_resampling_has_as_many_lenses() -> None:
    """Drawn among all cutouts, one in twenty of these would have none."""
    label = np.repeat([1, 0], [3, 50])
    drawn = paired_bootstrap(label, {"s": np.linspace(1, 0, 53)}, "auroc")
    assert not np.isnan(drawn["s"]).any()
