"""Images that are damaged or unlike others in one way, each read for what it is."""

import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from astropy.io import fits
from PIL import Image

from lens_pipeline.catalogue.background import background_sigma
from lens_pipeline.catalogue.cutout import CutoutError
from lens_pipeline.catalogue.images import read_cutout, read_image
from lens_pipeline_tests.catalogue.by_hand import (
    NOISE,
    RNG,
    SIZE,
    build,
    picture,
    pixels_by_hand,
    rows,
    sigma_by_hand,
    sky,
    write_cube,
    write_png,
)


def named_bands(path: Path, bands: str) -> None:
    """One extension a band, zero point 25; sigma is 1 in G, 10 in R, 100 in I, 1000 in Z."""
    hdus = [fits.PrimaryHDU()]
    for band in bands:
        sigma = 10.0 ** max("GRIZ".find(band), 0)
        hdu = fits.ImageHDU(RNG.normal(0, sigma, (SIZE, SIZE)).astype(np.float32), name=band)
        hdu.header["MAGZERO"] = 25.0
        hdus.append(hdu)
    fits.HDUList(hdus).writeto(path)


def test_a_damaged_picture_of_sixteen_bits_does_not_end_the_process(tmp_path: Path) -> None:
    """One flipped bit on a disk must cost one image, not the whole run."""
    path = tmp_path / "deep.png"
    picture(path)
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    script = (
        "import sys\n"
        "from lens_pipeline.catalogue.cutout import CutoutError\n"
        "from lens_pipeline.catalogue.images import read_image\n"
        "try:\n"
        "    read_image(sys.argv[1])\n"
        "except CutoutError as reason:\n"
        "    print(reason)\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, f"ended by signal {-done.returncode}: {done.stderr}"
    assert "cannot be read" in done.stdout


def test_background_sigma_is_what_it_says() -> None:
    for n_bright in (0, 100):
        band = RNG.normal(5, 3, (200, 200)).astype(np.float32)
        band[:n_bright, :50] += 8
        assert background_sigma(band) == pytest.approx(sigma_by_hand(band), rel=1e-5)


def test_a_file_with_a_further_band_is_fitted_by_name(tmp_path: Path) -> None:
    for row in range(12):
        named_bands(tmp_path / f"{row}.fits", "GRIZ" if row == 5 else "GRI")
    table = pd.DataFrame({"path": [f"{row}.fits" for row in range(12)]})
    dataset = build(tmp_path, table, image_size=SIZE)
    assert dataset.format.bands == ("G", "R", "I")
    assert dataset.rejects().empty


def test_magnitudes_follow_their_bands_into_another_order(tmp_path: Path) -> None:
    for row in range(12):
        named_bands(tmp_path / f"{row}.fits", "IRG" if row == 5 else "GRI")
    table = pd.DataFrame({"path": [f"{row}.fits" for row in range(12)]})
    for entry, _ in rows(build(tmp_path, table, image_size=SIZE)):
        found = [getattr(entry, f"background_magnitude_{band}") for band in "GRI"]
        np.testing.assert_allclose(found, [25, 22.5, 20], atol=0.2, err_msg=f"row {entry.row}")


def test_one_odd_image_at_the_start_does_not_name_the_bands_of_all(tmp_path: Path) -> None:
    for row in range(24):
        named_bands(tmp_path / f"{row}.fits", "XYZ" if row == 0 else "GRI")
    table = pd.DataFrame({"path": [f"{row}.fits" for row in range(24)]})
    dataset = build(tmp_path, table, image_size=SIZE, max_reject_fraction=0.1)
    assert dataset.format.bands == ("G", "R", "I")
    assert dataset.rejects()["row"].tolist() == [0]


def test_names_in_the_catalogue_do_not_rename_what_a_file_names(tmp_path: Path) -> None:
    for row in range(12):
        named_bands(tmp_path / f"{row}.fits", "GRI")
    table = pd.DataFrame({"path": [f"{row}.fits" for row in range(12)], "bands": "I,R,G"})
    dataset = build(tmp_path, table, image_size=SIZE)
    for entry, pixels in rows(dataset):
        with fits.open(entry.path) as hdus:
            cube = np.stack([hdus[band].data for band in dataset.format.bands])
        np.testing.assert_allclose(pixels, pixels_by_hand(cube, SIZE), rtol=1e-4, atol=1e-5)


def test_an_image_whose_middle_is_nan_is_refused(tmp_path: Path) -> None:
    cube = sky(3, 128, 128)
    cube[:, 46:82, 46:82] = np.nan  # 8 % of the image, all of its middle
    write_cube(tmp_path / "a.npy", cube)
    with pytest.raises(CutoutError, match="finite"):
        read_cutout([str(tmp_path / "a.npy")], 32)


def test_a_tiff_written_page_by_page_has_all_its_bands(tmp_path: Path) -> None:
    cube = sky()
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for band in cube:
            file.write(band)
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.tif")).pixels, cube)


def test_sixteen_bit_grey_with_alpha_keeps_its_sixteen_bits(tmp_path: Path) -> None:
    values = RNG.integers(0, 65535, (SIZE, SIZE, 2), endpoint=True).astype(np.uint16)
    path = tmp_path / "a.png"
    write_png(path, values)
    content = bytearray(path.read_bytes())
    content[25] = 4  # the colour type in the header, whose checksum follows
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4)
    path.write_bytes(content)
    pixels = read_image(str(path)).pixels
    assert pixels.shape == (1, SIZE, SIZE)
    np.testing.assert_allclose(pixels[0], values[..., 0] / 65535, atol=1e-7)


def test_a_pixel_beyond_float32_is_too_bright_and_no_hole(tmp_path: Path) -> None:
    cube = sky().astype(np.float64)
    cube[1, 20, 20] = 1e39
    write_cube(tmp_path / "a.npy", cube)
    with pytest.raises(CutoutError, match="brighter"):
        read_cutout([str(tmp_path / "a.npy")], SIZE)


@pytest.mark.parametrize(("name", "flux_unit"), [("a.png", None), ("a.npy", "background_sigma")])
def test_an_image_of_one_value_is_refused_in_every_unit(
    tmp_path: Path, name: str, flux_unit: str | None
) -> None:
    blank = np.zeros((3, SIZE, SIZE), np.uint8)
    if name.endswith("png"):
        Image.fromarray(np.moveaxis(blank, 0, -1)).save(tmp_path / name)
    else:
        np.save(tmp_path / name, blank.astype(np.float32))
    with pytest.raises(CutoutError, match="constant"):
        read_cutout([str(tmp_path / name)], SIZE, flux_unit)


def test_a_dead_band_is_refused_whatever_its_noise_is_said_to_be(tmp_path: Path) -> None:
    """Beyond the survey's edge in one band: were it kept where one class lies, it would tell it."""
    sky, dead = RNG.normal(0, 1, (2, SIZE, SIZE)).astype(np.float32)
    dead[:] = 0
    noise = np.ones_like(sky)
    names = {"G": sky, "G_RMS": noise, "R": dead, "R_RMS": noise}
    hdus = [fits.PrimaryHDU(), *(fits.ImageHDU(data, name=name) for name, data in names.items())]
    fits.HDUList(hdus).writeto(tmp_path / "a.fits")
    np.save(tmp_path / "a.npy", np.stack([sky, dead]))
    for name, flux_unit in (("a.fits", None), ("a.npy", "background_sigma")):
        with pytest.raises(CutoutError, match="a band is constant"):
            read_cutout([str(tmp_path / name)], SIZE, flux_unit)


@pytest.mark.parametrize(
    ("weight", "kept"), [(1.0, True), (3.0, True), (2200.0, False), (0.01, False)]
)
def test_weights_that_are_not_of_the_noise_do_not_count(
    tmp_path: Path, weight: float, kept: bool
) -> None:
    """Of a drizzled image they may be exposure times, of a coadded one relative."""
    sky = RNG.normal(0, 1, (SIZE, SIZE)).astype(np.float32)
    weights = np.full_like(sky, weight)
    hdus = [fits.PrimaryHDU(), fits.ImageHDU(sky, name="SCI"), fits.ImageHDU(weights, name="WHT")]
    fits.HDUList(hdus).writeto(tmp_path / "a.fits")
    (sigma,) = read_cutout([str(tmp_path / "a.fits")], SIZE).sigma
    assert sigma == pytest.approx(weight**-0.5 if kept else background_sigma(sky), rel=1e-5)


def test_a_tiff_of_32_bit_integers_is_refused(tmp_path: Path) -> None:
    values = RNG.integers(0, 2**32 - 1, (SIZE, SIZE), endpoint=True, dtype=np.uint32)
    tifffile.imwrite(tmp_path / "a.tif", values)
    with pytest.raises(CutoutError, match="uint32; 8 or 16 bits"):
        read_image(str(tmp_path / "a.tif"))


def test_a_tiff_with_a_damaged_height_is_refused_before_it_fills_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, sky()[0], compression="zlib")
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages.first.tags["ImageLength"].overwrite(SIZE | 1 << 12)
    with pytest.raises(CutoutError, match="cannot be read"):
        read_image(str(path))


@pytest.mark.parametrize("shape", [(0, SIZE, SIZE), (SIZE, SIZE, 0)])
def test_an_image_without_pixels_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape, np.float32))
    with pytest.raises(CutoutError):
        read_cutout([str(tmp_path / "a.npy")], SIZE)


def test_no_stated_sigma_makes_pixels_nan(tmp_path: Path) -> None:
    """Flux and noise too faint for a float32 end in 0 / 0."""
    image = fits.ImageHDU(np.zeros((SIZE, SIZE)), name="G_FLUX")
    noise = fits.ImageHDU(np.full((SIZE, SIZE), 1e-50), name="G_RMS")
    fits.HDUList([fits.PrimaryHDU(), image, noise]).writeto(tmp_path / "a.fits")
    with pytest.raises(CutoutError):
        read_cutout([str(tmp_path / "a.fits")], SIZE)


def test_without_a_zero_point_the_magnitude_is_nan(tmp_path: Path) -> None:
    write_cube(tmp_path / "a.npy", sky())
    magnitude = read_cutout([str(tmp_path / "a.npy")], SIZE).background_magnitude
    assert np.isnan(magnitude).all()


@pytest.mark.parametrize("bands", ["g,r", ""])
def test_no_band_is_taken_for_another_where_a_row_does_not_name_them_all(
    tmp_path: Path, bands: str
) -> None:
    """Bright in g; of another row's names nothing says that they are this one's."""
    table = pd.DataFrame({"path": [f"{row}.npy" for row in range(60)], "bands": "g,r,i"})
    table.loc[:9, "bands"] = "r,g,i"
    table.loc[50:, "bands"] = bands
    for row, names in enumerate(table["bands"]):
        image = RNG.normal(size=(3, 20, 20))
        image[1 if names == "r,g,i" else 0, 8:12, 8:12] += 50
        np.save(tmp_path / f"{row}.npy", image)
    dataset = build(tmp_path, table, image_size=20, bands=("i", "r", "g"), max_reject_fraction=0.5)
    for _, pixels in rows(dataset):
        assert pixels.max(axis=(1, 2)).argmax() == 2
    rejects = dataset.rejects()
    assert rejects["row"].tolist() == list(range(50, 60))
    said = "are named g, r; the image has 3" if bands else "have no names, and others' differ"
    assert rejects["reason"].str.contains(said).all()


def test_a_noise_map_in_an_npz_is_no_band(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", SCI=NOISE[0], ERR=np.ones_like(NOISE[0]))
    with pytest.raises(CutoutError, match="the array ERR is no band, by its name; .* in FITS"):
        read_image(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("cut", [1, 500, 2879])
def test_a_file_that_is_cut_in_the_header_of_its_mask_is_refused(tmp_path: Path, cut: int) -> None:
    """Of which astropy says nothing: pixels that are bad would be good."""
    path = tmp_path / "a.fits"
    sci, mask = fits.ImageHDU(NOISE[0], name="SCI"), np.zeros(NOISE[0].shape, np.int16)
    mask[:2] = 1
    fits.HDUList([fits.PrimaryHDU(), sci]).writeto(path)
    before = path.stat().st_size
    fits.append(path, mask, fits.Header([("EXTNAME", "DQ")]))
    content = path.read_bytes()
    assert np.isnan(read_image(str(path)).pixels).sum() == 2 * NOISE[0].shape[1]
    path.write_bytes(content + bytes(2880))  # padded, as some archives do
    assert np.isnan(read_image(str(path)).pixels).sum() == 2 * NOISE[0].shape[1]
    path.write_bytes(content[: before + cut])
    with pytest.raises(CutoutError, match="truncated"):
        read_image(str(path))
