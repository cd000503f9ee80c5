"""What looks like a lens and is none: unlensed galaxies around the host galaxy."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens_pipeline.simulation.population import (
    Array,
    magnitudes,
    source_axis_ratio,
    source_colours,
)
from lens_pipeline.simulation.render import Renderer
from lens_pipeline.simulation.streams import Purpose, stream

MAX_INTRUDERS = 3
MAX_DISTANCE = 3.0  # from the host, in its Einstein radii
DEVIATES = 8  # that an intruder takes


def draw_intruders(renderer: Renderer, seed: int, lenses: pd.DataFrame) -> Tensor:
    """One to three galaxies around each of the lens galaxies of a table.

    Returns (hosts, bands, size, size), expected electrons after the PSF.

    They lie anywhere (uniformly) within MAX_DISTANCE Einstein radii. Together they bring the light
    of the host's arcs, in colours of a source at that redshift, with the source's surface
    brightness (which lensing keeps): no sum or colour of pixels tells them from arcs, only their
    arrangement.
    """
    hosts = lenses.index.to_numpy()
    u = np.stack(
        [stream(seed, h, Purpose.INTRUDERS).random((MAX_INTRUDERS, DEVIATES)) for h in hosts]
    )
    table = _intruders(u, lenses)
    images = renderer.blur(renderer.disc(renderer.parameters(table)))
    electrons = renderer.electrons(images, magnitudes(table, "source", renderer.bands))
    owner = torch.from_numpy(np.searchsorted(hosts, table.index.to_numpy())).to(renderer.device)
    total = electrons.new_zeros(len(hosts), *electrons.shape[1:])
    return total.index_add_(0, owner, electrons)


def _intruders(u: Array, lenses: pd.DataFrame) -> pd.DataFrame:
    """Parameters of the intruders; u: (hosts, MAX_INTRUDERS, DEVIATES). The index is the host."""
    count = 1 + (MAX_INTRUDERS * u[:, 0, 0]).astype(int)
    present = np.arange(MAX_INTRUDERS) < count[:, None]
    weight = np.where(present, 0.3 + u[:, :, 1], 0)
    share = (weight / weight.sum(axis=1, keepdims=True))[present]
    host = lenses.iloc[np.nonzero(present)[0]]
    u = u[present]
    brightening = share * host["magnification"].to_numpy()
    radius = host["einstein_radius"].to_numpy() * MAX_DISTANCE * np.sqrt(u[:, 2])
    azimuth = 2 * np.pi * u[:, 3]
    g_r, r_i = source_colours(u[:, 4:6].T, host["z_source"].to_numpy())
    return pd.DataFrame(
        {
            "x": host["x"] + radius * np.cos(azimuth),
            "y": host["y"] + radius * np.sin(azimuth),
            "radius": host["source_radius"] * np.sqrt(brightening),
            "axis_ratio": source_axis_ratio(u[:, 6]),
            "angle": np.pi * u[:, 7],
            "source_magnitude": host["source_magnitude"] - 2.5 * np.log10(brightening),
            "source_g_r": g_r,
            "source_r_i": r_i,
        },
        index=host.index,
    )
