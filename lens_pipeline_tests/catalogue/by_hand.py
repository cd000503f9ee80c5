"""What a pixel must be, worked out from its file with astropy and NumPy; and files to try it on."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tifffile
from astropy.io import fits
from numpy.typing import NDArray
from PIL import Image

from lens_pipeline.catalogue import build_dataset, read_catalogue
from lens_pipeline.catalogue.dataset import Dataset
from lens_pipeline.catalogue.splits import PARTS, SPLITS

RNG = np.random.default_rng(5)
SIZE = 40
BANDS = "GRI"
Cube = NDArray[np.float32]
NOISE = RNG.normal(0, 3, (3, 40, 40)).astype(np.float32)
NOISE[:, 18:22, 18:22] += 500


def sigma_by_hand(band: Cube) -> float:
    """Of what a pixel and the one 3 right of and 3 below it have more, halved, than the other two
    corners of that square: three rounds of clipping at 3 sigma about the median, sigma = 1.4826 x
    MAD; no library.

    To the last digit: in a thousand images some value lies at 3.00000 sigma.
    """
    pixel = band.astype(np.float64)
    height, width = pixel.shape
    corners = [pixel[y : height - 3 + y, x : width - 3 + x] for y in (0, 3) for x in (0, 3)]
    values = (corners[3] - corners[1] - corners[2] + corners[0]) / 2
    values = values[np.isfinite(values)]

    def sigma_of(left: NDArray[np.float64]) -> float:
        return 1.482602218505602 * float(np.median(np.abs(left - np.median(left))))

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


def suffix_of(i: int, *suffixes: str) -> str:
    return suffixes[i % len(suffixes)]


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
