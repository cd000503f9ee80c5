"""Which fusion an ensemble takes: all are fitted and compared on the validation set."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit

from lens_pipeline.choices import Choice, Method, Strategy
from lens_pipeline.ensemble.calibration import Calibration, check_validation, fit_calibration
from lens_pipeline.ensemble.fusion import Fused, Fusion, fit_fusion, with_uncertainty
from lens_pipeline.evaluation.metrics import (
    INTERVAL,
    by_rank,
    independent_groups,
    lens_metrics,
    ranked_bootstrap,
    ranking_metric,
)

Array = NDArray[np.float64]
FOLDS = 5
SURE = 0.05  # of the resamplings, at most, may contradict
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FittedFusion:
    """What turns the members' raw logits into a calibrated one.

    members: the calibration of each; calibration: of what the fusion gives; shares: how far each
    member decides (see `moved_by`), all alike where that is not known.
    """

    members: tuple[Calibration, ...]
    fusion: Fusion
    calibration: Calibration
    shares: tuple[float, ...] = ()

    def __call__(self, logits: Array, deviation: Array) -> Array:
        """Logits (n,) of raw logits and their deviations under dropout, both (n, members)."""
        calibrated, variance = _calibrated(self.members, logits, deviation)
        return self.calibration(self.fusion(calibrated, variance))

    def fuse(self, logits: Array, draws: Array) -> Fused:
        """Scores of raw logits (n, members) and of the same with dropout (n, members, draws)."""
        n = len(self.members)
        drawn = np.stack([one(draws[:, i]) for i, one in enumerate(self.members)], axis=1)
        shares = np.array(self.shares or n * (1 / n,))
        return with_uncertainty(self(logits, draws.std(axis=2)), drawn, shares)

    def moved_by(self, logits: Array, deviation: Array) -> Array:
        """How far each member decides, (members,), 1 in sum: what the fused logit changes by, as
        root mean square, where the member's own is held at its mean. Arguments as of a call."""
        fused = self(logits, deviation)
        changes = []
        for member, mean in enumerate(logits.mean(axis=0)):
            held = logits.copy()
            held[:, member] = mean
            changes.append(np.sqrt(np.mean((self(held, deviation) - fused) ** 2)))
        total = sum(changes)
        return np.array(changes) / total if total else np.full(len(changes), 1 / len(changes))


def fit(
    strategy: Strategy,
    method: Method,
    logits: Array,
    deviation: Array,
    label: NDArray[np.integer],
) -> FittedFusion:
    """Calibrate the members, fuse them, calibrate the result.

    logits, deviation: the members' raw logits and their standard deviations under dropout, float64
    (n, members); label (n,). Raises InputError as `fit_calibration` does.
    """
    check_validation(logits, label)
    members = tuple(fit_calibration(one, label, method) for one in logits.T)
    calibrated, variance = _calibrated(members, logits, deviation)
    fusion = fit_fusion(strategy, calibrated, variance, label, _rank(label))
    # A fusion need not have its zero where lenses and non-lenses are alike: a slope is not enough.
    # Steps that were fitted to the same labels as the members' would be overfitted once more.
    calibration = fit_calibration(fusion(calibrated, variance), label, "platt")
    fitted = FittedFusion(members, fusion, calibration)
    return replace(fitted, shares=tuple(fitted.moved_by(logits, deviation).tolist()))


def choose(
    choice: Choice,
    method: Method,
    logits: Array,
    deviation: Array,
    label: NDArray[np.integer],
    group: NDArray[Any],
) -> tuple[FittedFusion, pd.DataFrame]:
    """(the fusion that was asked for, or the best; the comparison of all: see `compare`).

    group (n,): of the cutouts. Other arguments as of `fit`. Where a class has fewer than two
    cutouts a fold nothing can be compared: the table is empty, and the mean is the best.
    """
    check_validation(logits, label)
    counts = np.bincount(label == 1, minlength=2)
    table = pd.DataFrame()
    if counts.min() >= 2 * FOLDS:
        table = compare(method, logits, deviation, label, group)
    elif choice == "best":
        log.info(
            "  %d lenses and %d non-lenses of the validation set cannot tell fusions apart; "
            "the mean is taken",
            counts[1],
            counts[0],
        )
    best: Strategy = "mean" if table.empty else best_of(table)
    return fit(best if choice == "best" else choice, method, logits, deviation, label), table


def best_of(comparison: pd.DataFrame) -> Strategy:
    """The first in a table of `compare`; but a single member only where it beats the best of the
    others in 95 % of the resamplings: which of several is best by chance is easily overrated, and
    then it is less than their fusion."""
    fused = comparison[comparison["strategy"] != "single"].iloc[0]
    best: Strategy = "single" if fused["better"] <= SURE else fused["strategy"]
    return best


def compare(
    method: Method,
    logits: Array,
    deviation: Array,
    label: NDArray[np.integer],
    group: NDArray[Any],
) -> pd.DataFrame:
    """What each strategy is worth on validation cutouts that it was not fitted to.

    Arguments as of `choose`. Each fifth of the groups is scored by what was fitted to the others,
    and whole groups are resampled: see `independent_groups`.
    One row a strategy, the best first: `strategy`; `metric`, the name of what they are ranked by,
    see `ranked_bootstrap`; its `value`, and its `mean`, `low` and `high` over a thousand
    resamplings, the same for all; `gain`, `gain_low` and `gain_high` over the best single member;
    `better`, the fraction of resamplings in which it was better than that; `auroc` and `ece`.
    """
    check_validation(logits, label)
    group = independent_groups(label, group)
    fold = _folds(label, group)
    scores: dict[str, Array] = {}
    for strategy in get_args(Strategy):
        score = np.empty(len(label))
        for number in range(FOLDS):
            out = fold == number
            fitted = fit(strategy, method, logits[~out], deviation[~out], label[~out])
            score[out] = expit(fitted(logits[out], deviation[out]))
        scores[strategy] = score
    metric, drawn = ranked_bootstrap(label, scores, group)
    rows = []
    for name, score in scores.items():
        plain = lens_metrics(label, score, bootstrap=0)
        gain = drawn[name] - drawn["single"]
        low, high = np.percentile(drawn[name], INTERVAL)
        gain_low, gain_high = np.percentile(gain, INTERVAL)
        rows.append(
            {
                "strategy": name,
                "metric": metric,
                "value": plain[metric]["value"],
                "mean": drawn[name].mean(),
                "low": low,
                "high": high,
                "gain": gain.mean(),
                "gain_low": gain_low,
                "gain_high": gain_high,
                "better": float((gain > 0).mean() + (gain == 0).mean() / 2),
                "auroc": plain["auroc"]["value"],
                "ece": plain["ece"]["value"],
            }
        )
    # Of equals the simpler: they are listed so, and the sort is stable.
    return pd.DataFrame(rows).sort_values("mean", ascending=False, kind="stable", ignore_index=True)


def _calibrated(
    members: tuple[Calibration, ...], logits: Array, deviation: Array
) -> tuple[Array, Array]:
    """Calibrated logits and their variances under dropout, both (n, members)."""
    centre, low, high = (
        np.stack([one(part[:, i]) for i, one in enumerate(members)], axis=1)
        for part in (logits, logits - deviation, logits + deviation)
    )
    return centre, ((high - low) / 2) ** 2


def _folds(label: NDArray[np.integer], group: NDArray[Any]) -> NDArray[np.integer]:
    """A fold for each cutout, that of its group; of groups with lenses and of those without each
    fold has its share."""
    _, member = np.unique(group, return_inverse=True)
    with_lens = np.bincount(member, weights=label == 1) > 0
    random, fold = np.random.default_rng(0), np.empty(len(with_lens), dtype=int)
    for stratum in (~with_lens, with_lens):
        places = random.permutation(np.flatnonzero(stratum))
        fold[places] = np.arange(len(places)) % FOLDS
    return fold[member]


def _rank(label: NDArray[np.integer]) -> Callable[[Array], float]:
    metric = ranking_metric(int(np.count_nonzero(label == 0)))
    return lambda score: float(lens_metrics(label, by_rank(score), bootstrap=0)[metric]["value"])
