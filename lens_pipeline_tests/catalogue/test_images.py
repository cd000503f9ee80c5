"""From files to pixels: formats and their units."""

import errno
import io
import threading
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
from lens_pipeline.catalogue.cutout import Cutout, CutoutError
from lens_pipeline.catalogue.dataset import CutoutFormat
from lens_pipeline.catalogue.images import read_cutout, read_image
from lens_pipeline.errors import NoAnswerError
from lens_pipeline.simulation import simulate
from lens_pipeline_tests.catalogue.by_hand import NOISE, write_png

RNG = np.random.default_rng(0)


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
    with pytest.raises(CutoutError, match=r"the file type \.py is not known"):
        read_image(__file__)
    (tmp_path / "of.v1").mkdir()
    (tmp_path / "of.v1" / "a").write_bytes(b"")
    with pytest.raises(CutoutError, match="its name has no suffix; use FITS"):
        read_image(str(tmp_path / "of.v1" / "a"))


def test_bands_of_one_set_are_brought_into_one_order() -> None:
    """Also those that files of colours have, who need not name them."""
    pixels = np.arange(3 * 4 * 4, dtype=np.float32).reshape(3, 4, 4)
    for ours, theirs in ((("red", "green", "blue"), ("blue", "green", "red")), (tuple("irg"),) * 2):
        form = CutoutFormat(ours, 4, "composite", None)
        found = form.fitted(Cutout(pixels, "composite", theirs))
        np.testing.assert_array_equal(found.pixels, pixels[[theirs.index(band) for band in ours]])
    unnamed = Cutout(pixels, "composite")
    np.testing.assert_array_equal(form.fitted(unnamed).pixels, pixels)


def test_a_row_of_a_stack(tmp_path: Path) -> None:
    np.save(tmp_path / "stack.npy", np.stack([NOISE, 2 * NOISE]))
    row = read_image(f"{tmp_path}/stack.npy#1")
    np.testing.assert_array_equal(row.pixels, 2 * NOISE)
    with pytest.raises(CutoutError, match="no row 2"):
        read_image(f"{tmp_path}/stack.npy#2")
    np.save(tmp_path / "mono.npy", NOISE)  # three images of one band
    row = read_image(f"{tmp_path}/mono.npy#1")
    np.testing.assert_array_equal(row.pixels, NOISE[1:2])


@pytest.mark.parametrize("call", ["pathlib.Path.stat", "numpy.load"])
def test_a_file_system_that_fails_for_a_while_rejects_no_row_of_a_stack(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    np.save(tmp_path / "stack.npy", np.stack([NOISE, NOISE]))
    with monkeypatch.context() as away:
        away.setattr(call, stale)
        with pytest.raises(NoAnswerError, match=r"stack.npy: cannot be read now \(.*; try again"):
            read_image(f"{tmp_path}/stack.npy#1")
    np.testing.assert_array_equal(read_image(f"{tmp_path}/stack.npy#1").pixels, NOISE)


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


def test_compressed_tiff_is_read(tmp_path: Path) -> None:
    values = RNG.integers(0, 255, (40, 40, 3), endpoint=True).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.tif", compression="tiff_lzw")
    found = read_image(str(tmp_path / "a.tif"))
    np.testing.assert_allclose(found.pixels, np.moveaxis(values / 255, -1, 0), atol=1e-7)
