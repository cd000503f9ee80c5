"""What a model must show before it may score a survey."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GateDecision:
    """reasons: what was not reached, each with its figure and threshold; empty when passed."""

    passed: bool
    reasons: tuple[str, ...]
    figures: dict[str, float | None]


def first_model_gate(
    metrics: Mapping[str, Any], *, min_lens: int, min_nonlens: int, min_auroc_low: float
) -> GateDecision:
    """Whether a model with these test metrics may be the first champion.

    metrics: of `lens_metrics`. The test set needs `min_lens` and `min_nonlens` cutouts, and the
    lower 95 % bound of AUROC must exceed `min_auroc_low`.
    """
    low = metrics["auroc"]["low"]
    reasons = []
    for count, least, name in (
        (metrics["n_lens"], min_lens, "lenses"),
        (metrics["n_nonlens"], min_nonlens, "non-lenses"),
    ):
        if count < least:
            reasons.append(f"the test set has {count} {name}; at least {least} are needed")
    if low is None:
        reasons.append("AUROC has no interval; the test set needs lenses and non-lenses")
    elif low <= min_auroc_low:
        reasons.append(
            f"the lower 95 % bound of AUROC is {low:.3f}; it must exceed {min_auroc_low:g}"
        )
    figures = {
        "auroc_low": low,
        "n_lens": metrics["n_lens"],
        "n_nonlens": metrics["n_nonlens"],
    }
    return GateDecision(not reasons, tuple(reasons), figures)
