"""Real images, from their files to the dataset, by hand: bands, crops, units, magnitudes."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits

from lens_pipeline.catalogue.splits import SPLITS
from lens_pipeline_tests.catalogue.by_hand import (
    RNG,
    build,
    middle_of,
    pixels_by_hand,
    rows,
    sigma_by_hand,
    suffix_of,
    write_cube,
)


@pytest.mark.parametrize("bands", [None, ("I", "R", "G")])
def test_ps1_cutouts_by_hand(
    shared_data: Path, tmp_path: Path, bands: tuple[str, ...] | None
) -> None:
    """Lenses of 64 pixels and their neighbours of 40, four of them with holes punched in."""
    source = shared_data / "ps1_grizy"
    table = pd.read_csv(source / "catalogue.csv")
    table = pd.concat([table[table["label"] == label].head(18) for label in (1, 0)])
    table = table[["id", "path", "label"]].reset_index(drop=True)
    table["path"] = [str(source / path) for path in table["path"]]
    table["split"] = [SPLITS[row % 3] for row in range(len(table))]
    for row in (0, 1, 20, 21):
        with fits.open(table["path"][row]) as hdus:
            hdus["R"].data[3:7, 10 : 14 + row] = np.nan
            hdus["Z"].data[19:21, 19:21] = np.inf
            table.loc[row, "path"] = str(tmp_path / f"holed{row}.fits")
            hdus.writeto(table["path"][row])
    dataset = build(tmp_path, table, image_size=40, bands=bands)

    wanted = bands or ("G", "R", "I", "Z", "Y")
    assert dataset.format.bands == wanted
    assert dataset.rejects().empty
    sides = []
    for entry, pixels in rows(dataset):
        with fits.open(entry.path) as hdus:
            assert [hdu.name for hdu in hdus[1:]] == list("GRIZY")
            cube = np.stack([hdus[band].data.astype(np.float64) for band in wanted])
            zero_points = [hdus[band].header["ZP"] for band in wanted]
        side = cube.shape[-1]
        sides.append(side)
        assert pixels.shape == (len(wanted), 40, 40)
        assert pixels.dtype == np.float32
        middle = pixels_by_hand(cube, 40)
        np.testing.assert_allclose(pixels, middle, rtol=1e-5, atol=1e-6, err_msg=entry.id)
        # The middle is what it says: 12 pixels off each side of 64, none off 40.
        edge = {64: 12, 40: 0}[side]
        whole = np.isfinite(cube[0, edge : edge + 40, edge : edge + 40])
        flux = cube[0, edge : edge + 40, edge : edge + 40] / sigma_by_hand(cube[0])
        np.testing.assert_allclose(pixels[0][whole], flux[whole], rtol=1e-5, atol=1e-6)
        holes = (~np.isfinite(middle_of(cube, 40))).mean(axis=(1, 2)).max()
        assert entry.nan_fraction == pytest.approx(holes, rel=1e-5)
        assert np.isfinite(cube).all() == (entry.row not in (0, 1, 20, 21))
        for band, plane, zero_point in zip(wanted, cube, zero_points, strict=True):
            by_hand = zero_point - 2.5 * np.log10(sigma_by_hand(plane))
            assert getattr(entry, f"background_magnitude_{band}") == pytest.approx(
                by_hand, abs=1e-4
            )
    assert sorted(sides) == [40] * 18 + [64] * 18
    columns = [name for name in dataset.table("train") if name.startswith("background_magnitude_")]
    assert columns == [f"background_magnitude_{band}" for band in wanted]


def test_euclid_cutouts_by_hand(shared_data: Path, tmp_path: Path) -> None:
    """Through to the dataset: bands picked and ordered by name, the middle, the noise maps."""
    paths = sorted(str(path) for path in (shared_data / "euclid_q1").glob("*.fits")) * 2
    bands = ("NIR_H", "VIS", "NIR_Y")
    dataset = build(tmp_path, pd.DataFrame({"path": paths}), image_size=60, bands=bands)
    assert dataset.format.bands == bands
    found = list(rows(dataset))
    assert sorted(entry.row for entry, _ in found) == list(range(6))
    for entry, pixels in found:
        with fits.open(entry.path) as hdus:
            names = [hdu.name for hdu in hdus]
            for band, plane in zip(bands, pixels, strict=True):
                image = hdus[f"{band}_BGSUB" if f"{band}_BGSUB" in names else f"{band}_FLUX"]
                sigma = np.median(hdus[f"{band}_RMS"].data.astype(np.float64))
                flux = image.data[20:80, 20:80] / sigma
                np.testing.assert_allclose(plane, flux, rtol=1e-5, atol=1e-6)
                by_hand = image.header["MAGZERO"] - 2.5 * np.log10(sigma)
                stored = getattr(entry, f"background_magnitude_{band}")
                assert stored == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.parametrize("flux_unit", ["", "background_sigma"])
def test_no_step_of_eight_bits_lies_between_a_file_and_the_dataset(
    tmp_path: Path, flux_unit: str
) -> None:
    """6,400 levels of flux go in, and 6,400 come out, each the same multiple of what it was.

    8 bits would leave 256 of them, a float16 a quarter.
    """
    levels = np.arange(6400, dtype=np.float32) * np.float32(0.37) - np.float32(500)
    flux = {
        f"{row}.{suffix_of(row, 'fits', 'npy', 'npz', 'tif')}": RNG.permutation(levels)
        for row in range(12)
    }
    for name, values in flux.items():
        write_cube(tmp_path / name, values.reshape(1, 80, 80))
    table = pd.DataFrame({"path": list(flux), "flux_unit": flux_unit})
    dataset = build(tmp_path, table, image_size=80)
    found = list(rows(dataset))
    assert len(found) == 12
    for entry, pixels in found:
        given = flux[Path(entry.path).name]
        assert pixels.dtype == np.float32
        assert len(np.unique(pixels)) == 6400
        sigma = 1.0 if flux_unit else sigma_by_hand(given.reshape(80, 80))
        ratio = given.astype(np.float64) / pixels.ravel()
        np.testing.assert_allclose(ratio, sigma, rtol=5e-6)
        np.testing.assert_allclose(ratio, np.median(ratio), rtol=2e-7)  # float32 rounds to 6e-8
        if flux_unit:
            np.testing.assert_array_equal(pixels.ravel(), given)
