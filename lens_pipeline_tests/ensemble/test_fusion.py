"""Fusions against formulas written out here and against analytic optima."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from scipy.stats import bernoulli, norm
from scipy.stats import entropy as scipy_entropy
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from lens_pipeline import ensemble
from lens_pipeline.ensemble.choice import FittedFusion, best_of, choose, compare, fit
from lens_pipeline.ensemble.fusion import (
    InverseVariance,
    Mean,
    Single,
    Stacking,
    Strategy,
    fuse,
    with_uncertainty,
)
from lens_pipeline.errors import InputError

NOISE = np.array([0.8, 1.5, 3.0])
STRATEGIES = {"mean", "uncertainty_weighted", "stacking", "bayesian", "single"}


def members(n: int, seed: int, noise: np.ndarray = NOISE) -> tuple[np.ndarray, ...]:
    """Three members that see the same signal, each under its own known noise: raw logits (n, 3),
    their deviations under dropout (n, 3), labels (n,)."""
    random = np.random.default_rng(seed)
    label = np.arange(n) % 2
    logits = 2.0 * label[:, None] - 1 + noise * random.normal(size=(n, 3))
    return logits, np.broadcast_to(0.3 * noise, (n, 3)), label


def optimum(noise: np.ndarray = NOISE) -> float:
    """The AUROC of weights 1 / noise^2: classes 2 apart under noise 1 / sqrt(sum 1 / noise^2)."""
    return float(norm.cdf(2 * np.sqrt((1 / noise**2).sum()) / np.sqrt(2)))


def plain(strategy: str, fold: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> float:
    fitted = fit(strategy, "platt", *fold)
    return roc_auc_score(other[2], fitted(*other[:2]))


def test_the_mean_is_that_of_the_logits() -> None:
    random = np.random.default_rng(0)
    logit, draws = random.normal(size=(5, 3)), random.normal(size=(5, 3, 20))
    fused = fuse(logit, draws)
    np.testing.assert_allclose(fused.logit, logit.mean(axis=1))
    np.testing.assert_allclose(fused.probability, 1 / (1 + np.exp(-logit.mean(axis=1))))
    drawn = 1 / (1 + np.exp(-draws)).reshape(5, 60)
    np.testing.assert_allclose(fused.std, drawn.std(axis=1))
    by_scipy = scipy_entropy(np.stack([drawn, 1 - drawn]), axis=0).mean(axis=1)
    np.testing.assert_allclose(fused.entropy, by_scipy)


def test_what_cannot_be_fused_is_refused_by_name() -> None:
    logit, draws = np.zeros((5, 2)), np.zeros((5, 2, 20))
    assert fuse(logit.tolist(), draws.tolist()).probability.tolist() == [0.5] * 5
    assert len(fuse(logit[:0], draws[:0]).std) == 0
    for one, drawn, message in (
        (logit, draws[:3], r"logits have the shape \(5, 2\), draws \(3, 2, 20\); \(n, members\)"),
        (logit.T, draws, "logits have the shape"),
        (logit[:, 0], draws, "logits have the shape"),
        (logit, draws[..., 0], "logits have the shape"),
        (logit, draws[..., :0], "logits have the shape"),
        (np.where(np.eye(5, 2), np.nan, 0), draws, "logits: 2 of 10 are not finite"),
        (logit, draws + np.inf, "draws: 200 of 200 are not finite"),
    ):
        with pytest.raises(InputError, match=message):
            fuse(one, drawn)
    for fusion in ("mean", Mean):
        with pytest.raises(InputError, match=r"fusion: .* is none; give one, as Mean\(\)"):
            fuse(logit, draws, fusion)


def test_members_that_agree_are_certain_and_members_that_differ_are_not() -> None:
    agree = np.full((1, 2, 20), 3.0)
    differ = np.stack([np.full(20, 3.0), np.full(20, -3.0)])[None]
    assert fuse(agree[..., 0], agree).std[0] == pytest.approx(0)
    assert fuse(differ[..., 0], differ).std[0] > 0.4
    # Neither is unsure of its own answer: what differs is epistemic alone.
    assert fuse(differ[..., 0], differ).entropy == pytest.approx(fuse(agree[..., 0], agree).entropy)


def test_the_entry_point_of_the_library() -> None:
    assert ensemble.fuse is fuse


def test_members_without_any_variance_count_alike() -> None:
    """Without dropout, or that agree to the last bit."""
    logits = np.array([[6.0], [1.0]])
    np.testing.assert_allclose(fuse(logits, logits[..., None], InverseVariance()).logit, [6, 1])
    alike = np.full((2, 4), 5.0)
    np.testing.assert_allclose(fuse(alike, alike[..., None], InverseVariance()).logit, [5, 5])


def test_a_member_counts_by_the_inverse_of_its_variance() -> None:
    """Two members that agree, but for what dropout does to them; nothing is fitted."""
    draws = np.array([[[0.9, 1.1], [-1.0, 3.0]]])  # variances 0.01 and 4
    logit = np.array([[1.0, 1.2]])
    between = 0.01  # of 1.0 and 1.2
    weights = np.array([1 / (0.01 + between), 1 / (4.0 + between)])
    expected = (weights * logit[0]).sum() / weights.sum()
    assert fuse(logit, draws, InverseVariance()).logit[0] == pytest.approx(expected, rel=1e-12)
    assert fuse(logit, draws, Mean()).logit[0] == pytest.approx(1.1)
    # Without dropout, members that agree count alike.
    same = fuse(np.ones((1, 2)), np.ones((1, 2, 3)), InverseVariance())
    assert same.logit[0] == pytest.approx(1.0)


@pytest.mark.parametrize("strategy", ["uncertainty_weighted", "stacking", "bayesian"])
def test_known_noise_is_fused_as_well_as_can_be(strategy: str) -> None:
    validation, test = members(4000, 0), members(40_000, 1)
    assert plain(strategy, validation, test) == pytest.approx(optimum(), abs=0.005)
    raw_mean = roc_auc_score(test[2], test[0].mean(axis=1))
    assert raw_mean < optimum() - 0.02
    assert plain("single", validation, test) < optimum() - 0.005


def test_noise_that_differs_from_cutout_to_cutout_is_told_by_dropout() -> None:
    """Each cutout is clear to one member and noise to the others: only the draws tell to which."""

    def cutouts(n: int, seed: int) -> tuple[np.ndarray, ...]:
        random = np.random.default_rng(seed)
        label = np.arange(n) % 2
        noise = np.where(random.integers(3, size=n)[:, None] == np.arange(3), 0.7, 4.0)
        return 2.0 * label[:, None] - 1 + noise * random.normal(size=(n, 3)), noise, label

    test = cutouts(40_000, 1)
    by = {name: plain(name, cutouts(4000, 0), test) for name in STRATEGIES}
    best = roc_auc_score(test[2], (test[0] / test[1] ** 2).sum(axis=1))
    assert by["uncertainty_weighted"] == pytest.approx(best, abs=0.005)
    assert all(by[name] < best - 0.05 for name in STRATEGIES - {"uncertainty_weighted"})


@pytest.mark.parametrize("method", ["platt", "temperature", "isotonic"])
@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_every_fusion_ends_calibrated_and_never_lowers_a_score_for_a_higher_member(
    strategy: str, method: str
) -> None:
    fitted = fit(strategy, method, *members(4000, 0))
    logits, deviation, label = members(40_000, 1)
    score = fitted(logits, deviation)
    order = np.argsort(score).reshape(20, -1)
    predicted, observed = expit(score)[order].mean(axis=1), label[order].mean(axis=1)
    assert np.abs(predicted - observed).max() < 0.06
    assert np.abs(predicted - observed).mean() < 0.02
    if (strategy, method) == ("uncertainty_weighted", "isotonic"):
        return  # on a curve a logit's variance depends on where it lies
    for member in range(3):
        higher = logits.copy()
        higher[:, member] += 0.5
        assert np.all(fitted(higher, deviation) >= score)


def test_stacking_is_the_logistic_regression_of_scikit_learn() -> None:
    logits, deviation, label = members(4000, 0)
    fitted = fit("stacking", "platt", logits, deviation, label)
    calibrated = np.stack([one(x) for one, x in zip(fitted.members, logits.T, strict=True)], axis=1)
    theirs = LogisticRegression(C=np.inf, tol=1e-8).fit(calibrated, label).coef_[0]
    assert isinstance(fitted.fusion, Stacking)
    np.testing.assert_allclose(fitted.fusion.weights, theirs, rtol=0.02)


def test_a_member_that_learnt_nothing_or_the_opposite_does_no_harm() -> None:
    random = np.random.default_rng(3)
    for third in (0.0, -1.0):
        parts = []
        for seed in (0, 1):
            logits, deviation, label = members(20_000, seed)
            logits[:, 2] = third * (2 * label - 1) + random.normal(size=len(label))
            parts.append((logits, deviation, label))
        two = roc_auc_score(parts[1][2], (parts[1][0] / NOISE**2)[:, :2].sum(axis=1))
        for strategy in ("uncertainty_weighted", "stacking", "bayesian", "single"):
            least = two - (0.04 if strategy == "single" else 0.01)
            assert plain(strategy, *parts) > least, (strategy, third)


@pytest.mark.parametrize("method", ["platt", "temperature", "isotonic"])
def test_a_member_that_says_the_same_of_all_counts_for_nothing(method: str) -> None:
    logits, deviation, label = members(1000, 0)
    logits = np.column_stack([logits, np.zeros(1000)])
    deviation = np.column_stack([deviation, np.zeros(1000)])
    assert len(compare(method, logits, deviation, label, np.arange(1000))) == len(STRATEGIES)
    for strategy in sorted(STRATEGIES):
        fitted = fit(strategy, method, logits, deviation, label)
        without = fit(strategy, method, logits[:, :3], deviation[:, :3], label)
        score, expected = fitted(logits, deviation), without(logits[:, :3], deviation[:, :3])
        assert np.isfinite(score).all()
        assert roc_auc_score(label, score) == pytest.approx(
            roc_auc_score(label, expected), abs=0.002
        )
    alone = fit("uncertainty_weighted", method, logits[:, 3:], deviation[:, 3:], label)
    assert alone(logits[:, 3:], deviation[:, 3:]) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(
    ("better", "order", "taken"),
    [
        (0.30, ["single", "stacking", "mean"], "stacking"),  # that it is the best may be chance
        (0.06, ["single", "mean", "stacking"], "mean"),
        (0.04, ["single", "stacking", "mean"], "single"),
        (0.90, ["mean", "single", "stacking"], "mean"),
    ],
)
def test_a_single_member_is_taken_only_where_it_surely_beats_the_fusions(
    better: float, order: list[str], taken: str
) -> None:
    table = pd.DataFrame({"strategy": order})
    table["better"] = np.where(table["strategy"] == "single", 0.5, better)
    assert best_of(table) == taken


def test_the_best_is_chosen_on_cutouts_that_it_was_not_fitted_to() -> None:
    fitted, table = choose("best", "platt", *members(2000, 0), np.arange(2000))
    assert set(table["strategy"]) == STRATEGIES
    assert table["strategy"][0] == fitted.fusion.strategy != "single"
    single = table.set_index("strategy").loc["single"]
    assert (single["gain"], single["better"]) == (0, 0.5)
    first = table.iloc[0]
    assert first["gain_low"] > 0
    assert first["better"] > 0.95
    assert first["mean"] == table["mean"].max()
    assert first["metric"] == "tpr_at_fpr_1e-2"  # 1000 non-lenses: ten false positives
    few = (*members(200, 0), np.arange(200))
    named, compared = choose("stacking", "platt", *few)
    assert named.fusion.strategy == "stacking"
    assert compared.equals(compare("platt", *few))


def test_members_of_pure_noise_gain_nothing_where_they_are_judged() -> None:
    """Judged on what they were fitted to, they would; so on other cutouts of the same galaxies."""
    random = np.random.default_rng(0)
    group = np.arange(60).repeat(5)
    label = group % 2
    logits = random.normal(size=(60, 40))[group]
    deviation = np.ones_like(logits)
    auroc = compare("platt", logits, deviation, label, group).set_index("strategy")["auroc"]
    fitted = fit("stacking", "platt", logits, np.ones_like(logits), label)
    assert roc_auc_score(label, fitted(logits, np.ones_like(logits))) > 0.75
    assert auroc["stacking"] < 0.65


def test_resamplings_that_cannot_tell_are_left_out() -> None:
    """Of uneven groups some have fewer than the hundred non-lenses that an FPR of 1e-2 takes."""
    random = np.random.default_rng(0)
    logits, deviation, label = members(260, 1)
    group = random.permutation(np.repeat(np.arange(52), np.tile([2, 8], 26)))
    table = compare("platt", logits, deviation, label, group)
    numbers = table.select_dtypes("number")
    assert np.isfinite(numbers).all(axis=None)
    assert table.set_index("strategy").loc["single", "better"] == 0.5


def test_too_few_cutouts_take_the_mean(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lens_pipeline"):
        fitted, table = choose("best", "platt", *members(18, 0), np.arange(18))
    assert table.empty
    assert isinstance(fitted.fusion, Mean)
    assert "9 lenses and 9 non-lenses of the validation set cannot tell" in caplog.text


def test_one_member_is_an_ensemble_too() -> None:
    logits, deviation, label = members(200, 0)
    for strategy in sorted(STRATEGIES):
        fitted = fit(strategy, "platt", logits[:, :1], deviation[:, :1], label)
        assert roc_auc_score(label, fitted(logits[:, :1], deviation[:, :1])) == pytest.approx(
            roc_auc_score(label, logits[:, 0]), abs=1e-3
        )


def test_draws_give_the_uncertainty_of_the_calibrated_members() -> None:
    logits, deviation, label = members(400, 0)
    fitted = fit("single", "platt", logits, deviation, label)
    assert isinstance(fitted, FittedFusion)
    assert fitted.fusion == Single(0)  # the member with the least noise
    draws = logits[..., None] + deviation[..., None] * np.array([-1.0, 1.0])
    fused = fitted.fuse(logits, draws)
    np.testing.assert_allclose(fused.logit, fitted(logits, deviation))
    # A member that decides nothing adds no doubt.
    calibrated = [expit(one(draws[:, i])) for i, one in enumerate(fitted.members)]
    np.testing.assert_allclose(fused.std, calibrated[0].std(axis=1))
    unknown = replace(fitted, shares=()).fuse(logits, draws)
    np.testing.assert_allclose(unknown.std, np.concatenate(calibrated, axis=1).std(axis=1))


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_a_member_of_pure_noise_adds_hardly_any_doubt(strategy: Strategy) -> None:
    """It decides nothing in any fusion; counted like the other, it made five times the doubt."""
    logits, deviation, label = members(4000, 0)
    logits, deviation = logits[:, :2].copy(), deviation[:, :2]
    logits[:, 1] = np.random.default_rng(1).normal(size=4000)
    draws = logits[..., None] + deviation[..., None] * np.array([-1.0, 1.0])
    fitted = fit(strategy, "platt", logits, deviation, label)
    good = expit(fitted.members[0](draws[:, 0])).std(axis=1)
    assert 0.99 < fitted.fuse(logits, draws).std.mean() / good.mean() < 2.5


def test_each_member_adds_doubt_as_far_as_it_decides() -> None:
    """Against NumPy's covariance of draws that are repeated as often as their member counts."""
    draws = np.random.default_rng(0).normal(size=(5, 2, 20))
    logits, drawn = draws.mean(axis=2), expit(draws)
    fused = with_uncertainty(logits[:, 0], draws, np.array([0.75, 0.25]))
    counts = np.repeat([3, 1], 20)
    for row, values in enumerate(drawn.reshape(5, -1)):
        assert fused.std[row] == pytest.approx(np.sqrt(np.cov(values, fweights=counts, ddof=0)))
        entropy = np.average([bernoulli(p).entropy() for p in values], weights=counts)
        assert fused.entropy[row] == pytest.approx(entropy)


def test_a_members_share_is_what_its_own_scores_move() -> None:
    """Of a mean in proportion to the scatter of its calibrated logits."""
    logits, deviation, label = members(4000, seed=5)
    fitted = fit("mean", "platt", logits, deviation, label)
    slopes = np.array([one.slope for one in fitted.members])
    scatter = slopes * logits.std(axis=0)
    np.testing.assert_allclose(fitted.moved_by(logits, deviation), scatter / scatter.sum())
    alone = fit("single", "platt", logits, deviation, label)
    np.testing.assert_array_equal(alone.moved_by(logits, deviation), [1, 0, 0])


@pytest.mark.parametrize("strategy", ["mean", "uncertainty_weighted", "stacking", "bayesian"])
def test_a_member_that_ranks_backwards_has_no_share(strategy: str) -> None:
    logits, deviation, label = members(4000, seed=6)
    logits = logits * [1, 1, -1]
    shares = fit(strategy, "platt", logits, deviation, label).moved_by(logits, deviation)
    assert shares.sum() == pytest.approx(1)
    assert shares[2] < 0.02 < shares[:2].min()


def test_logits_that_are_not_finite_are_refused() -> None:
    logits, deviation, label = members(100, 0)
    logits[3, 1] = np.nan
    with pytest.raises(InputError, match="1 of 300 validation logits are not finite"):
        choose("best", "platt", logits, deviation, label, np.arange(100))
