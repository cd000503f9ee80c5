"""What a survey's camera and sky do to a cutout."""

import difflib
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lens_pipeline.errors import InputError

KNOWN_BANDS = ("g", "r", "i", "VIS")
LEAST_NOISE = 1.0  # electrons^2 of an empty pixel: it is drawn as a normal distribution
PER_BAND = ("sky_brightness", "zero_point", "exposure_time")
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class Survey(BaseModel):
    """A survey's coadded images, taken to be alike over its whole area."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(description="as in SURVEYS, or the user's own")
    bands: tuple[str, ...] = Field(
        min_length=1, description=f"of {', '.join(KNOWN_BANDS)}, in an image's order"
    )
    pixel_scale: Positive = Field(description="arcsec/pixel")
    seeing: Positive | tuple[Positive, ...] = Field(
        description="FWHM of the point spread function, arcsec; one, or one a band"
    )
    moffat_beta: float = Field(
        default=3.0, gt=1, description="slope of its Moffat profile, (1 + (r/a)^2)^-beta"
    )
    psf: str | tuple[str, ...] | None = Field(
        default=None,
        description="a FITS file of the point spread function, instead of Moffat's; or one a band; "
        "in a YAML file that leaves `seeing` out, that is their FWHM",
    )
    sky_brightness: tuple[float, ...] = Field(description="mag/arcsec^2, one a band")
    zero_point: tuple[float, ...] = Field(description="AB magnitude of one ADU/s, one a band")
    exposure_time: tuple[Positive, ...] = Field(description="s in all, one a band")
    exposures: Count | tuple[Count, ...] = Field(
        description="how many are coadded; one number, or one a band"
    )
    gain: Positive = Field(description="electrons per ADU")
    read_noise: float = Field(ge=0, description="electrons per pixel and exposure")
    noise_correlation: float = Field(
        default=0.0, ge=0, le=0.5, description="of adjacent pixels' noise, in resampled coadds"
    )

    @model_validator(mode="after")
    def _one_a_band(self) -> Self:
        for band in self.bands:
            if band not in KNOWN_BANDS:
                raise ValueError(f"bands: {band!r} is none of {', '.join(KNOWN_BANDS)}")
        if len(set(self.bands)) < len(self.bands):
            raise ValueError(f"bands: {', '.join(self.bands)}: one is named twice")
        for name in (*PER_BAND, "exposures", "seeing", "psf"):
            values = getattr(self, name)
            if isinstance(values, tuple) and len(values) != len(self.bands):
                raise ValueError(
                    f"{name}: has {len(values)} values for the bands "
                    f"{', '.join(self.bands)}; give one for each"
                )
        darkest = int(self.background_variance.argmin())
        if self.background_variance[darkest] < LEAST_NOISE:
            raise ValueError(
                f"sky_brightness, exposure_time, read_noise: in {self.bands[darkest]} an empty "
                f"pixel has a noise of {self.background_variance[darkest] ** 0.5:.2g} electrons; "
                f"at least {LEAST_NOISE**0.5:g} is needed"
            )
        return self

    @property
    def seeings(self) -> tuple[float, ...]:
        """FWHM in arcsec, one a band."""
        one = self.seeing
        return one if isinstance(one, tuple) else (one,) * len(self.bands)

    @property
    def best_seeing(self) -> float:
        """FWHM in arcsec, of the band in which a lens is resolved first."""
        return min(self.seeings)

    @property
    def psfs(self) -> tuple[str, ...]:
        """Files with point spread functions: none, one of all bands, or one a band."""
        if self.psf is None:
            return ()
        return self.psf if isinstance(self.psf, tuple) else (self.psf,)

    def electrons(self, magnitude: NDArray[np.float64]) -> NDArray[np.float64]:
        """Electrons (..., bands) that the coadd collects from AB magnitudes (..., bands)."""
        scale = self.gain * np.asarray(self.exposure_time)
        return scale * 10 ** (0.4 * (np.asarray(self.zero_point) - magnitude))

    @property
    def background_variance(self) -> NDArray[np.float64]:
        """Variance of an empty pixel, electrons^2, (bands,): Poisson sky plus read noise."""
        sky = self.electrons(np.asarray(self.sky_brightness)) * self.pixel_scale**2
        return sky + np.asarray(self.exposures) * self.read_noise**2


def of_bands(survey: Survey, bands: Any) -> dict[str, Any]:
    """What a survey says of each of some of its bands; nothing of others."""
    if not isinstance(bands, list) or not set(map(str, bands)) <= set(survey.bands):
        return {}
    places = [survey.bands.index(band) for band in bands]
    values = {name: getattr(survey, name) for name in (*PER_BAND, "exposures")}
    return {
        name: [one_a_band[place] for place in places]
        for name, one_a_band in values.items()
        if isinstance(one_a_band, tuple)
    }


_GRI = ("g", "r", "i")
# LensPop's numbers (Collett 2015) where nothing else is said. The slope of the Moffat profile is a
# common one for coadds.
SURVEYS = {
    survey.name: survey
    for survey in (
        Survey(  # its zero point is 30 for an exposure of 90 s; read noise: deeplenstronomy
            name="des",
            bands=_GRI,
            pixel_scale=0.263,
            seeing=0.9,
            sky_brightness=(21.7, 20.7, 20.1),
            zero_point=(30 - 2.5 * float(np.log10(90)),) * 3,
            gain=4.5,
            exposure_time=(900, 900, 900),
            exposures=10,
            read_noise=7.0,
        ),
        # Camera, seeing and exposures of the Wide layer: Aihara et al. 2018. DES's zero point for a
        # mirror of 8.2 m. Sky: LensPop's in g and i; in r CFHTLS's, which LensPop's HSC lacks.
        Survey(
            name="hsc",
            bands=_GRI,
            pixel_scale=0.168,
            seeing=0.7,
            sky_brightness=(21.9, 20.6, 19.2),
            zero_point=(30 - 2.5 * float(np.log10(90 / (8.2 / 4) ** 2)),) * 3,
            gain=4.5,
            exposure_time=(600, 600, 1200),
            exposures=6,
            read_noise=4.5,
        ),
        Survey(  # ten years: 80, 184, 184 visits of 30 s; zero points of electrons: SMTN-002
            name="lsst",
            bands=_GRI,
            pixel_scale=0.2,
            seeing=0.73,
            sky_brightness=(22.26, 21.2, 20.48),
            zero_point=(28.38, 28.16, 27.85),
            gain=1.0,
            exposure_time=(2400, 5520, 5520),
            exposures=(80, 184, 184),
            read_noise=10.0,
        ),
        Survey(  # its FWHM: within the 0.17 to 0.2 arcsec of LensPop's tables
            name="euclid_vis",
            bands=("VIS",),
            pixel_scale=0.1,
            seeing=0.18,
            sky_brightness=(22.2,),
            zero_point=(25.5,),
            gain=1.0,
            exposure_time=(1610,),
            exposures=4,
            read_noise=4.5,
        ),
        Survey(
            name="cfhtls",
            bands=_GRI,
            pixel_scale=0.187,
            seeing=0.8,
            sky_brightness=(21.9, 20.6, 19.2),
            zero_point=(26.96, 26.47, 26.24),
            gain=1.62,
            exposure_time=(3500, 5500, 5500),
            exposures=1,
            read_noise=5.0,
        ),
    )
}


DEFAULT_SURVEY = "des"


def find_survey(name: str) -> Survey:
    """The preset of that name, in any case of letters. Raises InputError for an unknown one."""
    try:
        return SURVEYS[name.lower()]
    except KeyError:
        near = difflib.get_close_matches(name.lower(), SURVEYS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"survey: unknown {name!r}; {hint}there are {', '.join(SURVEYS)}"
        ) from None
