"""Pictures of the selection function."""

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from lens_pipeline.evaluation.plots import COLOURS, FONT, column_figure, logarithmic, plain
from lens_pipeline.evaluation.selection import QUANTITIES

LABEL = 24  # characters in a line that is no wider than its panel
LOGARITHMIC = ("arc_snr", "arc_contrast", "flux_ratio")  # they span decades


def completeness_figure(selection: Mapping[str, Any]) -> Figure:
    """Completeness against each quantity, of what `selection_function` returns.

    A bin is as wide as its values; bars up and down are 95 % intervals, and the line is the
    completeness of all lenses.
    """
    quantities = selection["quantities"]
    rows = max(1, -(-len(quantities) // 2))
    figure = column_figure(0.35 + 1.55 * rows)
    panels = figure.subplots(rows, 2, sharey=True, squeeze=False).ravel()
    for axes, (name, quantity) in zip(panels, quantities.items(), strict=False):
        bins = quantity["bins"]
        middle = np.array([b["median"] for b in bins])
        value, low, high = (
            np.array([b["completeness"][end] for b in bins]) for end in ("value", "low", "high")
        )
        wide = [middle - [b["low"] for b in bins], [b["high"] for b in bins] - middle]
        axes.axhline(selection["completeness"]["value"], color="0.6", linewidth=0.8, linestyle=":")
        axes.errorbar(
            middle, value, [value - low, high - value], wide, fmt="o", color=COLOURS[0],
            markersize=3.5, linewidth=1,
        )  # fmt: skip
        plain(axes, textwrap.fill(QUANTITIES[name], LABEL), "")
        if name in LOGARITHMIC and bins[0]["low"] > 0:
            logarithmic(axes, bins[0]["low"], bins[-1]["high"])
        axes.set(ylim=(-0.04, 1.04))
    for axes in panels[len(quantities) :]:
        axes.set_visible(False)
    figure.supylabel("completeness", fontsize=FONT)
    return figure


def completeness_map_figure(grid: Mapping[str, Any]) -> Figure:
    """The `map` of a selection function: the colour is completeness, the number that of lenses.

    A cell without lenses stays empty.
    """
    n, found = np.array(grid["n"]), np.array(grid["found"])
    share = np.ma.masked_where(n == 0, found / np.maximum(n, 1))
    figure = column_figure(3.0)
    axes = figure.add_subplot()
    colours = colormaps["cividis"]  # grows in lightness, and so in print
    x, y = (np.array(grid[f"{axis}_edges"]) for axis in "xy")
    mesh = axes.pcolormesh(x, y, share, cmap=colours, vmin=0, vmax=1, edgecolor="white")
    for row, column in zip(*np.nonzero(n), strict=True):
        axes.text(
            x[column : column + 2].mean(), y[row : row + 2].mean(), str(n[row, column]),
            ha="center", va="center", fontsize=FONT,
            color="black" if share[row, column] > 0.5 else "white",
        )  # fmt: skip
    plain(axes, QUANTITIES[grid["x"]], QUANTITIES[grid["y"]]).grid(visible=False)
    bar = figure.colorbar(mesh, ax=axes)
    bar.set_label("completeness", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    return figure
