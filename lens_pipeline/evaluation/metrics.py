"""Metrics of a lens finder, with intervals, as the field defines them.

Metcalf et al. 2019 (A&A 625, A119) for TPR0 and TPR10; thresholds are realised ones, `score >= t`,
and nothing is interpolated between them. No result depends on the order of the cutouts, but for
resamplings of cutouts that are groups of their own (`paired_bootstrap`), which are others.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit

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
CALIBRATION = ("ece", "ece_balanced", "ece_top")
ERRORS = (*CALIBRATION, "brier")  # of probabilities; the others are of ranks
LOGITS = 50.0  # beyond, a probability is 0 or 1
AT_ONCE = 1 << 17  # numbers: so many samples are counted together


@dataclass(frozen=True)
class _Levels:
    """Samples of cutouts by distinct score (levels,), or of each sample, (samples, levels), highest
    first: how many lenses and non-lenses have it, (samples, levels)."""

    score: Array
    lens: Array
    nonlens: Array

    @cached_property
    def n_lens(self) -> Array:
        return self.lens.sum(axis=1)

    @cached_property
    def n_nonlens(self) -> Array:
        return self.nonlens.sum(axis=1)

    @cached_property
    def n(self) -> Array:
        return self.n_lens + self.n_nonlens

    @cached_property
    def found(self) -> Array:
        """Lenses at or above each score."""
        return np.cumsum(self.lens, axis=1)

    @cached_property
    def mistaken(self) -> Array:
        """Non-lenses at or above each score."""
        return np.cumsum(self.nonlens, axis=1)

    @cached_property
    def chosen(self) -> Array:
        """Cutouts at or above each score."""
        return self.found + self.mistaken

    @cached_property
    def excess(self) -> Array:
        """Lenses at or above each score beyond those that the scores promise."""
        return self.found - np.cumsum(self.score * (self.lens + self.nonlens), axis=1)

    @cached_property
    def balanced(self) -> "_Levels":
        """With lenses and non-lenses weighing the same, and the scores, which hold at the mixture
        of each sample, brought there (see `at_mixture`). A class that is absent stays so."""
        of_lens, of_nonlens = (
            (self.n / np.where(of > 0, 2 * of, self.n))[:, None]
            for of in (self.n_lens, self.n_nonlens)
        )
        lens, nonlens = self.score * of_lens, (1 - self.score) * of_nonlens
        return _Levels(lens / (lens + nonlens), self.lens * of_lens, self.nonlens * of_nonlens)


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
    the integers `n_lens` and `n_nonlens`, and `ece_by_chance` and `ece_balanced_by_chance`: the
    mean of these errors where the probabilities are right but for the share of lenses, None where
    `bootstrap` is 0 or a class that it needs is absent. `low` and `high` bound the middle 95 % of
    `bootstrap` resamplings, that of an ece centred on its value, with a `low` of 0 where more than
    5 % of such probabilities show as much; they are None where `bootstrap` is 0. group (n,): whole
    groups are drawn, as in `paired_bootstrap`, for cutouts of one galaxy or region are not
    independent; else lenses and non-lenses are, apart, and also where a class is of fewer than
    FEWEST_GROUPS groups, whose resamplings would be alike: there bounds are too close.
    No resampling has a non-lens that scores higher than those of the sample: `low` of a TPR at an
    FPR (that of one non-lens for tpr0, so always) is 0 where so many non-lenses (independent ones,
    see `design_effect`) may, with a chance of more than 5 %, show none of those that decide it.
    Where every lens is right in all of them, or none is, the bound is that of `jeffreys` for as
    many as the rarer class has cutouts (groups).

    auroc: ties count half. average_precision: sum of precision x step in recall. tpr0, tpr10: the
    highest true positive rate with no, and with fewer than ten, false positives. tpr_at_fpr_x: the
    highest with a false positive rate <= x. precision_at_k: among the k highest scores, k = 100 or
    n_lens if fewer; of ties at the k-th, what is expected. ece: the expected calibration error over
    15 bins of equal counts, ties and cutouts at an edge being shared. ece_balanced: the same where
    lenses and non-lenses weigh the same, and the scores are brought there from the sample's own
    mixture: where lenses are few, the probabilities of most are near 0, and so is the ece of scores
    that promise many times too many. ece_top: the ece over 5 bins of the tenth of the cutouts with
    the highest scores, 50 at least. brier: the mean squared error.

    A value that the sample cannot resolve is None: a TPR at an FPR below 1 / n_nonlens, tpr10 with
    fewer than ten non-lenses, ece_top with fewer than 50 cutouts, and all but ece, ece_top and
    brier where a class is absent.
    Raises InputError where label, score and group differ in length or hold anything else.
    """
    label, score = _checked(label, score)
    of_groups = checked_groups(group, len(label))
    levels = _levels(label, score)
    values = {name: metric(levels).item() for name, metric in METRICS.items()}
    if of_groups is None or not _enough_groups(label, of_groups):
        groups = np.arange(len(label))
        samples = _resampled(levels, bootstrap, seed)
    else:
        _, groups = np.unique(of_groups, return_inverse=True)
        weights = _drawn_groups(label, groups, bootstrap, seed)
        samples = _counted(label, _ranked(score), weights)
    draws = _over(samples, METRICS) if bootstrap else {}
    n_nonlens = int(levels.n_nonlens.item())
    deciding = FPRS | {"tpr0": 1 / max(1, n_nonlens), "tpr10": ENOUGH / max(ENOUGH, n_nonlens)}
    rarer = min(len(np.unique(groups[of_class])) for of_class in (label, ~label))
    chance = _by_chance(score, label, groups) if draws else {}
    by_chance = {
        f"{name}_by_chance": float(np.mean(chance[name]))
        if chance and math.isfinite(values[name])
        else None
        for name in ("ece", "ece_balanced")
    }
    metrics: dict[str, Any] = {}
    for name, value in values.items():
        low = high = None
        if math.isfinite(value) and draws:
            drawn = draws[name]
            drawn = drawn[np.isfinite(drawn)]  # of groups, some have too few of a class
            if name in CALIBRATION:
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
        known = value if math.isfinite(value) else None
        metrics[name] = {"value": known, "low": low, "high": high}
    counts = {"n_lens": int(levels.n_lens.item()), "n_nonlens": n_nonlens}
    return metrics | by_chance | counts


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
    of_groups = checked_groups(group, len(lens))
    # Numbers: to sort names once for each score takes longer.
    _, groups = np.unique(
        np.arange(len(lens)) if of_groups is None else of_groups, return_inverse=True
    )
    found = {}
    for name, (_, score) in checked.items():
        samples = _counted(lens, _ranked(score), _drawn_groups(lens, groups, times, seed=0))
        found[name] = _over(samples, {metric: METRICS[metric]})[metric]
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
    """(CHANCES,) of each of CALIBRATION that cutouts with these probabilities (n,) have where they
    are exactly right; but for the share of lenses, which is the sample's: chance makes the less of
    it the more lenses there are. member (n,): numbers of groups, whose labels are alike: by the
    root of how many times the variance of label - score is that of independent cutouts (Kish 1965)
    they are larger. What of it is of all groups alike, or goes with the score, is an error of the
    scores."""
    scores = _with_share(np.sort(score), label.mean())  # their order is nothing
    random, (distinct, level) = np.random.default_rng(0), _ranked(scores)
    aside = score - score.mean()
    error = (label - score) - (label - score).mean()
    error -= aside * ((aside @ error) / max(aside @ aside, np.finfo(float).tiny))
    alone = (error**2).sum()
    effect = 1.0
    if alone > np.finfo(float).eps * len(error):  # not of rounding alone
        effect = max(effect, (np.bincount(member, error) ** 2).sum() / alone)
    together = np.bincount(level, minlength=len(distinct)).astype(np.float64)
    drawn = (random.random(len(scores)) < scores for _ in range(CHANCES))
    lens = (np.bincount(level, found, len(distinct)) for found in drawn)
    samples = _blocks(distinct, ((found, together - found) for found in lens))
    made = _over(samples, {name: METRICS[name] for name in CALIBRATION})
    return {name: np.nan_to_num(of) * np.sqrt(effect) for name, of in made.items()}


def _with_share(score: Array, share: float) -> Array:
    """Scores (n,) with as much added to all logits as makes their mean this share; as they are
    where nothing does."""

    def excess(more: float) -> float:
        return float(expit(logit(score) + more).mean()) - share

    if not excess(-LOGITS) < 0 < excess(LOGITS):
        return score
    return expit(logit(score) + brentq(excess, -LOGITS, LOGITS))


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
    n_lens, n_nonlens = levels.n_lens.item(), levels.n_nonlens.item()
    if not n_lens or not n_nonlens:
        raise InputError("label: a ROC curve needs lenses and non-lenses")
    return (
        np.concatenate([[0], levels.mistaken[0] / n_nonlens]),
        np.concatenate([[0], levels.found[0] / n_lens]),
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
    (levels,) = _counted(label, _ranked(score), [np.ones(len(score))])
    return levels


def _ranked(score: Array) -> tuple[Array, NDArray[np.intp]]:
    """(the distinct scores, the highest first, and which of them each cutout has)"""
    distinct, level = np.unique(-score, return_inverse=True)
    return -distinct, level


def _counted(
    label: NDArray[np.bool_], ranked: tuple[Array, NDArray[np.intp]], weights: Iterable[Array]
) -> Iterator[_Levels]:
    """weights: for each sample, how often each cutout (n,) counts."""
    score, level = ranked
    lens, nonlens = level[label], level[~label]
    counts = (
        (
            np.bincount(lens, weight[label], len(score)),
            np.bincount(nonlens, weight[~label], len(score)),
        )
        for weight in weights
    )
    return _blocks(score, counts)


def _resampled(levels: _Levels, times: int, seed: int) -> Iterator[_Levels]:
    """Resamplings of single cutouts, each class apart; by score, so that their order is nothing."""
    random = np.random.default_rng(seed)
    n = len(levels.score)
    lens, nonlens = (
        np.repeat(np.arange(n), counts[0].astype(int)) for counts in (levels.lens, levels.nonlens)
    )

    def draw(owner: NDArray[np.intp]) -> NDArray[np.intp]:
        picked = owner[random.integers(len(owner), size=len(owner))] if len(owner) else owner
        return np.bincount(picked, minlength=n)

    return _blocks(levels.score, ((draw(lens), draw(nonlens)) for _ in range(times)))


def _blocks(
    score: Array, samples: Iterable[tuple[NDArray[Any], NDArray[Any]]]
) -> Iterator[_Levels]:
    """samples: (lenses, non-lenses) of each score; so many together as make small work quick and
    big work small."""
    left = iter(samples)
    while block := list(islice(left, max(1, AT_ONCE // len(score)))):
        lens, nonlens = (np.stack(kind, dtype=np.float64) for kind in zip(*block, strict=True))
        block.clear()
        yield _Levels(score, lens, nonlens)


def _over(samples: Iterable[_Levels], metrics: Mapping[str, "Metric"]) -> dict[str, Array]:
    """Metrics of all samples, NaN for those that cannot resolve one: {name: (samples,)}."""
    found = [{name: metric(levels) for name, metric in metrics.items()} for levels in samples]
    return {
        name: np.concatenate([np.zeros(0), *(values[name] for values in found)]) for name in metrics
    }


def _where(resolved: NDArray[np.bool_], numerator: Array, denominator: Array) -> Array:
    """Their ratio, NaN where it is not resolved."""
    return np.divide(numerator, denominator, out=np.full(len(resolved), np.nan), where=resolved)


def _both(levels: _Levels) -> NDArray[np.bool_]:
    return (levels.n_lens > 0) & (levels.n_nonlens > 0)


def _auroc(levels: _Levels) -> Array:
    """The chance that a lens scores above a non-lens (Mann & Whitney 1947)."""
    below = levels.n_nonlens[:, None] - levels.mistaken + levels.nonlens / 2
    above = (levels.lens * below).sum(axis=1)
    return _where(_both(levels), above, levels.n_lens * levels.n_nonlens)


def _average_precision(levels: _Levels) -> Array:
    chosen = np.maximum(levels.chosen, 1)  # a resampling may miss a level
    purity = (levels.lens * (levels.found / chosen)).sum(axis=1)
    return _where(_both(levels), purity, levels.n_lens)


def _tpr(
    levels: _Levels, false_positives: ArrayLike, resolved: NDArray[np.bool_] | bool = True
) -> Array:
    """The highest true positive rate with no more than so many false positives, of each sample."""
    allowed = _allowed(levels.mistaken, np.reshape(false_positives, (-1, 1)))
    found = np.where(allowed, levels.found, 0).max(axis=1)
    return _where(resolved & _both(levels), found, levels.n_lens)


def _tpr_at(fpr: float) -> "Metric":
    def metric(levels: _Levels) -> Array:
        most = levels.n_nonlens * fpr
        return _tpr(levels, most, most >= 1)

    return metric


def _allowed(mistaken: Array, false_positives: ArrayLike) -> NDArray[np.bool_]:
    return mistaken <= np.asarray(false_positives) * (1 + 1e-12)  # 0.01 x 300 is 3


def _precision_at_k(levels: _Levels) -> Array:
    k = np.minimum(TOP, levels.n_lens)
    count = levels.lens + levels.nonlens
    taken = np.clip(k[:, None] - (levels.chosen - count), 0, count)
    right = (levels.lens * (taken / np.maximum(count, 1))).sum(axis=1)
    return _where(_both(levels), right, k)


def _ece(levels: _Levels, highest: Array, bins: int) -> Array:
    """Over the cutouts with the highest scores, so many of each sample; NaN where it has fewer."""
    part = np.linspace(0, 1, bins + 1)
    chosen, excess = (np.pad(of, ((0, 0), (1, 0))) for of in (levels.chosen, levels.excess))
    rows = zip(highest, chosen, excess, strict=True)
    at_edges = np.array([np.interp(part * n, *curve) for n, *curve in rows])
    missed = np.abs(np.diff(at_edges, axis=1)).sum(axis=1)
    return _where(highest <= levels.n, missed, highest)


def _ece_balanced(levels: _Levels) -> Array:
    balanced = levels.balanced
    return np.where(_both(levels), _ece(balanced, balanced.n, BINS), np.nan)


def _ece_top(levels: _Levels) -> Array:
    return _ece(levels, np.maximum(TAIL_LEAST, np.ceil(TAIL * levels.n)), TAIL_BINS)


def _brier(levels: _Levels) -> Array:
    error = levels.lens @ (1 - levels.score) ** 2 + levels.nonlens @ levels.score**2
    return error / levels.n


Metric = Callable[[_Levels], Array]  # of each sample, NaN where it cannot resolve it
METRICS: Mapping[str, Metric] = {
    "auroc": _auroc,
    "average_precision": _average_precision,
    "tpr0": lambda levels: _tpr(levels, 0),
    "tpr10": lambda levels: _tpr(levels, ENOUGH - 1, levels.n_nonlens >= ENOUGH),
    **{name: _tpr_at(fpr) for name, fpr in FPRS.items()},
    "precision_at_k": _precision_at_k,
    "ece": lambda levels: _ece(levels, levels.n, BINS),
    "ece_balanced": _ece_balanced,
    "ece_top": _ece_top,
    "brier": _brier,
}
