"""Whose light the lens galaxy is: smooth ellipticals of the population, or real images."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from lens_pipeline.simulation.neighbours import draw_neighbours
from lens_pipeline.simulation.pool import KNOWN, Pool
from lens_pipeline.simulation.population import Array, magnitudes
from lens_pipeline.simulation.render import Renderer
from lens_pipeline.simulation.sources import galaxy_behind
from lens_pipeline.simulation.streams import number_of

# Blocks of candidates: after that many in vain a host takes another real galaxy, or is given up.
PATIENCE, LAST_BLOCK = 500, 2000
MOST_GALAXIES = 100  # that a host takes in turn, of a pool that has more

Numbers = NDArray[np.int64]


class HostGalaxies(Protocol):
    """The galaxies that hosts are, each with its number; `renderer` draws what they lens.

    unknown: the columns of `population.candidates` that are not known of them. blocks: how many of
    its candidates a host waits for. in_vain: the numbers of those that a host has left because no
    lens was seen behind them, which have been told.
    """

    renderer: Renderer
    unknown: tuple[str, ...]
    blocks: int
    in_vain: set[int]

    def number(self, host: int, block: int) -> int:
        """Of the galaxy that a host is in a block of its candidates; the same for every seed."""
        ...

    def known(self, numbers: Numbers) -> Mapping[str, Array]:
        """Columns of `population.candidates` that replace what is drawn, where not NaN; (n,)."""
        ...

    def background(self, numbers: Numbers) -> Array:
        """Variance of an empty pixel, electrons^2, (n, bands)."""
        ...

    def source(self, numbers: Numbers) -> Numbers:
        """Numbers of what is behind them, (n,): always the same, lest a host be in two groups."""
        ...

    def described(self, numbers: Numbers) -> pd.DataFrame:
        """What a catalogue says of them: `group`, `host`, and more where it is known."""
        ...

    def light(self, table: pd.DataFrame) -> Tensor:
        """Electrons (n, bands, size, size) of the galaxies in a table of candidates, none negative.

        The arcs' signal-to-noise suffers from it.
        """
        ...

    def neighbours(self, seed: int, lenses: pd.DataFrame) -> Tensor:
        """Electrons (n, bands, size, size) of what else is in the cutouts of hosts, lens or not;
        none where their images show it already. lenses: a row a host."""
        ...

    def unexposed(self, light: Tensor) -> Tensor:
        """Of that light, the expected electrons that `expose` takes."""
        ...

    def expose(self, electrons: Tensor, deviates: Tensor, numbers: Numbers) -> Tensor:
        """Cutouts (n, ..., bands, size, size) in background sigma, noise included.

        electrons: expected, of all that is unexposed; deviates: standard normal, as many.
        """
        ...


class SersicHosts:
    """Each host is a galaxy of its own, as the population draws it; its number is the host's."""

    unknown: tuple[str, ...] = ()
    blocks = LAST_BLOCK

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.in_vain: set[int] = set()

    def number(self, host: int, block: int) -> int:
        return host

    def known(self, numbers: Numbers) -> Mapping[str, Array]:
        return {}

    def background(self, numbers: Numbers) -> Array:
        return np.tile(self.renderer.survey.background_variance, (len(numbers), 1))

    def source(self, numbers: Numbers) -> Numbers:
        distinct, place = np.unique(numbers, return_inverse=True)
        behind = [galaxy_behind(self.renderer.sources, f"host {number}") for number in distinct]
        return np.array(behind, np.int64)[place]

    def described(self, numbers: Numbers) -> pd.DataFrame:
        group = [f"{self.renderer.survey.name}-host-{number:06d}" for number in numbers]
        return pd.DataFrame({"group": group, "host": ""})

    def light(self, table: pd.DataFrame) -> Tensor:
        renderer = self.renderer
        images = renderer.blur(renderer.elliptical(renderer.parameters(table)))
        return renderer.electrons(images, magnitudes(table, "lens", renderer.bands))

    def neighbours(self, seed: int, lenses: pd.DataFrame) -> Tensor:
        return draw_neighbours(self.renderer, seed, lenses)

    def unexposed(self, light: Tensor) -> Tensor:
        return light

    def expose(self, electrons: Tensor, deviates: Tensor, numbers: Numbers) -> Tensor:
        return self.renderer.expose(electrons, deviates)


class RealHosts:
    """Real images, with their own noise; a galaxy's number is its row in the pool.

    Hosts take the galaxies of the pool in turn, each by the host's number alone. Where none of many
    sources can be seen behind it, as may happen in a shallow image, the host takes the next, and so
    on through the pool. Another host tries such a galaxy again: which cutout it gets must
    not depend on those before it.
    """

    unknown: tuple[str, ...] = ("lens_radius", "lens_magnitude", "lens_g_r", "lens_r_i")

    def __init__(self, renderer: Renderer, pool: Pool) -> None:
        self.renderer, self._pool = renderer, pool
        self.in_vain: set[int] = set()
        self.blocks = max(LAST_BLOCK, PATIENCE * min(len(pool.table), MOST_GALAXIES))
        self._known = {name: pool.table[name].to_numpy(np.float64) for name in KNOWN}
        groups = pool.table["group"]
        # In an order of no meaning: galaxies that a catalogue lists side by side may be alike.
        self._order = np.argsort([number_of(name, 2**62) for name in pool.table["id"]])
        self._source = np.array([galaxy_behind(renderer.sources, g) for g in groups], np.int64)

    def number(self, host: int, block: int) -> int:
        return int(self._order[(host + block // PATIENCE) % len(self._order)])

    def known(self, numbers: Numbers) -> Mapping[str, Array]:
        return {name: column[numbers] for name, column in self._known.items()}

    def background(self, numbers: Numbers) -> Array:
        return self._pool.background[numbers]

    def source(self, numbers: Numbers) -> Numbers:
        return self._source[numbers]

    def described(self, numbers: Numbers) -> pd.DataFrame:
        table = self._pool.table.drop(columns=list(KNOWN)).rename(columns={"id": "host"})
        return table.iloc[numbers].reset_index(drop=True)

    def light(self, table: pd.DataFrame) -> Tensor:
        numbers = table["host_galaxy"].to_numpy()
        images = self._images(numbers).clamp_min(0)
        return self.renderer.electrons_of_sigma(images, self.background(numbers))

    def neighbours(self, seed: int, lenses: pd.DataFrame) -> Tensor:
        return self.renderer.darkness(len(lenses))

    def unexposed(self, light: Tensor) -> Tensor:
        return torch.zeros_like(light)

    def expose(self, electrons: Tensor, deviates: Tensor, numbers: Numbers) -> Tensor:
        # Several cutouts may show one galaxy: they have an axis between its and the bands'.
        between = (slice(None), *[None] * (electrons.ndim - 4))
        images, background = self._images(numbers)[between], self.background(numbers)[between]
        return self.renderer.paint(images, electrons, deviates, background)

    def _images(self, numbers: Numbers) -> Tensor:
        return torch.from_numpy(np.asarray(self._pool.pixels[numbers])).to(self.renderer.device)
