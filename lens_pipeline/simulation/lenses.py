"""The detectable lens of each host galaxy, found by rejection."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens_pipeline.errors import InputError, first_of
from lens_pipeline.simulation.config import Population, SimulationConfig
from lens_pipeline.simulation.hosts import HostGalaxies, Numbers
from lens_pipeline.simulation.population import (
    CANDIDATES,
    COLUMNS,
    candidates,
    magnitudes,
)
from lens_pipeline.simulation.streams import Purpose, stream

PERSISTENCE = 50  # times as long a host is waited for where others have been found
MANY = 50_000  # candidates that are drawn at a time

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lenses:
    """Accepted systems, one a host, in the hosts' order.

    table: the columns of `population.candidates`, NaN in those that the host galaxies leave
    unknown, with `magnification`, `arc_snr`, `arc_contrast`, and `source_galaxy` and
    `host_galaxy`, the numbers of both galaxies.
    galaxy, arcs: (hosts, bands, size, size), electrons: expected, after the PSF; of a galaxy that
    is an image, what it shows.
    """

    table: pd.DataFrame
    galaxy: Tensor
    arcs: Tensor


def draw_lenses(
    galaxies: HostGalaxies, config: SimulationConfig, seed: int, hosts: range
) -> Lenses:
    """For each host the first of its candidates that passes every cut.

    A candidate passes on the rendered arcs' signal-to-noise and contrast (best bands) and on their
    magnification, the flux of the arcs within the cutout over the flux of the source, which must be
    seen to be drawn out: magnification x source_radius > seeing (LensPop). Where few hosts are
    left, several candidates of each are rendered at a time; the first that passes is the same.
    """
    device = galaxies.renderer.device
    cuts, together = config.population, galaxies.renderer.together
    found: list[Lenses] = []
    pending, block = np.array(hosts), 0
    while pending.size:
        # As many again as before, while memory allows: the rarest hosts take hundreds of blocks.
        blocks = range(block, block + min(block + 1, max(1, MANY // (CANDIDATES * pending.size))))
        table = _candidates(galaxies, config, seed, pending, blocks)
        while len(table):
            n_hosts = table.index.nunique()
            place = table.groupby(level=0, sort=False).cumcount()
            now = (place < max(1, together // n_hosts)).to_numpy()
            drawn = _render(galaxies, table[now], cuts)
            first = ~drawn.table.index.duplicated()
            keep = torch.from_numpy(np.flatnonzero(first)).to(device)
            if first.any():
                found.append(Lenses(drawn.table[first], drawn.galaxy[keep], drawn.arcs[keep]))
            accepted = drawn.table.index[first]
            table = table[~now & ~table.index.isin(accepted)]
            pending = np.setdiff1d(pending, accepted)
        _tell(galaxies, pending, blocks)
        block = blocks.stop
        # Where others have found theirs, it is not the population that is impossible.
        if block >= galaxies.blocks * (PERSISTENCE if found else 1) and pending.size:
            tried = (galaxies.number(int(pending[0]), number) for number in range(block))
            behind = _names(galaxies, dict.fromkeys(tried))
            raise InputError(
                f"population: none of {block * CANDIDATES} systems of host {pending[0]}{behind} is "
                "a detectable lens; loosen its cuts or its distributions"
            )
    table = pd.concat([part.table for part in found])
    order = torch.from_numpy(np.argsort(table.index.to_numpy())).to(device)
    return Lenses(
        table.sort_index(),
        torch.cat([part.galaxy for part in found])[order],
        torch.cat([part.arcs for part in found])[order],
    )


def _tell(galaxies: HostGalaxies, hosts: Numbers, blocks: range) -> None:
    """Warn of each galaxy that a host leaves in vain at the end of those blocks, once."""
    left: dict[int, None] = {}
    for host in hosts:
        turns = [galaxies.number(int(host), number) for number in (*blocks, blocks.stop)]
        left |= {a: None for a, b in pairwise(turns) if a != b and a not in galaxies.in_vain}
    if left:
        galaxies.in_vain.update(left)
        names = ", ".join(galaxies.described(np.array([*left]))["host"])
        log.warning("hosts: no lens can be seen behind %s; others are taken", names)


def _names(galaxies: HostGalaxies, numbers: Iterable[int]) -> str:
    """Behind which real galaxies; empty for those of the population."""
    found = [name for name in galaxies.described(np.array([*numbers]))["host"] if name]
    return f" behind {first_of(found)}" if found else ""


def _candidates(
    galaxies: HostGalaxies, config: SimulationConfig, seed: int, hosts: np.ndarray, blocks: range
) -> pd.DataFrame:
    """The next blocks of each host's candidates; the index is the host, repeated in its order."""
    u = np.concatenate(
        [
            stream(seed, host, Purpose.CANDIDATES, block).random((CANDIDATES, COLUMNS))
            for host in hosts
            for block in blocks
        ]
    )
    number = np.array([galaxies.number(int(host), block) for host in hosts for block in blocks])
    number = number.repeat(CANDIDATES)
    table = candidates(u, config, galaxies.known(number), galaxies.background(number))
    number = number[table.index]
    table = table.set_index(hosts[table.index // (CANDIDATES * len(blocks))])
    table[list(galaxies.unknown)] = np.nan
    return table.assign(source_galaxy=galaxies.source(number), host_galaxy=number)


def _render(galaxies: HostGalaxies, table: pd.DataFrame, cuts: Population) -> Lenses:
    """Those systems of a table that pass the cuts.

    The galaxy is drawn for those alone that may pass: its noise only lowers the arcs' signal-to-
    noise, which no set of pixels raises above that of the matched filter.
    """
    renderer = galaxies.renderer
    background = galaxies.background(table["host_galaxy"].to_numpy())
    arcs = renderer.arcs(renderer.parameters(table))
    magnification = arcs.sum(dim=(1, 2)).cpu().numpy()
    arcs = renderer.electrons(renderer.blur(arcs), magnitudes(table, "source", renderer.bands))
    best = renderer.matched_filter(arcs, background).cpu().numpy()
    may = (magnification > cuts.min_magnification) & (best > cuts.min_arc_snr)
    may &= magnification * table["source_radius"].to_numpy() > renderer.survey.best_seeing
    table, arcs = table[may], arcs[torch.from_numpy(may).to(arcs.device)]
    if table.empty:
        return Lenses(table, arcs, arcs)

    galaxy = galaxies.light(table)
    snr = renderer.signal_to_noise(arcs, galaxy, background[may]).cpu().numpy()
    contrast = renderer.contrast(arcs, galaxy, background[may]).cpu().numpy()
    table = table.assign(magnification=magnification[may], arc_snr=snr, arc_contrast=contrast)
    passed = (snr > cuts.min_arc_snr) & (contrast >= cuts.min_arc_contrast)
    keep = torch.from_numpy(passed).to(arcs.device)
    return Lenses(table[passed], galaxy[keep], arcs[keep])
