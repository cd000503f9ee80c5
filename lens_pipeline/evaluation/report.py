"""Results for people: a table for the terminal, one HTML file for the rest."""

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lens_pipeline.evaluation.gates import GateDecision
from lens_pipeline.evaluation.metrics import TOP
from lens_pipeline.evaluation.plots import png_bytes
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
BESIDE_A_CHAMPION = (
    "Where there is a champion, the comparison with it decides, too: see the run's last lines, "
    "<code>summary.json</code>, or the check <code>passes_the_gate</code>."
)
LONG = 20  # rows of a table that is folded up


def format_metrics_table(metrics: Mapping[str, Mapping[str, Any]], split: str = "Test") -> str:
    """A table for the terminal: one row a model, each figure with its 95 % interval."""
    header = ["", *COLUMNS.values()]
    rows = [[name, *(metric_text(of[key]) for key in COLUMNS)] for name, of in metrics.items()]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in (header, *rows)]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*(line.rstrip() for line in lines), _counts(metrics, COLUMNS, split)])


def metric_text(metric: Mapping[str, float | None]) -> str:
    """A figure of `lens_metrics` with its interval, where it has one that is wider than nothing."""
    if metric["value"] is None:
        return UNRESOLVED
    value = f"{metric['value']:.3f}"
    if metric["low"] is None or metric["high"] is None:
        return value
    low, high = f"{metric['low']:.3f}", f"{metric['high']:.3f}"
    return value if low == value == high else f"{value} [{low}, {high}]"


def _counts(
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
            "rate": metric_text(of_kind["false_positive_rate"]),
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
                    f"{rate['value']:.2g} [{rate['low']:.2g}, {rate['high']:.2g}]"
                    if resolved
                    else f"below {rate['high']:.2g}"
                ),
                "completeness": metric_text(row["completeness"]),
                "candidates": _counted(candidates) if resolved else bound,
                "lenses": _counted(row["lenses"]),
                "purity": metric_text(purity) if resolved else f"above {purity['low']:.3f}",
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


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin-bottom: .3rem; } p { max-width: 46rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93em; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #ddd;
  white-space: nowrap; }
.facts th { vertical-align: top; } .facts td { white-space: normal; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } td small { color: #777; }
figure { display: inline-block; margin: 0 1rem 1.5rem 0; vertical-align: top; max-width: 100%; }
figure.narrow { max-width: min(100%, 25rem); }
figure img { max-width: 100%; } figcaption { color: #555; font-size: .9rem; }
.passed { color: #00693e; } .failed { color: #a33b00; }
@media print {
  body { max-width: none; margin: 0; padding: 0; }
  .wide { overflow: visible; } table { font-size: 8pt; } figure img { max-height: 60vh; }
  th, td { white-space: normal; overflow-wrap: anywhere; padding-right: .5rem; }
  figure, tr { break-inside: avoid; } h2, h3, h2 + p { break-after: avoid; }
}
"""


@dataclass(frozen=True)
class Picture:
    """name: of its file, without the suffix; references: {paper that it cites: its address}; table:
    what it shows, in words."""

    name: str
    caption: str
    figure: Figure
    references: Mapping[str, str] = field(default_factory=dict)
    table: pd.DataFrame | None = None

    @cached_property
    def png(self) -> bytes:
        return png_bytes(self.figure)


@dataclass(frozen=True)
class Section:
    """A heading of the report; tables by their captions."""

    title: str
    text: str
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    metrics: Mapping[str, Mapping[str, Mapping[str, Any]]],
    gate: GateDecision,
    sections: Sequence[Section],
) -> None:
    """Write one self-contained HTML file.

    facts: what was evaluated, in words; metrics: {what they rest on: those of `lens_metrics`, by
    model}.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", _facts(facts)]
    for basis, of_models in metrics.items():
        parts.append(f"<h2>Metrics: {html.escape(basis)}</h2>")
        parts += [_metrics(of_models), f"<p>{html.escape(_counts(of_models, MORE_COLUMNS))}</p>"]
    parts += ["<h2>Gate of a first model</h2>", _gate(gate), f"<p>{BESIDE_A_CHAMPION}</p>"]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>")
        parts += [_picture(picture) for picture in section.pictures]
        parts += [_table(caption, table) for caption, table in section.tables.items()]
    path.write_text(
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _table(caption: str, table: pd.DataFrame) -> str:
    shown = _rows(table)
    if len(table) > LONG:
        shown = f"<details><summary>{len(table)} rows</summary>{shown}</details>"
    return f"<h3>{html.escape(caption)}</h3>{shown}"


def _rows(table: pd.DataFrame) -> str:
    with pd.option_context("display.max_colwidth", None):  # of an id all is needed
        shown = table.to_html(
            index=False, float_format="{:.3f}".format, border=0, escape=True, na_rep=UNRESOLVED
        )
    return f"<div class=wide>{shown}</div>"


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
        for name, text in facts.items()
    )
    return f"<table class=facts>{rows}</table>"


def _metrics(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in metrics)
    rows = []
    for key, title in MORE_COLUMNS.items():
        cells = "".join(f"<td>{_html_cell(of[key])}</td>" for of in metrics.values())
        rows.append(f"<tr><th>{html.escape(title)}</th>{cells}</tr>")
    return f"<div class=wide><table><tr><th></th>{head}</tr>{''.join(rows)}</table></div>"


def _html_cell(metric: Mapping[str, float | None]) -> str:
    value, _, interval = metric_text(metric).partition(" ")
    return f"{value} <small>{interval}</small>"


def _gate(gate: GateDecision) -> str:
    if gate.passed:
        return "<p class=passed>Passed: this model may become champion where there is none.</p>"
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in gate.reasons)
    return f"<p class=failed>Not passed:</p><ul>{reasons}</ul>"


def _picture(picture: Picture) -> str:
    encoded = base64.b64encode(picture.png).decode()
    text = html.escape(picture.caption)
    narrow = " class=narrow" if picture.figure.get_figwidth() < 5 else ""
    papers = "".join(
        f'<br><a href="{html.escape(address)}">{html.escape(paper)}</a>'
        for paper, address in picture.references.items()
    )
    table = "" if picture.table is None else _rows(picture.table)
    return (
        f'<figure{narrow}><img alt="{text}" src="data:image/png;base64,{encoded}">'
        f"<figcaption>{text}{papers}</figcaption>{table}</figure>"
    )
