"""Results for people, as one HTML file."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lens_pipeline.evaluation.gates import GateDecision
from lens_pipeline.evaluation.plots import png_bytes
from lens_pipeline.evaluation.tables import MORE_COLUMNS, UNRESOLVED, counts_text, metric_text

BESIDE_A_CHAMPION = (
    "Where there is a champion, the comparison with it decides, too: see the run's last lines, "
    "<code>summary.json</code>, or the check <code>passes_the_gate</code>."
)
TPR_AT_COUNTS = (
    "TPR0 and TPR10: the largest share of the lenses that can be found with no false positive, and "
    "with fewer than ten."
)
LONG = 20  # rows of a table that is folded up

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
        parts += [
            _metrics(of_models),
            f"<p>{html.escape(counts_text(of_models, MORE_COLUMNS))}</p>",
        ]
    parts.append(f"<p>{TPR_AT_COUNTS}</p>")
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
        chance = [of[f"{key}_by_chance"] for of in metrics.values() if f"{key}_by_chance" in of]
        if chance:
            cells = "".join(f"<td>{UNRESOLVED if n is None else f'{n:.3f}'}</td>" for n in chance)
            rows.append(f"<tr><th>of which chance alone makes</th>{cells}</tr>")
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
