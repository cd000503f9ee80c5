"""What the pixels of cutouts are like, and whether those of others are like them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from astropy.stats import mad_std
from numpy.typing import NDArray

from lens_pipeline.catalogue.dataset import Dataset
from lens_pipeline.catalogue.splits import PARTS

Array = NDArray[np.floating]

SAMPLE = 2**22  # pixels of a band that its statistics are of: a thousand cutouts of 64 x 64
BLOCK = 2**24  # bytes that are read at a time
BLOCKS = 8  # parts of a sample, of which its standard errors are
BLANK = 12  # pixels: the side of the patches whose darkest tenth is taken for empty sky
LAG = 4  # pixels, beyond which no noise is taken to be correlated
BRIGHT = 0.99  # the quantile that tells of the galaxies, where the median tells of the sky

# The most that a band may differ between cutouts of one kind, each with its scale.
MOST: Mapping[str, float] = {
    # Of the noise. What sky subtraction leaves differs by less from one night to another.
    "median": 0.25,
    # Of itself. Pixels are in units of the background's noise, whatever the depth: a fifth more or
    # less is noise of another kind (resampled, weighted otherwise), or another calibration of it.
    "sigma": 0.2,
    # Of itself. It is half a magnitude: other galaxies, another zero point, bands in another order.
    "bright": 0.4,
    # In all. A coadd that is resampled otherwise has another texture, which networks see.
    "noise_correlation": 0.1,
}


def pixel_statistics(dataset: Dataset) -> dict[str, Any]:
    """What a dataset's pixels are like, for JSON.

    `non_finite`: {split: how many pixels are NaN or infinite}; `bands`, in their order, and
    `units`; `statistics`: {band: the `band_statistics` of the training split}, of cutouts drawn
    once for all time where there are more than SAMPLE pixels; empty where it holds none.
    """
    train = dataset.images("train")
    most = max(1, SAMPLE // int(np.prod(train.shape[2:])))
    drawn = np.arange(len(train))
    if most < len(train):
        drawn = np.sort(np.random.default_rng(0).choice(drawn, most, replace=False))
    return {
        "non_finite": {part: _non_finite(dataset, part) for part in PARTS},
        "bands": list(dataset.format.bands),
        "units": dataset.format.units,
        "statistics": statistics_of(train[drawn], dataset.format.bands) if len(train) else {},
    }


def statistics_of(images: Array, bands: Sequence[str]) -> dict[str, dict[str, float]]:
    """{band: its `band_statistics`} of images (n, bands, height, width); without a band that has no
    finite pixel."""
    return {
        name: band_statistics(images[:, number])
        for number, name in enumerate(bands)
        if np.isfinite(images[:, number]).any()
    }


def standard_errors(images: Array, bands: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of `statistics_of` the same images, by how these differ among BLOCKS parts of them; without a
    band that has no finite pixel in one of the parts."""
    parts = [statistics_of(part, bands) for part in np.array_split(images, BLOCKS)]
    return {
        band: {
            name: float(np.std([one[band][name] for one in parts], ddof=1)) / BLOCKS**0.5
            for name in MOST
        }
        for band in bands
        if all(band in one for one in parts)
    }


def band_statistics(pixels: Array) -> dict[str, float]:
    """Statistics that a few odd pixels do not move, of those that are finite, in their unit.

    `median`; `sigma`: 1.4826 times the median absolute deviation from it; `bright`: by how much the
    99th percentile exceeds it; `noise_correlation`, see there.
    """
    finite = pixels[np.isfinite(pixels)]
    median = np.median(finite)
    return {
        "median": float(median),
        "sigma": float(mad_std(finite)),
        "bright": float(np.quantile(finite, BRIGHT) - median),
        "noise_correlation": noise_correlation(pixels),
    }


def noise_correlation(pixels: Array) -> float:
    """Of the noise of adjacent pixels of images (n, height, width): 0 where it is white, 0.2 or so
    in resampled coadds. 0, too, of images without noise, or without a patch of it.

    Of mixed second differences, as those of `background.background_sigma`, below 3 sigma in the
    darkest patches; the mean along both axes. Patches with a row or column of equal pixels, as at
    a filled border, or with a pixel that is not finite do not count.
    """
    n, height, width = pixels.shape
    rows, columns = height // BLANK, width // BLANK
    cut = pixels[:, : rows * BLANK, : columns * BLANK].astype(np.float64)
    patches = cut.reshape(n, rows, BLANK, columns, BLANK).swapaxes(2, 3).reshape(-1, BLANK, BLANK)
    patches = patches[np.isfinite(patches).all(axis=(1, 2))]
    for axis in (1, 2):
        patches = patches[np.ptp(patches, axis=axis).all(axis=1)]
    if not len(patches):
        return 0.0
    darkest = patches[np.argsort(np.median(patches, axis=(1, 2)))[: -(-len(patches) // 10)]]
    lines = darkest[:, LAG:] - darkest[:, :-LAG]
    noise = (lines[:, :, LAG:] - lines[:, :, :-LAG]) / 2
    sigma = mad_std(noise)
    if not sigma:
        return 0.0
    noise[np.abs(noise) >= 3 * sigma] = np.nan
    found = []
    for along in (noise, noise.swapaxes(1, 2)):
        products = along[:, 1:] * along[:, :-1]
        known = np.isfinite(products)
        if not known.any():
            return 0.0
        power = (along[:, 1:][known] ** 2).mean() * (along[:, :-1][known] ** 2).mean()
        found.append(products[known].mean() / np.sqrt(power))
    return float(np.mean(found))


def _non_finite(dataset: Dataset, part: str) -> int:
    n, *shape = dataset.images(part).shape
    block = np.empty((max(1, BLOCK // (4 * int(np.prod(shape)))), *shape), dtype=np.float32)
    with dataset.open_images(part) as file:
        return sum(int(np.sum(~np.isfinite(images))) for images in file.blocks(0, n, block))


def other_format(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How the bands or units of two `pixel_statistics` differ; empty where they are the same."""
    pairs = {
        "bands": [", ".join(one["bands"]) for one in (now, before)],
        "units": [one["units"] for one in (now, before)],
    }
    return "; ".join(f"the {what} are {a}, were {b}" for what, (a, b) in pairs.items() if a != b)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> pd.DataFrame:
    """How far the bands of two `statistics_of` cutouts of one format differ: one row for each band
    and statistic.

    `band`, `statistic`, `before`, `now`, and `change`: the difference of these two in units of the
    larger `sigma` for a median, of the larger of both for what is a width, and as it is for a
    correlation; `at_most`, see MOST.
    """
    rows = []
    for band, statistics in now.items():
        was = before.get(band)
        if was is None:  # there were no cutouts to train on
            continue
        for name, most in MOST.items():
            if name not in was:  # an earlier release did not measure it
                continue
            unit = "sigma" if name == "median" else name
            scale = 1.0 if name == "noise_correlation" else max(was[unit], statistics[unit])
            difference = abs(statistics[name] - was[name])
            # Without a scale (a band that is black almost everywhere) any difference is one.
            change = difference / scale if scale > 0 else float(difference > 0)
            rows.append((band, name, was[name], statistics[name], change, most))
    names = ["band", "statistic", "before", "now", "change", "at_most"]
    return pd.DataFrame(rows, columns=names)
