"""What a model must show before it may score a survey. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from lens_pipeline.evaluation.metrics import (
    FEWEST_GROUPS,
    lens_metrics,
    ranked_bootstrap,
)

WORST = 5  # percentile: a loss beyond the tolerance is ruled out at 95 %
BEST = 95  # below zero a loss is certain at 95 %
CHALLENGER, CHAMPION = "challenger", "champion"


@dataclass(frozen=True)
class GateDecision:
    """reasons: what was not reached, each with its figure and threshold; empty when passed."""

    passed: bool
    reasons: tuple[str, ...]
    figures: dict[str, Any]


@dataclass(frozen=True)
class _Comparison:
    """Of a challenger with the champion, by `metric`: what each has, and the mean and the bounds of
    the gain over resamplings of both together (`ranked_bootstrap`)."""

    metric: str
    challenger: float
    champion: float
    gain: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.metric} is {self.challenger:.3f}, the champion's {self.champion:.3f}"

    @property
    def certain_loss(self) -> list[str]:
        """A reason, where the challenger is worse for certain, however little."""
        if self.high >= 0:
            return []
        return [f"{self}; it is worse, by {-self.high:.3f} or more at 95 %"]


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
    survey: Sequence[str] | ArrayLike,
    min_lens: int,
    min_nonlens: int,
    min_auroc_low: float,
    tolerance: float,
    max_ece: float,
) -> GateDecision:
    """Whether a challenger may take the place of the champion.

    label (n,): 1 lens, 0 not, of the current test set; challenger, champion: probabilities (n,) of
    the same cutouts, both scored now; group (n,): what is drawn whole, see `paired_bootstrap`; seen
    (n,): whether either model has trained or validated on the group; survey (n,): of which each is.

    Only what neither has seen counts. Of that there must be `min_lens` and `min_nonlens` cutouts,
    in FEWEST_GROUPS groups each. The challenger must pass as a first model would, its
    `ece_balanced` must not exceed `max_ece` beside what chance alone makes of it, and by
    `ranking_metric` it must not be worse than the champion by `tolerance` or more: by the lower
    95 % bound, of one side, of the difference over resamplings of both together, see
    `ranked_bootstrap`. Nor, by the upper one, for certain: losses that are each within the
    tolerance would add up from version to version.

    Of several surveys, none that has as many cutouts and groups may be worse for certain, either:
    what a large one gains would hide what a small one loses. They share the 5 % of doubt.
    """
    known = np.asarray(seen, dtype=bool)
    scored = {"label": label, CHALLENGER: challenger, CHAMPION: champion}
    new = pd.DataFrame(scored | {"group": group, "survey": survey})[~known]
    figures: dict[str, Any] = {
        **_counts(new),
        "n_seen": int(known.sum()),
        "n_groups": new["group"].nunique(),
    }
    kept = (
        f"in groups that neither model has seen ({figures['n_seen']} cutouts of the test split are "
        "of others) there are"
    )
    if shortages := _too_few(new, kept, min_lens, min_nonlens):
        return GateDecision(False, tuple(shortages), figures)
    metrics = lens_metrics(new["label"], new[CHALLENGER], group=new["group"])
    reasons = list(
        first_model_gate(
            metrics, min_lens=min_lens, min_nonlens=min_nonlens, min_auroc_low=min_auroc_low
        ).reasons
    )
    ece, by_chance = metrics["ece_balanced"]["value"], metrics["ece_balanced_by_chance"]
    if ece - by_chance > max_ece:
        reasons.append(
            f"the calibration error is {ece:.3f} where both classes weigh the same, of which "
            f"chance makes {by_chance:.3f}; at most {max_ece:g} beside it is allowed"
        )
    of_all = _compared(new)
    if of_all.low <= -tolerance:
        reasons.append(
            f"{of_all}; a loss of {-of_all.low:.3f} cannot be ruled out at 95 %, {tolerance:g} is "
            "tolerated"
        )
    else:
        reasons += of_all.certain_loss
    judged = {
        str(name): rows
        for name, rows in new.groupby("survey")
        if len(rows) < len(new) and not _too_few(rows, "", min_lens, min_nonlens)
    }
    for name, rows in judged.items():
        of_one = _compared(rows, parts=len(judged))
        figures[f"gain of {name}"] = of_one.gain
        reasons += [f"{name}: {reason}" for reason in of_one.certain_loss]
    figures |= {
        "metric": of_all.metric,
        "challenger": of_all.challenger,
        "champion": of_all.champion,
        "gain": of_all.gain,
        "gain_low": of_all.low,
        "gain_high": of_all.high,
        "auroc_low": metrics["auroc"]["low"],
        "ece_balanced": ece,
        "ece_balanced_by_chance": by_chance,
    }
    return GateDecision(not reasons, tuple(reasons), figures)


def _compared(cutouts: pd.DataFrame, parts: int = 1) -> _Comparison:
    """parts: that are each looked at for a loss, and share the doubt that its bound leaves."""
    label, scores = cutouts["label"], {name: cutouts[name] for name in (CHALLENGER, CHAMPION)}
    metric, drawn = ranked_bootstrap(label, scores, cutouts["group"])
    value = {
        name: float(lens_metrics(label, score, bootstrap=0)[metric]["value"])
        for name, score in scores.items()
    }
    gain = drawn[CHALLENGER] - drawn[CHAMPION]
    low, high = (float(bound) for bound in np.percentile(gain, [WORST, 100 - (100 - BEST) / parts]))
    return _Comparison(metric, **value, gain=float(gain.mean()), low=low, high=high)


def _counts(cutouts: pd.DataFrame) -> dict[str, int]:
    return {
        f"n_{name}": int((cutouts["label"] == value).sum())
        for name, value in (("lens", 1), ("nonlens", 0))
    }


def _too_few(cutouts: pd.DataFrame, where: str, min_lens: int, min_nonlens: int) -> list[str]:
    """Why models cannot be compared on these cutouts."""
    return _shortages(_counts(cutouts), where, min_lens, min_nonlens) or [
        f"{where} {n} groups with {name}, and at least {FEWEST_GROUPS} are needed"
        for value, name in ((1, "lenses"), (0, "non-lenses"))
        if (n := cutouts.loc[cutouts["label"] == value, "group"].nunique()) < FEWEST_GROUPS
    ]


def _shortages(counts: Mapping[str, Any], where: str, min_lens: int, min_nonlens: int) -> list[str]:
    return [
        f"{where} {count} {name}, and at least {least} are needed"
        for count, least, name in (
            (counts["n_lens"], min_lens, "lenses"),
            (counts["n_nonlens"], min_nonlens, "non-lenses"),
        )
        if count < least
    ]
