"""PNG, JPEG and TIFF files -> arrays (bands, height, width), as stored."""

import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: of more than 4 GB, or ready for it


def read_picture(content: bytes) -> NDArray[Any]:
    """(bands, height, width): uint8 or uint16 where it is a composite, else floats.

    Pillow opens 16-bit colour as 8-bit colour, without a word: those files go to others. Raises
    ValueError, and what decoders raise on a damaged file.
    """
    if content[:4] in _TIFF:
        return _read_tiff(content)
    if content[1:4] == b"PNG" and content[24] == 16 and content[25] in (2, 4, 6):
        return _read_deep_png(content)
    return _read_pillow(content)


def _read_pillow(content: bytes) -> NDArray[Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        opened = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:  # whose words name an address in memory
        raise ValueError("no PNG, JPEG or TIFF, or its beginning is damaged") from None
    with opened as image:
        mode = {"P": "RGB", "RGBA": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "LA": "L", "1": "L"}
        array = np.asarray(image.convert(mode.get(image.mode, image.mode)))
    return np.moveaxis(array, -1, 0) if array.ndim == 3 else array[None]


def _read_deep_png(content: bytes) -> NDArray[np.uint16]:
    """A PNG with 16 bits a channel; an alpha channel is no band.

    A slow reader, for a fast one ends the process on some damaged files.
    """
    import png

    width, height, rows, about = png.Reader(bytes=content).read()
    cube = np.array([list(row) for row in rows], np.uint16).reshape(height, width, -1)
    return np.moveaxis(cube, -1, 0)[: about["planes"] - about["alpha"]]


def _read_tiff(content: bytes) -> NDArray[Any]:
    """Pages or channels as bands; what tifffile cannot decompress goes to Pillow if it is 8-bit."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(content)) as file:
        series = file.series[0]
        for page in (p for s in file.series for p in s.pages if p is not None):
            # A segment that the header claims and the file lacks would be zeros, however many.
            page = page.aspage()
            if len(page.dataoffsets) != math.prod(page.chunked) or 0 in page.databytecounts:
                raise ValueError("the TIFF lacks a part of its image")
            if page.compression == 1 and page.nbytes > len(content):
                raise ValueError("the TIFF is truncated")
        first = file.pages.first
        if first.photometric == tifffile.PHOTOMETRIC.PALETTE:
            return _read_pillow(content)
        try:
            array = series.asarray()
            if len(file.series) > 1 and {s.shape for s in file.series} == {series.shape}:
                array = np.stack([s.asarray() for s in file.series])
        except ValueError:
            if series.dtype != np.uint8:
                raise
            return _read_pillow(content)
        if not np.issubdtype(array.dtype, np.floating) and array.dtype not in (np.uint8, np.uint16):
            raise ValueError(
                f"the pixels are {array.dtype}; 8 or 16 bits without a sign, or floats, are needed"
            )
        if series.axes.endswith("S"):
            array = np.moveaxis(array, -1, 0)
        if first.photometric == tifffile.PHOTOMETRIC.RGB:
            array = array[:3]
        elif {*first.extrasamples} & {
            tifffile.EXTRASAMPLE.ASSOCALPHA,
            tifffile.EXTRASAMPLE.UNASSALPHA,
        }:
            array = array[:-1]
        negative = first.photometric == tifffile.PHOTOMETRIC.MINISWHITE
        if negative and np.issubdtype(array.dtype, np.integer):
            array = np.iinfo(array.dtype).max - array
    return array.reshape(-1, *array.shape[-2:])
