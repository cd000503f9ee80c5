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
    logit: NDArray[np.float64], draws: NDArray[np.float64], calibration: Platt | None = None
) -> Fused:
    """The mean of the members' calibrated logits, calibrated once more.

    logit: float64 (n, members); draws: float64 (n, members, draws), the same with dropout.
    """
    calibrate = calibration or Platt()
    fused = calibrate(logit.mean(axis=1))
    drawn = expit(calibrate(draws)).reshape(len(draws), -1)
    return Fused(
        probability=expit(fused),
        logit=fused,
        std=drawn.std(axis=1),
        entropy=(entr(drawn) + entr(1 - drawn)).mean(axis=1),
    )
