"""FITS files of several images: bands, and what belongs to them, by the names of extensions."""

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from lens_pipeline.catalogue.background import background_sigma
from lens_pipeline.catalogue.cutout import CutoutError
from lens_pipeline.catalogue.images import read_cutout, read_image
from lens_pipeline_tests.catalogue.by_hand import NOISE


def test_multi_extension_fits_with_band_names(tmp_path: Path) -> None:
    hdus = [fits.PrimaryHDU(), *(fits.ImageHDU(NOISE[i], name=b) for i, b in enumerate("GRI"))]
    fits.HDUList(hdus).writeto(tmp_path / "a.fits")
    cutout = read_image(str(tmp_path / "a.fits"))
    assert cutout.bands == ("G", "R", "I")
    np.testing.assert_array_equal(cutout.pixels, NOISE)


def test_bands_whose_names_differ_in_case_alone_are_two(tmp_path: Path) -> None:
    """Rubin's `y` and Euclid's `Y`."""
    np.savez(tmp_path / "a.npz", y=NOISE[0], Y=NOISE[1], J=NOISE[2])
    path = str(tmp_path / "a.npz")
    of_y, of_Y, of_J = read_cutout([path], 40, bands=["y", "Y", "j"]).pixels
    np.testing.assert_allclose(of_y, NOISE[0] / background_sigma(NOISE[0]), rtol=1e-5)
    np.testing.assert_allclose(of_Y, NOISE[1] / background_sigma(NOISE[1]), rtol=1e-5)
    np.testing.assert_allclose(of_J, NOISE[2] / background_sigma(NOISE[2]), rtol=1e-5)
    np.savez(tmp_path / "b.npz", vis=NOISE[0], VIS=NOISE[1])
    with pytest.raises(CutoutError, match="there is several bands Vis; there are vis, VIS"):
        read_cutout([str(tmp_path / "b.npz")], 40, bands=["Vis"])


def write_bands(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Two bands with noise maps, a mask, a PSF of another size; (image, mask) of `VIS`."""
    mask = np.zeros((40, 40), np.int16)
    mask[3, 5] = 4
    hdus = [fits.PrimaryHDU()]
    for name, data, zero_point in [
        ("NIR_H_FLUX", NOISE[1], 29.9),
        ("NIR_H_WHT", np.full((40, 40), 1 / 16, np.float32), None),
        ("VIS_FLUX", NOISE[0] + 100, 24.6),
        ("VIS_BGSUB", NOISE[0], 24.6),
        ("VIS_RMS", np.full((40, 40), 2.5, np.float32), None),
        ("VIS_MASK", mask, None),
        ("VIS_PSF", np.ones((21, 21), np.float32), None),
    ]:
        hdu = fits.ImageHDU(data, name=name)
        if zero_point:
            hdu.header["MAGZERO"] = zero_point
        hdus.append(hdu)
    fits.HDUList(hdus).writeto(path)
    return NOISE[0], mask


def test_extensions_are_taken_for_what_their_names_say(tmp_path: Path) -> None:
    image, mask = write_bands(tmp_path / "a.fits")
    cutout = read_cutout([str(tmp_path / "a.fits")], 40, bands=["vis", "NIR_H"])
    assert cutout.bands == ("vis", "NIR_H")
    good = mask == 0
    np.testing.assert_allclose(cutout.pixels[0][good], image[good] / 2.5, rtol=1e-6)
    np.testing.assert_allclose(cutout.pixels[1], NOISE[1] / 4, rtol=1e-6)
    assert cutout.nan_fraction == pytest.approx(1 / 1600)
    assert cutout.pixels[0, 3, 5] == pytest.approx(np.median(image[good]) / 2.5)
    # m = zero point - 2.5 log10(flux); a stored 1 is a flux of one sigma.
    expected = [24.6 - 2.5 * np.log10(2.5), 29.9 - 2.5 * np.log10(4)]
    np.testing.assert_allclose(cutout.background_magnitude, expected)
    with pytest.raises(CutoutError, match="there is no band z; there are NIR_H, VIS"):
        read_cutout([str(tmp_path / "a.fits")], 40, bands=["z"])


@pytest.mark.parametrize(
    ("image", "noise"),
    [
        ("SCI_{}", "ERR_{}"),
        ("{}-FLUX", "{}-RMS"),
        ("{}.SCI", "{}.NOISEMAP"),
        ("{}", "RMS_{}"),
        ("{}", "{}_STD"),
    ],
)
def test_a_noise_map_is_no_band_however_it_is_named(tmp_path: Path, image: str, noise: str) -> None:
    extensions = []
    for number, band in enumerate(("G", "R")):
        extensions += [(image.format(band), NOISE[number]), (noise.format(band), RMS)]
    found = read_image(write_extensions(tmp_path / "a.fits", extensions))
    assert (found.bands, found.sigma) == (("G", "R"), (2.5, 2.5))


@pytest.mark.parametrize(
    ("names", "bands"),
    [
        (("vis_flux", "vis_rms", "vis_mask", "y", "Y"), ("vis",)),
        (("g", "g_rms", "flag_g", "r", "weird"), ("g", "r", "weird")),
        (("sci", "err", "dq"), None),
    ],
)
def test_names_in_small_letters_say_as_much(
    tmp_path: Path, names: tuple[str, ...], bands: tuple[str, ...] | None
) -> None:
    """astropy writes the names that it is given in capitals, and reads those of others as they
    are."""
    maps = {"rms": RMS, "err": RMS, "mask": MASK, "flag": MASK, "dq": MASK}
    hdus: fits.HDUList = fits.HDUList([fits.PrimaryHDU()])
    for name in names:
        role = next((role for role in maps if role in name), None)
        hdus.append(fits.ImageHDU(SKY if role is None else maps[role]))
        hdus[-1].header["EXTNAME"] = name
    hdus.writeto(tmp_path / "a.fits")
    found = read_image(str(tmp_path / "a.fits"))
    assert found.bands == bands
    assert found.sigma[0] == 2.5
    assert np.isnan(found.pixels[0, 3, 5])


SKY = NOISE[0]


RMS = np.full((40, 40), 2.5, np.float32)


MASK = np.zeros((40, 40), np.int16)

MASK[3, 5] = 4


def write_extensions(path: Path, extensions: list[tuple[str, np.ndarray]]) -> str:
    """Each under its name; the first without one is the primary image."""
    primary, rest = fits.PrimaryHDU(), extensions
    if not extensions[0][0]:
        primary, rest = fits.PrimaryHDU(extensions[0][1]), extensions[1:]
    hdus = [primary, *(fits.ImageHDU(data, name=name) for name, data in rest)]
    fits.HDUList(hdus).writeto(path)
    return str(path)


@pytest.mark.parametrize(
    "extensions",
    [
        [("SCI", SKY), ("ERR", RMS), ("DQ", MASK), ("PSF", SKY[:21, :21])],
        [("WHT", 1 / RMS**2), ("FLAG", MASK), ("IMAGE", SKY)],
        [("FLUX", SKY + 100), ("BGSUB", SKY), ("RMS", RMS), ("MASK", MASK)],
        [("", SKY), ("ERR", RMS), ("MASK", MASK)],
    ],
)
def test_extensions_named_by_their_roles_alone_are_one_band(
    tmp_path: Path, extensions: list[tuple[str, np.ndarray]]
) -> None:
    """`SCI` with `ERR` was a cutout of two bands of these names."""
    path = write_extensions(tmp_path / "a.fits", extensions)
    found = read_image(path)
    assert found.bands is None
    assert found.pixels.shape == (1, 40, 40)
    cutout = read_cutout([path], 40, names=["g"])
    assert cutout.bands == ("g",)
    good = MASK == 0
    np.testing.assert_allclose(cutout.pixels[0][good], SKY[good] / 2.5, rtol=1e-6)
    assert cutout.nan_fraction == pytest.approx(1 / 1600)
    # So does a file for each band.
    assert read_cutout([path, path], 40, bands=["g", "r"]).sigma == pytest.approx((2.5, 2.5))


def test_a_role_alone_beside_named_bands(tmp_path: Path) -> None:
    of_one = [("VIS", SKY), ("ERR", RMS), ("PSF", SKY[:21, :21])]
    found = read_image(write_extensions(tmp_path / "one.fits", of_one))
    assert (found.bands, found.sigma) == (("VIS",), (2.5,))
    more = [("G", SKY), ("R_FLUX", NOISE[1]), ("R_VAR", RMS**2)]
    found = read_image(write_extensions(tmp_path / "more.fits", more))
    assert (found.bands, found.sigma) == (("R",), (2.5,))
    psf = [("G", SKY), ("R", NOISE[1]), ("PSF", SKY[:21, :21])]
    assert read_image(write_extensions(tmp_path / "psf.fits", psf)).bands == ("G", "R")


@pytest.mark.parametrize(
    ("extensions", "reason"),
    [
        ([("SCI", SKY), ("ERR", RMS), ("SCI", SKY), ("ERR", RMS)], "2 extensions are named SCI"),
        ([("G", SKY), ("G", SKY)], "2 extensions are named G"),
        ([("G", SKY), ("R", SKY), ("MASK", MASK)], "of which band it is; name it G_MASK, say"),
        ([("ERR", RMS), ("DQ", MASK)], "none of the extensions ERR, DQ is an image"),
        ([("SCI", NOISE), ("ERR", NOISE)], r"each holds one band; the shape of one is \(3, 40, 40"),
    ],
)
def test_extensions_that_leave_open_what_goes_together(
    tmp_path: Path, extensions: list[tuple[str, np.ndarray]], reason: str
) -> None:
    with pytest.raises(CutoutError, match=reason):
        read_image(write_extensions(tmp_path / "a.fits", extensions))


def test_real_euclid_files(shared_data: Path) -> None:
    paths = sorted((shared_data / "euclid_q1").glob("*.fits"))
    assert len(paths) == 3
    for path in paths:
        cutout = read_cutout([str(path)], 100)
        assert cutout.bands is not None
        assert {"VIS", "NIR_Y", "NIR_J", "NIR_H"} <= set(cutout.bands)
        assert cutout.pixels.shape == (8, 100, 100)
        with fits.open(path) as hdus:
            for band, pixels, magnitude in zip(
                cutout.bands, cutout.pixels, cutout.background_magnitude, strict=True
            ):
                names = [hdu.name for hdu in hdus]
                image = hdus[f"{band}_BGSUB" if f"{band}_BGSUB" in names else f"{band}_FLUX"]
                sigma = np.median(hdus[f"{band}_RMS"].data)
                filled = image.data == 0  # some pixels of two bands
                assert filled.mean() < 0.006
                np.testing.assert_allclose(pixels[~filled], image.data[~filled] / sigma, rtol=1e-4)
                by_hand = image.header["MAGZERO"] - 2.5 * np.log10(sigma)
                assert magnitude == pytest.approx(by_hand, abs=1e-3)
    # VIS reaches about 24.5 mag at ten sigma in a galaxy of 0.3 arcsec: one pixel's sigma is deep.
    vis = read_cutout([str(paths[0])], 100, bands=["VIS"])
    assert 27.5 < vis.background_magnitude[0] < 31.5
