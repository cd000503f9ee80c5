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
from lens_pipeline.simulation.render import Renderer, add_in_order
from lens_pipeline.simulation.streams import Purpose, stream

# Per square arcsec, of the magnitudes that `source_i_magnitude` draws, 20 to 27 (one cutout in ten
# of DES has a brighter one): 46 x 10^(0.31 (i -
# 25)) per square arcmin are brighter than i (LSST Science Book, section 3.7).
DENSITY = 46 * (10 ** (0.31 * (27 - 25)) - 10 ** (0.31 * (20 - 25))) / 3600
MIN_SNR = 3.0  # of a star as bright; what is fainter drowns in the sky's noise
MIN_RADIUS = 0.6  # pixels: smaller ones look the same, but sub-pixels would miss their light
DEVIATES = 9


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
    add_components(electrons, owner[seen], renderer, "disc", table[seen])
    return electrons


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
