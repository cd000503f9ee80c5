"""From a catalogue to a dataset: what survives of bad images, and of real ones, by hand.

Nothing here trusts the package's own arithmetic: what a pixel must be is worked out from the file
with astropy and NumPy.
"""

import pickle
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tifffile
from astropy.io import fits
from numpy.typing import NDArray
from PIL import Image

from lens_pipeline.catalogue import build_dataset, read_catalogue
from lens_pipeline.catalogue.dataset import PARTS, Dataset
from lens_pipeline.catalogue.images import CutoutError, background_sigma, read_cutout, read_image
from lens_pipeline_tests.catalogue.test_images import write_png

RNG = np.random.default_rng(5)
SIZE = 40
BANDS = "GRI"
Cube = NDArray[np.float32]


def sigma_by_hand(band: Cube) -> float:
    """Three rounds of clipping at 3 sigma about the median, sigma = 1.4826 x MAD; no library."""
    values = band[np.isfinite(band)].astype(np.float64)

    def sigma_of(left: NDArray[np.float64]) -> float:
        return 1.4826 * float(np.median(np.abs(left - np.median(left))))

    for _ in range(3):
        values = values[np.abs(values - np.median(values)) <= 3 * sigma_of(values)]
    return sigma_of(values)


def pixels_by_hand(cube: Cube, size: int) -> Cube:
    """Flux over sigma, holes filled with the band's median, the central square."""
    bands = []
    for band in cube:
        filled = np.where(np.isfinite(band), band, np.median(band[np.isfinite(band)]))
        bands.append(filled / sigma_by_hand(band))
    return middle_of(np.stack(bands), size)


def middle_of(cube: Cube, size: int) -> Cube:
    top, left = ((length - size) // 2 for length in cube.shape[1:])
    return cube[:, top : top + size, left : left + size]


def sky(n_bands: int = 3, height: int = SIZE, width: int = SIZE) -> Cube:
    """Noise of another sigma in each band, and a source in the middle."""
    sigma = 3 * 10.0 ** np.arange(n_bands)[:, None, None]
    cube = RNG.normal(0, sigma, (n_bands, height, width))
    cube[:, height // 2 - 3 : height // 2 + 3, width // 2 - 3 : width // 2 + 3] += 30 * sigma
    return cube.astype(np.float32)


def write_cube(path: Path, cube: NDArray[Any], bands: str = "") -> None:
    """In the format that the name asks for; bands: a named FITS extension or NPZ array for each."""
    if path.suffix == ".fits" and bands:
        images = [fits.ImageHDU(b, name=n) for b, n in zip(cube, bands, strict=True)]
        fits.HDUList([fits.PrimaryHDU(), *images]).writeto(path)
    elif path.suffix == ".fits":
        fits.PrimaryHDU(cube).writeto(path)
    elif path.suffix == ".npz":
        np.savez(path, **dict(zip(bands or "abcdefgh"[: len(cube)], cube, strict=True)))
    elif path.suffix == ".tif":
        layout = {"planarconfig": "separate"} if len(cube) > 1 else {}
        tifffile.imwrite(path, cube, photometric="minisblack", **layout)
    else:
        np.save(path, cube)


def picture(path: Path, channels: int = 3, size: int = SIZE) -> None:
    """A composite of 8 bits (PNG, JPEG, TIFF), of 16 where the name begins with `deep`."""
    if path.name.startswith("deep"):
        values = RNG.integers(0, 65535, (size, size, channels), endpoint=True).astype(np.uint16)
        if path.suffix == ".png":
            write_png(path, values)
        else:
            tifffile.imwrite(path, values, photometric="rgb")
    else:
        values = RNG.integers(0, 255, (size, size, channels), endpoint=True).astype(np.uint8)
        Image.fromarray(values.squeeze()).save(path)


def cut_short(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


class _Bomb:
    """Unpickled, it leaves a file: whoever reads one has run what a stranger wrote."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.mark,)


# Each kind of bad image: (writes the number-th of them into a folder and says its path, reason).
Writer = Callable[[Path, int], str]
KINDS: dict[str, tuple[Writer, str]] = {}


def kind(name: str, reason: str, among: dict[str, tuple[Writer, str]] = KINDS) -> Callable:
    def add(write: Writer) -> Writer:
        among[name] = (write, reason)
        return write

    return add


def _suffix(i: int, *suffixes: str) -> str:
    return suffixes[i % len(suffixes)]


@kind("missing", "the file is missing")
def _missing(folder: Path, i: int) -> str:
    return f"absent{i}.{_suffix(i, 'fits', 'npy', 'npy#3', 'png', 'tif', 'npz')}"


@kind("empty", "the file cannot be read .+")
def _empty(folder: Path, i: int) -> str:
    name = f"empty{i}.{_suffix(i, 'fits', 'npy', 'png', 'tif', 'npz', 'jpg')}"
    (folder / name).touch()
    return name


@kind("FITS cut in its data", "the file cannot be read .+truncated.+")
def _cut_fits(folder: Path, i: int) -> str:
    path = folder / f"cut{i}.fits"
    write_cube(path, sky(), BANDS if i % 2 else "")
    cut_short(path, 0.48 + 0.01 * i)  # within a cube, or the data of the second extension
    return path.name


@kind("PNG cut short", "the file cannot be read .+")
def _cut_png(folder: Path, i: int) -> str:
    path = folder / f"{'deep' if i % 5 == 0 else ''}cut{i}.png"
    picture(path)
    cut_short(path, 0.05 + 0.06 * i)
    return path.name


@kind("NPY, NPZ, TIFF or JPEG cut short", "the file cannot be read .+")
def _cut_other(folder: Path, i: int) -> str:
    path = folder / f"cut{i}.{_suffix(i, 'npy', 'npz', 'tif', 'jpg')}"
    if path.suffix == ".jpg":
        picture(path)
    else:
        write_cube(path, sky())
    cut_short(path, 0.1 + 0.06 * i)
    return path.name


@kind("garbage", "the file cannot be read .+")
def _garbage(folder: Path, i: int) -> str:
    name = f"garbage{i}.{_suffix(i, 'fits', 'fits', 'npy', 'png', 'tif', 'npz', 'jpg')}"
    (folder / name).write_bytes(RNG.bytes(20_000))
    return name


@kind("a folder", "the file cannot be read .+")
def _folder(folder: Path, i: int) -> str:
    name = f"folder{i}.{_suffix(i, 'fits', 'npy', 'png')}"
    (folder / name).mkdir()
    return name


@kind("FITS without an image", r"the file cannot be read \(the FITS file holds no image\)")
def _table_only(folder: Path, i: int) -> str:
    name = f"table{i}.fits"
    column = fits.Column("flux", "E", array=np.ones(9))
    table = fits.BinTableHDU.from_columns([column])
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(folder / name)
    return name


@kind("bands of several shapes", "the file cannot be read .+differ in shape.+")
def _ragged(folder: Path, i: int) -> str:
    name = f"ragged{i}.fits"
    images = [fits.ImageHDU(sky(1, 40 + b, 44)[0], name=n) for b, n in enumerate(BANDS)]
    fits.HDUList([fits.PrimaryHDU(), *images]).writeto(folder / name)
    return name


@kind("too small", r"(39 x 40|40 x 39|20 x 20) pixels; at least 40 x 40 are needed")
def _small(folder: Path, i: int) -> str:
    name = f"small{i}.{_suffix(i, 'fits', 'npy', 'npz', 'tif')}"
    write_cube(folder / name, sky(3, *[(39, 40), (40, 39), (20, 20)][i % 3]))
    return name


@kind("all NaN", "a band has no finite pixel")
def _all_nan(folder: Path, i: int) -> str:
    name = f"nan{i}.{_suffix(i, 'fits', 'npy', 'tif')}"
    cube = sky()
    cube[slice(None) if i % 2 else i % 3] = np.nan
    write_cube(folder / name, cube)
    return name


@kind("many NaN in a band", r"(11|25|90)% of a band's pixels are not finite; 10% may be")
def _many_nan(folder: Path, i: int) -> str:
    name = f"holed{i}.{_suffix(i, 'fits', 'npy', 'npz')}"
    cube = sky()
    share = [0.11, 0.25, 0.9][i % 3]
    holes = RNG.permutation(SIZE * SIZE)[: round(share * SIZE * SIZE)]
    cube[i % 3].ravel()[holes] = [np.nan, np.inf, -np.inf][i % 3]
    write_cube(folder / name, cube)
    return name


@kind("constant", "the background is constant: there is no noise to measure")
def _constant(folder: Path, i: int) -> str:
    name = f"constant{i}.{_suffix(i, 'fits', 'npy', 'tif')}"
    cube = sky()
    cube[slice(None) if i % 2 else i % 3] = [0, 7.3, -1e-3][i % 3]
    if i % 5 == 0:
        cube[:, 0, 0] = np.nan
    write_cube(folder / name, cube)
    return name


@kind("number of bands", "[1245] bands; 3 are needed")
def _band_count(folder: Path, i: int) -> str:
    name = f"bands{i}.{_suffix(i, 'fits', 'npy')}"
    write_cube(folder / name, sky((1, 2, 4, 5)[i % 4]))
    return name


@kind("names of bands", "there is no band I; there are G, R, Z")
def _band_names(folder: Path, i: int) -> str:
    name = f"names{i}.{_suffix(i, 'fits', 'npz')}"
    write_cube(folder / name, sky(), "GRZ")
    return name


@kind("another unit", "the pixels are composite; background_sigma is needed")
def _composite(folder: Path, i: int) -> str:
    name = _suffix(i, f"rgb{i}.png", f"rgb{i}.jpg", f"rgb{i}.tif", f"deep{i}.tif", f"deep{i}.png")
    picture(folder / name)
    return name


@kind("too bright for a float16", "a pixel is brighter than 65504 background sigma")
def _bright(folder: Path, i: int) -> str:
    name = f"bright{i}.{_suffix(i, 'fits', 'npy', 'tif')}"
    cube = sky() / np.float32(1000)
    sigma = 0.003 * 10.0 ** (i % 3)
    # Above 65504 sigma by a third; negative; and so bright that the quotient is infinite.
    cube[i % 3, 20, 20] = [9e4 * sigma, -9e4 * sigma, 3.3e38 * 0.9][i // 3 % 3]
    write_cube(folder / name, cube)
    return name


@kind("unknown type", r"the file type \.(txt|csv|gz) is not known; use FITS, NPY, .+")
def _unknown(folder: Path, i: int) -> str:
    name = f"unknown{i}.{_suffix(i, 'txt', 'csv', 'fits.gz')}"
    (folder / name).write_text("1 2 3\n")
    return name


@kind("not real numbers", r"the pixels are (complex64|complex128|<U3|\|S3|bool), not real numbers")
def _no_numbers(folder: Path, i: int) -> str:
    name = f"type{i}.npy"
    dtype = ["complex64", "complex128", "U3", "S3", "bool"][i % 5]
    np.save(folder / name, sky().astype(dtype))
    return name


@kind("a pickle", "the file cannot be read .+")
def _pickled(folder: Path, i: int) -> str:
    bombs = np.full((1, 3, SIZE, SIZE), _Bomb(folder / "EXPLODED"), dtype=object)
    name = f"pickle{i}.{_suffix(i, 'npy', 'npy', 'npy', 'npz')}"
    path = folder / name
    if i % 4 == 1:
        path.write_bytes(pickle.dumps(bombs[0, 0, 0, 0]))
    elif i % 4 == 3:
        np.savez(path, allow_pickle=True, pixels=bombs[0])
    else:
        np.save(path, bombs[0] if i % 4 else bombs, allow_pickle=True)
    return f"{name}#0" if i % 4 == 0 else name


@kind("no such row", r"there is no row (5|99) in a stack of shape \((5|3), .+\)")
def _row(folder: Path, i: int) -> str:
    name = f"few{i}.npy"
    cube = sky() if i % 3 == 0 else np.stack([sky()] * 5)  # an image of its own has no rows
    np.save(folder / name, cube)
    return f"{name}#{5 if i % 2 else 99}"


def _good_flux(folder: Path, i: int) -> tuple[str, Cube]:
    """A usable image in one of the formats; every fifth has some NaN, up to 5 % of a band."""
    form = i % 6
    wide = form in (0, 2) and i % 4 == 0
    cube = sky(3, 48, 43) if wide else sky()
    if i % 5 == 0:
        band = cube[i % 3].ravel()
        band[RNG.permutation(band.size)[: RNG.integers(1, band.size // 20)]] = np.nan
    name = f"good{i}.{['fits', 'fits', 'npy', 'npy', 'npz', 'tif'][form]}"
    if form == 3:  # a row in a stack of its own
        np.save(folder / name, np.stack([sky(), cube, sky()]))
        return f"{name}#1", cube
    write_cube(folder / name, cube, BANDS if form in (1, 4) else "")
    return name, cube


@dataclass
class Ingested:
    """A dataset with what it was made from: each row's kind (`good` or of KINDS) and path."""

    dataset: Dataset
    folder: Path
    kinds: list[str]
    paths: list[str]
    cubes: Mapping[int, Cube]  # of the good rows

    def rows_of(self, kind: str) -> list[int]:
        return [row for row, own in enumerate(self.kinds) if own == kind]


def ingest(
    folder: Path,
    kinds: Mapping[str, tuple[Writer, str]],
    good: Callable[[Path, int], tuple[str, Cube]],
    n: int,
    of_each: int,
) -> Ingested:
    """A catalogue of n rows, of_each bad in each of the ways, in a random order."""
    shuffled = [name for name in kinds for _ in range(of_each)]
    shuffled += ["good"] * (n - len(shuffled))
    RNG.shuffle(shuffled)
    paths, cubes = [], {}
    count: dict[str, int] = dict.fromkeys(shuffled, 0)
    for row, name in enumerate(shuffled):
        number = count[name]
        count[name] += 1
        if name == "good":
            path, cubes[row] = good(folder, number)
        else:
            path = kinds[name][0](folder, number)
        paths.append(path)
    ids = [f"no. {row}" for row in range(n)]
    table = pd.DataFrame({"id": ids, "path": paths, "label": np.arange(n) % 3 == 0})
    table.to_csv(folder / "table.csv", index=False)
    out = folder / "out"
    out.mkdir()
    catalogue = read_catalogue(folder / "table.csv")
    dataset = build_dataset(catalogue, out, image_size=SIZE, max_reject_fraction=0.5)
    return Ingested(dataset, folder, shuffled, paths, cubes)


def assert_listed_with_reason(ingested: Ingested, kind: str, reason: str) -> None:
    """Every row of the kind is there exactly once, with its file, and for the right reason."""
    rows = ingested.rows_of(kind)
    listed = ingested.dataset.rejects()
    listed = listed[listed["row"].isin(rows)]
    wanted = pd.DataFrame(
        {
            "id": [f"no. {row}" for row in rows],
            "row": rows,
            "file": [f"{ingested.folder}/{ingested.paths[row].partition('#')[0]}" for row in rows],
            "column": "path",
        }
    )
    kept = sorted(set(rows) - set(listed["row"]))
    assert not kept, f"{kind}: taken for good: {[ingested.paths[row] for row in kept]}"
    pd.testing.assert_frame_equal(
        listed[list(wanted)].reset_index(drop=True), wanted, obj=f"rejects for {kind!r}"
    )
    other = listed[~listed["reason"].str.fullmatch(reason)]
    assert other.empty, f"{kind}: another reason: {other[['file', 'reason']].to_dict('records')}"


@pytest.fixture(scope="module")
def flux_rows(tmp_path_factory: pytest.TempPathFactory) -> Ingested:
    """1,500 rows, 15 of them bad in each of the ways."""
    return ingest(tmp_path_factory.mktemp("flux"), KINDS, _good_flux, 1500, 15)


@pytest.mark.parametrize("kind", KINDS)
def test_a_catalogue_with_one_per_cent_of_each_kind_of_bad_image(
    flux_rows: Ingested, kind: str
) -> None:
    assert_listed_with_reason(flux_rows, kind, KINDS[kind][1])


def test_beside_bad_images_every_good_one_is_kept_once(flux_rows: Ingested) -> None:
    dataset = flux_rows.dataset
    good = flux_rows.rows_of("good")
    rejects = dataset.rejects()
    kept = [row for part in PARTS for row in dataset.table(part)["row"]]
    assert sorted(kept) == good
    assert sorted([*kept, *rejects["row"]]) == list(range(1500))
    assert dataset.facts["n_rejects"] == len(rejects) == 1500 - len(good)
    assert dataset.format.bands == tuple(BANDS)


def test_beside_bad_images_the_good_ones_have_their_own_pixels(flux_rows: Ingested) -> None:
    """A reject shifts no row: each image is that of its path, to the rounding of float32."""
    with_holes = 0
    for part in PARTS:
        table, images = flux_rows.dataset.table(part), flux_rows.dataset.images(part)
        for row, name, nan_fraction, pixels in zip(
            table["row"], table["id"], table["nan_fraction"], images, strict=True
        ):
            cube = flux_rows.cubes[row]
            assert name == f"no. {row}"
            holes = np.isnan(middle_of(cube, SIZE)).mean(axis=(1, 2)).max()
            assert nan_fraction == pytest.approx(holes, rel=1e-5), flux_rows.paths[row]
            np.testing.assert_allclose(
                pixels, pixels_by_hand(cube, SIZE), rtol=1e-5, atol=1e-6, err_msg=str(row)
            )
            with_holes += holes > 0
    assert with_holes > 200


def test_a_pickle_is_refused_and_never_run(flux_rows: Ingested) -> None:
    mark = flux_rows.folder / "EXPLODED"
    assert not mark.exists()
    # They are live: a careless reader would have set one off.
    pickle.loads((flux_rows.folder / "pickle1.npy").read_bytes())
    assert mark.exists()
    mark.unlink()


# The other way round: pictures, with flux among them.
OF_PICTURES: dict[str, tuple[Writer, str]] = {
    name: KINDS[name] for name in ("missing", "empty", "PNG cut short", "garbage", "a folder")
}


@kind("another unit", "the pixels are background_sigma; composite is needed", OF_PICTURES)
def _flux_among_pictures(folder: Path, i: int) -> str:
    name = f"flux{i}.{_suffix(i, 'fits', 'npy', 'npz', 'tif')}"
    write_cube(folder / name, sky())
    return name


@kind("number of bands", "1 bands; 3 are needed", OF_PICTURES)
def _grey(folder: Path, i: int) -> str:
    name = f"grey{i}.{_suffix(i, 'png', 'jpg', 'tif')}"
    picture(folder / name, channels=1)
    return name


@kind("too small", "39 x 39 pixels; at least 40 x 40 are needed", OF_PICTURES)
def _small_picture(folder: Path, i: int) -> str:
    name = _suffix(i, f"small{i}.png", f"small{i}.jpg", f"small{i}.tif", f"deepsmall{i}.png")
    picture(folder / name, size=39)
    return name


def _good_picture(folder: Path, i: int) -> tuple[str, Cube]:
    """PNG and TIFF, of 8 and 16 bits."""
    name = _suffix(i, f"good{i}.png", f"deepgood{i}.png", f"good{i}.tif", f"deepgood{i}.tif")
    full = 65535 if name.startswith("deep") else 255
    values = RNG.integers(0, full, (SIZE, SIZE, 3), endpoint=True)
    if full == 255:
        Image.fromarray(values.astype(np.uint8)).save(folder / name)
    elif name.endswith("png"):
        write_png(folder / name, values.astype(np.uint16))
    else:
        tifffile.imwrite(folder / name, values.astype(np.uint16), photometric="rgb")
    return name, np.moveaxis(values / full, -1, 0).astype(np.float32)


def test_a_catalogue_of_pictures_with_each_kind_of_bad_image(tmp_path: Path) -> None:
    ingested = ingest(tmp_path, OF_PICTURES, _good_picture, 240, 6)
    for name, (_, reason) in OF_PICTURES.items():
        assert_listed_with_reason(ingested, name, reason)
    dataset = ingested.dataset
    kept = [row for part in PARTS for row in dataset.table(part)["row"]]
    assert sorted(kept) == ingested.rows_of("good")
    assert sorted([*kept, *dataset.rejects()["row"]]) == list(range(240))
    for part in PARTS:
        for row, pixels in zip(dataset.table(part)["row"], dataset.images(part), strict=True):
            np.testing.assert_allclose(pixels, ingested.cubes[row], atol=1e-7)


# Real images, by hand.

SPLITS = ("train", "val", "test")


def build(folder: Path, table: pd.DataFrame, **settings: Any) -> Dataset:
    """A dataset of a table; splits in turn, and both classes in each, where it does not say."""
    n = np.arange(len(table))
    stated = {"id": [f"c{i}" for i in n], "label": n // 3 % 2, "split": [SPLITS[i % 3] for i in n]}
    table = table.assign(**{name: v for name, v in stated.items() if name not in table})
    table.to_csv(folder / "table.csv", index=False)
    out = folder / "out"
    out.mkdir()
    return build_dataset(read_catalogue(folder / "table.csv"), out, **settings)


def rows(dataset: Dataset) -> Iterator[tuple[Any, Cube]]:
    """(row of the table, pixels) of every image that was kept."""
    for part in PARTS:
        yield from zip(dataset.table(part).itertuples(), dataset.images(part), strict=True)


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
        f"{row}.{_suffix(row, 'fits', 'npy', 'npz', 'tif')}": RNG.permutation(levels)
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
        sigma = 1.0 if flux_unit else sigma_by_hand(given)
        ratio = given.astype(np.float64) / pixels.ravel()
        np.testing.assert_allclose(ratio, sigma, rtol=5e-6)
        np.testing.assert_allclose(ratio, np.median(ratio), rtol=2e-7)  # float32 rounds to 6e-8
        if flux_unit:
            np.testing.assert_array_equal(pixels.ravel(), given)


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
        "from lens_pipeline.catalogue.images import CutoutError, read_image\n"
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


def test_a_tiff_of_32_bit_integers_is_refused_or_on_its_own_full_scale(tmp_path: Path) -> None:
    values = RNG.integers(0, 2**32 - 1, (SIZE, SIZE), endpoint=True, dtype=np.uint32)
    tifffile.imwrite(tmp_path / "a.tif", values)
    try:
        pixels = read_image(str(tmp_path / "a.tif")).pixels
    except CutoutError:
        return
    np.testing.assert_allclose(pixels[0], values / (2**32 - 1), atol=1e-6)


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
