"""Galaxies that happen to be near the line of sight: what a cutout shows besides its host, lens or
not."""

import numpy as np
import pandas as pd
import torch
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
from lens_pipeline.simulation.render import Renderer
from lens_pipeline.simulation.streams import Purpose, stream

# Per square arcsec, of the magnitudes that `source_i_magnitude` draws, 20 to 27: 46 x 10^(0.31 (i -
# 25)) per square arcmin are brighter than i (LSST Science Book, section 3.7).
DENSITY = 46 * (10 ** (0.31 * (27 - 25)) - 10 ** (0.31 * (20 - 25))) / 3600
MIN_SNR = 3.0  # of a star as bright; what is fainter drowns in the sky's noise
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
    table.index = hosts.repeat([len(u) for u in drawn])
    light = magnitudes(table, "component", renderer.bands)
    seen = star_snr(renderer.survey, light, renderer.survey.background_variance) > MIN_SNR
    electrons = renderer.darkness(len(hosts))
    add_components(electrons, hosts, renderer, "disc", table[seen])
    return electrons


def _galaxies(u: Array, renderer: Renderer) -> pd.DataFrame:
    i_magnitude = source_i_magnitude(u[:, 0])
    z = source_redshift(u[:, 1], i_magnitude)
    g_r, r_i = source_colours(u[:, 2:4].T, z)
    side = renderer.size * renderer.survey.pixel_scale
    return pd.DataFrame(
        {
            "x": side * (u[:, 4] - 0.5),
            "y": side * (u[:, 5] - 0.5),
            "radius": source_radius(u[:, 6], i_magnitude, z) * kpc_to_arcsec(z),
            "axis_ratio": source_axis_ratio(u[:, 7]),
            "angle": np.pi * u[:, 8],
            "component_magnitude": i_magnitude + r_i,
            "component_g_r": g_r,
            "component_r_i": r_i,
        }
    )


def add_components(
    electrons: Tensor,
    hosts: NDArray[np.int64],
    renderer: Renderer,
    profile: str,
    table: pd.DataFrame,
) -> None:
    """Add to the electrons (hosts, bands, size, size) the light of a table's rows, each to that of
    the host which its index names; of a profile as in `Renderer.component`."""
    image = renderer.blur(renderer.component(profile, renderer.parameters(table)))
    light = renderer.electrons(image, magnitudes(table, "component", renderer.bands))
    owner = pd.Series(np.arange(len(hosts)), index=hosts)[table.index].to_numpy()
    # One of each host at a time: on a GPU a sum of many in one go has no order, and so no last bit.
    place = table.groupby(level=0).cumcount().to_numpy()
    for number in range(place.max(initial=-1) + 1):
        now = np.flatnonzero(place == number)
        electrons[torch.from_numpy(owner[now])] += light[torch.from_numpy(now)]
