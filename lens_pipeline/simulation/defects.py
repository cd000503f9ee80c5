"""What a camera, and what flies past it, leaves on a cutout, whatever it shows.

A defect falls on lenses and decoys alike. Decoys of the kind `artefact` always have one, the others
with the chance RATE; lenses have one with the chance that this makes for a decoy of the mixture,
share + (1 - share) RATE. So a defect tells nothing of the class: P(defect | lens) = P(defect | non-
lens). All that it may tell is the kind of a decoy.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lens_pipeline.simulation.hosts import HostGalaxies
from lens_pipeline.simulation.population import Array
from lens_pipeline.simulation.render import Renderer, add_in_order
from lens_pipeline.simulation.streams import Purpose, stream

DEFECTS = ("cosmic_rays", "trail", "bad_columns")
RATE = 0.03  # of cutouts of every kind but `artefact`
MAX_STROKES = 3
DEVIATES = 6  # for the defect as a whole, and for each of its strokes


def choose_defects(
    seed: int, hosts: Iterable[int], kinds: NDArray[np.str_], mixture: Mapping[str, float]
) -> NDArray[np.str_]:
    """The defect, of DEFECTS, of each host's lens and of its decoy, text (hosts, 2); mostly ''.

    kinds: of the decoys, (hosts,), drawn from the mixture of relative weights.
    """
    u = _deviates(seed, hosts)[:, :, 0]
    artefacts = mixture.get("artefact", 0) / sum(mixture.values())
    of_decoy = np.where(kinds == "artefact", 1, RATE)
    of_lens = np.full(len(kinds), artefacts + (1 - artefacts) * RATE)
    there = u[:, :, 0] < np.stack([of_lens, of_decoy], axis=1)
    return np.where(there, np.array(DEFECTS)[(len(DEFECTS) * u[:, :, 1]).astype(int)], "")


def add_defects(
    electrons: Tensor,
    galaxies: HostGalaxies,
    seed: int,
    hosts: NDArray[np.int64],
    numbers: NDArray[np.int64],
    defects: NDArray[np.str_],
) -> None:
    """Add to the electrons (hosts, 2, bands, size, size) of lenses and decoys their defects, as
    `choose_defects` gives them; numbers: of the hosts' galaxies, (hosts,)."""
    damaged = np.nonzero(defects)
    if len(damaged[0]):
        images = _images(galaxies.renderer, _deviates(seed, hosts)[damaged], defects[damaged])
        background = galaxies.background(numbers[damaged[0]])
        electrons[damaged] += galaxies.renderer.electrons_of_sigma(images, background)


def _deviates(seed: int, hosts: Iterable[int]) -> Array:
    shape = (2, 1 + MAX_STROKES, DEVIATES)
    return np.stack([stream(seed, host, Purpose.DEFECTS).random(shape) for host in hosts])


def _images(renderer: Renderer, u: Array, defects: NDArray[np.str_]) -> Tensor:
    """In background sigma, (n, bands, size, size).

    In one band each, as coadds of a few exposures show them.
    """
    v, side = u[:, 0], renderer.size
    count = np.select([defects == "cosmic_rays", defects == "trail"], [3, 1], 1 + (v[:, 2] < 0.5))
    there = np.arange(MAX_STROKES) < count[:, None]
    row, d = np.nonzero(there)[0], u[:, 1:][there]
    ray, trail, column = (defects[row] == kind for kind in DEFECTS)
    strokes = renderer.stroke(
        x=side * (d[:, 0] - 0.5),
        y=np.where(column, 0, side * (d[:, 1] - 0.5)),
        angle=np.where(column, np.pi / 2, np.pi * d[:, 2]),
        length=np.where(ray, 2 + 10 * d[:, 3], 4.0 * side),
        width=np.where(trail, 1.5 + d[:, 4], 0.6),
        height=np.select([ray, trail], [10 + 50 * d[:, 5], 3 + 12 * d[:, 5]], 5 + 20 * d[:, 5]),
    )
    band = (len(renderer.bands) * v[row, 3]).astype(int)
    images = strokes.new_zeros(len(u) * len(renderer.bands), side, side)
    add_in_order(images, row * len(renderer.bands) + band, strokes)
    return images.unflatten(0, (len(u), len(renderer.bands)))
