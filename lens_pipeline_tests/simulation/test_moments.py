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


@pytest.mark.parametrize("flux", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("distance", [6, 8, 11, 15])
def test_a_neighbour_is_not_measured_with_a_galaxy(flux: float, distance: int) -> None:
    """Rather nothing is: mass between two galaxies would have its arcs around nothing."""
    y, x = np.mgrid[:64, :64] - 31.5
    psf = moffat(3.4, 3.0, "cpu").double().numpy()

    def galaxy(x0: float) -> np.ndarray:
        return np.exp(-0.5 * (((x - x0) / 3) ** 2 + (y / 2.4) ** 2))

    image = fftconvolve(1e4 * (galaxy(0) + flux * galaxy(distance)), psf, mode="same")
    shape = shape_of(image, moments_of_psf(psf))
    assert np.isnan(shape.x) or abs(shape.x) < 1.5
    assert np.isnan(shape.axis_ratio) or abs(shape.axis_ratio - 0.8) < 0.2


def test_a_psf_of_euclid(shared_data: Path) -> None:
    paths = sorted((shared_data / "euclid_q1").glob("*.fits"))
    assert paths
    for path in paths:
        psf = fits.getdata(path, extname="VIS_PSF").astype(np.float64)
        assert measured(psf) == pytest.approx((0.6, 0.5), abs=0.02), path
