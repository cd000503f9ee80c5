"""From the members' calibrated logits to one score and its uncertainty."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr, expit

from lens_pipeline.ensemble.calibration import Platt


@dataclass(frozen=True)
class Fused:
    """Scores of n cutouts, each float64 (n,).

    std: epistemic, the standard deviation of the probability over members and dropout draws;
    entropy: aleatoric, the mean over them of the entropy of a yes-or-no answer, in nats.
    """

    probability: NDArray[np.float64]
    logit: NDArray[np.float64]
    std: NDArray[np.float64]
    entropy: NDArray[np.float64]


def fuse(
    logit: NDArray[np.float64],
    draws: NDArray[np.float64],
    calibration: Platt | None = None,
    strategy: str = "mean",
) -> Fused:
    """A mean of the members' calibrated logits, calibrated once more.

    logit: float64 (n, members); draws: float64 (n, members, draws), the same with dropout.
    strategy: `mean`, all alike; or `uncertainty_weighted`, see `_inverse_variance`.
    """
    calibrate = calibration or Platt()
    weights = _inverse_variance(logit, draws) if strategy == "uncertainty_weighted" else None
    fused = calibrate(np.average(logit, axis=1, weights=weights))
    drawn = expit(calibrate(draws)).reshape(len(draws), -1)
    return Fused(
        probability=expit(fused),
        logit=fused,
        std=drawn.std(axis=1),
        entropy=(entr(drawn) + entr(1 - drawn)).mean(axis=1),
    )


def _inverse_variance(
    logit: NDArray[np.float64], draws: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Weights (n, members): one over a member's variance of draws plus that between the members.

    The more the members disagree, the less one's own steadiness says, and the more alike they count
    (as studies do in a random-effects mean, DerSimonian & Laird 1986).
    """
    variance = draws.var(axis=2) + logit.var(axis=1, keepdims=True)
    return 1 / np.maximum(variance, np.finfo(np.float64).tiny)
