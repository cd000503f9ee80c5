"""From files to pixels: formats, units, and images that cannot be used."""

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from PIL import Image

from lens_pipeline.catalogue.images import CutoutError, background_sigma, read_cutout, read_image

RNG = np.random.default_rng(0)
NOISE = RNG.normal(0, 3, (3, 40, 40)).astype(np.float32)
NOISE[:, 18:22, 18:22] += 500


def test_linear_flux_is_in_background_sigma(tmp_path: Path) -> None:
    scaled = NOISE * np.array([1, 10, 0.1], np.float32)[:, None, None]
    np.save(tmp_path / "a.npy", scaled)
    cutout = read_cutout([str(tmp_path / "a.npy")], 40)
    assert cutout.units == "background_sigma"
    corner = cutout.pixels[:, :15, :]
    np.testing.assert_allclose(corner.std(axis=(1, 2)), 1, atol=0.06)
    np.testing.assert_allclose(cutout.pixels[0], NOISE[0] / background_sigma(NOISE[0]), rtol=1e-5)


def test_stated_background_sigma_is_left_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", NOISE)
    cutout = read_cutout([str(tmp_path / "a.npy")], 40, "background_sigma")
    np.testing.assert_array_equal(cutout.pixels, NOISE)


def test_background_sigma_is_blind_to_galaxies() -> None:
    with_galaxy = NOISE[0].copy()
    with_galaxy[10:25, 10:25] += 1000
    assert background_sigma(with_galaxy) == pytest.approx(3, rel=0.08)


def test_multi_extension_fits_with_band_names(tmp_path: Path) -> None:
    hdus = [fits.PrimaryHDU(), *(fits.ImageHDU(NOISE[i], name=b) for i, b in enumerate("GRI"))]
    fits.HDUList(hdus).writeto(tmp_path / "a.fits")
    cutout = read_image(str(tmp_path / "a.fits"))
    assert cutout.bands == ("G", "R", "I")
    np.testing.assert_array_equal(cutout.pixels, NOISE)


def test_a_file_for_each_band(tmp_path: Path) -> None:
    for band in range(2):
        fits.PrimaryHDU(NOISE[band]).writeto(tmp_path / f"{band}.fits")
    references = [str(tmp_path / f"{band}.fits") for band in range(2)]
    assert read_cutout(references, 32).pixels.shape == (2, 32, 32)


@pytest.mark.parametrize(("dtype", "full"), [(np.uint8, 255), (np.uint16, 65535)])
def test_composites_are_value_over_full_scale(tmp_path: Path, dtype: type, full: int) -> None:
    values = RNG.integers(0, full, (40, 40), endpoint=True).astype(dtype)
    Image.fromarray(values).save(tmp_path / "a.png")
    cutout = read_cutout([str(tmp_path / "a.png")], 40)
    assert cutout.units == "composite"
    np.testing.assert_allclose(cutout.pixels[0], values / full, atol=1e-7)


def test_colour_composite_has_three_bands(tmp_path: Path) -> None:
    values = RNG.integers(0, 255, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_allclose(
        read_image(str(tmp_path / "a.png")).pixels, values.transpose(2, 0, 1) / 255, atol=1e-7
    )


def test_the_middle_is_kept(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", NOISE)
    pixels = read_cutout([str(tmp_path / "a.npy")], 20, "background_sigma").pixels
    np.testing.assert_array_equal(pixels, NOISE[:, 10:30, 10:30])


def test_a_few_nans_become_the_median(tmp_path: Path) -> None:
    holed = NOISE.copy()
    holed[1, :2, :5] = np.nan
    np.save(tmp_path / "a.npy", holed)
    cutout = read_cutout([str(tmp_path / "a.npy")], 40, "background_sigma")
    assert cutout.nan_fraction == pytest.approx(10 / 1600)
    assert (cutout.pixels[1, :2, :5] == np.nanmedian(holed[1])).all()


def _all_nan() -> np.ndarray:
    array = NOISE.copy()
    array[2] = np.nan
    return array


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (_all_nan(), "no finite pixel"),
        (np.where(np.arange(40) < 20, np.nan, NOISE), "50% of a band's pixels"),
        (NOISE[:, :20, :20], "20 x 20 pixels"),
        (np.zeros((3, 40, 40), np.float32), "no noise to measure"),
        (NOISE * 1j, "not real numbers"),
        (NOISE[None, None], "is needed"),
        (np.array([{"a": 1}], dtype=object), "cannot be read"),
    ],
)
def test_unusable_pixels(tmp_path: Path, array: np.ndarray, reason: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(CutoutError, match=reason):
        read_cutout([str(tmp_path / "a.npy")], 32)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    fits.PrimaryHDU(NOISE).writeto(tmp_path / "a.fits")
    Image.fromarray((NOISE[0] % 255).astype(np.uint8)).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", NOISE)
    for name in ("a.fits", "a.png", "a.npy"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(CutoutError, match="cannot be read"):
            read_image(str(path))
    with pytest.raises(CutoutError, match="missing"):
        read_image(str(tmp_path / "absent.fits"))
    with pytest.raises(CutoutError, match="not known"):
        read_image(__file__)


def test_a_row_of_a_stack(tmp_path: Path) -> None:
    np.save(tmp_path / "stack.npy", np.stack([NOISE, 2 * NOISE]))
    row = read_image(f"{tmp_path}/stack.npy#1")
    np.testing.assert_array_equal(row.pixels, 2 * NOISE)
    with pytest.raises(CutoutError, match="no row 2"):
        read_image(f"{tmp_path}/stack.npy#2")


def test_real_pan_starrs_stack(shared_data: Path) -> None:
    """203 multi-extension files with some NaNs: all readable, with their five bands."""
    paths = sorted((shared_data / "ps1_grizy" / "fits").glob("*.fits"))[:40]
    for path in paths:
        cutout = read_image(str(path))
        assert cutout.bands == ("G", "R", "I", "Z", "Y")
        assert cutout.pixels.dtype == np.float32
