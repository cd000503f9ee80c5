"""Files laid out as surveys and their tools lay them out: planes of masks, maps beside images."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from astropy.io import fits
from PIL import Image

from lens_pipeline.catalogue.background import background_sigma
from lens_pipeline.catalogue.cutout import Cutout, CutoutError, central, usable_cutout
from lens_pipeline.catalogue.images import read_cutout, read_image
from lens_pipeline_tests.catalogue.by_hand import Cube, picture, pixels_by_hand, sky

SIDE = 60
Extensions = list[tuple[str, np.ndarray]]


def write(path: Path, extensions: Extensions, **of_mask: int) -> str:
    """Extensions, behind an empty primary one; of_mask: cards of each mask's header."""
    hdus = [fits.PrimaryHDU(), *(fits.ImageHDU(data, name=name) for name, data in extensions)]
    for hdu in hdus:
        if "MASK" in hdu.name:
            hdu.header.update(of_mask)
    fits.HDUList(hdus).writeto(path)
    return str(path)


def galaxy() -> Cube:
    """One band: a galaxy of 200 sigma, noise of 1."""
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    noise = np.random.default_rng(3).standard_normal((SIDE, SIDE))
    return (noise + 200 * np.exp(-np.hypot(y, x) / 3)).astype(np.float32)


PLANES = {"MP_BAD": 0, "MP_SAT": 1, "MP_INTRP": 2, "MP_DETECTED": 5, "MP_NO_DATA": 8}


def test_a_mask_of_planes_says_which_of_its_bits_are_bad(tmp_path: Path) -> None:
    """HSC and Rubin mark the pixels of every source, the galaxy's among them, as detected."""
    image = galaxy()
    mask = np.where(image > 5, 1 << 5, 0).astype(np.int32)
    mask[2, 3], mask[4, 5], mask[6, 7] = 1 << 8, 1 << 1 | 1 << 5, 1 << 2
    variance = np.full((SIDE, SIDE), 4, np.float32)
    maps: Extensions = [("IMAGE", image), ("MASK", mask), ("VARIANCE", variance)]
    cutout = read_image(write(tmp_path / "a.fits", maps, **PLANES))
    assert cutout.bands is None
    assert cutout.sigma == (2,)
    bad = np.isnan(cutout.pixels[0])
    assert list(zip(*np.nonzero(bad), strict=True)) == [(2, 3), (4, 5)]
    np.testing.assert_array_equal(cutout.pixels[0][~bad], image[~bad])


def test_a_mask_that_covers_the_object_is_refused(tmp_path: Path) -> None:
    image = galaxy()
    mask = np.where(image > 5, 1 << 5, 0).astype(np.int32)
    path = write(tmp_path / "a.fits", [("IMAGE", image), ("MASK", mask)])
    with pytest.raises(CutoutError, match="mask MASK covers the middle"):
        read_image(path)
    beside = np.roll(mask, 20, axis=0)
    read_image(write(tmp_path / "b.fits", [("IMAGE", image), ("MASK", beside)]))


@pytest.mark.parametrize(
    ("names", "bands", "sigma"),
    [
        (["SCI", "WGT"], None, 0.5),  # DES
        (["SCI", "MSK", "WGT"], None, 0.5),
        (["SCI", "WHT", "CTX"], None, 0.5),  # HST, drizzled
        (["SCI", "ERR", "DQ", "AREA", "VAR_POISSON", "VAR_RNOISE", "WHT"], None, 4),  # JWST
        (["IMAGE", "VARIANCE"], None, 2),
        (["WEIGHT", "SCI"], None, 0.5),
        (["G", "G_INVVAR", "R", "R_INVVAR"], ("G", "R"), 0.5),  # Legacy Surveys
        (["COMPRESSED_IMAGE"], None, None),
    ],
)
def test_maps_are_no_bands(
    tmp_path: Path, names: list[str], bands: tuple[str, ...] | None, sigma: float | None
) -> None:
    """Each was a band, on a scale of its own."""
    image, empty = galaxy(), np.zeros((SIDE, SIDE), np.int16)
    maps = [
        (name, empty)
        if name in ("MSK", "DQ")
        else (name, image if name in ("SCI", "IMAGE", "G", "R") or sigma is None else empty + 4)
        for name in names
    ]
    cutout = read_image(write(tmp_path / "a.fits", maps))
    assert cutout.bands == bands
    assert len(cutout.pixels) == len(bands or "1")
    np.testing.assert_array_equal(cutout.pixels[0], image)
    assert cutout.sigma == pytest.approx(() if sigma is None else [sigma] * len(bands or "1"))


def test_an_image_that_is_alone_may_have_any_name(tmp_path: Path) -> None:
    """As tools name it after its object, or its role."""
    for name in ("OBJ17_SCI", "CUTOUT", "VAR"):
        path = write(tmp_path / f"{name}.fits", [(name, galaxy())])
        assert read_image(path).bands is None
        assert read_cutout([path], SIDE, bands=["r"]).bands == ("r",)
    with pytest.raises(CutoutError, match=r"the shape is \(1, 1, 60, 60\); \(bands, height"):
        read_image(write(tmp_path / "b.fits", [("SCI", galaxy()[None, None])]))


@pytest.mark.parametrize("lost", ["G_MASK", "R_SCI"])
def test_an_extension_whose_header_is_damaged_is_not_left_out(tmp_path: Path, lost: str) -> None:
    mask = np.zeros((SIDE, SIDE), np.int16)
    path = write(tmp_path / "a.fits", [("G_SCI", galaxy()), ("G_MASK", mask), ("R_SCI", galaxy())])
    content = bytearray(Path(path).read_bytes())
    with fits.open(path) as hdus:
        begin = hdus[lost].fileinfo()["hdrLoc"]
    content[begin : begin + 80] = b"\xff" * 80
    Path(path).write_bytes(content)
    with pytest.raises(CutoutError, match=f"the header of the extension {lost} is damaged"):
        read_image(path)


def test_unnamed_compressed_extensions_are_bands(tmp_path: Path) -> None:
    bands = [fits.CompImageHDU(np.round(sky(1)[0]).astype(np.int32)) for _ in range(3)]
    fits.HDUList([fits.PrimaryHDU(), *bands]).writeto(tmp_path / "a.fits.fz")
    found = read_image(str(tmp_path / "a.fits.fz"))
    assert found.bands is None
    np.testing.assert_array_equal(found.pixels, [hdu.data for hdu in bands])


@pytest.mark.parametrize(
    ("card", "zero_point"),
    [
        (b"MAGZERO = 'N/A'", np.nan),
        (b"MAGZERO =", np.nan),
        (b"MAGZERO = '27,0'", np.nan),
        (b"magzero = 25", 25),
        (b"OBSERVER= 'Jos\xe9'", np.nan),
    ],
)
def test_a_header_that_breaks_the_standard_costs_no_image(
    tmp_path: Path, card: bytes, zero_point: float
) -> None:
    """Nor does what pads the file's end; a truncated file does."""
    image = galaxy()
    hdu = fits.PrimaryHDU(image)
    hdu.header["COMMENT"] = "to be replaced"
    hdu.writeto(tmp_path / "a.fits")
    content = (tmp_path / "a.fits").read_bytes()
    place = content.index(b"COMMENT ")
    content = content[:place] + card.ljust(80) + content[place + 80 :]
    (tmp_path / "a.fits").write_bytes(content + bytes(2880))
    cutout = read_cutout([str(tmp_path / "a.fits")], SIDE)
    np.testing.assert_allclose(cutout.pixels, pixels_by_hand(image[None], SIDE), rtol=1e-5)
    assert cutout.zero_point == pytest.approx((zero_point,), nan_ok=True)


def test_blank_pixels_of_unsigned_integers_are_no_flux(tmp_path: Path) -> None:
    hdu = fits.PrimaryHDU((np.round(galaxy()) + 1000).astype(np.uint16))
    hdu.header["BLANK"] = -32768
    hdu.data[5, 6] = 0
    hdu.writeto(tmp_path / "a.fits")
    pixels = read_image(str(tmp_path / "a.fits")).pixels[0]
    assert np.isnan(pixels[5, 6])
    assert np.isnan(pixels).sum() == 1
    assert pixels[0, 0] == hdu.data[0, 0]


def test_beyond_the_edge_of_a_tile_nothing_is_measured(tmp_path: Path) -> None:
    """Zeros, where other surveys write NaN: the sky's noise would seem less than it is."""
    image = np.stack([galaxy(), galaxy()])
    image[1, :5] = 0
    image[1, 50, 50] = 0  # by itself, a pixel like others
    np.save(tmp_path / "a.npy", image)
    cutout = read_cutout([str(tmp_path / "a.npy")], SIDE)
    image[1, :5] = np.nan
    np.testing.assert_allclose(cutout.pixels, pixels_by_hand(image, SIDE), rtol=1e-5)
    assert cutout.nan_fraction == pytest.approx(5 / SIDE)
    image[1, :20] = 0
    np.save(tmp_path / "b.npy", image)
    with pytest.raises(CutoutError, match="33% of a band's pixels are not finite, or zeros"):
        read_cutout([str(tmp_path / "b.npy")], SIDE)
    # Of counts zeros are many, and no filler.
    counts = np.random.default_rng(0).poisson(0.3, (2, SIDE, SIDE))
    noise = np.full((SIDE, SIDE), 0.55, np.float32)
    path = write(tmp_path / "c.fits", [("SCI", counts[0].astype(np.int16)), ("RMS", noise)])
    found = read_cutout([path], SIDE)
    assert found.nan_fraction == 0
    np.testing.assert_allclose(found.pixels[0], counts[0] / 0.55, rtol=1e-6)
    # In the units that a simulation gives, zeros are zeros.
    assert read_cutout([str(tmp_path / "b.npy")], SIDE, "background_sigma").nan_fraction == 0


def test_suffixes_are_known_in_any_case_of_letters(tmp_path: Path) -> None:
    cube = sky()
    fits.PrimaryHDU(cube).writeto(tmp_path / "a.fits.gz")
    (tmp_path / "a.fits.gz").rename(tmp_path / "A.FITS.GZ")
    np.save(tmp_path / "a.npy", cube[None])
    (tmp_path / "a.npy").rename(tmp_path / "A.NPY")
    for name in ("A.FITS.GZ", "A.NPY#0"):
        np.testing.assert_array_equal(read_image(str(tmp_path / name)).pixels, cube)


@pytest.mark.parametrize("suffix", ["npy", "fits"])
def test_bands_at_the_end_are_bands(tmp_path: Path, suffix: str) -> None:
    cube = sky()
    path = tmp_path / f"a.{suffix}"
    last = np.moveaxis(cube, 0, -1)
    if suffix == "npy":
        np.save(path, last)
    else:
        hdu = fits.PrimaryHDU(last)
        hdu.header["MAGZERO"] = 27.0
        hdu.writeto(path)
    found = read_image(str(path))
    np.testing.assert_array_equal(found.pixels, cube)
    assert found.zero_point == ((27.0,) * len(cube) if suffix == "fits" else ())
    usable = usable_cutout(found, 32)
    sigma = [background_sigma(band) for band in cube]
    np.testing.assert_allclose(usable.sigma, sigma)
    np.testing.assert_allclose(usable.pixels[1], central(cube[1], 32) / sigma[1], rtol=1e-6)


def test_colours_are_chosen_by_name(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    found: Cutout = read_image(str(tmp_path / "a.png"))
    turned = found.with_bands(["blue", "green", "red"])
    np.testing.assert_array_equal(turned.pixels, found.pixels[::-1])
    np.testing.assert_array_equal(found.with_bands(["Green"]).pixels, found.pixels[1:2])
    # By other names, they are what the catalogue says.
    np.testing.assert_array_equal(found.with_bands(["i", "r", "g"]).pixels, found.pixels)


COLOUR = np.random.default_rng(4).integers(0, 255, (40, 40, 3), endpoint=True).astype(np.uint8)


@pytest.mark.parametrize(
    ("values", "how", "expected"),
    [
        (sky(), {"bigtiff": True, "photometric": "minisblack", "planarconfig": "separate"}, sky),
        (COLOUR.astype(np.uint16) * 257, {"bigtiff": True, "photometric": "rgb"}, COLOUR),
        (COLOUR[..., 0], {"photometric": "miniswhite"}, 255 - COLOUR[..., :1]),
        (sky(1), {"photometric": "miniswhite"}, sky),  # flux is none of a picture
        (
            COLOUR[..., :2],
            {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unassalpha"]},
            COLOUR[..., :1],
        ),
    ],
)
def test_kinds_of_tiff(
    tmp_path: Path, values: np.ndarray, how: dict[str, object], expected: np.ndarray
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", values, **how)
    found = read_image(str(tmp_path / "a.tif"))
    if callable(expected):
        np.testing.assert_array_equal(found.pixels, values)
    else:
        np.testing.assert_allclose(found.pixels, np.moveaxis(expected, -1, 0) / 255, atol=1e-7)


def test_a_tiff_of_a_palette_shows_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(COLOUR).quantize(16)
    image.save(tmp_path / "a.tif")
    shown = np.asarray(image.convert("RGB")) / 255
    found = read_image(str(tmp_path / "a.tif"))
    np.testing.assert_allclose(found.pixels, np.moveaxis(shown, -1, 0), atol=1e-7)
