"""Pictures that a person would look for. Each function returns a figure of its own."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

# Okabe & Ito 2008: told apart by the colour-blind, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FONT = 8  # points
PER_KIND = 10  # cutouts of each kind on a sheet
COLUMNS = 8  # of a contact sheet

# Lupton et al. 2004 (PASP 116, 133), the same for all cutouts, in background sigma: noise is grey,
# arcs of a few sigma show, and cores keep their colour.
SOFTENING = 4.0
WHITE = 60.0
BLACK = -1.0


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
    right.yaxis.set_major_formatter(PercentFormatter(1))
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
    history.step(best.index, best, where="post", color=COLOURS[1], label="best so far")
    history.xaxis.set_major_locator(MaxNLocator(integer=True))
    history.set_ylabel(monitor)
    history.legend(frameon=False, fontsize=8)
    return figure


def colour_composite(images: NDArray[np.floating], units: str) -> NDArray[np.float64]:
    """Pictures (n, height, width, 3) from 0 to 1 of cutouts (n, bands, height, width).

    In background sigma, bands run from blue to red and the middle one of three is green; colours
    follow Lupton et al. 2004, with one stretch for all cutouts. A composite is shown as it is.
    """
    bands = images.shape[1]
    red, green, blue = (bands - 1, bands // 2, 0) if units != "composite" else (0, bands // 2, -1)
    rgb = np.moveaxis(images[:, [red, green, blue]].astype(np.float64), 1, -1)
    if units == "composite":
        return rgb.clip(0, 1)
    rgb = rgb - BLACK
    intensity = rgb.mean(axis=-1, keepdims=True).clip(1e-6)
    scale = np.arcsinh(intensity / SOFTENING) / np.arcsinh(WHITE / SOFTENING)
    rgb = (rgb * scale / intensity).clip(0)
    # Colours stay, and what is bright is compressed, not cut: arcs show on the light of a galaxy.
    return rgb / np.hypot(1, rgb.max(axis=-1, keepdims=True))


def contact_sheet(
    images: NDArray[np.floating],
    captions: Sequence[str],
    units: str,
    maps: NDArray[np.floating] | None = None,
) -> Figure:
    """Cutouts (n, bands, height, width) side by side, each below its caption of a line or more.

    maps (n, height, width): what is shown below each, from 0 to its own maximum.
    """
    parts = [colour_composite(images, units)]
    if maps is not None:
        most = maps.max(axis=(1, 2), keepdims=True)
        parts.append(colormaps["cividis"](maps / np.where(most > 0, most, 1))[..., :3])
    upright = [part if units == "composite" else part[:, ::-1] for part in parts]
    tiles = np.concatenate(upright, axis=1)
    rows = max(1, -(-len(tiles) // COLUMNS))
    height, width = tiles.shape[1:3]
    lines = max((caption.count("\n") + 1 for caption in captions), default=1)
    gap, strip = max(1, width // 40), -(-width * (1 + 3 * lines) // 24)  # a line is an eighth high
    # One picture: a figure of a hundred axes takes longer to draw than to simulate.
    sheet = np.ones((rows * (strip + height), COLUMNS * (width + gap) - gap, 3))
    figure = Figure(figsize=(1.25 * COLUMNS, 1.25 * COLUMNS * sheet.shape[0] / sheet.shape[1]))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for number, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        row, column = divmod(number, COLUMNS)
        top, left = row * (strip + height) + strip, column * (width + gap)
        sheet[top : top + height, left : left + width] = tile
        axes.text(
            left + width / 2, top - width / 40, caption, fontsize=FONT, ha="center", va="bottom",
            parse_math=False,
        )  # fmt: skip
    axes.imshow(sheet)
    return figure


def first_cutouts_sheet(images: NDArray[np.floating], table: pd.DataFrame, units: str) -> Figure:
    """The first cutouts of a split: two rows of lenses over two rows of non-lenses.

    images: (n, bands, height, width); table: their `label` and, where that is known, `kind`.
    """
    table = table.reset_index(drop=True)
    rows = pd.concat([table[table["label"] == label].head(16) for label in (1, 0)])
    names = rows["label"].astype(int).map({1: "lens", 0: "non-lens"}).astype(object)
    if "kind" in rows:
        names = rows["kind"].astype(object).fillna(names).astype(str)
    return contact_sheet(np.asarray(images[rows.index]), names.tolist(), units)


def kinds_sheet(images: NDArray[np.floating], kinds: Sequence[str], units: str) -> Figure:
    """A row for each kind of cutout, lenses first, with up to PER_KIND of each.

    images: (n, bands, height, width); kinds: of each.
    """
    of_kind: dict[str, list[int]] = {}
    for row, kind in enumerate(kinds):
        of_kind.setdefault(kind, []).append(row)
    names = sorted(of_kind, key=lambda kind: (kind != "lens", kind))
    size, gap = images.shape[-1], 2
    step = size + gap
    # One picture: a figure of a hundred axes takes longer to draw than to simulate.
    mosaic = np.ones((len(names) * step - gap, PER_KIND * step - gap, 3))
    for row, name in enumerate(names):
        chosen = of_kind[name][:PER_KIND]
        for column, picture in enumerate(colour_composite(images[chosen], units)):
            top = row * step
            left = column * step
            upright = picture if units == "composite" else picture[::-1]
            mosaic[top : top + size, left : left + size] = upright
    figure = Figure(figsize=(1.05 * PER_KIND + 1.4, 1.05 * len(names)), layout="compressed")
    axes = figure.add_subplot()
    axes.imshow(mosaic)
    places = [size / 2 + row * step for row in range(len(names))]
    axes.set_yticks(places, [literal(name) for name in names], fontsize=10)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure
