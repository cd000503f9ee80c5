"""From the members' calibrated logits to one score and its uncertainty."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.optimize import minimize
from scipy.special import entr, expit, logit

from lens_pipeline.choices import Strategy
from lens_pipeline.ensemble.calibration import ALIKE, Isotonic, fit_calibration
from lens_pipeline.errors import InputError

Array = NDArray[np.float64]
STEADIEST = 0.1  # of a member's scatter within a class, at least, is its own noise
NOTHING_BUT = 1e12  # the noise of a member that says the same of every cutout
UNTOLD = 0.01  # of a member's noise, at least, is what dropout does not tell


@dataclass(frozen=True)
class Fused:
    """Scores of n cutouts, each float64 (n,).

    std: epistemic, the standard deviation of the probability over members and dropout draws, each
    member counting as far as it decides; entropy: aleatoric, the mean over them of the entropy of a
    yes-or-no answer, in nats.
    """

    probability: Array
    logit: Array
    std: Array
    entropy: Array


@dataclass(frozen=True)
class Mean:
    """The mean of the members' calibrated logits."""

    strategy: Literal["mean"] = "mean"

    def __call__(self, logits: Array, variance: Array) -> Array:
        return logits.mean(axis=1)


@dataclass(frozen=True)
class InverseVariance:
    """A mean of the logits in which each counts, cutout by cutout, by one over its variance.

    The variance is that of the member's dropout draws on the cutout, and `noise`, what the members'
    disagreement says of it beyond that. Both are of logits on one scale, (logit - offset) / scale:
    calibration gives a member the smaller logits the more noise it has, and one over their variance
    would favour the worst. Where nothing was fitted there is one scale for all, and the noise is
    the variance between the members on the cutout itself (as of studies in a random-effects mean,
    DerSimonian & Laird 1986).
    """

    scale: tuple[float, ...] | None = None
    offset: tuple[float, ...] | None = None
    noise: tuple[float, ...] | None = None
    strategy: Literal["uncertainty_weighted"] = "uncertainty_weighted"

    def __call__(self, logits: Array, variance: Array) -> Array:
        if self.scale is None or self.offset is None or self.noise is None:
            noise, on_scale, of_draws = logits.var(axis=1, keepdims=True), logits, variance
        else:
            scale, noise = np.array(self.scale), np.array(self.noise)
            on_scale, of_draws = (logits - np.array(self.offset)) / scale, variance / scale**2
        spread = np.maximum(of_draws + noise, np.finfo(np.float64).tiny)
        weight = spread.min(axis=1, keepdims=True) / spread  # at most 1, whatever the variance
        return np.average(on_scale, axis=1, weights=weight)


@dataclass(frozen=True)
class Stacking:
    """A weighted sum of the logits, with weights fitted once for all cutouts (Wolpert 1992)."""

    weights: tuple[float, ...]
    strategy: Literal["stacking"] = "stacking"

    def __call__(self, logits: Array, variance: Array) -> Array:
        return logits @ np.array(self.weights)


@dataclass(frozen=True)
class Bayesian:
    """The posterior log-odds of members that err independently (Holloway et al. 2024).

    curves: each member's calibration by a curve of its own; prior: the log-odds of a lens among
    the cutouts that they were fitted on. What members have in common is counted more than once; the
    calibration after the fusion takes that back.
    """

    curves: tuple[Isotonic, ...]
    prior: float
    strategy: Literal["bayesian"] = "bayesian"

    def __call__(self, logits: Array, variance: Array) -> Array:
        evidence = [curve(logits[:, i]) - self.prior for i, curve in enumerate(self.curves)]
        return self.prior + np.sum(evidence, axis=0)


@dataclass(frozen=True)
class Single:
    """One member alone: what every fusion must beat."""

    member: int
    strategy: Literal["single"] = "single"

    def __call__(self, logits: Array, variance: Array) -> Array:
        return logits[:, self.member]


_ANY = Mean | InverseVariance | Stacking | Bayesian | Single
Fusion = Annotated[_ANY, Field(discriminator="strategy")]


def fuse(logits: ArrayLike, draws: ArrayLike, fusion: Fusion | None = None) -> Fused:
    """One score of the members' calibrated logits.

    logits: float64 (n, members); draws: float64 (n, members, draws), the same with dropout;
    fusion: the mean unless another is given. Raises InputError where the shapes do not fit
    together, for logits that are not finite, and for what is no fusion.
    """
    fusion = Mean() if fusion is None else fusion
    if not isinstance(fusion, _ANY):
        raise InputError(f"fusion: {fusion!r} is none; give one, as Mean() or InverseVariance()")
    own, drawn = np.asarray(logits, dtype=np.float64), np.asarray(draws, dtype=np.float64)
    fit = own.ndim == 2 and drawn.ndim == 3 and drawn.shape[:2] == own.shape
    if not fit or 0 in drawn.shape[1:]:
        raise InputError(
            f"logits have the shape {own.shape}, draws {drawn.shape}; (n, members) and "
            "(n, members, draws) are meant"
        )
    for name, values in (("logits", own), ("draws", drawn)):
        bad = np.count_nonzero(~np.isfinite(values))
        if bad:
            raise InputError(f"{name}: {bad} of {values.size} are not finite")
    fused = fusion(own, drawn.var(axis=2))
    return with_uncertainty(fused, drawn, np.full(own.shape[1], 1 / own.shape[1]))


def with_uncertainty(fused: Array, draws: Array, shares: Array) -> Fused:
    """Fused logits (n,) as scores, with what the draws (n, members, draws) say of their
    uncertainty; shares (members,): how far each member decides, 1 in sum."""
    drawn = expit(draws)
    mean = drawn.mean(axis=2) @ shares
    scatter = np.mean((drawn - mean[:, None, None]) ** 2, axis=2)
    return Fused(
        probability=expit(fused),
        logit=fused,
        std=np.sqrt(scatter @ shares),
        entropy=(entr(drawn) + entr(1 - drawn)).mean(axis=2) @ shares,
    )


def fit_fusion(
    strategy: Strategy,
    logits: Array,
    variance: Array,
    label: NDArray[np.integer],
    rank: Callable[[Array], float],
) -> Fusion:
    """A fusion fitted to the validation set.

    logits: the members' calibrated ones, float64 (n, members); variance: of their dropout draws,
    likewise; label (n,); rank: what a score (n,) is worth, by which `single` chooses its member.
    """
    fit: dict[Strategy, Callable[[], Fusion]] = {
        "mean": Mean,
        "uncertainty_weighted": lambda: _inverse_variance(logits, variance, label),
        "stacking": lambda: _stacking(logits, label),
        "bayesian": lambda: _bayesian(logits, label),
        "single": lambda: Single(int(np.argmax([rank(one) for one in logits.T]))),
    }
    return fit[strategy]()


def _inverse_variance(
    logits: Array, variance: Array, label: NDArray[np.integer]
) -> InverseVariance:
    """On the common scale every member's classes have their means at 0 and 1.

    What a member varies by within a class, beyond what it has in common with the others (one
    factor behind them all, Spearman 1904), is its own noise.
    """
    low, high = logits[label == 0].mean(axis=0), logits[label == 1].mean(axis=0)
    scale = np.maximum(high - low, 1e-3 * logits.std(axis=0))  # all noise, where nothing was learnt
    constant = logits.std(axis=0) < ALIKE
    scale[constant] = 1
    on_scale = (logits - np.where(label[:, None] == 1, high, low)) / scale
    covariance = np.cov(on_scale, rowvar=False).reshape(len(scale), len(scale))
    scatter = np.diag(covariance)
    pairs = np.triu_indices(len(scale), k=1)
    spread = np.outer(scatter, scatter)[pairs]
    weight = np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)
    common = max(float(weight @ covariance[pairs]) / weight.sum(), 0.0) if weight.any() else 0.0
    own = np.maximum(scatter - common, STEADIEST * scatter)
    noise = np.maximum(own - (variance / scale**2).mean(axis=0), UNTOLD * own)
    noise[constant] = NOTHING_BUT
    return InverseVariance(tuple(scale.tolist()), tuple(low.tolist()), tuple(noise.tolist()))


def _stacking(logits: Array, label: NDArray[np.integer]) -> Stacking:
    """Logistic regression with weights >= 0 under a penalty on their distance from equal ones, as
    if they were drawn round those with a deviation of one; the intercept is the calibration's."""
    members = logits.shape[1]
    target, equal = (label == 1).astype(np.float64), 1 / members

    def loss(parameters: Array) -> tuple[float, Array]:
        weights, intercept = parameters[:-1], parameters[-1]
        z = logits @ weights + intercept
        residual = expit(z) - target
        value = np.sum(np.logaddexp(0, z) - target * z) + np.sum((weights - equal) ** 2) / 2
        return float(value), np.append(residual @ logits + weights - equal, residual.sum())

    start = np.append(np.full(members, equal), 0.0)
    bounds = [(0.0, None)] * members + [(None, None)]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x[:-1]
    return Stacking(tuple(found.tolist()))


def _bayesian(logits: Array, label: NDArray[np.integer]) -> Bayesian:
    curves = [fit_calibration(one, label, "isotonic") for one in logits.T]
    isotonic = tuple(curve for curve in curves if isinstance(curve, Isotonic))
    return Bayesian(isotonic, float(logit(np.mean(label == 1))))
