"""From files to pixels: formats, units, and images that cannot be used."""

import io
import struct
import threading
import zlib
from contextlib import nullcontext
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
import tifffile
from astropy.io import fits
from PIL import Image
from scipy import ndimage

from lens_pipeline.catalogue.background import background_sigma
from lens_pipeline.catalogue.images import CutoutError, read_cutout, read_image
from lens_pipeline.simulation import simulate

RNG = np.random.default_rng(0)
NOISE = RNG.normal(0, 3, (3, 40, 40)).astype(np.float32)
NOISE[:, 18:22, 18:22] += 500


def test_linear_flux_is_in_background_sigma(tmp_path: Path) -> None:
    scaled = NOISE * np.array([1, 10, 0.1], np.float32)[:, None, None]
    np.save(tmp_path / "a.npy", scaled)
    cutout = read_cutout([str(tmp_path / "a.npy")], 40)
    assert cutout.units == "background_sigma"
    corner = cutout.pixels[:, :15, :]
    np.testing.assert_allclose(corner.std(axis=(1, 2)), 1, atol=0.1)
    np.testing.assert_allclose(cutout.pixels[0], NOISE[0] / background_sigma(NOISE[0]), rtol=1e-5)


def test_a_compressed_file_is_read_as_what_it_holds(tmp_path: Path) -> None:
    fits.PrimaryHDU(NOISE).writeto(tmp_path / "a.fits.gz")
    fits.PrimaryHDU(NOISE).writeto(tmp_path / "a.fits")
    compressed, plain = (read_image(str(tmp_path / name)) for name in ("a.fits.gz", "a.fits"))
    np.testing.assert_array_equal(compressed.pixels, plain.pixels)
    (tmp_path / "a.fits.gz").write_bytes((tmp_path / "a.fits.gz").read_bytes()[:1000])
    with pytest.raises(CutoutError, match="cannot be read"):
        read_image(str(tmp_path / "a.fits.gz"))


def test_a_stack_is_opened_once_for_its_rows_and_again_when_it_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    load = np.load
    monkeypatch.setattr(np, "load", lambda *a, **b: (opened.append(a), load(*a, **b))[1])
    stack = np.arange(20 * 3 * 4 * 4, dtype=np.float32).reshape(20, 3, 4, 4)
    np.save(tmp_path / "stack.npy", stack)
    for row in range(20):
        found = read_image(f"{tmp_path}/stack.npy#{row}", "background_sigma")
        np.testing.assert_array_equal(found.pixels, stack[row])
    assert len(opened) == 1
    np.save(tmp_path / "other.npy", -stack)
    (tmp_path / "other.npy").replace(tmp_path / "stack.npy")
    found = read_image(f"{tmp_path}/stack.npy#7", "background_sigma")
    np.testing.assert_array_equal(found.pixels, -stack[7])
    (tmp_path / "stack.npy").unlink()
    with pytest.raises(CutoutError, match="the file is missing"):
        read_image(f"{tmp_path}/stack.npy#7")


def test_of_a_stack_in_a_store_its_row_alone_is_fetched(tmp_path: Path) -> None:
    stack = np.arange(20 * 3 * 40 * 40, dtype=np.float32).reshape(20, 3, 40, 40)
    whole = io.BytesIO()
    np.save(whole, stack)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/stack.npy", whole.getvalue()[: 128 + stack[:6].nbytes])  # the rest is away
    found = read_image("memory://stack.npy#5", "background_sigma")
    np.testing.assert_array_equal(found.pixels, stack[5])
    with pytest.raises(CutoutError, match=r"no row 20 in a stack of shape \(20, 3, 40, 40\)"):
        read_image("memory://stack.npy#20")
    np.save(tmp_path / "stack.npy", stack)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))  # knows no ranges
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/stack.npy#5"
        np.testing.assert_array_equal(read_image(url, "background_sigma").pixels, stack[5])
        server.shutdown()
    np.save(whole := io.BytesIO(), np.asfortranarray(stack))
    memory.pipe_file("/columns.npy", whole.getvalue())
    with pytest.raises(CutoutError, match="C order"):
        read_image("memory://columns.npy#5")


def test_a_signed_url_is_of_the_file_that_it_names(tmp_path: Path) -> None:
    """As a cutout service has it, too: `cutout.fits?ra=150.1&size=64`."""
    fits.PrimaryHDU(NOISE).writeto(tmp_path / "a.fits.gz")
    np.save(tmp_path / "a.npy", NOISE)
    np.save(tmp_path / "stack.npy", NOISE[None])
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))  # leaves out queries
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in (
            "a.fits.gz?ra=150.1&dec=2.2",
            "a.npy?Signature=x.y",
            "stack.npy?Signature=z#0",
        ):
            found = read_image(f"http://127.0.0.1:{server.server_port}/{name}")
            np.testing.assert_array_equal(found.pixels, NOISE)
        server.shutdown()


def test_stated_background_sigma_is_left_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", NOISE)
    cutout = read_cutout([str(tmp_path / "a.npy")], 40, "background_sigma")
    np.testing.assert_array_equal(cutout.pixels, NOISE)


def test_background_sigma_is_blind_to_galaxies() -> None:
    with_galaxy = NOISE[0].copy()
    with_galaxy[10:25, 10:25] += 1000
    assert background_sigma(with_galaxy) == pytest.approx(3, rel=0.08)


@pytest.mark.parametrize(("survey", "most"), [("des", 1.25), ("hsc", 1.4)])
def test_background_sigma_is_that_of_cutouts_which_a_galaxy_fills(survey: str, most: float) -> None:
    """The simulator's, whose sigma is 1, and whose galaxies are as wide as real ones."""
    images = simulate(survey, 100, seed=3).images
    sigma = [background_sigma(band) for image in images for band in image]
    assert np.median(sigma) == pytest.approx(1.05, abs=0.04)
    assert np.quantile(sigma, 0.02) > 0.95
    assert np.quantile(sigma, 0.98) < most


def test_background_sigma_is_that_of_resampled_images_whose_noise_is_not_white() -> None:
    images = ndimage.gaussian_filter(RNG.normal(size=(20, 80, 80)), (0, 0.7, 0.7))[:, 8:-8, 8:-8]
    sigma = np.median([background_sigma(image.astype(np.float32)) for image in images])
    assert sigma == pytest.approx(images.std(), rel=0.03)


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


@pytest.mark.parametrize("suffix", ["npy", "npy#0", "npz"])
def test_bytes_of_numpy_are_a_composite_unless_their_unit_is_stated(
    tmp_path: Path, suffix: str
) -> None:
    values = RNG.integers(0, 255, (40, 40, 3), endpoint=True).astype(np.uint8)
    path = tmp_path / f"a.{suffix}"
    if suffix == "npz":
        np.savez(path, values)
    else:
        np.save(tmp_path / "a.npy", values[None] if "#" in suffix else values)
    found = read_image(str(path))
    assert found.units == "composite"
    np.testing.assert_allclose(found.pixels, np.moveaxis(values, -1, 0) / 255, atol=1e-7)
    stated = read_image(str(path), flux_unit="counts")
    assert stated.units == "flux"
    np.testing.assert_array_equal(stated.pixels, np.moveaxis(values, -1, 0))


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
    np.save(tmp_path / "mono.npy", NOISE)  # three images of one band
    row = read_image(f"{tmp_path}/mono.npy#1")
    np.testing.assert_array_equal(row.pixels, NOISE[1:2])


def test_real_pan_starrs_stack(shared_data: Path) -> None:
    """203 multi-extension files with some NaNs: all readable, with their five bands."""
    paths = sorted((shared_data / "ps1_grizy" / "fits").glob("*.fits"))[:40]
    for path in paths:
        cutout = read_image(str(path))
        assert cutout.bands == ("G", "R", "I", "Z", "Y")
        assert cutout.pixels.dtype == np.float32


def write_png(path: Path, colour: np.ndarray) -> None:
    """A PNG of 16 bits a channel, by the specification: Pillow writes none."""
    height, width, _ = colour.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colour)

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_colour_keeps_its_sixteen_bits(tmp_path: Path, suffix: str) -> None:
    """Pillow alone would make it 8-bit colour, without a word."""
    colour = RNG.integers(0, 65535, (40, 40, 3), endpoint=True).astype(np.uint16)
    path = tmp_path / f"a.{suffix}"
    if suffix == "png":
        write_png(path, colour)
    else:
        tifffile.imwrite(path, colour)
    cutout = read_cutout([str(path)], 40)
    assert cutout.units == "composite"
    np.testing.assert_allclose(cutout.pixels, np.moveaxis(colour / 65535, -1, 0), atol=1e-7)


@pytest.mark.parametrize("suffix", ["fits", "npy", "npz", "tif"])
def test_flux_comes_through_every_format_to_the_last_bit(tmp_path: Path, suffix: str) -> None:
    """The differences of 8-bit steps would be a hundred times those that float32 makes."""
    path = tmp_path / f"a.{suffix}"
    if suffix == "fits":
        fits.PrimaryHDU(NOISE).writeto(path)
    elif suffix == "npy":
        np.save(path, NOISE)
    elif suffix == "npz":
        np.savez(path, g=NOISE[0], r=NOISE[1], i=NOISE[2])
    else:
        tifffile.imwrite(path, np.moveaxis(NOISE, 0, -1), photometric="rgb")
    found = read_image(str(path))
    np.testing.assert_array_equal(found.pixels, NOISE)
    assert found.units == "flux"
    assert found.bands == (("g", "r", "i") if suffix == "npz" else None)


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


SKY = NOISE[0]
RMS = np.full((40, 40), 2.5, np.float32)
MASK = np.zeros((40, 40), np.int16)
MASK[3, 5] = 4


@pytest.mark.parametrize("hole", [np.nan, 0.0])
def test_a_galaxy_without_its_middle_is_refused_as_one_whose_mask_covers_it(
    tmp_path: Path, hole: float
) -> None:
    """Saturated cores are written so; two pixels of a cosmic ray are filled in."""
    for side, refused in ((2, False), (6, True)):
        image = SKY + 100
        middle = slice(20 - side // 2, 20 + side // 2)
        image[middle, middle] = hole
        np.save(tmp_path / "a.npy", image)
        with (
            pytest.raises(CutoutError, match="the middle, where the object is, is not finite")
            if refused
            else nullcontext()
        ):
            read_cutout([str(tmp_path / "a.npy")], 40)


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


def test_compressed_tiff_is_read(tmp_path: Path) -> None:
    values = RNG.integers(0, 255, (40, 40, 3), endpoint=True).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.tif", compression="tiff_lzw")
    found = read_image(str(tmp_path / "a.tif"))
    np.testing.assert_allclose(found.pixels, np.moveaxis(values / 255, -1, 0), atol=1e-7)
