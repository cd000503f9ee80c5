"""Intervals of fractions, against SciPy's."""

import pytest
from scipy.stats import beta, binomtest

from lens_pipeline.evaluation.fractions import fraction


def test_the_interval_of_a_fraction_is_that_of_jeffreys_and_near_that_of_wilson() -> None:
    got = fraction(30, 50)
    assert got["low"] == pytest.approx(beta.ppf(0.025, 30.5, 20.5))
    wilson = binomtest(30, 50).proportion_ci(method="wilson")
    assert (got["low"], got["high"]) == pytest.approx((wilson.low, wilson.high), abs=0.01)
    assert fraction(0, 50)["low"] == 0
    assert fraction(50, 50)["high"] == 1
    assert fraction(0, 0) == {"value": None, "low": None, "high": None}
