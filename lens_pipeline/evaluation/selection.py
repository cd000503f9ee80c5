"""What a lens finder finds of what there is: completeness against what the catalogue knows of the
lenses (the selection function), and false positives by kind.

Pure functions of score tables; no result depends on the order of the cutouts.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.evaluation.fractions import (
    design_effect,
    fraction_of,
)
from lens_pipeline.evaluation.metrics import lens_metrics, threshold_at_fpr

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
