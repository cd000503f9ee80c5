"""Calibration of logits on validation data, and their shift to the prevalence of the sky."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit, logit

from lens_pipeline.choices import Method
from lens_pipeline.errors import InputError
from lens_pipeline.evaluation.metrics import is_lens

Array = NDArray[np.float64]
ALIKE = 1e-9  # logits that differ by less are the same but for rounding


@dataclass(frozen=True)
class Platt:
    """Calibrated logit = slope x logit + intercept."""

    slope: float = 1.0
    intercept: float = 0.0
    form: Literal["line"] = "line"

    def __call__(self, logit: Array) -> Array:
        return self.slope * logit + self.intercept


@dataclass(frozen=True)
class Isotonic:
    """Calibrated logits between knots by straight lines, beyond them with a slope.

    knots, values: the logits and what they are calibrated to, both strictly rising.
    """

    knots: tuple[float, ...]
    values: tuple[float, ...]
    slope: float
    form: Literal["curve"] = "curve"

    def __call__(self, logit: Array) -> Array:
        inside = np.interp(logit, self.knots, self.values)
        return inside + self.slope * (logit - np.clip(logit, self.knots[0], self.knots[-1]))


Calibration = Annotated[Platt | Isotonic, Field(discriminator="form")]


def fit_calibration(logits: ArrayLike, label: ArrayLike, method: Method = "platt") -> Calibration:
    """What turns logits (n,) into calibrated ones, from label (n,) of 1 and 0, both present.

    platt: a slope and an intercept (Platt 1999); temperature: a slope alone (Guo et al. 2017);
    isotonic: any rising curve (Zadrozny & Elkan 2002), drawn through the middles of its steps
    (Oron & Flournoy 2017), for steps would tie the highest scores, which are what a survey looks
    at, and beyond the outermost with Platt's slope. All take the smoothed targets of Platt (1999),
    so that no finite sample makes a probability of 0 or 1, and none turns a ranking round. Raises
    InputError for another method, for a class that is absent, for logits that are not finite, and
    where logits and labels are not as many.
    """
    if method not in get_args(Method):
        raise InputError(f"method {method!r}: must be one of {', '.join(get_args(Method))}")
    z = np.asarray(logits, dtype=np.float64)
    lens = check_validation(z, label)
    if z.ndim != 1:
        raise InputError(f"logit: has the shape {z.shape}; (n,) is meant")
    n_lens, n_nonlens = int(lens.sum()), int((~lens).sum())
    target = np.where(lens, (n_lens + 1) / (n_lens + 2), 1 / (n_nonlens + 2))
    fit: dict[Method, Callable[[], Calibration]] = {
        "platt": lambda: _scaling(z, target, free_intercept=True),
        "temperature": lambda: _scaling(z, target, free_intercept=False),
        "isotonic": lambda: _isotonic(z, target),
    }
    return fit[method]()


def check_validation(logits: Array, label: ArrayLike) -> NDArray[np.bool_]:
    """Which of the cutouts are lenses, (n,). Raises InputError for logits (n,) or (n, members) and
    label (n,) that nothing can be fitted to."""
    lens = is_lens(label)
    if lens.shape != logits.shape[:1]:
        raise InputError(f"label has the shape {lens.shape}, logit {logits.shape}")
    bad = np.count_nonzero(~np.isfinite(logits))
    if bad:
        raise InputError(
            f"logit: {bad} of {np.size(logits)} validation logits are not finite; a member's "
            "training has failed, train it again with a lower learning rate"
        )
    for of_class, name in ((lens, "lens"), (~lens, "non-lens")):
        if not of_class.any():
            raise InputError(f"label: the validation set has no {name}; calibration needs both")
    return lens


def _scaling(logits: Array, target: Array, free_intercept: bool) -> Platt:
    scale = float(logits.std())  # a network's may be of any
    if scale <= ALIKE * max(1.0, float(np.abs(logits).max())):
        scale = 1.0  # they say the same of all: a spread that is left is of rounding
        if free_intercept:
            return Platt(1.0, float(logit(target.mean()) - logits.mean()))
    logits = logits / scale

    def loss(parameters: Array) -> tuple[float, Array]:
        z = parameters[0] * logits + parameters[1]
        residual = expit(z) - target
        value = float(np.sum(np.logaddexp(0, z) - target * z))
        return value, np.array([residual @ logits, residual.sum()])

    free = (None, None) if free_intercept else (0.0, 0.0)
    found = minimize(
        loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(1e-3, 1e3), free]
    )
    return Platt(float(found.x[0] / scale), float(found.x[1]))


def _isotonic(logits: Array, target: Array) -> Isotonic:
    distinct, place, count = np.unique(logits, return_inverse=True, return_counts=True)
    mean = np.bincount(place, weights=target) / count
    steps = isotonic_regression(mean, weights=count).x
    step = np.concatenate([[0], np.cumsum(np.diff(steps) > 1e-9)])  # rounding makes no step
    n = np.bincount(step, weights=count)
    knots = np.bincount(step, weights=distinct * count) / n
    values = logit(np.bincount(step, weights=steps * count) / n)
    slope = _scaling(logits, target, free_intercept=True).slope
    return Isotonic(tuple(knots.tolist()), tuple(values.tolist()), slope)


def at_mixture(probability: ArrayLike, label: ArrayLike, fitted_at: float) -> Array:
    """Probabilities (n,) calibrated where a fraction `fitted_at` are lenses, as they hold among
    cutouts mixed as these labels; of one class alone they stay as they are."""
    lens = np.asarray(label) == 1
    same = np.asarray(probability, dtype=np.float64)
    if lens.all() or not lens.any() or (share := float(lens.mean())) == fitted_at:
        return same
    return expit(logit(same) + prior_shift(share, fitted_at))


def prior_shift(prevalence: float, fitted_at: float) -> float:
    """What to add to logits calibrated where a fraction `fitted_at` are lenses, to hold where a
    fraction `prevalence` are: the change of the prior's log-odds (Saerens et al. 2002).

    It presumes that the lenses and the non-lenses of the sky look like those of the validation set.
    """
    return float(logit(prevalence) - logit(fitted_at))
