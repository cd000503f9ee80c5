"""What a model must show before it may score a survey. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lens_pipeline.evaluation.metrics import (
    FEWEST_GROUPS,
    ece_by_chance,
    lens_metrics,
    ranked_bootstrap,
)

WORST = 5  # percentile: a loss beyond the tolerance is ruled out at 95 %
BEST = 95  # below zero a loss is certain at 95 %


@dataclass(frozen=True)
class GateDecision:
    """reasons: what was not reached, each with its figure and threshold; empty when passed."""

    passed: bool
    reasons: tuple[str, ...]
    figures: dict[str, Any]


def refused(reason: str) -> GateDecision:
    return GateDecision(False, (reason,), {})


def first_model_gate(
    metrics: Mapping[str, Any], *, min_lens: int, min_nonlens: int, min_auroc_low: float
) -> GateDecision:
    """Whether a model with these test metrics may be the first champion.

    metrics: of `lens_metrics`. The test set needs `min_lens` and `min_nonlens` cutouts, and the
    lower 95 % bound of AUROC must exceed `min_auroc_low`.
    """
    low = metrics["auroc"]["low"]
    reasons = _shortages(metrics, "the test set has", min_lens, min_nonlens)
    if low is None:
        reasons.append("AUROC has no interval; the test set needs lenses and non-lenses")
    elif low <= min_auroc_low:
        reasons.append(
            f"the lower 95 % bound of AUROC is {low:.3f}, and must exceed {min_auroc_low:g}"
        )
    figures = {
        "auroc_low": low,
        "n_lens": metrics["n_lens"],
        "n_nonlens": metrics["n_nonlens"],
    }
    return GateDecision(not reasons, tuple(reasons), figures)


def champion_gate(
    label: ArrayLike,
    challenger: ArrayLike,
    champion: ArrayLike,
    *,
    group: Sequence[str] | ArrayLike,
    seen: ArrayLike,
    min_lens: int,
    min_nonlens: int,
    min_auroc_low: float,
    tolerance: float,
    max_ece: float,
) -> GateDecision:
    """Whether a challenger may take the place of the champion.

    label (n,): 1 lens, 0 not, of the current test set; challenger, champion: probabilities (n,) of
    the same cutouts, both scored now; group (n,): what is drawn whole, see `paired_bootstrap`; seen
    (n,): whether either model has trained or validated on the group.

    Only what neither has seen counts. Of that there must be `min_lens` and `min_nonlens` cutouts,
    in FEWEST_GROUPS groups each. The challenger must pass as a first model would, its `ece` must
    not exceed `max_ece`, and by `ranking_metric` it must not be worse than the champion by
    `tolerance` or more: by the lower 95 % bound, of one side, of the difference over resamplings of
    both together, see `ranked_bootstrap`. Nor, by the upper one, for certain: losses that are each
    within the tolerance would add up from version to version. Of the `ece`, what chance alone makes
    does not count.
    """
    new = ~np.asarray(seen, dtype=bool)
    label, challenger, champion, groups = (
        np.asarray(values)[new] for values in (label, challenger, champion, group)
    )
    n_lens, n_nonlens = (int(np.count_nonzero(label == value)) for value in (1, 0))
    figures: dict[str, Any] = {
        "n_lens": n_lens,
        "n_nonlens": n_nonlens,
        "n_seen": int(np.count_nonzero(~new)),
        "n_groups": len(np.unique(groups)),
    }
    kept = (
        f"in groups that neither model has seen ({figures['n_seen']} cutouts of the test split are "
        "of others) there are"
    )
    shortages = _shortages(figures, kept, min_lens, min_nonlens) or [
        f"{kept} {n} groups with {name}, and at least {FEWEST_GROUPS} are needed"
        for value, name in ((1, "lenses"), (0, "non-lenses"))
        if (n := len(np.unique(groups[label == value]))) < FEWEST_GROUPS
    ]
    if shortages:
        return GateDecision(False, tuple(shortages), figures)
    metrics = lens_metrics(label, challenger, group=groups)
    reasons = list(
        first_model_gate(
            metrics, min_lens=min_lens, min_nonlens=min_nonlens, min_auroc_low=min_auroc_low
        ).reasons
    )
    ece, by_chance = metrics["ece"]["value"], ece_by_chance(challenger)
    if ece - by_chance > max_ece:
        reasons.append(
            f"the calibration error is {ece:.3f}, of which chance makes {by_chance:.3f}; at most "
            f"{max_ece:g} beside it is allowed"
        )
    scores = {"challenger": challenger, "champion": champion}
    metric, drawn = ranked_bootstrap(label, scores, groups)
    gain = drawn["challenger"] - drawn["champion"]
    lowest, highest = (float(bound) for bound in np.percentile(gain, [WORST, BEST]))
    theirs = lens_metrics(label, champion, bootstrap=0)[metric]["value"]
    both = f"{metric} is {metrics[metric]['value']:.3f}, the champion's {theirs:.3f}"
    if lowest <= -tolerance:
        reasons.append(
            f"{both}; a loss of {-lowest:.3f} cannot be ruled out at 95 %, {tolerance:g} is "
            "tolerated"
        )
    elif highest < 0:
        reasons.append(f"{both}; it is worse, by {-highest:.3f} or more at 95 %")
    figures |= {
        "metric": metric,
        "challenger": metrics[metric]["value"],
        "champion": theirs,
        "gain": float(gain.mean()),
        "gain_low": lowest,
        "gain_high": highest,
        "auroc_low": metrics["auroc"]["low"],
        "ece": ece,
        "ece_by_chance": by_chance,
    }
    return GateDecision(not reasons, tuple(reasons), figures)


def _shortages(counts: Mapping[str, Any], where: str, min_lens: int, min_nonlens: int) -> list[str]:
    return [
        f"{where} {count} {name}, and at least {least} are needed"
        for count, least, name in (
            (counts["n_lens"], min_lens, "lenses"),
            (counts["n_nonlens"], min_nonlens, "non-lenses"),
        )
        if count < least
    ]
