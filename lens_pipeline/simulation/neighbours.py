"""Galaxies that happen to be near the line of sight: what a cutout shows besides its host, lens or
not."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from lens_pipeline.simulation.population import (
    Array,
    kpc_to_arcsec,
    magnitudes,
    source_axis_ratio,
    source_colours,
    source_i_magnitude,
    source_radius,
    source_redshift,
    star_snr,
)
from lens_pipeline.simulation.render import PSF_RADIUS, Renderer, add_in_order
from lens_pipeline.simulation.streams import Purpose, stream

# Per square arcsec, of the magnitudes that `source_i_magnitude` draws, 20 to 27 (one cutout in ten
# of DES has a brighter one): 46 x 10^(0.31 (i - 25)) per square arcmin are brighter than i (LSST
# Science Book, section 3.7).
DENSITY = 46 * (10 ** (0.31 * (27 - 25)) - 10 ** (0.31 * (20 - 25))) / 3600
MIN_SNR = 3.0  # of a star as bright; what is fainter drowns in the sky's noise
MIN_RADIUS = 0.6  # pixels: smaller ones look the same, but sub-pixels would miss their light
DEVIATES = 9
STAMP = 64  # pixels: the side of the smallest stamp
HELD = 5  # half-light radii of a disc along its major axis: beyond is 1 in 500 of its light


def draw_neighbours(renderer: Renderer, seed: int, hosts: NDArray[np.int64]) -> Tensor:
    """Expected electrons (hosts, bands, size, size), after the PSF.

    Exponential discs with the sizes, colours and redshifts of `population`'s sources, uniformly
    over the cutout, as many as number counts say.
    """
    mean = DENSITY * (renderer.size * renderer.survey.pixel_scale) ** 2
    streams = [stream(seed, host, Purpose.NEIGHBOURS) for host in hosts]
    drawn = [random.random((random.poisson(mean), DEVIATES)) for random in streams]
    table = _galaxies(np.concatenate(drawn), renderer)
    owner = np.arange(len(hosts)).repeat([len(u) for u in drawn])
    light = magnitudes(table, "component", renderer.bands)
    seen = star_snr(renderer.survey, light, renderer.survey.background_variance) > MIN_SNR
    electrons = renderer.darkness(len(hosts))
    table, owner = table[seen], owner[seen]
    sides = _stamps(table, renderer)
    for side in np.unique(sides):
        add = add_components if side == renderer.size else _add_stamps
        add(electrons, owner[sides == side], renderer.of_size(side), "disc", table[sides == side])
    return electrons


def _stamps(table: pd.DataFrame, renderer: Renderer) -> NDArray[np.int64]:
    """The side in pixels of the stamp that holds the light of each, (rows,): the cutout's own, or a
    smaller one, for the number of neighbours grows with the area of what each would be drawn on."""
    major = table["radius"] / np.sqrt(table["axis_ratio"]) / renderer.survey.pixel_scale
    wanted = 2 * (PSF_RADIUS + HELD * major.to_numpy())
    stamp = (STAMP * 2 ** np.ceil(np.log2(np.maximum(wanted / STAMP, 1)))).astype(np.int64)
    return np.minimum(stamp, renderer.size)


def _add_stamps(
    electrons: Tensor,
    owner: NDArray[np.int64],
    stamp: Renderer,
    profile: str,
    table: pd.DataFrame,
) -> None:
    """As `add_components`, each drawn on a stamp of its own, smaller than the cutout."""
    size, side, pixel = electrons.shape[-1], stamp.size, stamp.survey.pixel_scale
    place = table[["x", "y"]].to_numpy() / pixel + (size - 1) / 2  # in pixels of the cutout
    low = np.round(place - (side - 1) / 2).astype(int)
    table = table.assign(**dict(zip("xy", (place - low - (side - 1) / 2).T * pixel, strict=True)))
    for start in range(0, len(table), stamp.together):
        rows = slice(start, start + stamp.together)
        light = stamp.darkness(len(table[rows]))
        add_components(light, np.arange(len(light)), stamp, profile, table[rows])
        for one, number, (left, top) in zip(light, owner[rows], low[rows], strict=True):
            inside = [slice(max(begin, 0), max(begin + side, 0)) for begin in (top, left)]
            shown = electrons[number][:, inside[0], inside[1]]
            above, before = max(-top, 0), max(-left, 0)
            shown += one[:, above : above + shown.shape[1], before : before + shown.shape[2]]


def _galaxies(u: Array, renderer: Renderer) -> pd.DataFrame:
    i_magnitude = source_i_magnitude(u[:, 0])
    z = source_redshift(u[:, 1], i_magnitude)
    g_r, r_i = source_colours(u[:, 2:4].T, z)
    pixel = renderer.survey.pixel_scale
    side = renderer.size * pixel
    radius = source_radius(u[:, 6], i_magnitude, z) * kpc_to_arcsec(z)
    return pd.DataFrame(
        {
            "x": side * (u[:, 4] - 0.5),
            "y": side * (u[:, 5] - 0.5),
            "radius": np.maximum(radius, MIN_RADIUS * pixel),
            "axis_ratio": source_axis_ratio(u[:, 7]),
            "angle": np.pi * u[:, 8],
            "component_magnitude": i_magnitude + r_i,
            "component_g_r": g_r,
            "component_r_i": r_i,
        }
    )


def add_components(
    electrons: Tensor,
    owner: NDArray[np.int64],
    renderer: Renderer,
    profile: str,
    table: pd.DataFrame,
) -> None:
    """Add to the electrons (n, bands, size, size) the light of a table's rows, after the PSF, each
    to its owner's, (rows,); of a profile as in `Renderer.component`."""
    for start in range(0, len(table), renderer.together):
        rows = slice(start, start + renderer.together)
        part = table.iloc[rows]
        image = renderer.blur(renderer.component(profile, renderer.parameters(part)))
        light = renderer.electrons(image, magnitudes(part, "component", renderer.bands))
        add_in_order(electrons, owner[rows], light)
