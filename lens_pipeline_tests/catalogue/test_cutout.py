"""From images to usable cutouts: noise as the unit, the middle, and pixels that are filled in."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from lens_pipeline.catalogue.background import background_sigma
from lens_pipeline.catalogue.cutout import CutoutError
from lens_pipeline.catalogue.images import read_cutout
from lens_pipeline_tests.catalogue.by_hand import NOISE


def test_linear_flux_is_in_background_sigma(tmp_path: Path) -> None:
    scaled = NOISE * np.array([1, 10, 0.1], np.float32)[:, None, None]
    np.save(tmp_path / "a.npy", scaled)
    cutout = read_cutout([str(tmp_path / "a.npy")], 40)
    assert cutout.units == "background_sigma"
    corner = cutout.pixels[:, :15, :]
    np.testing.assert_allclose(corner.std(axis=(1, 2)), 1, atol=0.1)
    np.testing.assert_allclose(cutout.pixels[0], NOISE[0] / background_sigma(NOISE[0]), rtol=1e-5)


def test_stated_background_sigma_is_left_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", NOISE)
    cutout = read_cutout([str(tmp_path / "a.npy")], 40, "background_sigma")
    np.testing.assert_array_equal(cutout.pixels, NOISE)


def test_the_middle_is_kept(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", NOISE)
    pixels = read_cutout([str(tmp_path / "a.npy")], 20, "background_sigma").pixels
    np.testing.assert_array_equal(pixels, NOISE[:, 10:30, 10:30])
    assert pixels.base is None  # the rest of a large image does not stay in memory


def test_a_few_nans_become_the_median(tmp_path: Path) -> None:
    holed = NOISE.copy()
    holed[1, :2, :5] = np.nan
    np.save(tmp_path / "a.npy", holed)
    cutout = read_cutout([str(tmp_path / "a.npy")], 40, "background_sigma")
    assert cutout.nan_fraction == pytest.approx(10 / 1600)
    assert (cutout.pixels[1, :2, :5] == np.nanmedian(holed[1])).all()


def test_small_images_are_padded_with_the_median_where_asked_for(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", NOISE[:, :30])
    with pytest.raises(CutoutError, match="40 x 30 pixels"):
        read_cutout([str(tmp_path / "a.npy")], 36, "background_sigma")
    cutout = read_cutout([str(tmp_path / "a.npy")], 36, "background_sigma", pad=True)
    np.testing.assert_array_equal(cutout.pixels[:, 3:33], NOISE[:, :30, 2:38])
    assert (cutout.pixels[:, :3] == np.median(NOISE[:, :30], axis=(1, 2))[:, None, None]).all()
    assert (cutout.pixels[:, 33:] == cutout.pixels[:, :1, :1]).all()
    assert cutout.padded_fraction == pytest.approx(1 / 6)
    assert cutout.nan_fraction == 0


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


@pytest.mark.parametrize("hole", [np.nan, 0.0])
def test_a_galaxy_without_its_middle_is_refused_as_one_whose_mask_covers_it(
    tmp_path: Path, hole: float
) -> None:
    """Saturated cores are written so; two pixels of a cosmic ray are filled in."""
    for side, refused in ((2, False), (6, True)):
        image = NOISE[0] + 100
        middle = slice(20 - side // 2, 20 + side // 2)
        image[middle, middle] = hole
        np.save(tmp_path / "a.npy", image)
        with (
            pytest.raises(CutoutError, match="the middle, where the object is, is not finite")
            if refused
            else nullcontext()
        ):
            read_cutout([str(tmp_path / "a.npy")], 40)
