"""Calibration of logits on validation data."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize


@dataclass(frozen=True)
class Platt:
    """Calibrated logit = slope x logit + intercept."""

    slope: float = 1.0
    intercept: float = 0.0

    def __call__(self, logit: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.slope * logit + self.intercept


def fit_platt(logit: NDArray[np.float64], label: NDArray[np.integer]) -> Platt:
    """Maximum-likelihood scaling of logits, with the smoothed targets of Platt (1999).

    logit (n,) and label (n,) of 1 and 0, both present. The slope is kept positive: calibration
    never turns a ranking round.
    """
    lens = label == 1
    n_lens, n_nonlens = int(lens.sum()), int((~lens).sum())
    target = np.where(lens, (n_lens + 1) / (n_lens + 2), 1 / (n_nonlens + 2))

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        z = parameters[0] * logit + parameters[1]
        residual = 1 / (1 + np.exp(-np.clip(z, -500, 500))) - target
        value = float(np.sum(np.logaddexp(0, z) - target * z))
        return value, np.array([residual @ logit, residual.sum()])

    found = minimize(
        loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(1e-3, 1e3), (None, None)]
    )
    return Platt(float(found.x[0]), float(found.x[1]))
