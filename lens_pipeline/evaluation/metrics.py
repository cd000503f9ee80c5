"""Metrics of a lens finder, with intervals, as the field defines them.

Metcalf et al. 2019 (A&A 625, A119) for TPR0 and TPR10; thresholds are realised ones, `score >= t`,
and nothing is interpolated between them. No result depends on the order of the cutouts, but for
resamplings of cutouts that are groups of their own (`paired_bootstrap`), which are others.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lens_pipeline.errors import InputError
from lens_pipeline.evaluation.fractions import design_effect, jeffreys

Array = NDArray[np.float64]

FPRS = {"tpr_at_fpr_1e-2": 1e-2, "tpr_at_fpr_1e-3": 1e-3, "tpr_at_fpr_1e-4": 1e-4}
TOP = 100
BINS = 15
TAIL = 0.1  # of the cutouts: those with the highest scores
TAIL_LEAST = 50  # cutouts; fewer tell nothing of their calibration
TAIL_BINS = 5
INTERVAL = (2.5, 97.5)  # percentiles
FEWEST_GROUPS = 20  # of fewer that are drawn whole, resampling says little
RESOLVED = 0.95  # of samples, or resamplings: a rate that fewer tell is not resolved
ENOUGH = 10  # false positives: a rate of fewer is mostly chance
CHANCES = 200  # draws of labels, for what chance makes of a calibration error
ERRORS = ("ece", "ece_top", "brier")  # of probabilities; the others are of ranks


@dataclass(frozen=True)
class _Levels:
    """Cutouts by distinct score, highest first: how many lenses and non-lenses have it."""

    score: Array
    lens: Array
    nonlens: Array

    @cached_property
    def found(self) -> Array:
        """Lenses at or above each score."""
        return np.cumsum(self.lens)

    @cached_property
    def mistaken(self) -> Array:
        """Non-lenses at or above each score."""
        return np.cumsum(self.nonlens)

    @cached_property
    def chosen(self) -> Array:
        """Cutouts at or above each score."""
        return self.found + self.mistaken

    @cached_property
    def excess(self) -> Array:
        """Lenses at or above each score beyond those that the scores promise."""
        return self.found - np.cumsum(self.score * (self.lens + self.nonlens))


def by_rank(score: ArrayLike) -> Array:
    """Scores (n,) of any range -> numbers from 0 to below 1 in their order, equal where they are
    equal: where ranks alone count, for probabilities of logits above 36 are all 1."""
    _, rank = np.unique(np.asarray(score), return_inverse=True)
    return rank / max(1, len(rank))


def lens_metrics(
    label: ArrayLike,
    score: ArrayLike,
    bootstrap: int = 1000,
    seed: int = 0,
    group: ArrayLike | None = None,
) -> dict[str, Any]:
    """Metrics of scores on labelled cutouts.

    label (n,): 1 lens, 0 not; score (n,): probabilities. Returns {name: {"value", "low", "high"}},
    the integers `n_lens` and `n_nonlens`, and `ece_by_chance`: the mean ece of cutouts with these
    probabilities where they are exactly right, None where `bootstrap` is 0. `low` and `high` bound
    the middle 95 % of `bootstrap` resamplings, that of ece and ece_top centred on their values,
    with a `low` of 0 where more than 5 % of exactly right probabilities show as much; they are None
    where `bootstrap` is 0. group (n,): whole groups are drawn, as in `paired_bootstrap`, for
    cutouts of one galaxy or region are not independent; else lenses and non-lenses are, apart, and
    also where a class is of fewer than FEWEST_GROUPS groups, whose resamplings would be alike:
    there bounds are too close.
    No resampling has a non-lens that scores higher than those of the sample: `low` of a TPR at an
    FPR (that of one non-lens for tpr0, so always) is 0 where so many non-lenses (independent ones,
    see `design_effect`) may, with a chance of more than 5 %, show none of those that decide it.
    Where every lens is right in all of them, or none is, the bound is that of `jeffreys` for as
    many as the rarer class has cutouts (groups).

    auroc: ties count half. average_precision: sum of precision x step in recall. tpr0, tpr10: the
    highest true positive rate with no, and with fewer than ten, false positives. tpr_at_fpr_x: the
    highest with a false positive rate <= x. precision_at_k: among the k highest scores, k = 100 or
    n_lens if fewer; of ties at the k-th, what is expected. ece: the expected calibration error over
    15 bins of equal counts, ties and cutouts at an edge being shared. ece_top: the same over 5 bins
    of the tenth of the cutouts with the highest scores, 50 at least. brier: the mean squared error.

    A value that the sample cannot resolve is None: a TPR at an FPR below 1 / n_nonlens, tpr10 with
    fewer than ten non-lenses, ece_top with fewer than 50 cutouts, and all but ece, ece_top and
    brier where a class is absent.
    Raises InputError where label, score and group differ in length or hold anything else.
    """
    label, score = _checked(label, score)
    of_groups = checked_groups(group, len(label))
    levels = _levels(label, score)
    values = _values(levels)
    if of_groups is None or not _enough_groups(label, of_groups):
        groups = np.arange(len(label))
        drawings = _resampled(levels, bootstrap, seed)
    else:
        _, groups = np.unique(of_groups, return_inverse=True)
        ranked, weights = _ranked(score), _drawn_groups(label, groups, bootstrap, seed)
        drawings = (_counted(label, ranked, weight) for weight in weights)
    draws = [_values(drawn) for drawn in drawings]
    n_nonlens = int(levels.nonlens.sum())
    deciding = FPRS | {"tpr0": 1 / max(1, n_nonlens), "tpr10": ENOUGH / max(ENOUGH, n_nonlens)}
    rarer = min(len(np.unique(groups[of_class])) for of_class in (label, ~label))
    chance = _by_chance(score, label, groups) if draws else {}
    by_chance = float(np.mean(chance["ece"])) if chance else None
    metrics: dict[str, Any] = {}
    for name, value in values.items():
        low = high = None
        if value is not None and draws:
            drawn = np.array([draw[name] for draw in draws], dtype=np.float64)
            drawn = drawn[np.isfinite(drawn)]  # of groups, some have too few of a class
            if name in ("ece", "ece_top"):
                # Noise alone makes a calibration error, and resampling adds as much once more.
                drawn = np.maximum(drawn - np.median(drawn) + value, 0)
            if len(drawn):
                low, high = map(float, np.percentile(drawn, INTERVAL))
            if name in chance and value <= np.quantile(chance[name], RESOLVED):
                low = 0.0
            if name in deciding and _may_show_none(score[~label], groups[~label], deciding[name]):
                low = 0.0
            if name not in ERRORS and low == high and value in (0, 1):
                low, high = map(float, jeffreys(value * rarer, rarer))
        metrics[name] = {"value": value, "low": low, "high": high}
    counts = {"n_lens": int(levels.lens.sum()), "n_nonlens": n_nonlens}
    return metrics | {"ece_by_chance": by_chance} | counts


def ranking_metric(n_nonlens: int) -> str:
    """What models are ranked by on so many non-lenses: the TPR at the smallest FPR of `FPRS` that
    allows ten false positives, else at the smallest that allows one, else the AUROC."""
    by_rate = sorted(FPRS, key=FPRS.__getitem__)
    for least in (ENOUGH, 1):
        for name in by_rate:
            if n_nonlens * FPRS[name] >= least:
                return name
    return "auroc"


def paired_bootstrap(
    label: ArrayLike,
    scores: Mapping[str, ArrayLike],
    metric: str,
    *,
    group: ArrayLike | None = None,
    times: int = 1000,
) -> dict[str, Array]:
    """A metric of several scores of the same cutouts, resampled together: {name: (times,)}.

    label (n,): 1 lens, 0 not; scores: probabilities (n,) by name; metric: of `lens_metrics`; group
    (n,): whole groups are drawn, those with lenses and those without apart; else each cutout is a
    group of its own. A resampling that cannot resolve the metric has NaN. Raises InputError as
    `lens_metrics` does.
    """
    checked = {name: _checked(label, score) for name, score in scores.items()}
    lens = next(iter(checked.values()))[0]
    groups = checked_groups(group, len(lens))
    if groups is None:
        groups = np.arange(len(lens))
    found = {name: np.full(times, np.nan) for name in scores}
    ranked = {name: _ranked(score) for name, (_, score) in checked.items()}
    for draw, weight in enumerate(_drawn_groups(lens, groups, times, seed=0)):
        for name in scores:
            value = _metrics(_counted(lens, ranked[name], weight))[metric]()
            found[name][draw] = np.nan if value is None else value
    return found


def ranked_bootstrap(
    label: ArrayLike, scores: Mapping[str, ArrayLike], group: ArrayLike
) -> tuple[str, dict[str, Array]]:
    """(metric, {name: resamplings}), see `paired_bootstrap`: of `ranking_metric`, or of the AUROC
    where more than a twentieth of the resamplings, which have fewer non-lenses, cannot resolve it.
    Those of the others that cannot are left out of all."""
    n_nonlens = int(np.count_nonzero(np.asarray(label) == 0))
    for metric in (ranking_metric(n_nonlens), "auroc"):
        drawn = paired_bootstrap(label, scores, metric, group=group)
        resolved = np.isfinite(list(drawn.values())).all(axis=0)
        if resolved.mean() >= RESOLVED:
            break
    return metric, {name: values[resolved] for name, values in drawn.items()}


def _by_chance(
    score: Array, label: NDArray[np.bool_], member: NDArray[np.integer]
) -> dict[str, Array]:
    """(CHANCES,) of the `ece`, and `ece_top`, that cutouts with these probabilities (n,) have where
    they are exactly right. member (n,): numbers of groups, whose labels are alike: by the root of
    how many times the variance of label - score is that of independent cutouts (Kish 1965) they are
    larger."""
    scores = np.sort(score)  # their order is nothing
    random, ranked = np.random.default_rng(0), _ranked(scores)
    error = label - score
    alone = (error**2).sum()
    effect = max(1.0, (np.bincount(member, error) ** 2).sum() / alone) if alone else 1.0
    drawn = (random.random(len(scores)) < scores for _ in range(CHANCES))
    levels = [_metrics(_counted(found, ranked, np.ones(len(scores)))) for found in drawn]
    return {
        name: np.array([level[name]() or 0.0 for level in levels]) * np.sqrt(effect)
        for name in ("ece", "ece_top")
    }


def _may_show_none(nonlens: Array, groups: NDArray[Any], fpr: float) -> bool:
    """Whether as many non-lenses as these, with scores and groups (n,), would in more than 5 % of
    samples hold none of the share `fpr` that scores highest. How far groups are alike is seen in
    the tenth that does: of fewer it is chance."""
    effect = design_effect(nonlens >= np.quantile(nonlens, 1 - TAIL), groups)
    independent = len(nonlens) / effect
    return bool((1 - fpr) ** independent > 1 - RESOLVED)


def _enough_groups(label: NDArray[np.bool_], groups: NDArray[Any]) -> bool:
    """Whether resampling groups tells of what else might have been drawn."""
    return all(len(np.unique(groups[of_class])) >= FEWEST_GROUPS for of_class in (label, ~label))


def independent_groups(label: ArrayLike, group: ArrayLike) -> NDArray[Any]:
    """What is drawn as one, (n,): the groups, or each cutout where a class is of too few groups."""
    groups = np.asarray(group)
    enough = _enough_groups(np.asarray(label) == 1, groups)
    return groups if enough else np.arange(len(groups))


def _drawn_groups(
    lens: NDArray[np.bool_], groups: NDArray[Any], times: int, seed: int
) -> Iterator[Array]:
    """How often each cutout is in a resampling of whole groups, those with lenses and those without
    apart: (n,), as often as asked."""
    _, member = np.unique(groups, return_inverse=True)
    with_lens = np.bincount(member, weights=lens) > 0
    strata = [np.flatnonzero(with_lens), np.flatnonzero(~with_lens)]
    random = np.random.default_rng(seed)
    for _ in range(times):
        drawn = [random.choice(stratum, len(stratum)) for stratum in strata if len(stratum)]
        counts = np.bincount(np.concatenate(drawn), minlength=len(with_lens))
        yield counts[member].astype(np.float64)


def roc(label: ArrayLike, score: ArrayLike) -> tuple[Array, Array, Array]:
    """(false positive rate, true positive rate, threshold), one entry a distinct score.

    They start at (0, 0, inf). Raises InputError as `lens_metrics` does, or if a class is absent.
    """
    label, score = _checked(label, score)
    levels = _levels(label, score)
    n_lens, n_nonlens = levels.lens.sum(), levels.nonlens.sum()
    if not n_lens or not n_nonlens:
        raise InputError("label: a ROC curve needs lenses and non-lenses")
    return (
        np.concatenate([[0], levels.mistaken / n_nonlens]),
        np.concatenate([[0], levels.found / n_lens]),
        np.concatenate([[np.inf], levels.score]),
    )


def threshold_at_fpr(label: ArrayLike, score: ArrayLike, fpr: float) -> float:
    """The score from which on cutouts are chosen for the TPR that `lens_metrics` gives at that FPR.

    Of the realised thresholds that reach it, the highest: it has the fewest false positives. It is
    infinite where any threshold that finds a lens has more. Raises InputError as `roc` does.
    """
    rate, found, threshold = roc(label, score)
    n_nonlens = np.count_nonzero(np.asarray(label) == 0)
    reached = found[_allowed(rate * n_nonlens, fpr * n_nonlens)].max()
    return float(threshold[np.argmax(found == reached)])


def _checked(label: ArrayLike, score: ArrayLike) -> tuple[NDArray[np.bool_], Array]:
    labels = np.asarray(label)
    try:
        scores = np.asarray(score, dtype=np.float64)
    except (TypeError, ValueError) as problem:
        raise InputError(f"score: must be a probability for every cutout ({problem})") from None
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise InputError(f"label has the shape {labels.shape}, score {scores.shape}; (n,) is meant")
    if not len(labels):
        raise InputError("label: there is no cutout to evaluate")
    lens = is_lens(labels)
    if not ((scores >= 0) & (scores <= 1)).all():
        raise InputError("score: must be a probability from 0 to 1 for every cutout")
    return lens, scores


def checked_groups(group: ArrayLike | None, n: int) -> NDArray[Any] | None:
    """As an array. Raises InputError where there is not one for each of n cutouts."""
    if group is None:
        return None
    groups = np.asarray(group)
    if groups.shape != (n,):
        raise InputError(f"group has the shape {groups.shape}; ({n},), one a cutout, is meant")
    return groups


def is_lens(label: ArrayLike) -> NDArray[np.bool_]:
    """Which labels (n,) are 1. Raises InputError where one is neither that nor 0."""
    labels = np.asarray(label)
    if not np.isin(labels, (0, 1)).all():
        raise InputError("label: must be 1 (lens) or 0 (not) for every cutout")
    return labels == 1


def _levels(label: NDArray[np.bool_], score: Array) -> _Levels:
    return _counted(label, _ranked(score), np.ones(len(score)))


def _ranked(score: Array) -> tuple[Array, NDArray[np.intp]]:
    """(the distinct scores, the highest first, and which of them each cutout has)"""
    distinct, level = np.unique(-score, return_inverse=True)
    return -distinct, level


def _counted(
    label: NDArray[np.bool_], ranked: tuple[Array, NDArray[np.intp]], weight: Array
) -> _Levels:
    """weight (n,): how often each cutout counts."""
    score, level = ranked
    lens, nonlens = (
        np.bincount(level[kind], weight[kind], len(score)).astype(np.float64)
        for kind in (label, ~label)
    )
    return _Levels(score, lens, nonlens)


def _resampled(levels: _Levels, times: int, seed: int) -> Iterator[_Levels]:
    """Resamplings of single cutouts, each class apart; by score, so that their order is nothing."""
    random = np.random.default_rng(seed)
    n = len(levels.score)

    def draw(counts: Array) -> Array:
        owner = np.repeat(np.arange(n), counts.astype(int))
        picked = owner[random.integers(len(owner), size=len(owner))] if len(owner) else owner
        return np.bincount(picked, minlength=n).astype(np.float64)

    for _ in range(times):
        yield _Levels(levels.score, draw(levels.lens), draw(levels.nonlens))


def _values(levels: _Levels) -> dict[str, float | None]:
    return {name: metric() for name, metric in _metrics(levels).items()}


def _metrics(levels: _Levels) -> dict[str, Callable[[], float | None]]:
    n_lens, n_nonlens = int(levels.lens.sum()), int(levels.nonlens.sum())
    both = n_lens > 0 and n_nonlens > 0
    tail = max(TAIL_LEAST, math.ceil(TAIL * (n_lens + n_nonlens)))

    def where(resolved: bool, metric: Callable[[], float]) -> Callable[[], float | None]:
        return lambda: float(metric()) if resolved else None

    def at_fpr(fpr: float) -> Callable[[], float | None]:
        return where(both and n_nonlens * fpr >= 1, lambda: _tpr(levels, n_nonlens * fpr))

    return {
        "auroc": where(both, lambda: _auroc(levels)),
        "average_precision": where(both, lambda: _average_precision(levels)),
        "tpr0": where(both, lambda: _tpr(levels, 0)),
        "tpr10": where(both and n_nonlens >= 10, lambda: _tpr(levels, 9)),
        **{name: at_fpr(fpr) for name, fpr in FPRS.items()},
        "precision_at_k": where(both, lambda: _precision_at(levels, min(TOP, n_lens))),
        "ece": lambda: _ece(levels, n_lens + n_nonlens, BINS),
        "ece_top": where(tail <= n_lens + n_nonlens, lambda: _ece(levels, tail, TAIL_BINS)),
        "brier": lambda: _brier(levels),
    }


def _auroc(levels: _Levels) -> float:
    """The chance that a lens scores above a non-lens (Mann & Whitney 1947)."""
    below = levels.nonlens.sum() - levels.mistaken + levels.nonlens / 2
    return levels.lens @ below / (levels.lens.sum() * levels.nonlens.sum())


def _average_precision(levels: _Levels) -> float:
    chosen = np.maximum(levels.chosen, 1)  # a resampling may miss a level
    return levels.lens @ (levels.found / chosen) / levels.lens.sum()


def _tpr(levels: _Levels, false_positives: float) -> float:
    """The highest true positive rate with no more than so many false positives."""
    allowed = _allowed(levels.mistaken, false_positives)
    return levels.found[allowed].max(initial=0) / levels.lens.sum()


def _allowed(mistaken: Array, false_positives: float) -> NDArray[np.bool_]:
    return mistaken <= false_positives * (1 + 1e-12)  # 0.01 x 300 is 3


def _precision_at(levels: _Levels, k: int) -> float:
    count = levels.lens + levels.nonlens
    taken = np.clip(k - (levels.chosen - count), 0, count)
    return float(levels.lens @ (taken / np.maximum(count, 1)) / k)


def _ece(levels: _Levels, highest: int, bins: int) -> float:
    """Over the cutouts with the highest scores, so many of them."""
    chosen, excess = (np.concatenate([[0], of]) for of in (levels.chosen, levels.excess))
    edges = np.linspace(0, highest, bins + 1)
    return float(np.abs(np.diff(np.interp(edges, chosen, excess))).sum() / highest)


def _brier(levels: _Levels) -> float:
    error = levels.lens @ (1 - levels.score) ** 2 + levels.nonlens @ levels.score**2
    return float(error / (levels.lens.sum() + levels.nonlens.sum()))
