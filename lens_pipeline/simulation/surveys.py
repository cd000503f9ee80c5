"""What a survey's camera and sky do to a cutout."""

import difflib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lens_pipeline.errors import InputError


@dataclass(frozen=True)
class Survey:
    """A survey's coadded images, taken to be alike over its whole area.

    name: as in `SURVEYS`; bands: one letter each, the order of an image's first axis.
    pixel_scale: arcsec/pixel. seeing: FWHM of the point spread function in arcsec.
    moffat_beta: slope of its Moffat profile, (1 + (r/a)^2)^-beta.
    sky_brightness: mag/arcsec^2, one a band. zero_point: AB magnitude of one ADU per second.
    gain: electrons per ADU. exposure_time: seconds per exposure; exposures: how many are coadded.
    read_noise: electrons per pixel and exposure.
    """

    name: str
    bands: tuple[str, ...]
    pixel_scale: float
    seeing: float
    moffat_beta: float
    sky_brightness: tuple[float, ...]
    zero_point: float
    gain: float
    exposure_time: float
    exposures: int
    read_noise: float

    def electrons(self, magnitude: NDArray[np.float64]) -> NDArray[np.float64]:
        """Electrons that the coadd collects from an AB magnitude; any shape."""
        scale = self.gain * self.exposure_time * self.exposures
        return scale * 10 ** (0.4 * (self.zero_point - magnitude))

    @property
    def background_variance(self) -> NDArray[np.float64]:
        """Variance of an empty pixel, electrons^2, (bands,): Poisson sky plus read noise."""
        sky = self.electrons(np.asarray(self.sky_brightness)) * self.pixel_scale**2
        return sky + self.exposures * self.read_noise**2


SURVEYS = {
    # Collett 2015 (LensPop), whose zero point is 30 for an exposure of 90 s; the slope of the
    # Moffat profile is a common one for coadds, the read noise is deeplenstronomy's.
    "des": Survey(
        name="des",
        bands=("g", "r", "i"),
        pixel_scale=0.263,
        seeing=0.9,
        moffat_beta=3.0,
        sky_brightness=(21.7, 20.7, 20.1),
        zero_point=30 - 2.5 * float(np.log10(90)),
        gain=4.5,
        exposure_time=90.0,
        exposures=10,
        read_noise=7.0,
    ),
}


def find_survey(name: str) -> Survey:
    """The preset of that name, in any case of letters. Raises InputError for an unknown one."""
    try:
        return SURVEYS[name.lower()]
    except KeyError:
        near = difflib.get_close_matches(name.lower(), SURVEYS, cutoff=0.0) or list(SURVEYS)
        raise InputError(f"survey: unknown {name!r}; try {' or '.join(near)}") from None
