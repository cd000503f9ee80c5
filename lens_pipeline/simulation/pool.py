"""A pool of real lens galaxies: a catalogue of cutouts on which arcs are painted.

Any catalogue that `catalogue.read_catalogue` reads; labels may be empty, and lenses (label 1) are
left out. Its cutouts are those of the survey: its bands, by name where files name them, and its
pixel scale, in linear flux. What the catalogue says of a galaxy in these columns replaces what the
population draws, where a row is not empty: `z_lens` (or `redshift`), `velocity_dispersion` (km/s),
`axis_ratio` and `position_angle` (radians from +x, along columns, towards +y, along rows, of the
major axis), and `x`, `y` (arcsec from the middle of the cutout). The last four are measured on the
image where they are not given, so that mass and light lie alike.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.catalogue.columns import numbers, refuse
from lens_pipeline.catalogue.cutout import COMPOSITE, Cutout, CutoutError
from lens_pipeline.catalogue.reading import read_cutouts
from lens_pipeline.catalogue.table import Catalogue, read_catalogue
from lens_pipeline.errors import InputError, told_of
from lens_pipeline.simulation.config import MAX_VELOCITY_DISPERSION, Array, SimulationConfig
from lens_pipeline.simulation.moments import BRIGHT, Shape, moments_of_psf, shape_of
from lens_pipeline.simulation.population import may_lens
from lens_pipeline.simulation.psf import point_spread
from lens_pipeline.simulation.render import Renderer
from lens_pipeline.simulation.sources import SersicDiscs
from lens_pipeline.simulation.surveys import Survey

MEASURED = ("x", "y", "axis_ratio", "position_angle")
KNOWN = ("z_lens", "velocity_dispersion", *MEASURED)
PLACE = ("ra", "dec")
PIXEL_SCALE_TOLERANCE = 0.01
MAX_REDSHIFT = 10.0
TYPICAL = {"x": 0.0, "y": 0.0, "lens_radius": 0.8, "axis_ratio": 0.7}  # of lens galaxies; arcsec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pool:
    """The galaxies of a pool that can be hosts.

    table: `id`, `group`, the columns of KNOWN (float64, NaN where not known), and `ra`, `dec` where
    the catalogue has them; one row a galaxy.
    pixels: float32 (n, bands, size, size), in units of each band's background sigma; a file that is
    mapped, so that no more is in memory than is looked at.
    background: (n, bands), electrons^2: the square of that sigma in the survey's camera, by the
    file's zero point; where it states none, the survey's own.
    """

    table: pd.DataFrame
    pixels: NDArray[np.float32]
    background: NDArray[np.float64]


def pool_catalogue(source: str, options: Mapping[str, Any] | None = None) -> Catalogue:
    """The catalogue of a pool. Raises InputError, naming the setting, as `read_catalogue` does."""
    try:
        return read_catalogue(source, options)
    except InputError as problem:
        raise told_of("hosts", problem) from None


def read_pool(
    source: str,
    config: SimulationConfig,
    image_size: int,
    scratch: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Pool:
    """The galaxies of a catalogue (path or fsspec URL) that can be hosts, read once.

    Those labelled lenses, those that cannot lens within the population's cuts, and those whose
    cutouts cannot be used are left out, counted and logged. scratch: where the pixels lie until
    this process ends, in a file without a name; by default in the system's temporary folder.
    Raises InputError, naming file, row and column, for composites, another pixel scale, values out
    of range, and where no galaxy is left.
    """
    survey = config.survey
    catalogue = pool_catalogue(source, options)
    _check_pixel_scale(catalogue, survey)
    known = _known(catalogue, image_size * survey.pixel_scale / 2)
    lens = (catalogue.table["label"] == 1).fillna(False).to_numpy(bool)
    able = may_lens(config, known["velocity_dispersion"].to_numpy(), known["z_lens"].to_numpy())
    rejects: list[str] = []
    rows: list[int] = []
    magnitudes: list[Sequence[float]] = []
    shapes: list[Shape] = []
    middles: list[tuple[float, float]] = []
    psf = moments_of_psf(point_spread(survey, "cpu").mean(dim=0).double().numpy())
    seen = _seen_ellipticity(survey, psf)
    at = known[["x", "y"]].fillna(0.0).to_numpy() / survey.pixel_scale
    with tempfile.TemporaryFile(dir=scratch) as file:
        wanted = np.flatnonzero(~lens & able)
        for row, cutout in _read(catalogue, wanted, image_size, survey.bands, options):
            if isinstance(cutout, CutoutError):
                rejects.append(f"{_where(catalogue, row, cutout.image)}: {cutout}")
            else:
                file.write(np.ascontiguousarray(cutout.pixels, np.float32).tobytes())
                rows.append(row)
                # In units of each band's noise, their mean is the more certain.
                image = cutout.pixels.astype(np.float64).sum(axis=0) / np.sqrt(len(survey.bands))
                middles.append(cutout.middle)
                x, y = at[row] + cutout.middle
                shapes.append(shape_of(image, psf, x, y, seen))
                magnitudes.append(cutout.background_magnitude)
        _tell(source, len(known), len(rows), int(lens.sum()), int((~lens & ~able).sum()), rejects)
        file.flush()
        shape = (len(rows), len(survey.bands), image_size, image_size)
        pixels = np.memmap(file, np.float32, "r", shape=shape)
    known = known.iloc[rows].reset_index(drop=True)
    known[["x", "y"]] += np.array(middles) * survey.pixel_scale
    _warn_of_unknown_mass(source, known)
    known = _with_shapes(known, shapes, survey.pixel_scale)
    columns = ["id", "group", *(name for name in PLACE if name in catalogue.table)]
    of_catalogue = catalogue.table[columns].iloc[rows].reset_index(drop=True)
    table = pd.concat([of_catalogue, known], axis=1)
    return Pool(table, pixels, _background(survey, np.array(magnitudes, np.float64)))


def _read(
    catalogue: Catalogue,
    wanted: NDArray[np.intp],
    image_size: int,
    bands: Sequence[str],
    options: Mapping[str, Any] | None,
) -> Iterator[tuple[int, Cutout | CutoutError]]:
    """(row, cutout or the reason against it) of those rows. Raises InputError for a composite."""
    read = read_cutouts(
        catalogue, image_size, bands=bands, options=dict(options or {}), rows=wanted
    )
    for row, cutout in read:
        if isinstance(cutout, Cutout) and cutout.units == COMPOSITE:
            raise InputError(
                f"hosts: {catalogue.source}: {_where(catalogue, row)}: is a composite; arcs can be "
                "painted on linear flux alone, as FITS or NPY files hold it"
            )
        yield row, cutout


def _tell(source: str, n: int, used: int, lenses: int, unable: int, rejects: list[str]) -> None:
    """Log how many galaxies are left out, and why. Raises InputError where none is left."""
    first = f" (the first: {rejects[0]})" if rejects else ""
    reasons = {
        "labelled lenses": lenses,
        "that cannot lens within the population's cuts": unable,
        f"that cannot be used{first}": len(rejects),
    }
    left_out = ", ".join(f"{count} {why}" for why, count in reasons.items() if count)
    if not used:
        raise InputError(f"hosts: {source}: none of its {n} galaxies can be a host: {left_out}")
    more = f"; left out: {left_out}" if left_out else ""
    log.info("hosts: %d of %d galaxies of %s%s", used, n, source, more)


def _warn_of_unknown_mass(source: str, known: pd.DataFrame) -> None:
    unknown = int(known["velocity_dispersion"].isna().sum())
    if unknown:
        log.warning(
            "hosts: of %d of %d galaxies of %s the velocity dispersion is not known: it is drawn, "
            "and the redshift where that is not known, whatever the galaxy's brightness",
            unknown,
            len(known),
            source,
        )


def _seen_ellipticity(survey: Survey, psf: Array) -> float:
    """What `shape_of` sees of the ellipticity of the population's early types, n = 4.

    Of one of TYPICAL, turned all ways: with the radius it changes by a tenth.
    """
    renderer = Renderer(survey, SersicDiscs(), 64, "cpu")
    turned = pd.DataFrame({**TYPICAL, "position_angle": np.arange(4) * np.pi / 8})
    light = renderer.blur(renderer.elliptical(renderer.parameters(turned))).mean(dim=1)
    images = (light * (BRIGHT / light.amax())).double().numpy()
    squared = np.array([shape_of(image, psf).axis_ratio for image in images]) ** 2
    true = (1 - TYPICAL["axis_ratio"] ** 2) / (1 + TYPICAL["axis_ratio"] ** 2)
    seen = float(((1 - squared) / (1 + squared)).mean() / true)
    # Nothing is seen through a point spread function as wide as the cutouts.
    return seen if seen > 0 else 1.0


def _with_shapes(known: pd.DataFrame, shapes: Sequence[Shape], pixel_scale: float) -> pd.DataFrame:
    """What is known, with what is measured where it is not."""
    measured = pd.DataFrame([asdict(shape) for shape in shapes])
    measured[["x", "y"]] *= pixel_scale
    missing = int((known[list(MEASURED)].isna() & measured.isna()).any(axis=1).sum())
    if missing:
        log.info("hosts: of %d of %d galaxies no shape can be measured", missing, len(known))
    return known.fillna(measured)


def _background(survey: Survey, magnitude: NDArray[np.float64]) -> NDArray[np.float64]:
    """electrons^2 of background sigmas of those AB magnitudes; of NaN, the survey's."""
    stated = np.isfinite(magnitude)
    own = -2.5 * np.log10(
        np.sqrt(survey.background_variance) / survey.electrons(np.zeros(len(survey.bands)))
    )
    for band, name in enumerate(survey.bands):
        if stated[:, band].any():
            log.info(
                "hosts: one background sigma in %s is %.2f mag in the median (%s: %.2f mag)",
                name,
                np.median(magnitude[stated[:, band], band]),
                survey.name,
                own[band],
            )
    return np.where(stated, survey.electrons(magnitude) ** 2, survey.background_variance)


def _check_pixel_scale(catalogue: Catalogue, survey: Survey) -> None:
    if "pixel_scale" not in catalogue.table:
        log.warning(
            "hosts: %s has no column pixel_scale; %g arcsec, survey.pixel_scale, is taken for it",
            catalogue.source,
            survey.pixel_scale,
        )
    if "pixel_scale" in catalogue.table:
        differs = (catalogue.table["pixel_scale"] / survey.pixel_scale - 1).abs()
        refuse(
            f"hosts: {catalogue.source}",
            catalogue.table,
            differs > PIXEL_SCALE_TOLERANCE,
            "pixel_scale",
            f"is not survey.pixel_scale, {survey.pixel_scale:g}; set that in the simulation's YAML",
        )


def _known(catalogue: Catalogue, half_side: float) -> pd.DataFrame:
    """The columns of KNOWN, float64; NaN where the catalogue does not tell them.

    half_side: of a cutout, arcsec.
    """
    redshift = (0.0, MAX_REDSHIFT, f"a redshift, above 0 and at most {MAX_REDSHIFT:g}")
    inside = (-half_side, half_side, "arcsec from the middle of the cutout, and within it")
    allowed = {
        "z_lens": redshift,
        "redshift": redshift,
        "velocity_dispersion": (
            *(0.0, MAX_VELOCITY_DISPERSION),
            f"km/s, above 0, and at most {MAX_VELOCITY_DISPERSION:.0f}, for no galaxy has more",
        ),
        "axis_ratio": (0.0, 1.0, "above 0, and at most 1"),
        "position_angle": (-2 * np.pi, 2 * np.pi, "radians from +x towards +y"),
        "x": inside,
        "y": inside,
    }
    source = f"hosts: {catalogue.source}"
    found = {}
    for name, (above, most, what) in allowed.items():
        found[name] = numbers(catalogue.table, name, source, what)
        outside = (found[name] <= above) | (found[name] > most)
        refuse(source, catalogue.table, outside, name, f"must be {what}, or empty")
    found["z_lens"] = found["z_lens"].fillna(found["redshift"])
    return pd.DataFrame({name: found[name] for name in KNOWN})


def _where(catalogue: Catalogue, row: int, image: int = 0) -> str:
    column = catalogue.image_columns[image]
    return f"row {row + 1}, column {column}, {catalogue.table[column].iloc[row]}"
