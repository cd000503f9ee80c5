"""Calibration and the prior's shift, against scikit-learn and against known truths."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.calibration import _sigmoid_calibration
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from lens_pipeline.ensemble.calibration import (
    Isotonic,
    Platt,
    at_mixture,
    fit_calibration,
    prior_shift,
)
from lens_pipeline.errors import InputError
from lens_pipeline.evaluation.metrics import lens_metrics

METHODS = ("platt", "temperature", "isotonic")


def overconfident(
    n: int = 4000, seed: int = 0, shift: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Logits three times too large and shifted, with the labels that the true ones give."""
    random = np.random.default_rng(seed)
    true = random.normal(0, 1.5, n)
    label = (random.uniform(size=n) < expit(true)).astype(int)
    return 3 * true + shift, label


def test_platt_scaling_is_that_of_scikit_learn() -> None:
    logit, label = overconfident()
    ours = fit_calibration(logit, label, "platt")
    a, b = _sigmoid_calibration(logit, label)  # p = 1 / (1 + exp(a logit + b))
    assert isinstance(ours, Platt)
    assert ours.slope == pytest.approx(-a, rel=1e-3)
    assert ours.intercept == pytest.approx(-b, abs=1e-3)


def test_the_temperature_is_the_slope_of_a_logistic_regression_through_zero() -> None:
    logit, label = overconfident()
    ours = fit_calibration(logit, label, "temperature")
    theirs = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-8).fit(logit[:, None], label)
    assert isinstance(ours, Platt)
    assert ours.intercept == 0
    assert ours.slope == pytest.approx(theirs.coef_[0, 0], rel=3e-3)  # the targets are smoothed


def test_an_isotonic_curve_passes_the_middles_of_the_steps_of_scikit_learn() -> None:
    logit, label = overconfident()
    ours = fit_calibration(logit, label, "isotonic")
    assert isinstance(ours, Isotonic)
    steps = IsotonicRegression().fit_transform(logit, label)
    high, low = steps.max(), steps.min()
    for step in np.unique(steps)[1:-1]:
        middle = logit[steps == step].mean()
        assert low < step < high
        assert expit(ours(np.array([middle])))[0] == pytest.approx(step, abs=0.003)


@pytest.mark.parametrize("method", METHODS)
def test_calibration_brings_probabilities_to_what_is_observed(method: str) -> None:
    """Fitted on one half of known truth, judged on another: the expected error falls below 0.02."""
    shift = 0.0 if method == "temperature" else 1.0
    calibrate = fit_calibration(*overconfident(20_000, shift=shift), method)
    held_out, truth = overconfident(20_000, seed=1, shift=shift)
    before = lens_metrics(truth, expit(held_out), bootstrap=0)
    after = lens_metrics(truth, expit(calibrate(held_out)), bootstrap=0)
    assert before["ece"]["value"] > 0.08
    assert after["ece"]["value"] < 0.02
    assert after["auroc"]["value"] == pytest.approx(before["auroc"]["value"], abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_logits_of_any_scale_are_calibrated_alike(method: str, scale: float) -> None:
    logit, label = overconfident()
    own, other = (
        fit_calibration(logit, label, method),
        fit_calibration(scale * logit, label, method),
    )
    np.testing.assert_allclose(other(scale * logit), own(logit), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_calibration_neither_turns_a_ranking_round_nor_ties_it(method: str) -> None:
    logit, label = overconfident()
    calibrate = fit_calibration(-logit, label, method)
    beyond = np.sort(np.concatenate([[-1e3], np.unique(logit), [1e3]]))
    assert np.all(np.diff(calibrate(beyond)) > 0)


@pytest.mark.parametrize("method", METHODS)
def test_perfectly_separated_classes_keep_finite_probabilities(method: str) -> None:
    calibrate = fit_calibration(np.array([-5.0, -4.0, 4.0, 5.0]), np.array([0, 0, 1, 1]), method)
    assert expit(calibrate(np.array([5.0])))[0] < 0.95  # four cutouts prove no more


def test_after_the_shift_a_thousandth_of_the_sky_is_what_is_predicted() -> None:
    """Fitted where half are lenses, it predicts as many lenses as there are where one in a
    thousand is, at every level of the probability."""
    random = np.random.default_rng(0)

    def cutouts(n_lens: int, n_nonlens: int) -> tuple[np.ndarray, np.ndarray]:
        label = np.repeat([1, 0], [n_lens, n_nonlens])
        return random.normal(2.0 * label, 1.0) * 3, label

    half, label = cutouts(20_000, 20_000)
    calibrate = fit_calibration(half, label)
    sky, truth = cutouts(2_000, 1_998_000)
    probability = expit(calibrate(sky) + prior_shift(1e-3, 0.5))
    for low, high in ((0, 1), (0.0005, 0.01), (0.01, 0.1), (0.1, 1)):
        chosen = (probability >= low) & (probability <= high)
        n = truth[chosen].sum()
        assert n > 50
        expected = probability[chosen].sum()
        assert abs(n - expected) < 1.96 * np.sqrt(expected) + 0.03 * expected
    # Without it, what half the validation set was is what it expects of the sky.
    assert expit(calibrate(sky)).sum() > 50 * truth.sum()


def test_what_cannot_be_calibrated_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="no lens;"):
        fit_calibration(np.zeros(3), np.zeros(3, dtype=int))
    with pytest.raises(InputError, match="no non-lens;"):
        fit_calibration(np.zeros(3), np.ones(3, dtype=int))
    with pytest.raises(InputError, match="2 of 3 validation logits are not finite"):
        fit_calibration(np.array([np.nan, np.inf, 0.0]), np.array([0, 1, 1]))
    with pytest.raises(InputError, match=r"label has the shape \(3,\), logit \(2,\)"):
        fit_calibration([-1.0, 1.0], [0, 1, 1])
    with pytest.raises(InputError, match=r"logit: has the shape \(2, 2\); \(n,\) is meant"):
        fit_calibration(np.eye(2), [0, 1])
    for labels in (["lens", "not"], [1, 2], [1, -1]):
        with pytest.raises(InputError, match=r"label: must be 1 \(lens\) or 0 \(not\)"):
            fit_calibration([-1.0, 1.0], labels)
    with pytest.raises(InputError, match="'beta': must be one of platt, temperature, isotonic"):
        fit_calibration([-1.0, 1.0], [0, 1], "beta")


@pytest.mark.parametrize("method", METHODS)
def test_lists_and_true_and_false_are_calibrated_as_arrays_are(method: str) -> None:
    logit, label = overconfident(200)
    of_arrays = fit_calibration(logit, label, method)
    assert fit_calibration(logit.tolist(), label.tolist(), method) == of_arrays
    assert fit_calibration(logit, label == 1, method) == of_arrays


def test_targets_are_smoothed_as_platt_says() -> None:
    """Lenses have the target (n + 1) / (n + 2), others 1 / (n + 2), n being as many as there are of
    them; where each class has one logit, a line meets both."""
    for n_lens, n_nonlens in ((2, 2), (3, 8)):
        label = np.repeat([1, 0], [n_lens, n_nonlens])
        found = fit_calibration(np.where(label, 1.5, -0.5), label, "platt")
        of_lens, of_nonlens = expit(found(np.array([1.5, -0.5])))
        assert of_lens == pytest.approx((n_lens + 1) / (n_lens + 2), abs=1e-4)
        assert of_nonlens == pytest.approx(1 / (n_nonlens + 2), abs=1e-4)


def test_probabilities_hold_at_another_mixture() -> None:
    """By Bayes' theorem: one lens in fifty, where they were calibrated at one in two."""
    random = np.random.default_rng(0)
    label = (np.arange(200_000) % 50 == 0).astype(int)
    signal = random.normal(2 * label, 1)
    at_half = 1 / (1 + np.exp(-(2 * signal - 2)))  # of unit normals two apart
    shifted = at_mixture(at_half, label, 0.5)
    odds = np.exp(2 * signal - 2) * 0.02 / 0.98
    np.testing.assert_allclose(shifted, odds / (1 + odds))
    assert lens_metrics(label, at_half, bootstrap=0)["ece"]["value"] > 0.1
    assert lens_metrics(label, shifted, bootstrap=0)["ece"]["value"] < 0.005
    np.testing.assert_array_equal(at_mixture(at_half, label, 0.02), at_half)
    np.testing.assert_array_equal(at_mixture(at_half, label[:0], 0.5), at_half)


@pytest.mark.parametrize("constant", [-1.1, 0.3, 7.7, 40.1])
def test_a_network_that_says_the_same_of_all_has_the_base_rate(constant: float) -> None:
    """Though no float is all of its logits, whose mean so is another."""
    label = (np.arange(400) % 4 == 0).astype(int)
    logits = np.full(400, constant)
    calibrate = fit_calibration(logits, label)
    np.testing.assert_allclose(expit(calibrate(logits)), 0.25, atol=0.01)
    near = np.nextafter(np.float32(constant), np.float32(100))  # as another machine rounds it
    np.testing.assert_allclose(expit(calibrate(np.array([float(near)]))), 0.25, atol=0.01)
