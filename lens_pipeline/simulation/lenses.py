"""The detectable lens of each host galaxy, found by rejection."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens_pipeline.simulation.population import (
    CANDIDATES,
    COLUMNS,
    MIN_ARC_SNR,
    MIN_MAGNIFICATION,
    candidates,
    magnitudes,
)
from lens_pipeline.simulation.render import Renderer
from lens_pipeline.simulation.streams import Purpose, stream


@dataclass(frozen=True)
class Lenses:
    """Accepted systems, one a host, in the hosts' order.

    table: the columns of `population.candidates`, with `magnification` and `arc_snr`.
    galaxy, arcs: (hosts, bands, size, size), expected electrons after the PSF.
    """

    table: pd.DataFrame
    galaxy: Tensor
    arcs: Tensor


def draw_lenses(renderer: Renderer, seed: int, hosts: range) -> Lenses:
    """For each host the first of its candidates that passes every cut.

    A candidate passes on the rendered arcs' signal-to-noise (best band) and on their magnification,
    the flux of the arcs within the cutout over the flux of the source.
    """
    found: list[Lenses] = []
    pending, block = np.array(hosts), 0
    while pending.size:
        table = _candidates(renderer, seed, pending, block)
        while len(table):
            tried = table[~table.index.duplicated()]
            drawn = _render(renderer, tried)
            passed = (drawn.table["magnification"] > MIN_MAGNIFICATION) & (
                drawn.table["arc_snr"] > MIN_ARC_SNR
            )
            keep = torch.from_numpy(passed.to_numpy(copy=True)).to(renderer.device)
            found.append(Lenses(drawn.table[passed], drawn.galaxy[keep], drawn.arcs[keep]))
            accepted = table.index.isin(tried.index[passed])
            table = table[table.index.duplicated() & ~accepted]
            pending = np.setdiff1d(pending, tried.index[passed])
        block += 1
    table = pd.concat([part.table for part in found])
    order = torch.from_numpy(np.argsort(table.index.to_numpy())).to(renderer.device)
    return Lenses(
        table.sort_index(),
        torch.cat([part.galaxy for part in found])[order],
        torch.cat([part.arcs for part in found])[order],
    )


def _candidates(renderer: Renderer, seed: int, hosts: np.ndarray, block: int) -> pd.DataFrame:
    """The next block of each host's candidates; the index is the host, repeated in its order."""
    u = np.concatenate(
        [stream(seed, h, Purpose.CANDIDATES, block).random((CANDIDATES, COLUMNS)) for h in hosts]
    )
    table = candidates(u, renderer.survey)
    return table.set_index(hosts[table.index // CANDIDATES])


def _render(renderer: Renderer, table: pd.DataFrame) -> Lenses:
    p = renderer.parameters(table)
    galaxy, arcs = renderer.elliptical(p), renderer.arcs(p)
    magnification = arcs.sum(dim=(1, 2))
    galaxy = renderer.electrons(renderer.blur(galaxy), magnitudes(table, "lens", renderer.bands))
    arcs = renderer.electrons(renderer.blur(arcs), magnitudes(table, "source", renderer.bands))
    snr = renderer.signal_to_noise(arcs, galaxy)
    return Lenses(
        table.assign(magnification=magnification.cpu().numpy(), arc_snr=snr.cpu().numpy()),
        galaxy,
        arcs,
    )
