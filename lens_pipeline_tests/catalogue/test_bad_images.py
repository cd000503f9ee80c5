"""Among good images, a few bad ones of each kind: which are listed, and why."""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from astropy.io import fits
from PIL import Image

from lens_pipeline.catalogue import build_dataset, read_catalogue
from lens_pipeline.catalogue.dataset import Dataset
from lens_pipeline.catalogue.splits import PARTS
from lens_pipeline_tests.catalogue.by_hand import (
    BANDS,
    RNG,
    SIZE,
    Cube,
    middle_of,
    picture,
    pixels_by_hand,
    sky,
    suffix_of,
    write_cube,
    write_png,
)
from lens_pipeline_tests.payload import Payload


def cut_short(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


# Each kind of bad image: (writes the number-th of them into a folder and says its path, reason).
Writer = Callable[[Path, int], str]
KINDS: dict[str, tuple[Writer, str]] = {}
TOO_SMALL = r"pixels; at least 40 x 40 are needed \(LENS_IMAGE_SIZE\), or LENS_PAD"


def kind(name: str, reason: str, among: dict[str, tuple[Writer, str]] = KINDS) -> Callable:
    def add(write: Writer) -> Writer:
        among[name] = (write, reason)
        return write

    return add


@kind("missing", "the file is missing")
def _missing(folder: Path, i: int) -> str:
    return f"absent{i}.{suffix_of(i, 'fits', 'npy', 'npy#3', 'png', 'tif', 'npz')}"


@kind("empty", "the file cannot be read .+")
def _empty(folder: Path, i: int) -> str:
    name = f"empty{i}.{suffix_of(i, 'fits', 'npy', 'png', 'tif', 'npz', 'jpg')}"
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
    path = folder / f"cut{i}.{suffix_of(i, 'npy', 'npz', 'tif', 'jpg')}"
    if path.suffix == ".jpg":
        picture(path)
    else:
        write_cube(path, sky())
    cut_short(path, 0.1 + 0.06 * i)
    return path.name


@kind("garbage", "the file cannot be read .+")
def _garbage(folder: Path, i: int) -> str:
    name = f"garbage{i}.{suffix_of(i, 'fits', 'fits', 'npy', 'png', 'tif', 'npz', 'jpg')}"
    (folder / name).write_bytes(RNG.bytes(20_000))
    return name


@kind("a folder", "the file cannot be read .+")
def _folder(folder: Path, i: int) -> str:
    name = f"folder{i}.{suffix_of(i, 'fits', 'npy', 'png')}"
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


@kind("too small", rf"(39 x 40|40 x 39|20 x 20) {TOO_SMALL}")
def _small(folder: Path, i: int) -> str:
    name = f"small{i}.{suffix_of(i, 'fits', 'npy', 'npz', 'tif')}"
    write_cube(folder / name, sky(3, *[(39, 40), (40, 39), (20, 20)][i % 3]))
    return name


@kind("all NaN", "a band has no finite pixel")
def _all_nan(folder: Path, i: int) -> str:
    name = f"nan{i}.{suffix_of(i, 'fits', 'npy', 'tif')}"
    cube = sky()
    cube[slice(None) if i % 2 else i % 3] = np.nan
    write_cube(folder / name, cube)
    return name


@kind(
    "many NaN in a band",
    r"(11|25|90)% of a band's pixels are not finite, or zeros side by side; 10% may be",
)
def _many_nan(folder: Path, i: int) -> str:
    name = f"holed{i}.{suffix_of(i, 'fits', 'npy', 'npz')}"
    cube = sky()
    share = [0.11, 0.25, 0.9][i % 3]
    holes = RNG.permutation(SIZE * SIZE)[: round(share * SIZE * SIZE)]
    cube[i % 3].ravel()[holes] = [np.nan, np.inf, -np.inf][i % 3]
    write_cube(folder / name, cube)
    return name


@kind("constant", "the background is constant: there is no noise to measure")
def _constant(folder: Path, i: int) -> str:
    name = f"constant{i}.{suffix_of(i, 'fits', 'npy', 'tif')}"
    cube = sky()
    cube[slice(None) if i % 2 else i % 3] = [0, 7.3, -1e-3][i % 3]
    if i % 5 == 0:
        cube[:, 0, 0] = np.nan
    write_cube(folder / name, cube)
    return name


@kind("number of bands", "[1245] bands; 3 are needed")
def _band_count(folder: Path, i: int) -> str:
    name = f"bands{i}.{suffix_of(i, 'fits', 'npy')}"
    write_cube(folder / name, sky((1, 2, 4, 5)[i % 4]))
    return name


@kind("names of bands", "there is no band I; there are G, R, Z")
def _band_names(folder: Path, i: int) -> str:
    name = f"names{i}.{suffix_of(i, 'fits', 'npz')}"
    write_cube(folder / name, sky(), "GRZ")
    return name


@kind("another unit", r"the image is a composite .*JPEG.*; linear flux \(FITS.*\) is needed")
def _composite(folder: Path, i: int) -> str:
    name = suffix_of(i, f"rgb{i}.png", f"rgb{i}.jpg", f"rgb{i}.tif", f"deep{i}.tif", f"deep{i}.png")
    picture(folder / name)
    return name


@kind("too bright for a float16", "a pixel is more than 65504 background sigma from zero")
def _bright(folder: Path, i: int) -> str:
    name = f"bright{i}.{suffix_of(i, 'fits', 'npy', 'tif')}"
    cube = sky() / np.float32(1000)
    sigma = 0.003 * 10.0 ** (i % 3)
    # Above 65504 sigma by a third; negative; and so bright that the quotient is infinite.
    cube[i % 3, 20, 20] = [9e4 * sigma, -9e4 * sigma, 3.3e38 * 0.9][i // 3 % 3]
    write_cube(folder / name, cube)
    return name


@kind("unknown type", r"the file type \.(txt|csv|dat) is not known; use FITS, NPY, .+")
def _unknown(folder: Path, i: int) -> str:
    name = f"unknown{i}.{suffix_of(i, 'txt', 'csv', 'dat')}"
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
    bombs = np.full((1, 3, SIZE, SIZE), Payload(folder / "EXPLODED"), dtype=object)
    name = f"pickle{i}.{suffix_of(i, 'npy', 'npy', 'npy', 'npz')}"
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
    """700 rows, 15 of them bad in each of the ways."""
    return ingest(tmp_path_factory.mktemp("flux"), KINDS, _good_flux, 700, 15)


@pytest.mark.parametrize("kind", KINDS)
def test_a_catalogue_with_some_of_each_kind_of_bad_image(flux_rows: Ingested, kind: str) -> None:
    assert_listed_with_reason(flux_rows, kind, KINDS[kind][1])


def test_beside_bad_images_every_good_one_is_kept_once(flux_rows: Ingested) -> None:
    dataset = flux_rows.dataset
    good = flux_rows.rows_of("good")
    rejects = dataset.rejects()
    kept = [row for part in PARTS for row in dataset.table(part)["row"]]
    assert sorted(kept) == good
    assert sorted([*kept, *rejects["row"]]) == list(range(700))
    assert dataset.facts["n_rejects"] == len(rejects) == 700 - len(good)
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
    assert with_holes > 60


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


@kind("another unit", r"the image is linear flux .*; a composite .*JPEG.* is needed", OF_PICTURES)
def _flux_among_pictures(folder: Path, i: int) -> str:
    name = f"flux{i}.{suffix_of(i, 'fits', 'npy', 'npz', 'tif')}"
    write_cube(folder / name, sky())
    return name


@kind("number of bands", "1 bands; 3 are needed", OF_PICTURES)
def _grey(folder: Path, i: int) -> str:
    name = f"grey{i}.{suffix_of(i, 'png', 'jpg', 'tif')}"
    picture(folder / name, channels=1)
    return name


@kind("too small", rf"39 x 39 {TOO_SMALL}", OF_PICTURES)
def _small_picture(folder: Path, i: int) -> str:
    name = suffix_of(i, f"small{i}.png", f"small{i}.jpg", f"small{i}.tif", f"deepsmall{i}.png")
    picture(folder / name, size=39)
    return name


def _good_picture(folder: Path, i: int) -> tuple[str, Cube]:
    """PNG and TIFF, of 8 and 16 bits."""
    name = suffix_of(i, f"good{i}.png", f"deepgood{i}.png", f"good{i}.tif", f"deepgood{i}.tif")
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
