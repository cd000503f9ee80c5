"""Sheets of cutouts. Each function returns a figure of its own."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lens_pipeline.evaluation.plots import FONT, literal

COMPOSITE = "composite"  # the unit of pictures that somebody has drawn
PER_KIND = 10  # cutouts of each kind on a sheet
COLUMNS = 8  # of a contact sheet

# Lupton et al. 2004 (PASP 116, 133), the same for all cutouts, in background sigma: noise is grey,
# arcs of a few sigma show, and cores keep their colour.
SOFTENING = 4.0
WHITE = 60.0
BLACK = -1.0


def colour_composite(images: NDArray[np.floating], units: str) -> NDArray[np.float64]:
    """Pictures (n, height, width, 3) from 0 to 1 of cutouts (n, bands, height, width).

    In background sigma, bands run from blue to red and the middle one of three is green; colours
    follow Lupton et al. 2004, with one stretch for all cutouts. A composite is shown as it is.
    """
    bands = images.shape[1]
    is_drawn = units == COMPOSITE
    red, green, blue = (0, bands // 2, -1) if is_drawn else (bands - 1, bands // 2, 0)
    rgb = np.moveaxis(images[:, [red, green, blue]].astype(np.float64), 1, -1)
    if is_drawn:
        return rgb.clip(0, 1)
    rgb = rgb - BLACK
    intensity = rgb.mean(axis=-1, keepdims=True).clip(1e-6)
    scale = np.arcsinh(intensity / SOFTENING) / np.arcsinh(WHITE / SOFTENING)
    rgb = (rgb * scale / intensity).clip(0)
    # Colours stay, and what is bright is compressed, not cut: arcs show on the light of a galaxy.
    return rgb / np.hypot(1, rgb.max(axis=-1, keepdims=True))


def upright(pictures: NDArray[np.floating], units: str) -> NDArray[np.floating]:
    """The rows of flux run upwards, as those of FITS files; a picture's run downwards."""
    return pictures if units == COMPOSITE else pictures[:, ::-1]


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
    tiles = np.concatenate([upright(part, units) for part in parts], axis=1)
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
        pictures = upright(colour_composite(images[chosen], units), units)
        for column, picture in enumerate(pictures):
            top = row * step
            left = column * step
            mosaic[top : top + size, left : left + size] = picture
    figure = Figure(figsize=(1.05 * PER_KIND + 1.4, 1.05 * len(names)), layout="compressed")
    axes = figure.add_subplot()
    axes.imshow(mosaic)
    places = [size / 2 + row * step for row in range(len(names))]
    axes.set_yticks(places, [literal(name) for name in names], fontsize=10)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure
