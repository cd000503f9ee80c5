"""Results as tables and lines of text, for the terminal, the report and Dagster's pages."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from lens_pipeline.evaluation.metrics import TOP
from lens_pipeline.evaluation.selection import QUANTITIES

COLUMNS = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "tpr_at_fpr_1e-2": "TPR at FPR 1e-2",
    "ece": "calibration error",
}
PRECISION = "precision_at_k"
# In the order of docs/report.md: ranking, its end without false positives, calibration.
MORE_COLUMNS = {
    "auroc": COLUMNS["auroc"],
    "average_precision": COLUMNS["average_precision"],
    "tpr0": "TPR0",
    "tpr10": "TPR10",
    "tpr_at_fpr_1e-2": COLUMNS["tpr_at_fpr_1e-2"],
    "tpr_at_fpr_1e-3": "TPR at FPR 1e-3",
    "tpr_at_fpr_1e-4": "TPR at FPR 1e-4",
    PRECISION: "precision at k",
    "ece": COLUMNS["ece"],
    "ece_balanced": "calibration error, both classes weighing the same",
    "ece_top": "calibration error, highest tenth",
    "brier": "Brier score",
}
UNRESOLVED = "–"
NOTHING_TO_EXPECT = (
    "No threshold finds a lens at a false positive rate that the sample resolves: what a survey "
    "may expect cannot be told."
)
# By what a cutout is found again, as it is printed.
TRACED = {"id": "{}", "kind": "{}", "probability": "{:.4f}", "ra": "{:.5f}", "dec": "{:.5f}"}


def format_metrics_table(metrics: Mapping[str, Mapping[str, Any]], split: str = "Test") -> str:
    """A table for the terminal: one row a model, each figure with its 95 % interval."""
    header = ["", *COLUMNS.values()]
    rows = [[name, *(metric_text(of[key]) for key in COLUMNS)] for name, of in metrics.items()]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in (header, *rows)]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*(line.rstrip() for line in lines), counts_text(metrics, COLUMNS, split)])


def metric_text(metric: Mapping[str, float | None]) -> str:
    """A figure of `lens_metrics` with its interval, where it has one that is wider than nothing."""
    if metric["value"] is None:
        return UNRESOLVED
    value = f"{metric['value']:.3f}"
    if metric["low"] is None or metric["high"] is None:
        return value
    low, high = f"{metric['low']:.3f}", f"{metric['high']:.3f}"
    return value if low == value == high else f"{value} [{low}, {high}]"


def _rate_text(rate: Mapping[str, float]) -> str:
    """With its interval, to two digits: at a prevalence of lenses all of it may be below 0.001."""
    return f"{rate['value']:.2g} [{rate['low']:.2g}, {rate['high']:.2g}]"


def counts_text(
    metrics: Mapping[str, Mapping[str, Any]], columns: Iterable[str], split: str = "Test"
) -> str:
    first = next(iter(metrics.values()))
    text = (
        f"{split} split: {first['n_lens']} lenses, {first['n_nonlens']} non-lenses; "
        "95 % intervals by bootstrap."
    )
    if PRECISION in columns:
        text += f" k: the {min(TOP, first['n_lens'])} highest-scored."
    if any(of[key]["value"] is None for of in metrics.values() for key in columns):
        text += f" {UNRESOLVED}: too few cutouts to tell."
    return text


def kinds_table(kinds: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """A row for each kind of non-lens, those hardest to tell from lenses first."""
    hardest = sorted(kinds.items(), key=lambda item: (item[1]["auroc"] is None, item[1]["auroc"]))
    rows = [
        {
            "kind": kind,
            "cutouts": of_kind["n"],
            "false positives": of_kind["false_positives"],
            "rate": _rate_text(of_kind["false_positive_rate"]),
            "AUROC": of_kind["auroc"],
        }
        for kind, of_kind in hardest
    ]
    return pd.DataFrame(rows)


def surveys_table(surveys: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """A row for each survey: what `lens_metrics` gives on its cutouts."""
    rows = [
        {"survey": name, "lenses": of["n_lens"], "non-lenses": of["n_nonlens"]}
        | {title: metric_text(of[key]) for key, title in COLUMNS.items()}
        for name, of in surveys.items()
    ]
    return pd.DataFrame(rows)


def format_text(form: Mapping[str, Any]) -> str:
    """The `format` of a dataset in words."""
    size, scale = form["image_size"], form["pixel_scale"]
    of = "several scales or an unknown one" if scale is None else f"{scale:g} arcsec"
    return (
        f"the central {size} x {size} pixels of {of}, bands {', '.join(form['bands'])}, in units "
        f"of {form['units'].replace('_', ' ')}"
    )


def cutouts_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a cutout, in their order: by what it is found again.

    rows: `id`, `probability` and, where the catalogue has them, `kind`, `ra` and `dec` (degrees).
    """
    table = pd.DataFrame({"order": range(1, len(rows) + 1)})
    for name, text in TRACED.items():
        if name in rows and rows[name].notna().any():
            table[name] = rows[name].astype(object).map(text.format, "ignore").to_numpy()
    return table


def completeness_table(selection: Mapping[str, Any]) -> pd.DataFrame:
    """What `selection_function` returns, a row for each bin of each quantity."""
    rows = [
        {
            "quantity": QUANTITIES[name],
            "from": f"{of_bin['low']:.3g}",
            "to": f"{of_bin['high']:.3g}",
            "lenses": of_bin["n"],
            "found": of_bin["found"],
            "completeness": metric_text(of_bin["completeness"]),
            "not known of": quantity["missing"],
        }
        for name, quantity in selection["quantities"].items()
        for of_bin in quantity["bins"]
    ]
    return pd.DataFrame(rows)


def threshold_text(threshold: float) -> str:
    """Rounded down, with two digits of it and of what is missing to 1: as it is printed it chooses
    the same cutouts, or some more."""
    least = min(threshold, 1 - threshold)
    digits = max(4, 1 - math.floor(math.log10(least))) if least > 0 else 4
    return f"{math.floor(threshold * 10**digits) / 10**digits:.{digits}f}"


def forecast_table(forecast: Mapping[str, Any]) -> pd.DataFrame:
    """What `forecast` returns, a row a threshold."""
    rows = []
    for row in forecast["rows"]:
        purity, candidates, rate = row["purity"], row["candidates"], row["false_positive_rate"]
        resolved = row["false_positives"] > 0
        bound = f"{_count(candidates['low'])} to {_count(candidates['high'])}"
        rows.append(
            {
                "chosen for": f"FPR {row['fpr']:g}" if row["fpr"] else "no false positive",
                "threshold": threshold_text(row["threshold"]),
                "false positive rate": (
                    _rate_text(rate) if resolved else f"below {rate['high']:.2g}"
                ),
                "completeness": metric_text(row["completeness"]),
                "candidates": _counted(candidates) if resolved else bound,
                "lenses": _counted(row["lenses"]),
                "purity": _rate_text(purity) if resolved else f"above {purity['low']:.2g}",
            }
        )
    return pd.DataFrame(rows)


def fusions_table(comparison: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The `comparison` of an ensemble, a row a fusion, the best first."""
    rows = []
    for row in comparison:
        gain = {"value": row["gain"], "low": row["gain_low"], "high": row["gain_high"]}
        metric = {"value": row["mean"], "low": row["low"], "high": row["high"]}
        rows.append(
            {
                "fusion": row["strategy"].replace("_", " "),
                MORE_COLUMNS[row["metric"]]: metric_text(metric),
                "gain": metric_text(gain),
                "better in": f"{row['better']:.0%}",
                "AUROC": row["auroc"],
                "calibration error": row["ece"],
            }
        )
    return pd.DataFrame(rows)


def seeds_table(
    metrics: Mapping[str, Mapping[str, Any]], architectures: Mapping[str, str]
) -> pd.DataFrame:
    """A row for each architecture that several members have: how far trainings of one network that
    differ in seed (and in the groups drawn) are apart. Empty where no two have one.

    metrics: of `lens_metrics`, by member; architectures: {member: architecture}.
    """
    rows = []
    for architecture in dict.fromkeys(architectures.values()):
        members = [name for name, arch in architectures.items() if arch == architecture]
        if len(members) < 2:
            continue
        row: dict[str, Any] = {"architecture": architecture, "seeds": len(members)}
        for key, title in COLUMNS.items():
            values = [metrics[name][key]["value"] for name in members]
            if None in values:
                row[title] = UNRESOLVED
            else:
                low, high = min(values), max(values)
                row[title] = f"{sum(values) / len(values):.3f} ({low:.3f} to {high:.3f})"
        rows.append(row)
    return pd.DataFrame(rows)


def _counted(number: Mapping[str, float]) -> str:
    return f"{_count(number['value'])} [{_count(number['low'])}, {_count(number['high'])}]"


def _count(number: float) -> str:
    return f"{number:,.0f}"


def format_kinds(kinds: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for the terminal."""
    rows = kinds_table(kinds).itertuples(index=False)
    return "AUROC against each kind: " + ", ".join(f"{r.kind} {r.AUROC:.3f}" for r in rows)


def format_surveys(surveys: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for the terminal."""
    return "AUROC by survey: " + _aurocs(surveys)


def format_origins(origins: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for the terminal: from simulated lenses real non-lenses may be told by their noise."""
    return "AUROC of each kind of cutouts alone: " + _aurocs(origins)


def _aurocs(parts: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{name} {metric_text(of['auroc'])}" for name, of in parts.items())
