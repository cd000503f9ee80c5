"""Intervals of fractions, against SciPy's."""

import numpy as np
import pytest
from scipy.stats import beta, binomtest

from lens_pipeline.evaluation.fractions import design_effect, fraction, real_lens_fraction
from lens_pipeline.evaluation.score_plots import one_in


def test_the_interval_of_a_fraction_is_that_of_jeffreys_and_near_that_of_wilson() -> None:
    got = fraction(30, 50)
    assert got["low"] == pytest.approx(beta.ppf(0.025, 30.5, 20.5))
    wilson = binomtest(30, 50).proportion_ci(method="wilson")
    assert (got["low"], got["high"]) == pytest.approx((wilson.low, wilson.high), abs=0.01)
    assert fraction(0, 50)["low"] == 0
    assert fraction(50, 50)["high"] == 1
    assert fraction(0, 0) == {"value": None, "low": None, "high": None}


def test_two_false_positives_bound_a_rate_no_lower_than_none() -> None:
    """Of twenty cutouts each of a hundred galaxies: how alike they are two do not show."""
    group = np.repeat(np.arange(100), 20)
    usual = design_effect(group < 20, group)
    assert usual > 10
    high = []
    for n in (0, 2, 5):
        chosen = np.zeros(2000, dtype=bool)
        chosen[np.arange(n) * 300] = True  # of different galaxies
        high.append(fraction(n, 2000, design_effect(chosen, group, usual))["high"])
    assert high == sorted(high)


def test_lenses_are_as_frequent_on_the_sky_as_networks_know_of_real_ones() -> None:
    validation = {"n_lens": 500, "n_nonlens": 500}
    assert real_lens_fraction({"validation": validation}) == 0.5
    real = {"n_lens": 30, "n_nonlens": 970}
    assert real_lens_fraction({"validation": validation, "validation_of_real": real}) == 0.03


def test_a_prevalence_is_told_as_it_is() -> None:
    said = {0.001: "1 lens in 1,000", 0.1: "1 lens in 10", 0.4: "40 % lenses", 0.7: "70 % lenses"}
    assert {value: one_in(value) for value in said} == said
