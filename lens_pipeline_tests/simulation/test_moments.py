"""Shapes of galaxies before the point spread function, whichever that is."""

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from scipy.signal import fftconvolve

from lens_pipeline.simulation.moments import moments_of_psf, shape_of
from lens_pipeline.simulation.psf import moffat

SIDE = 128


def measured(psf: np.ndarray) -> tuple[float, float]:
    """Axis ratio and position angle of a Gaussian galaxy, 8 by 4.8 pixels, turned by 0.5."""
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    major, minor = x * np.cos(0.5) + y * np.sin(0.5), y * np.cos(0.5) - x * np.sin(0.5)
    image = 1e4 * np.exp(-0.5 * ((major / 8) ** 2 + (minor / 4.8) ** 2))
    shape = shape_of(fftconvolve(image, psf / psf.sum(), mode="same"), moments_of_psf(psf))
    return shape.axis_ratio, shape.position_angle


@pytest.mark.parametrize("fwhm", [0.0, 1.0, 1.6, 4.0, 20.0, 25.0])
def test_no_psf_is_too_narrow_or_too_wide(fwhm: float) -> None:
    """Of a FWHM in pixels; 0 is a single pixel."""
    psf = np.pad([[1.0]], 24) if fwhm == 0 else moffat(fwhm, 3.0, "cpu").double().numpy()
    assert measured(psf) == pytest.approx((0.6, 0.5), abs=0.1)
    noise = np.random.default_rng(0).standard_normal((SIDE, SIDE))
    assert np.isnan(shape_of(noise, moments_of_psf(psf)).axis_ratio)


def test_a_psf_of_euclid(shared_data: Path) -> None:
    for path in sorted((shared_data / "euclid_q1").glob("*.fits")):
        psf = fits.getdata(path, extname="VIS_PSF").astype(np.float64)
        assert measured(psf) == pytest.approx((0.6, 0.5), abs=0.02), path
