"""Pictures that a person would look for. Each function returns a figure of its own."""

import io
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

# Okabe & Ito 2008: told apart by the colour-blind, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FONT = 8  # points


def png_bytes(figure: Figure) -> bytes:
    return _saved(figure, format="png")


def jpeg_bytes(figure: Figure) -> bytes:
    """For sheets of cutouts: their noise makes a PNG several times as large."""
    return _saved(figure, format="jpeg", pil_kwargs={"quality": 88})


def _saved(figure: Figure, **how: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi="figure", **how)
    return buffer.getvalue()


def column_figure(height: float = 2.8) -> Figure:
    """Of a journal's column: 3.4 inches wide, in type of 8 points."""
    return Figure(figsize=(3.4, height), dpi=200, layout="constrained")


def literal(name: str) -> str:
    """A user's name as matplotlib draws it letter by letter: a `$` begins no formula, and a `_` in
    front does not keep it from a legend."""
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def plain(axes: Axes, x: str, y: str) -> Axes:
    """A panel's labels and its quiet frame."""
    axes.set_xlabel(x, fontsize=FONT)
    axes.set_ylabel(y, fontsize=FONT)
    axes.tick_params(labelsize=FONT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    return axes


def logarithmic(axes: Axes, low: float, high: float) -> None:
    """An x axis from one value to the other, with so many labels that none overlap."""
    axes.set_xscale("log")
    short = high < 30 * low
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if short else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def learning_curves_figure(curves: pd.DataFrame) -> Figure:
    """Loss, and the ranking of the validation split, by epoch.

    curves: one row an epoch; columns `epoch`, `train/loss`, `val/loss`, `val/auroc`, ...
    """
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    panels = (
        (left, "loss", {"train/loss": "training", "val/loss": "validation"}),
        (
            right,
            "validation split",
            {
                "val/auroc": "AUROC",
                "val/average_precision": "average precision",
                "val/tpr_at_fpr_1e-2": "TPR at FPR 1e-2",
            },
        ),
    )
    for axes, title, columns in panels:
        for number, (column, name) in enumerate(columns.items()):
            if column in curves and curves[column].notna().any():
                axes.plot(
                    curves["epoch"] + 1, curves[column], "o-", markersize=3, label=name,
                    color=COLOURS[number],
                )  # fmt: skip
        axes.set(xlabel="epoch")
        axes.set_title(title, fontsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        axes.legend(frameon=False, fontsize=9)
    right.set(ylim=(0, 1.01))
    return figure


def tuning_figure(trials: pd.DataFrame, settings: Mapping[str, str], monitor: str) -> Figure:
    """How the best value grew over the trials, and each trial's value against each setting.

    trials: `number`, `state` (complete, pruned, ...), `value`, and a column for each setting;
    settings: whether each is a `choice`, or a number whose axis is `linear` or `log`; monitor: what
    the value is.
    """
    columns = min(5, 1 + len(settings))
    rows = -(-(1 + len(settings)) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    for axes, (name, scale) in zip(panels, {"number": "linear", **settings}.items(), strict=False):
        choices = sorted(trials[name].dropna().unique()) if scale == "choice" else []
        x = trials[name].map(choices.index, na_action="ignore") if choices else trials[name]
        for state, marker in (("complete", "o"), ("pruned", "x")):
            some = trials["state"] == state
            value = trials.loc[some, "value"]
            axes.scatter(x[some], value, 18, COLOURS[0], marker, label=state, alpha=0.8)
        if choices:
            axes.set_xticks(range(len(choices)), [literal(str(choice)) for choice in choices])
            axes.set_xlim(-0.5, len(choices) - 0.5)
        elif scale == "log" and trials["value"].notna().any():  # else all trials have failed
            logarithmic(axes, x.min(), x.max())
        axes.set_xlabel("trial" if name == "number" else name.rpartition(".")[2].replace("_", " "))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    for axes in panels[1 + len(settings) :]:
        axes.set_visible(False)
    history = panels[0]
    best = trials[trials["state"] == "complete"].set_index("number")["value"]
    best = best.cummin() if monitor == "val/loss" else best.cummax()
    best = best.reindex(trials["number"].sort_values()).ffill()
    history.step(best.index, best, where="post", color=COLOURS[1], label="best so far")
    history.xaxis.set_major_locator(MaxNLocator(integer=True))
    history.set_ylabel(monitor)
    history.legend(frameon=False, fontsize=8)
    return figure
