"""Calibration and fusion against scikit-learn and against formulas written out here."""

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import entropy as scipy_entropy
from sklearn.calibration import _sigmoid_calibration

from lens_pipeline import ensemble
from lens_pipeline.ensemble.calibration import Platt, fit_platt
from lens_pipeline.ensemble.fusion import fuse
from lens_pipeline.evaluation.metrics import lens_metrics


def overconfident(n: int = 4000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits three times too large and shifted, with the labels that the true ones give."""
    random = np.random.default_rng(seed)
    true = random.normal(0, 1.5, n)
    label = (random.uniform(size=n) < expit(true)).astype(int)
    return 3 * true + 1, label


def test_platt_scaling_is_that_of_scikit_learn() -> None:
    logit, label = overconfident()
    ours = fit_platt(logit, label)
    a, b = _sigmoid_calibration(logit, label)  # p = 1 / (1 + exp(a logit + b))
    assert ours.slope == pytest.approx(-a, rel=1e-3)
    assert ours.intercept == pytest.approx(-b, abs=1e-3)


def test_calibration_brings_probabilities_to_what_is_observed() -> None:
    logit, label = overconfident()
    platt = fit_platt(logit, label)
    assert platt.slope == pytest.approx(1 / 3, rel=0.1)
    held_out, truth = overconfident(seed=1)
    before = lens_metrics(truth, expit(held_out), bootstrap=0)
    after = lens_metrics(truth, expit(platt(held_out)), bootstrap=0)
    assert before["ece"]["value"] > 0.08
    assert after["ece"]["value"] < 0.03
    assert after["auroc"] == before["auroc"]


def test_calibration_never_turns_a_ranking_round() -> None:
    logit, label = overconfident()
    assert fit_platt(-logit, label).slope > 0


def test_perfectly_separated_classes_keep_finite_probabilities() -> None:
    platt = fit_platt(np.array([-5.0, -4.0, 4.0, 5.0]), np.array([0, 0, 1, 1]))
    assert np.isfinite([platt.slope, platt.intercept]).all()
    assert expit(platt(np.array([5.0])))[0] < 0.95  # four cutouts prove no more


def test_fusion_is_the_mean_of_calibrated_logits() -> None:
    random = np.random.default_rng(0)
    logit, draws = random.normal(size=(5, 3)), random.normal(size=(5, 3, 20))
    fused = fuse(logit, draws, Platt(0.8, -0.3))
    expected = 0.8 * logit.mean(axis=1) - 0.3
    np.testing.assert_allclose(fused.logit, expected)
    np.testing.assert_allclose(fused.probability, 1 / (1 + np.exp(-expected)))
    drawn = 1 / (1 + np.exp(-(0.8 * draws - 0.3))).reshape(5, 60)
    np.testing.assert_allclose(fused.std, drawn.std(axis=1))
    by_scipy = scipy_entropy(np.stack([drawn, 1 - drawn]), axis=0).mean(axis=1)
    np.testing.assert_allclose(fused.entropy, by_scipy)


def test_members_that_agree_are_certain_and_members_that_differ_are_not() -> None:
    agree = np.full((1, 2, 20), 3.0)
    differ = np.stack([np.full(20, 3.0), np.full(20, -3.0)])[None]
    assert fuse(agree[..., 0], agree).std[0] == pytest.approx(0)
    assert fuse(differ[..., 0], differ).std[0] > 0.4
    # Neither is unsure of its own answer: what differs is epistemic alone.
    assert fuse(differ[..., 0], differ).entropy == pytest.approx(fuse(agree[..., 0], agree).entropy)


def test_the_entry_point_of_the_library() -> None:
    assert ensemble.fuse is fuse


def test_a_member_counts_by_the_inverse_of_its_variance() -> None:
    """Two members that agree, but for what dropout does to them."""
    draws = np.array([[[0.9, 1.1], [-1.0, 3.0]]])  # variances 0.01 and 4
    logit = np.array([[1.0, 1.2]])
    between = 0.01  # of 1.0 and 1.2
    weights = np.array([1 / (0.01 + between), 1 / (4.0 + between)])
    expected = (weights * logit[0]).sum() / weights.sum()
    fused = fuse(logit, draws, strategy="uncertainty_weighted")
    assert fused.logit[0] == pytest.approx(expected, rel=1e-12)
    assert fuse(logit, draws).logit[0] == pytest.approx(1.1)
    # Without dropout, members that agree count alike.
    same = fuse(np.ones((1, 2)), np.ones((1, 2, 3)), strategy="uncertainty_weighted")
    assert same.logit[0] == pytest.approx(1.0)
