"""Results for people: a table for the terminal, one HTML file for the rest."""

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lens_pipeline.evaluation.gates import GateDecision
from lens_pipeline.evaluation.plots import png_bytes

COLUMNS = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "tpr_at_fpr_1e-2": "TPR at FPR 1e-2",
    "ece": "calibration error",
}
MORE_COLUMNS = COLUMNS | {
    "tpr0": "TPR0",
    "tpr10": "TPR10",
    "tpr_at_fpr_1e-3": "TPR at FPR 1e-3",
    "precision_at_k": "precision at k",
    "brier": "Brier score",
}
UNRESOLVED = "–"


def format_metrics_table(metrics: Mapping[str, Mapping[str, Any]], split: str = "Test") -> str:
    """A table for the terminal: one row a model, each figure with its 95 % interval."""
    header = ["", *COLUMNS.values()]
    rows = [[name, *(metric_text(of[key]) for key in COLUMNS)] for name, of in metrics.items()]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in (header, *rows)]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*(line.rstrip() for line in lines), _counts(metrics, split)])


def metric_text(metric: Mapping[str, float | None]) -> str:
    """A figure of `lens_metrics` with its interval."""
    if metric["value"] is None:
        return UNRESOLVED
    if metric["low"] is None or metric["high"] is None:
        return f"{metric['value']:.3f}"
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"


def _counts(metrics: Mapping[str, Mapping[str, Any]], split: str = "Test") -> str:
    first = next(iter(metrics.values()))
    text = (
        f"{split} split: {first['n_lens']} lenses, {first['n_nonlens']} non-lenses; "
        "95 % intervals by bootstrap."
    )
    if any(of[key]["value"] is None for of in metrics.values() for key in COLUMNS):
        text += f" {UNRESOLVED}: too few cutouts to tell."
    return text


def kinds_table(kinds: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """A row for each kind of non-lens, those hardest to tell from lenses first."""
    rows = [
        {"kind": kind, "cutouts": of_kind["n"], "AUROC": of_kind["auroc"]}
        for kind, of_kind in sorted(kinds.items(), key=lambda item: item[1]["auroc"])
    ]
    return pd.DataFrame(rows)


def format_kinds(kinds: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for the terminal."""
    rows = kinds_table(kinds).itertuples(index=False)
    return "AUROC against each kind: " + ", ".join(f"{r.kind} {r.AUROC:.3f}" for r in rows)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid #ddd;
  white-space: nowrap; }
.wide { overflow-x: auto; } td small { color: #777; }
figure { display: inline-block; margin: 0 1rem 1.5rem 0; vertical-align: top; }
figure img { max-width: 100%; } figcaption { color: #555; font-size: .9rem; }
.passed { color: #00693e; } .failed { color: #a33b00; }
"""


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    metrics: Mapping[str, Mapping[str, Any]],
    figures: Mapping[str, Figure],
    gate: GateDecision,
    tables: Mapping[str, pd.DataFrame],
) -> None:
    """Write one self-contained HTML file.

    facts: what was evaluated, in words; metrics: of `lens_metrics`, by model; figures and tables by
    their captions.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", _facts(facts), "<h2>Metrics</h2>"]
    parts += [_metrics(metrics), f"<p>{html.escape(_counts(metrics))}</p>"]
    parts += ["<h2>Gate</h2>", _gate(gate)]
    for caption, table in tables.items():
        shown = table.to_html(index=False, float_format="{:.3f}".format, border=0, escape=True)
        parts.append(f"<h2>{html.escape(caption)}</h2><div class=wide>{shown}</div>")
    parts.append("<h2>Pictures</h2>")
    parts += [_picture(caption, figure) for caption, figure in figures.items()]
    path.write_text(
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
        for name, text in facts.items()
    )
    return f"<div class=wide><table>{rows}</table></div>"


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
        return "<p class=passed>Passed: this model may become champion.</p>"
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in gate.reasons)
    return f"<p class=failed>Not passed:</p><ul>{reasons}</ul>"


def _picture(caption: str, figure: Figure) -> str:
    encoded = base64.b64encode(png_bytes(figure)).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{encoded}">'
        f"<figcaption>{text}</figcaption></figure>"
    )
