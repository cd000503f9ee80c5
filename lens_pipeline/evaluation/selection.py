"""What a lens finder finds of what there is, and what a survey may expect of it.

The selection function (completeness against what the catalogue knows of the lenses), false
positives by kind, purity at a stated prevalence. Pure functions of labels, scores and score tables;
no result depends on the order of the cutouts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lens_pipeline.errors import InputError
from lens_pipeline.evaluation.fractions import (
    design_effect,
    fraction,
    fraction_of,
    jeffreys,
    rate_beyond,
    upper_limit,
)
from lens_pipeline.evaluation.metrics import INTERVAL, lens_metrics, roc, threshold_at_fpr

Array = NDArray[np.float64]

# Columns of a catalogue, as the simulator names them, and of FLUX_RATIO.
QUANTITIES: Mapping[str, str] = {
    "einstein_radius": "Einstein radius (arcsec)",
    "arc_snr": "arc signal-to-noise",
    "arc_contrast": "arc / lens surface brightness",
    "source_magnitude": "source magnitude (AB)",
    "z_source": "source redshift",
    "z_lens": "lens redshift",
    "flux_ratio": "arc / lens flux",
}
MAP = ("einstein_radius", "source_magnitude")
NO_KIND = "not stated"
DECADES = (1e-1, 1e-2, 1e-3, 1e-4)

MAX_BINS = 8
LENSES_PER_BIN = 20
MAX_CELLS = 6  # along each side of the map
LENSES_PER_CELL = 10  # on average

PREVALENCE = 1e-3
OBJECTS = 1_000_000
DRAWS = 4000
POINTS = 200


def working_fpr(n_nonlens: int) -> float:
    """The smallest false positive rate in decades that so many non-lenses can resolve.

    From 1e-1 to 1e-4; 0, no false positive at all, for fewer than ten.
    """
    return min((fpr for fpr in DECADES if n_nonlens * fpr >= 1), default=0.0)


def _groups(table: pd.DataFrame) -> NDArray[Any] | None:
    return table["group"].to_numpy(str) if "group" in table else None


def selection_function(table: pd.DataFrame) -> dict[str, Any]:
    """The completeness of a choice of cutouts against what is known of the lenses.

    table: one row a cutout; `label` (1 lens, 0 not), `probability`, and, where they are known,
    `group`, and any of the simulator's columns (see `Simulation`). Cutouts are chosen at the
    threshold of `threshold_at_fpr` for `working_fpr`. Returns

    - `fpr`, `threshold` (None where no threshold has so few false positives and finds a lens),
      `n_nonlens`, `false_positives`, and `completeness` of all lenses;
    - `quantities`: {column of QUANTITIES: `missing`, the lenses of which it is not known, and
      `bins` of equal counts}, each bin with `low`, `high` and `median` (of the quantity), `n`,
      `found` and `completeness`. Equal values share a bin. Columns that are absent, or of which
      nothing is known, are left out;
    - `map`: {`x`, `y` (columns), `x_edges`, `y_edges`, `n`, `found` (row by row of y)} over
      Einstein radius and source magnitude; None where fewer than 40 lenses have both.

    A `completeness` is {"value", "low", "high"}, a fraction with its 95 % interval; of groups: see
    `design_effect`.
    Raises InputError as `roc` does.
    """
    label, score = table["label"].to_numpy(dtype=np.int8), table["probability"].to_numpy(float)
    n_nonlens = int((label == 0).sum())
    fpr = working_fpr(n_nonlens)
    threshold = threshold_at_fpr(label, score, fpr)
    lenses = table[label == 1]
    found, groups = lenses["probability"].to_numpy(float) >= threshold, _groups(lenses)
    known = {name: values for name in QUANTITIES if (values := _quantity(lenses, name)) is not None}
    return {
        "fpr": fpr,
        "threshold": threshold if np.isfinite(threshold) else None,
        "n_nonlens": n_nonlens,
        "false_positives": int((score[label == 0] >= threshold).sum()),
        "completeness": fraction_of(found, groups),
        "quantities": {
            name: {
                "missing": int(np.isnan(values).sum()),
                "bins": _bins(values, found, groups),
            }
            for name, values in known.items()
        },
        "map": _map(known[MAP[0]], known[MAP[1]], found) if known.keys() >= set(MAP) else None,
    }


def _quantity(lenses: pd.DataFrame, name: str) -> Array | None:
    """(lenses,), NaN where it is not known; None where it never is."""
    if name == "flux_ratio":
        needed = ("magnification", "source_magnitude", "lens_magnitude")
        parts = [_quantity(lenses, column) for column in needed]
        if any(part is None for part in parts):
            return None
        magnification, source, lens = parts
        values = magnification * 10 ** (-0.4 * (source - lens))  # type: ignore[operator]
    elif name in lenses:
        values = pd.to_numeric(lenses[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
        values = np.where(np.isfinite(values), values, np.nan)
    else:
        return None
    return None if np.isnan(values).all() else values


def _bins(
    values: Array, found: NDArray[np.bool_], groups: NDArray[Any] | None
) -> list[dict[str, Any]]:
    usual = design_effect(found, groups)
    there = ~np.isnan(values)
    values, found = values[there], found[there]
    groups = None if groups is None else groups[there]
    wanted = int(np.clip(len(values) // LENSES_PER_BIN, 1, MAX_BINS))
    edges = np.unique(np.quantile(values, np.linspace(0, 1, wanted + 1)))
    # Of a bin the upper edge belongs to it, as `pandas.qcut` has it; of the first, the lower, too.
    place = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, None)
    bins = []
    for number in np.unique(place):
        inside = place == number
        bins.append(
            {
                "low": float(values[inside].min()),
                "high": float(values[inside].max()),
                "median": float(np.median(values[inside])),
                "n": int(inside.sum()),
                "found": int(found[inside].sum()),
                "completeness": fraction_of(
                    found[inside], None if groups is None else groups[inside], usual
                ),
            }
        )
    return bins


def _map(x: Array, y: Array, found: NDArray[np.bool_]) -> dict[str, Any] | None:
    known = ~np.isnan(x) & ~np.isnan(y)
    x, y, found = x[known], y[known], found[known]
    cells = int(min(np.sqrt(len(x) / LENSES_PER_CELL), MAX_CELLS))
    if cells < 2:
        return None
    n, x_edges, y_edges = np.histogram2d(x, y, bins=cells)
    hits, _, _ = np.histogram2d(x[found], y[found], bins=(x_edges, y_edges))
    return {
        "x": MAP[0],
        "y": MAP[1],
        "x_edges": x_edges.tolist(),
        "y_edges": y_edges.tolist(),
        "n": n.T.astype(int).tolist(),
        "found": hits.T.astype(int).tolist(),
    }


def false_positives_by_kind(table: pd.DataFrame, threshold: float | None) -> dict[str, Any]:
    """Of each kind of non-lens: how many there are, are chosen, and how they rank.

    table: as for `selection_function`, with a column `kind`; threshold: the lowest probability that
    is chosen, None where none is. Returns {kind: `n`, `false_positives`, `false_positive_rate` (see
    `fraction`), `auroc` against all lenses, None where there is none}; those without a kind are of
    NO_KIND, and the result is empty where no non-lens has one.
    """
    lenses, others = (table[table["label"] == label] for label in (1, 0))
    if "kind" not in table or others["kind"].isna().all():
        return {}
    lowest = np.inf if threshold is None else threshold
    usual = design_effect(others["probability"] >= lowest, _groups(others))
    kinds = {}
    for kind, part in others.groupby(others["kind"].astype(object).fillna(NO_KIND)):
        against = pd.concat([lenses, part])
        ranked = lens_metrics(
            against["label"].to_numpy(dtype=np.int8), against["probability"].to_numpy(), bootstrap=0
        )
        chosen = (part["probability"] >= lowest).to_numpy()
        kinds[str(kind)] = {
            "n": len(part),
            "false_positives": int(chosen.sum()),
            "false_positive_rate": fraction_of(chosen, _groups(part), usual),
            "auroc": ranked["auroc"]["value"],
        }
    return kinds


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
    seed: int = 0,
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
    label, score = np.asarray(label), np.asarray(score, dtype=np.float64)
    groups = None if group is None else np.asarray(group)
    n_nonlens = int((label == 0).sum())
    thresholds = {
        threshold_at_fpr(label, score, fpr): fpr
        for fpr in (*(fpr for fpr in DECADES if n_nonlens * fpr >= 1), 0.0)
    }
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
                    **_expected(counts, effects, prevalence, n_objects, seed),
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
    seed: int,
) -> dict[str, Any]:
    """counts: found, n_lens, mistaken, n_nonlens; effects: of both classes."""
    found, n_lens, mistaken, n_nonlens = counts
    n_lenses, n_others = n_objects * prevalence, n_objects * (1 - prevalence)
    completeness = fraction(found, n_lens, effects[0])
    lenses = {end: value * n_lenses for end, value in completeness.items() if value is not None}
    if mistaken:
        rate: dict[str, Any] = rate_beyond(mistaken, n_nonlens, effects[1])
        tpr, fpr = found / n_lens, rate["value"]
        drawn = _posteriors(counts, effects, seed)
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
    its upper limit; group: as of `forecast`. Raises InputError as that does.
    """
    _check_prevalence(prevalence)
    fpr, tpr, threshold = roc(label, score)
    labels, scores = np.asarray(label), np.asarray(score, dtype=np.float64)
    n_lens, n_nonlens = int((labels == 1).sum()), int((labels == 0).sum())
    last = len(threshold) - 1
    # What is chosen lies among the first: there are more points.
    place = np.unique(np.geomspace(1, last, min(POINTS, last)).round().astype(int))
    fpr, tpr, threshold = fpr[place], tpr[place], threshold[place]
    mistaken = (fpr * n_nonlens).round()
    others = scores[labels == 0]
    own = None if group is None else np.asarray(group)[labels == 0]
    usual = design_effect(others >= np.quantile(others, 1 - DECADES[0]), own)
    effect = np.array([design_effect(others >= at, own, usual) for at in threshold])
    low, high = jeffreys(mistaken / effect, n_nonlens / effect)
    none = mistaken == 0
    high = np.where(none, upper_limit(n_nonlens / effect), high)
    return pd.DataFrame(
        {
            "threshold": threshold,
            "completeness": tpr,
            "false_positives": mistaken.astype(int),
            "purity_of_sample": purity(tpr, fpr, n_lens / (n_lens + n_nonlens)),
            "purity": np.where(none, np.nan, purity(tpr, fpr, prevalence)),
            "purity_low": purity(tpr, high, prevalence),
            "purity_high": np.where(none, np.nan, purity(tpr, low, prevalence)),
        }
    )


def _posteriors(counts: Sequence[int], effects: Sequence[float], seed: int) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    found, n_lens, mistaken, n_nonlens = np.array(counts) / np.repeat(effects, 2)
    tpr = random.beta(found + 0.5, n_lens - found + 0.5, DRAWS)
    return tpr, random.beta(mistaken + 1, n_nonlens - mistaken, DRAWS)  # see `rate_beyond`


def _interval(value: float, drawn: Array) -> dict[str, float | None]:
    low, high = np.percentile(drawn, INTERVAL)
    return {"value": value, "low": float(low), "high": float(high)}
