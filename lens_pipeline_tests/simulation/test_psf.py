"""Point spread functions: the seeing's own, and those of the user."""

from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.io import fits

from lens_pipeline.errors import InputError
from lens_pipeline.simulation.psf import fwhm_of, moffat, point_spread, read_psf
from lens_pipeline.simulation.render import Renderer
from lens_pipeline.simulation.sources import SersicDiscs
from lens_pipeline.simulation.surveys import find_survey

DES = find_survey("des")


def test_the_psf_keeps_the_flux_and_has_the_seeing_as_its_width() -> None:
    kernel = moffat(3.4, 3.0, "cpu").numpy()
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    middle = kernel.shape[0] // 2
    profile = kernel[middle, middle:] / kernel[middle, middle]
    assert 2 * np.interp(0.5, profile[::-1], np.arange(len(profile))[::-1]) == pytest.approx(
        3.4, rel=0.03
    )


def test_a_psf_of_the_users_own(tmp_path: Path) -> None:
    narrow, wide = np.zeros((5, 5), np.float32), np.ones((51, 51), np.float32)
    narrow[2, 2] = 7
    for name, image in {"narrow": narrow, "wide": wide, "even": wide[:50, :50]}.items():
        fits.PrimaryHDU(image).writeto(tmp_path / f"{name}.fits")
    image = torch.zeros(1, 32, 32)
    image[0, 16, 16] = 1

    def blurred(name: str) -> np.ndarray:
        survey = DES.model_copy(update={"psf": str(tmp_path / f"{name}.fits")})
        return Renderer(survey, SersicDiscs(), 32, "cpu").blur(image).numpy()[0, 0]

    np.testing.assert_allclose(blurred("narrow"), image[0].numpy(), atol=1e-6)
    assert blurred("wide")[16, 16] == pytest.approx(1 / 49**2, rel=1e-3)  # cut to 49 pixels a side
    fits.PrimaryHDU(np.ones((61, 61), np.float32)).writeto(tmp_path / "wider.fits")
    with pytest.raises(InputError, match=r"wider\.fits has 35% of its light more than 24 pixels"):
        blurred("wider")
    columns = [fits.Column("PSF_MASK", "25E", array=np.ones((1, 25)))]
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / "psfex.fits")
    with pytest.raises(InputError, match=r"psfex\.fits holds a table, as PSFEx writes"):
        blurred("psfex")
    with pytest.raises(InputError, match=r"s3://b/psf\.fits is a URL; name a file"):
        read_psf("s3://b/psf.fits")
    with pytest.raises(InputError, match=r"even\.fits has the shape \(50, 50\); .* needed"):
        blurred("even")
    with pytest.raises(InputError, match=r"none\.fits cannot be read"):
        blurred("none")
    moved = np.roll(narrow, (1, -2), axis=(0, 1))
    fits.PrimaryHDU(moved).writeto(tmp_path / "moved.fits")
    with pytest.raises(InputError, match=r"moved\.fits has its centroid -2\.0, \+1\.0 pixels"):
        blurred("moved")


def test_a_noisy_psf_is_as_centred_as_its_peak(tmp_path: Path) -> None:
    """A mean of stars whose wings are noise, far beyond what is drawn with."""
    y, x = np.mgrid[:101, :101] - 50.0
    random = np.random.default_rng(0)
    for number in range(8):
        noise = random.standard_normal(x.shape) / 200
        for name, off in (("fine", 0.0), ("moved", 0.8)):
            image = (1 + ((x - off) ** 2 + y**2) / 3.9**2) ** -3.0 + noise
            fits.PrimaryHDU(image.astype(np.float32)).writeto(tmp_path / f"{name}{number}.fits")
        assert read_psf(str(tmp_path / f"fine{number}.fits")).sum() == pytest.approx(1, abs=1e-5)
        with pytest.raises(InputError, match=r"has its centroid \+0\.[789], [+-]0\.[01] pixels"):
            read_psf(str(tmp_path / f"moved{number}.fits"))


def test_psfs_of_real_surveys_are_centred(shared_data: Path, tmp_path: Path) -> None:
    count = 0
    for path in (shared_data / "euclid_q1").glob("*.fits"):
        with fits.open(path) as file:
            for hdu in file:
                if hdu.name.endswith("_PSF"):
                    count += 1
                    fits.PrimaryHDU(hdu.data).writeto(tmp_path / f"{count}.fits")
                    psf = read_psf(str(tmp_path / f"{count}.fits"))
                    if hdu.name == "VIS_PSF":  # pixels of 0.1 arcsec; Cropper et al. 2025
                        assert 1.3 < fwhm_of(psf) < 2.1
    assert count == 24


def test_a_psf_is_not_cut_without_a_word() -> None:
    """Of 20 pixels and a slope of 3, a sixth of the light is beyond what is drawn."""
    survey = DES.model_copy(update={"seeing": 20 * DES.pixel_scale})
    with pytest.raises(InputError, match=r"survey\.seeing: 16% of the light of a Moffat profile"):
        point_spread(survey, "cpu")
    point_spread(survey.model_copy(update={"seeing": 14 * DES.pixel_scale}), "cpu")


def test_each_band_may_have_a_psf_of_its_own(tmp_path: Path) -> None:
    point = torch.zeros(1, 64, 64)
    point[0, 32, 32] = 1
    magnitudes = np.full((1, 3), 20.0)

    def seen(**changes: object) -> np.ndarray:
        renderer = Renderer(DES.model_copy(update=changes), SersicDiscs(), 64, "cpu")
        electrons = renderer.electrons(renderer.blur(point), magnitudes).numpy()[0]
        return electrons / electrons.sum(axis=(1, 2), keepdims=True)

    of_each = seen(seeing=(1.4, 1.0, 0.8))
    for band, seeing in enumerate((1.4, 1.0, 0.8)):
        np.testing.assert_allclose(of_each[band], seen(seeing=seeing)[band], atol=1e-6)
    paths = []
    for side in (1, 3, 5):
        fits.PrimaryHDU(np.ones((side, side), np.float32)).writeto(tmp_path / f"{side}.fits")
        paths.append(str(tmp_path / f"{side}.fits"))
    np.testing.assert_allclose(seen(psf=tuple(paths))[:, 32, 32], [1, 1 / 9, 1 / 25], atol=1e-5)
