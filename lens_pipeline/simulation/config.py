"""All that decides a simulation: the survey, the hosts, the sources, the decoys, the population.

Plain pydantic, and written by hand in a YAML file where the defaults are not wanted::

    survey: {seeing: [1.3, 1.1, 1.0]}             # what differs from the preset; one a band, or one
    sources: sersic                               # or hubble
    decoys: {unlensed: 2, edge_on: 1}             # relative weights
    population:
      shear: {distribution: uniform, low: 0, high: 0.05}
      velocity_dispersion: {distribution: normal, mean: 250, std: 40, low: 100, high: 400}
      min_arc_snr: 30

With `hosts: lrg/catalogue.csv`, arcs are painted on real images of lens galaxies.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from scipy.special import ndtr, ndtri

from lens_pipeline.errors import InputError
from lens_pipeline.locations import at_home, protocol_of, written_down
from lens_pipeline.settings_files import first_wrong, no_such_key, read_yaml
from lens_pipeline.simulation.decoy_kinds import KEEP_HOST, MIXTURE
from lens_pipeline.simulation.surveys import DEFAULT_SURVEY, Survey, find_survey, of_bands

Array = NDArray[np.float64]

# km/s: no galaxy has more, and beyond 542 the relation of its magnitude has no solution.
MAX_VELOCITY_DISPERSION = 500.0
FARTHEST = 12.0  # redshift: the distances of `population` end there


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Uniform(_Part):
    """From low to high."""

    distribution: Literal["uniform"]
    low: float
    high: float

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low > self.high:
            raise ValueError("low must not be above high")
        return self

    def __call__(self, u: Array) -> Array:
        return self.low + (self.high - self.low) * u


class Normal(_Part):
    """A normal distribution, cut at low and high."""

    distribution: Literal["normal"]
    mean: float
    std: float = Field(gt=0)
    low: float = -np.inf
    high: float = np.inf

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low >= self.high:
            raise ValueError("low must be below high")
        if not np.isfinite(self(np.array(0.5))):
            raise ValueError("low and high are too many std from the mean")
        return self

    def __call__(self, u: Array) -> Array:
        if self.low > self.mean:  # so far above it `ndtr` is 1; so far below, it is exact
            mirrored = Normal.model_construct(
                mean=-self.mean, std=self.std, low=-self.high, high=-self.low
            )
            return -mirrored(1 - u)
        low, high = (ndtr((edge - self.mean) / self.std) for edge in (self.low, self.high))
        return self.mean + self.std * ndtri(low + (high - low) * u)


class LogNormal(_Part):
    """The decimal logarithm is normal: its median, and its scatter in dex."""

    distribution: Literal["lognormal"]
    median: float = Field(gt=0)
    dex: float = Field(gt=0)

    def __call__(self, u: Array) -> Array:
        return self.median * 10 ** (self.dex * ndtri(u))


class Constant(_Part):
    """Always the same."""

    distribution: Literal["constant"]
    value: float

    def __call__(self, u: Array) -> Array:
        return np.full_like(u, self.value)


# What values of a population can be, and how it is said.
POSSIBLE: Mapping[str, tuple[str, Callable[[Array], NDArray[np.bool_]]]] = {
    "lens_redshift": (f"above 0, and at most {FARTHEST:g}", lambda z: (z > 0) & (z <= FARTHEST)),
    "velocity_dispersion": ("above 0 km/s", lambda sigma: sigma > 0),
    "lens_axis_ratio": ("above 0, and at most 1", lambda q: (q > 0) & (q <= 1)),
    "shear": ("at least 0, and below 1", lambda gamma: (gamma >= 0) & (gamma < 1)),
    "source_redshift": (f"above 0, and at most {FARTHEST:g}", lambda z: (z > 0) & (z <= FARTHEST)),
    # The redshifts of brighter ones would be below 0.
    "source_i_magnitude": ("from 18 to 32", lambda i: (i >= 18) & (i <= 32)),
    "source_axis_ratio": ("above 0, and at most 1", lambda q: (q > 0) & (q <= 1)),
}
LOOKED_AT = np.array([0.001, 0.5, 0.999])  # quantiles

Distribution = Annotated[
    Uniform | Normal | LogNormal | Constant, Field(discriminator="distribution")
]


class Population(_Part):
    """Distributions that replace those of `population` with the same names, and the cuts.

    A distribution given here does not depend on what the built-in one depends on. That of velocity
    dispersions is of galaxies that are lenses: those of all galaxies, weighted by sigma^4.
    """

    lens_redshift: Distribution | None = None
    velocity_dispersion: Distribution | None = Field(
        default=None,
        description=f"km/s; what is above {MAX_VELOCITY_DISPERSION:.0f} is drawn anew",
    )
    lens_axis_ratio: Distribution | None = None
    shear: Distribution | None = None
    source_i_magnitude: Distribution | None = Field(default=None, description="unlensed, AB")
    source_redshift: Distribution | None = None
    source_axis_ratio: Distribution | None = None
    min_einstein_radius: float = Field(default=0.5, gt=0, description="arcsec")
    max_einstein_radius: float = Field(default=3.0, gt=0, description="arcsec")
    min_redshift_gap: float = Field(default=0.4, ge=0, description="between lens and source")
    min_magnification: float = Field(default=3.0, ge=0)
    min_arc_snr: float = Field(default=20.0, ge=0, description="in the best band")
    min_arc_contrast: float = Field(
        default=0.1, ge=0, description="over the galaxy's light, see `Renderer.contrast`"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.min_einstein_radius >= self.max_einstein_radius:
            raise ValueError(
                f"min_einstein_radius: must be below max_einstein_radius, which is "
                f"{self.max_einstein_radius:g} arcsec"
            )
        for name, (said, possible) in POSSIBLE.items():
            if (replacement := getattr(self, name)) is None:
                continue
            drawn = replacement(LOOKED_AT)
            if not (fits := possible(drawn)).all():
                raise ValueError(
                    f"{name}: must be {said}, and {drawn[~fits][0]:.3g} is drawn; a normal one is "
                    "cut at low and high"
                )
        return self

    @model_validator(mode="after")
    def _of_galaxies(self) -> Self:
        sigma = self.velocity_dispersion
        if sigma is not None and not sigma(np.array(0.5)) <= MAX_VELOCITY_DISPERSION:
            raise ValueError(
                f"velocity_dispersion: half of it is above {MAX_VELOCITY_DISPERSION:.0f} km/s, "
                "which no galaxy has"
            )
        return self

    def named(self, builtin: Callable[..., Array], u: Array, *given: Array) -> Array:
        """The distribution of the name of a function of `population`: given here, or that one."""
        replacement = getattr(self, builtin.__name__)
        return builtin(u, *given) if replacement is None else replacement(u)


class SimulationConfig(_Part):
    """The parts of a simulation."""

    survey: Survey
    hosts: str | None = Field(
        default=None,
        description="a catalogue of real lens galaxies' cutouts, or smooth ones; see `pool`",
    )
    sources: Literal["hubble", "sersic"] = Field(
        default="hubble", description="real galaxies of the Hubble deep field, or smooth discs"
    )
    decoys: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=lambda given: {
            kind: MIXTURE[kind] for kind in (KEEP_HOST if given.get("hosts") else MIXTURE)
        },
        description="relative weights by kind; with `hosts`, of those in KEEP_HOST alone",
    )
    population: Population = Population()

    @model_validator(mode="after")
    def _known_kinds(self) -> Self:
        unknown = sorted(set(self.decoys) - set(MIXTURE))
        if unknown:
            raise ValueError(f"decoys: {unknown[0]} is none of {', '.join(MIXTURE)}")
        if not sum(self.decoys.values()):
            raise ValueError("decoys: at least one weight must be above 0")
        if self.sources == "hubble" and self.population.source_axis_ratio is not None:
            raise ValueError(
                "population.source_axis_ratio: real galaxies (sources: hubble) have their own "
                "shapes; leave it out, or say sources: sersic"
            )
        moved = [kind for kind, weight in self.decoys.items() if weight and kind not in KEEP_HOST]
        if self.hosts is not None and self.survey.noise_correlation:
            raise ValueError(
                "survey.noise_correlation: real images (hosts) keep their own noise; leave it out"
            )
        if self.hosts is not None and moved:
            raise ValueError(
                f"decoys: {moved[0]} is made of the host's own light, which a real image (hosts) "
                f"does not tell; there are {', '.join(KEEP_HOST)}"
            )
        return self


def load_config(survey: str, file: str | Path | None = None) -> SimulationConfig:
    """The preset of a survey, with what a YAML file says on top.

    Raises InputError, naming the file and the key, where it says what is not valid.
    """
    preset = find_survey(survey)
    if file is None:
        return SimulationConfig(survey=preset)
    values = read_yaml(Path(file))
    stated = values.get("survey", {})
    if not isinstance(stated, dict):
        raise InputError(f"{file}: survey: must hold keys and their values")
    stated = of_bands(preset, stated.get("bands")) | stated
    if "psf" in stated:
        psf = stated["psf"]
        several = isinstance(psf, list)
        stated = stated | {
            "psf": [_beside(file, p) for p in psf] if several else _beside(file, psf)
        }
    if "hosts" in values:
        values = values | {"hosts": _beside(file, values["hosts"])}
    try:
        config = SimulationConfig.model_validate(values | {"survey": preset.model_dump() | stated})
    except ValidationError as problem:
        place, said, unknown = first_wrong(problem)
        if unknown and len(place) <= 2:
            known = [*SimulationConfig.model_fields]
            for section in ("survey", "population"):
                inside = SimulationConfig.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
                known += [f"{section}.{name}" for name in inside]
            said = no_such_key(".".join(place), known)
        raise InputError(": ".join(filter(None, (str(file), ".".join(place), said)))) from None
    if config.survey.psfs and "seeing" not in stated:
        # What is resolved, and what drawn out, is told by it: the preset's is another camera's.
        from lens_pipeline.simulation.psf import fwhm_of, read_psf

        scale = config.survey.pixel_scale
        seeing = tuple(fwhm_of(read_psf(path)) * scale for path in config.survey.psfs)
        seen = {"seeing": seeing[0] if len(seeing) == 1 else seeing}
        config = config.model_copy(update={"survey": config.survey.model_copy(update=seen)})
    return config


def load_configs(
    surveys: Sequence[str] | None, file: str | Path | None = None
) -> list[SimulationConfig]:
    """`load_config` of each survey, DEFAULT_SURVEY where none is named; of several, each must be
    called as it was named."""
    names = surveys or (DEFAULT_SURVEY,)
    configs = [load_config(name, file) for name in names]
    for name, config in zip(names, configs, strict=True):
        if len(names) > 1 and config.survey.name != name:
            raise InputError(
                f"LENS_SURVEY: {name}: the simulation calls it {config.survey.name}; name it so"
            )
    return configs


def _beside(file: str | Path, path: Any) -> Any:
    """A path in a YAML file is relative to the file; a URL, or what is no text, stays as it is.
    Raises InputError for a URL that holds a secret, for results name it."""
    if not isinstance(path, str):
        return path
    if protocol_of(path):
        try:
            return written_down(path)
        except InputError as problem:
            raise InputError(f"{file}: {problem}") from None
    if not path.strip():
        raise InputError(f"{file}: names a file by an empty text; leave its key out")
    return str(Path(file).parent / at_home(path))
