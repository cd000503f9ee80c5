"""What a survey may expect: purity and numbers of candidates at a stated prevalence of lenses.

Pure functions of labels and scores; no result depends on the order of the cutouts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lens_pipeline.errors import InputError
from lens_pipeline.evaluation.fractions import (
    design_effect,
    fraction,
    rate_beyond,
    upper_limit,
)
from lens_pipeline.evaluation.metrics import INTERVAL, checked_groups, roc, threshold_at_fpr
from lens_pipeline.evaluation.selection import DECADES

Array = NDArray[np.float64]

PREVALENCE = 1e-3
OBJECTS = 1_000_000
DRAWS = 4000
POINTS = 200


def purity(completeness: ArrayLike, false_positive_rate: ArrayLike, prevalence: float) -> Array:
    """The share of lenses among what is chosen (Bayes' theorem), where one is at `prevalence`.

    NaN where nothing is chosen.
    """
    lenses = prevalence * np.asarray(completeness, dtype=np.float64)
    others = (1 - prevalence) * np.asarray(false_positive_rate, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return lenses / (lenses + others)


def forecast(
    label: ArrayLike,
    score: ArrayLike,
    *,
    prevalence: float = PREVALENCE,
    n_objects: int = OBJECTS,
    group: ArrayLike | None = None,
) -> dict[str, Any]:
    """What a survey of `n_objects`, of which a share `prevalence` are lenses, may expect.

    It supposes that its lenses and its other objects are like those of the sample. Returns
    `prevalence`, `n_objects` and `rows`, one for each threshold that the sample's false positive
    rates in decades give, and the one before the first false positive; each with `fpr` (which the
    threshold was chosen for), `threshold`, `found` and `false_positives` (counts in the sample),
    and {"value", "low", "high"} of `completeness`, `false_positive_rate`, `lenses` and
    `candidates` (expected numbers in the survey) and `purity`.

    group (n,): cutouts of one are no independent ones, see `design_effect`. Intervals are those of
    `jeffreys` and `rate_beyond`, which also gives the value of the false positive rate, and the
    middle 95 % of what both rates' posteriors give: with a few false positives, a resampling of
    them is too narrow. Where there is none, the sample does not resolve the rate: `high` of it is
    the exact 95 % upper limit (see `upper_limit`), and the rate, purity and candidates have no
    value, but purity and candidates the `low` and `high` that follow from it.

    Raises InputError for a prevalence that is not between 0 and 1, no objects, or as `roc` does.
    """
    _check_prevalence(prevalence)
    if n_objects < 1:
        raise InputError(f"n_objects: {n_objects} is too small; at least 1 is needed")
    groups = checked_groups(group, np.size(label))
    n_nonlens = int((np.asarray(label) == 0).sum())
    thresholds = {
        threshold_at_fpr(label, score, fpr): fpr
        for fpr in (*(fpr for fpr in DECADES if n_nonlens * fpr >= 1), 0.0)
    }
    label, score = np.asarray(label), np.asarray(score, dtype=np.float64)
    rows = []
    usual: dict[int, float] = {}  # of the class at the first threshold, at which most are chosen
    for threshold, fpr in thresholds.items():
        if np.isfinite(threshold):
            chosen = score >= threshold
            counts, effects = [], []
            for value in (1, 0):
                of_class = label == value
                counts += [int(chosen[of_class].sum()), int(of_class.sum())]
                own = None if groups is None else groups[of_class]
                effect = design_effect(chosen[of_class], own, usual.get(value))
                effects.append(effect)
                usual.setdefault(value, effect)
            found, _, mistaken, _ = counts
            rows.append(
                {
                    "fpr": fpr,
                    "threshold": threshold,
                    "found": found,
                    "false_positives": mistaken,
                    **_expected(counts, effects, prevalence, n_objects),
                }
            )
    return {"prevalence": prevalence, "n_objects": n_objects, "rows": rows}


def _check_prevalence(prevalence: float) -> None:
    if not 0 < prevalence < 1:
        raise InputError(
            f"prevalence: {prevalence:g} is not between 0 and 1; of one lens in a thousand objects "
            "it is 0.001"
        )


def _expected(
    counts: Sequence[int],
    effects: Sequence[float],
    prevalence: float,
    n_objects: int,
) -> dict[str, Any]:
    """counts: found, n_lens, mistaken, n_nonlens; effects: of both classes."""
    found, n_lens, mistaken, n_nonlens = counts
    n_lenses, n_others = n_objects * prevalence, n_objects * (1 - prevalence)
    completeness = fraction(found, n_lens, effects[0])
    lenses = {end: value * n_lenses for end, value in completeness.items() if value is not None}
    if mistaken:
        ends = rate_beyond(mistaken, n_nonlens, effects[1])
        rate: dict[str, Any] = dict(zip(("value", "low", "high"), map(float, ends), strict=True))
        tpr, fpr = found / n_lens, rate["value"]
        drawn = _posteriors(counts, effects)
        pure = _interval(float(purity(tpr, fpr, prevalence)), purity(*drawn, prevalence))
        candidates = _interval(
            tpr * n_lenses + fpr * n_others, drawn[0] * n_lenses + drawn[1] * n_others
        )
    else:
        limit = float(upper_limit(n_nonlens / effects[1]))
        rate = {"value": None, "low": 0.0, "high": limit}
        least = float(purity(found / n_lens, limit, prevalence))
        pure = {"value": None, "low": least, "high": None}
        most = lenses["high"] + limit * n_others
        candidates = {"value": None, "low": lenses["low"], "high": most}
    return {
        "completeness": completeness,
        "false_positive_rate": rate,
        "lenses": lenses,
        "candidates": candidates,
        "purity": pure,
    }


def threshold_curve(
    label: ArrayLike,
    score: ArrayLike,
    prevalence: float = PREVALENCE,
    group: ArrayLike | None = None,
) -> pd.DataFrame:
    """Completeness and purity from the highest threshold down, at up to POINTS realised ones.

    Columns: `threshold`; `completeness`; `false_positives` (a count); `purity_of_sample`, at the
    sample's own mixture; `purity` at `prevalence`, NaN where there is no false positive, and
    `purity_low`, `purity_high`: from the interval of the false positive rate alone, and there from
    its upper limit; that rate, and group, as of `forecast`. Raises InputError as that does.
    """
    _check_prevalence(prevalence)
    fpr, tpr, threshold = roc(label, score)
    labels, scores = np.asarray(label), np.asarray(score, dtype=np.float64)
    n_lens, n_nonlens = int((labels == 1).sum()), int((labels == 0).sum())
    last = len(threshold) - 1
    place = np.arange(1, last + 1)
    if last > POINTS:  # what is chosen lies among the first: there are more points
        place = np.unique(np.geomspace(1, last, POINTS).round().astype(int))
    fpr, tpr, threshold = fpr[place], tpr[place], threshold[place]
    mistaken = (fpr * n_nonlens).round()
    others = scores[labels == 0]
    groups = checked_groups(group, len(labels))
    # As numbers, for names take long to sort at each point.
    own = None if groups is None else np.unique(groups, return_inverse=True)[1][labels == 0]
    usual = design_effect(others >= np.quantile(others, 1 - DECADES[0]), own)
    effect = np.array([design_effect(others >= at, own, usual) for at in threshold])
    expected, low, high = rate_beyond(mistaken, n_nonlens, effect)
    none = mistaken == 0
    high = np.where(none, upper_limit(n_nonlens / effect), high)
    return pd.DataFrame(
        {
            "threshold": threshold,
            "completeness": tpr,
            "false_positives": mistaken.astype(int),
            "purity_of_sample": purity(tpr, fpr, n_lens / (n_lens + n_nonlens)),
            "purity": np.where(none, np.nan, purity(tpr, expected, prevalence)),
            "purity_low": purity(tpr, high, prevalence),
            "purity_high": np.where(none, np.nan, purity(tpr, low, prevalence)),
        }
    )


def _posteriors(counts: Sequence[int], effects: Sequence[float]) -> tuple[Array, Array]:
    random = np.random.default_rng(0)
    found, n_lens, mistaken, n_nonlens = np.array(counts) / np.repeat(effects, 2)
    tpr = random.beta(found + 0.5, n_lens - found + 0.5, DRAWS)
    return tpr, random.beta(mistaken + 1, n_nonlens - mistaken, DRAWS)  # see `rate_beyond`


def _interval(value: float, drawn: Array) -> dict[str, float | None]:
    low, high = np.percentile(drawn, INTERVAL)
    return {"value": value, "low": float(low), "high": float(high)}
