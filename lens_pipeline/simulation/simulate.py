"""Labelled cutouts of a survey: lenses, each beside a look-alike of the same light."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from lens_pipeline.catalogue.cutout import SIGMA_UNITS
from lens_pipeline.catalogue.dataset import CutoutFormat
from lens_pipeline.catalogue.joined import joined_format
from lens_pipeline.catalogue.stack import Stack
from lens_pipeline.errors import InputError
from lens_pipeline.progress import progress_bar
from lens_pipeline.settings import MAX_IMAGE_SIZE, MAX_SEED, MIN_IMAGE_SIZE
from lens_pipeline.simulation import population
from lens_pipeline.simulation.config import SimulationConfig, load_config
from lens_pipeline.simulation.decoys import choose_kinds, draw_decoys
from lens_pipeline.simulation.defects import add_defects, choose_defects
from lens_pipeline.simulation.hosts import HostGalaxies, RealHosts, SersicHosts
from lens_pipeline.simulation.lenses import draw_lenses
from lens_pipeline.simulation.pool import read_pool
from lens_pipeline.simulation.render import Renderer
from lens_pipeline.simulation.sources import make_sources
from lens_pipeline.simulation.streams import Purpose, number_of, stream
from lens_pipeline.simulation.surveys import Survey
from lens_pipeline.storage import filling

LARGE = 64  # pixels a side, of which 256 cutouts are drawn together in some 150 MB a band
STACK_ROWS = 1000  # cutouts in one file of a catalogue

GALAXY_TRUTHS = [
    *("z_lens", "velocity_dispersion", "axis_ratio", "position_angle"),
    *("x", "y", "lens_radius", "lens_magnitude", "lens_g_r", "lens_r_i"),
]
OF_ANOTHER_GALAXY = ["position_angle", "x", "y"]  # that stands where the host would be
LENSING_TRUTHS = [
    *(
        "z_source",
        "einstein_radius",
        "shear",
        "shear_angle",
        "magnification",
        "arc_snr",
        "arc_contrast",
    ),
    *("source_x", "source_y", "source_radius", "source_axis_ratio", "source_angle"),
    *("source_magnitude", "source_g_r", "source_r_i"),
]


@dataclass(frozen=True)
class Simulation:
    """Simulated cutouts and what is true of them.

    images: float32 (n, bands, size, size), sky-subtracted, in sigmas of each band's background.
    table: one row a cutout.

    Of every cutout: `id`; `label` (1 lens, 0 not); `kind` (`lens`, or one of
    `decoy_kinds.MIXTURE`); `defect` (of the image, one of `defects.DEFECTS`; mostly empty);
    `group` (all that shows one source galaxy, in whatever survey, and so all that shows one real
    host; with smooth sources, one host, or one group of real ones); `survey`; `pixel_scale`
    (arcsec); `source_galaxy` (its name, empty where it is smooth); `host` (the id of the real
    galaxy that is the host, empty where it is smooth), and its `ra`, `dec` where the pool's
    catalogue has them.
    Of the host galaxy: `z_lens`, `velocity_dispersion` (km/s), `axis_ratio`, `position_angle`
    (radians from +x, along columns, towards +y, along rows), `x`, `y` (arcsec from the middle),
    `lens_radius` (half-light, arcsec), `lens_magnitude` (AB, r), `lens_g_r`, `lens_r_i` (mag);
    these four are NaN of a real one, and all but place and angle of a `late_type`, which stands
    where the host would be.
    Of a lens, NaN elsewhere: `z_source`, `einstein_radius` (arcsec), `shear`, `shear_angle`
    (radians), `magnification` (of the flux, within the cutout), `arc_snr` (best band),
    `arc_contrast` (the arcs' light over the galaxy's: the fifth largest ratio among pixels where
    they have a signal-to-noise above 2, in the best band; see `Renderer.contrast`), `source_x`,
    `source_y` (arcsec from the lens),
    `source_radius` (arcsec), `source_axis_ratio` (of a smooth source, NaN of a real
    galaxy), `source_angle` (radians, by which it is turned; of a smooth one, of its major axis),
    `source_magnitude` (unlensed, AB, r), `source_g_r`, `source_r_i`.
    Unrelated galaxies and satellites (see `neighbours`) are not described, and `arc_snr` and
    `arc_contrast` leave them out.
    """

    images: NDArray[np.float32]
    table: pd.DataFrame


def simulate(
    survey: str,
    n: int,
    seed: int = 0,
    *,
    device: str = "cpu",
    image_size: int = 64,
    batch_size: int = 256,
    config: SimulationConfig | None = None,
    compiled: bool = False,
) -> Simulation:
    """Simulate n cutouts: lenses, each followed by a decoy made of the same light.

    The first m cutouts are the same for every n >= m (and one pool of hosts); for another
    batch_size (cutouts drawn together) or device, or compiled (see `Renderer`), to 1e-4 of the
    background sigma, or 5e-7 of a cutout's brightest pixel where that is more: float32 holds no
    more of it. image_size: pixels a side, 32 to 512, as of the settings. config:
    `load_config(survey)` by default. Raises InputError for an unknown survey, arguments out of
    range, a pool of hosts that cannot be used (see `read_pool`), or where nothing can be compiled.
    """
    _check(n, seed, image_size)
    config = config or load_config(survey)
    galaxies = _galaxies(config, _renderer(config, device, image_size, compiled))
    parts = []
    with progress_bar(total=n, desc="simulating", unit="cutout") as progress:
        for part in _batches(galaxies, config, range(n), seed, batch_size):
            parts.append(part)
            progress.update(len(part.table))
    return Simulation(
        np.concatenate([part.images for part in parts]),
        pd.concat([part.table for part in parts], ignore_index=True),
    )


def simulate_catalogue(
    out: str | Path,
    config: SimulationConfig,
    n: int,
    seed: int = 0,
    *,
    device: str = "cpu",
    image_size: int = 64,
    compiled: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Path:
    """Write n simulated cutouts into `out`, a folder that holds nothing, or is made; return its
    `catalogue.parquet`.

    The catalogue has `Simulation`'s columns, `path` (`images-00000.npy#17` is row 17 of that
    stack), `flux_unit`, `bands` and `simulated`; `simulation.json` says what made it. The files are
    the same, byte for byte, for the same arguments. storage_options: of fsspec, for the pool of
    hosts. Raises InputError as `simulate` does, and for a folder that holds anything.
    """
    _check(n, seed, image_size)
    with filling(out) as folder:
        renderer = _renderer(config, device, image_size, compiled)
        galaxies = _galaxies(config, renderer, folder, storage_options)
        table = _write_stacks(folder, galaxies, config, n, seed)
        about = {
            **json.loads(config.model_dump_json()),  # null where a bound is infinite
            "population_version": population.VERSION,
            "n": int(n),
            "seed": int(seed),
            "image_size": int(image_size),
        }
        (folder / "simulation.json").write_text(json.dumps(about, indent=2) + "\n")
        catalogue = folder / "catalogue.parquet"
        table.to_parquet(catalogue, index=False)
    return catalogue


def _write_stacks(
    folder: Path, galaxies: HostGalaxies, config: SimulationConfig, n: int, seed: int
) -> pd.DataFrame:
    """Of the catalogue of n cutouts, whose images are written."""
    tables, bands, size = [], config.survey.bands, galaxies.renderer.size
    with progress_bar(total=n, desc="simulating", unit="cutout") as progress:
        for number, first in enumerate(range(0, n, STACK_ROWS)):
            rows = range(first, min(first + STACK_ROWS, n))
            file = folder / f"images-{number:05d}.npy"
            with closing(Stack(file, (len(bands), size, size))) as stack:
                for part in _batches(galaxies, config, rows, seed):
                    for image in part.images:
                        stack.append(image)
                    tables.append(part.table)
                    progress.update(len(part.table))
    table = pd.concat(tables, ignore_index=True)
    paths = [f"images-{row // STACK_ROWS:05d}.npy#{row % STACK_ROWS}" for row in range(n)]
    table.insert(1, "path", paths)
    table["flux_unit"] = SIGMA_UNITS
    table["bands"] = ",".join(bands)
    table["simulated"] = True  # it may be put together with one of real cutouts
    return table


def simulate_surveys(
    out: str | Path,
    configs: Sequence[SimulationConfig],
    n: int,
    seed: int = 0,
    *,
    image_size: int = 64,
    **how: Any,
) -> Path:
    """Write n simulated cutouts into `out`, a folder that holds nothing, or is made, as many of
    each survey; return the `catalogue.parquet` of all.

    The cutouts of each survey lie in a folder of its name; those of a single one in `out` itself.
    Several have each a seed of their own, from `seed` and the name: no two share hosts or noise.
    how: what else `simulate_catalogue` takes. Raises InputError as it does, and, before anything is
    simulated, where two surveys have one name or differ in their bands, or n is less than they are.
    """
    how["image_size"] = image_size
    if len(configs) == 1:
        return simulate_catalogue(out, configs[0], n, seed, **how)
    names = [config.survey.name for config in configs]
    if len(set(names)) < len(names):
        raise InputError(f"survey: {', '.join(names)}: each needs a name of its own")
    _check(n, seed, image_size, surveys=len(names))
    joined_format({one.survey.name: _format(one.survey, image_size) for one in configs})
    with filling(out) as folder:
        tables = []
        for number, (name, config) in enumerate(zip(names, configs, strict=True)):
            share = n // len(names) + (number < n % len(names))
            own_seed = number_of(f"{seed} {name}", 2**32)
            table = pd.read_parquet(
                simulate_catalogue(folder / name, config, share, own_seed, **how)
            )
            tables.append(table.assign(path=f"{name}/" + table["path"]))
        catalogue = folder / "catalogue.parquet"
        pd.concat(tables, ignore_index=True).to_parquet(catalogue, index=False)
    return catalogue


def _check(n: int, seed: int, image_size: int, surveys: int = 1) -> None:
    """Raises InputError, naming the argument, where one is no whole number or out of range."""
    for name, value, least, most in (
        ("n", n, surveys, None),
        ("seed", seed, 0, MAX_SEED),
        ("image_size", image_size, MIN_IMAGE_SIZE, MAX_IMAGE_SIZE),
    ):
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise InputError(f"{name}: {value!r} must be a whole number")
        if value < least:
            raise InputError(f"{name}: {value} is too small; at least {least} is needed")
        if most is not None and value > most:
            raise InputError(f"{name}: {value} is too large; at most {most} is possible")


def _format(survey: Survey, image_size: int) -> CutoutFormat:
    return CutoutFormat(survey.bands, image_size, SIGMA_UNITS, survey.pixel_scale)


def _renderer(config: SimulationConfig, device: str, image_size: int, compiled: bool) -> Renderer:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise InputError(f"device: {device} cannot be used ({reason})") from None
    if compiled:
        try:
            torch.compile(torch.sqrt)(torch.ones(2, device=device))
        except RuntimeError as problem:
            reason = str(problem).strip().splitlines()[0]
            raise InputError(f"compiled: torch cannot compile ({reason}); install g++") from None
    sources = make_sources(config.sources, device)
    return Renderer(config.survey, sources, image_size, device, compiled)


def _galaxies(
    config: SimulationConfig,
    renderer: Renderer,
    scratch: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> HostGalaxies:
    if config.hosts is None:
        return SersicHosts(renderer)
    SimulationConfig.model_validate(config.model_dump())  # a copy keeps decoys that are impossible
    return RealHosts(renderer, read_pool(config.hosts, config, renderer.size, scratch, options))


def _batches(
    galaxies: HostGalaxies, config: SimulationConfig, rows: range, seed: int, batch_size: int = 256
) -> Iterator[Simulation]:
    """The cutouts of those rows, some at a time; row 2h is host h's lens, 2h + 1 is not."""
    if batch_size < 2:
        raise InputError(f"batch_size: {batch_size} is too small; at least 2 is needed")
    # Of large cutouts fewer, for memory holds them all.
    area = max(1.0, (galaxies.renderer.size / LARGE) ** 2)
    step = max(2, int(batch_size / area) // 2 * 2)
    for first in range(rows.start, rows.stop, step):
        yield _pairs(galaxies, config, seed, range(first, min(first + step, rows.stop)))


@torch.inference_mode()
def _pairs(galaxies: HostGalaxies, config: SimulationConfig, seed: int, rows: range) -> Simulation:
    hosts = range(rows.start // 2, (rows.stop + 1) // 2)
    lenses = draw_lenses(galaxies, config, seed, hosts)
    kinds = choose_kinds(seed, hosts, config.decoys)
    bare = galaxies.unexposed(lenses.galaxy)
    decoys = draw_decoys(galaxies, seed, lenses.table, bare, kinds)
    # Of both the same: neighbours of one alone would tell them apart.
    neighbours = galaxies.neighbours(seed, lenses.table)
    electrons = torch.stack([bare + lenses.arcs, decoys], dim=1) + neighbours[:, None]
    numbers = lenses.table["host_galaxy"].to_numpy()
    defects = choose_defects(seed, hosts, kinds, config.decoys)
    add_defects(electrons, galaxies, seed, np.array(hosts), numbers, defects)
    deviates = _deviates(electrons, seed, hosts)
    images = galaxies.expose(electrons, deviates, numbers)
    return Simulation(
        images.flatten(0, 1)[: len(rows)].cpu().numpy(),
        _table(galaxies, lenses.table, kinds, defects, rows),
    )


def _deviates(like: Tensor, seed: int, hosts: range) -> Tensor:
    noise = np.stack(
        [stream(seed, h, Purpose.NOISE).standard_normal(like.shape[1:], np.float32) for h in hosts]
    )
    return torch.from_numpy(noise).to(like.device)


def _table(
    galaxies: HostGalaxies,
    lenses: pd.DataFrame,
    kinds: NDArray[np.str_],
    defects: NDArray[np.str_],
    rows: range,
) -> pd.DataFrame:
    row = np.array(rows)
    host, is_lens = row // 2, row % 2 == 0
    kind = np.where(is_lens, "lens", kinds[host - host[0]])
    truths = lenses.loc[host].reset_index(drop=True)
    survey, names = galaxies.renderer.survey, galaxies.renderer.sources.names
    hosts = galaxies.described(truths["host_galaxy"].to_numpy())
    galaxy = np.array(names)[truths["source_galaxy"]] if names else np.full(len(row), "")
    truths.loc[~is_lens, LENSING_TRUTHS] = np.nan
    if names:
        truths["source_axis_ratio"] = np.nan  # real galaxies have shapes of their own
    not_there = [name for name in GALAXY_TRUTHS if name not in OF_ANOTHER_GALAXY]
    truths.loc[kind == "late_type", not_there] = np.nan
    cutouts = pd.DataFrame(
        {
            "id": [f"{survey.name}-{r:07d}-{k}" for r, k in zip(row, kind, strict=True)],
            "label": is_lens.astype(np.int8),
            "kind": kind,
            "defect": defects[host - host[0], row % 2],
            # A galaxy that is lensed in two splits would be known from training.
            "group": galaxy if names else hosts["group"],
            "survey": survey.name,
            "pixel_scale": survey.pixel_scale,
            "source_galaxy": galaxy,
        }
    )
    truths = truths[[*GALAXY_TRUTHS, *LENSING_TRUTHS]]
    return pd.concat([cutouts, hosts.drop(columns="group"), truths], axis=1)
