"""Image files -> float32 cutouts (bands, height, width), which `cutout` makes usable.

Linear flux is as it was stored; an 8- or 16-bit composite (PNG, JPEG, integer TIFF) is value / full
scale.
"""

import gzip
import hashlib
import io
import math
import posixpath
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from lens_pipeline.catalogue.cutout import (
    COMPOSITE,
    FLUX,
    SIGMA_UNITS,
    Cutout,
    CutoutError,
    usable_cutout,
)
from lens_pipeline.catalogue.fits_images import read_fits, role_of
from lens_pipeline.catalogue.pictures import read_picture
from lens_pipeline.errors import NoAnswerError, words_of
from lens_pipeline.locations import protocol_of, without_query
from lens_pipeline.storage import asking, locate, states_of

STACKS = 8  # local ones that are open at a time, in each process
NPY_HEAD = 4096  # bytes: more than the head of a NumPy file
# The head of a NumPy file is a Python literal; CPython before 3.11.8 and 3.12.2 reads these in one
# thread at a time, and another fails with a SystemError now and then (gh-106905).
_LITERALS = threading.Lock()
STACK_ROW = re.compile(r"^(?P<file>.*\.npy(\?[^#]*)?)#(?P<row>\d+)$", re.IGNORECASE)


def file_of(reference: str) -> str:
    """The file that a path addresses: `stack.npy#17` is row 17 of `stack.npy`."""
    match = STACK_ROW.match(reference)
    return match["file"] if match else reference


def files_fingerprint(references: Iterable[str], options: dict[str, Any] | None = None) -> str:
    """A hash of which files these are: their paths, sizes and times of change (or ETags).

    As make does, a file is taken for changed when its size or time is; reading all of a survey's
    pixels only to find that nothing changed would take hours.
    """
    digest = hashlib.sha256()
    for path, state in states_of({file_of(reference) for reference in references}, options):
        digest.update(f"{path}\0{state or 'missing'}\0".encode())
    return digest.hexdigest()


def read_image(
    reference: str, flux_unit: str | None = None, options: dict[str, Any] | None = None
) -> Cutout:
    """Read one file, as it is.

    flux_unit: `background_sigma` says that a FITS or NPY image is in these units already; else it
    is linear flux, but for NPY or NPZ of bytes without a flux_unit, which are a composite. Raises
    CutoutError with the reason; within `strict_fits`, for a truncated FITS file, too; and
    NoAnswerError where it lies in a store that fails: that says nothing of the file.
    """
    path, row = file_of(reference), STACK_ROW.match(reference)
    name = without_query(path).lower()
    try:
        if row:
            read = _remote_row if protocol_of(path) else _local_row
            return _of_array(read(path, int(row["row"]), options), flux_unit)
        content = _content(path, options)
        if name.endswith(".gz"):
            content, name = gzip.decompress(content), name.removesuffix(".gz")
    except FileNotFoundError:
        raise CutoutError("the file is missing") from None
    except (CutoutError, NoAnswerError):
        raise
    except Exception as problem:  # noqa: BLE001  (each store has errors of its own)
        raise _unreadable(problem) from None
    return decode_image(content, posixpath.splitext(name)[1].lstrip("."), flux_unit)


def decode_image(content: bytes, suffix: str, flux_unit: str | None = None) -> Cutout:
    """The image in a file of that suffix (`fits`, `npy`, ...), as it is; see `read_image`."""
    linear = _linear(flux_unit)
    try:
        if suffix == "npy":
            with _LITERALS:
                array = np.load(io.BytesIO(content), allow_pickle=False)
            return _of_array(array, flux_unit)
        if suffix in ("fits", "fit", "fz"):
            found = read_fits(io.BytesIO(content))
            cube = _as_cube(found.pixels)
            of_bands = found.zero_point * (len(cube) // len(found.zero_point))
            return Cutout(cube, linear, found.bands, sigma=found.sigma, zero_point=of_bands)
        if suffix == "npz":
            return _read_npz(content, flux_unit)
        if suffix in ("png", "jpg", "jpeg", "tif", "tiff"):
            cube = read_picture(content)
            if np.issubdtype(cube.dtype, np.floating):
                return Cutout(_as_cube(cube), linear)
            return _composite(cube)
    except CutoutError:
        raise
    except Exception as problem:  # noqa: BLE001  (decoders raise anything on a damaged file)
        raise _unreadable(problem) from None
    kind = f"the file type .{suffix} is not known" if suffix else "its name has no suffix"
    raise CutoutError(f"{kind}; use FITS, NPY, NPZ, PNG, JPEG or TIFF")


def _content(
    path: str, options: dict[str, Any] | None, begin: int | None = None, end: int | None = None
) -> bytes:
    filesystem, inside = locate(path, options)
    with asking(path):
        return filesystem.cat_file(inside, begin, end)


def _linear(flux_unit: str | None) -> str:
    return SIGMA_UNITS if flux_unit == SIGMA_UNITS else FLUX


def _composite(cube: NDArray[Any]) -> Cutout:
    full_scale = np.float32(np.iinfo(cube.dtype).max)
    return Cutout((cube / full_scale).astype(np.float32), COMPOSITE)


def _of_array(array: NDArray[Any], flux_unit: str | None) -> Cutout:
    """Bytes are those of a picture, unless their unit is stated: no survey's flux has 256 steps."""
    if array.dtype == np.uint8 and flux_unit is None:
        return _composite(_by_bands(array))
    return Cutout(_as_cube(array), _linear(flux_unit))


def _unreadable(problem: Exception) -> CutoutError:
    # The same words for all cutouts: which it is, is told beside them.
    said = re.sub(r", url='[^']*'", "", words_of(problem, 1000))
    return CutoutError(f"the file cannot be read ({said[:200]})")


def _read_npz(content: bytes, flux_unit: str | None) -> Cutout:
    """One cube, or one image for each band, named by it: what is no image FITS files alone tell."""
    with _LITERALS, np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        names = arrays.files
        if len(names) == 1:
            return _of_array(arrays[names[0]], flux_unit)
        if maps := [name for name in names if role_of(name) not in (None, "image")]:
            raise CutoutError(
                f"the array {maps[0]} is no band, by its name; write noise maps and masks in FITS"
            )
        shapes = {name: arrays[name].shape for name in names}
        if len(set(shapes.values())) > 1 or len(shapes[names[0]]) != 2:
            raise CutoutError(f"the arrays of the bands differ in shape: {shapes}")
        stacked = _of_array(np.stack([arrays[name] for name in names]), flux_unit)
        return replace(stacked, bands=tuple(names))


def _local_row(path: str, row: int, _: object) -> NDArray[Any]:
    with asking(path):
        state = Path(path).stat()
        stack = _mapped(path, state.st_ino, state.st_mtime_ns, state.st_size)
    _check_row(row, stack.shape)
    return stack[row]


@lru_cache(maxsize=STACKS)
def _mapped(path: str, *_: int) -> NDArray[Any]:
    """A stack, opened once for its many rows, as long as what its file system says of it is the
    same: a file that shrinks under its mapping would end the process."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _check_row(row: int, shape: tuple[int, ...]) -> None:
    if len(shape) not in (3, 4) or row >= shape[0]:  # of one band, or of several
        raise CutoutError(f"there is no row {row} in a stack of shape {shape}")


def _remote_row(path: str, row: int, options: dict[str, Any] | None) -> NDArray[Any]:
    """A row of a stack in a store, of which nothing else is fetched but its head."""
    head = io.BytesIO(_content(path, options, 0, NPY_HEAD))
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    with _LITERALS:
        shape, by_columns, dtype = read[npy.read_magic(head)](head)
    _check_row(row, shape)
    if by_columns or dtype.hasobject:
        raise CutoutError("a stack must be of numbers, row after row (C order)")
    size = dtype.itemsize * math.prod(shape[1:])
    begin = head.tell() + row * size
    content = _content(path, options, begin, begin + size)
    if len(content) > size:  # a web server that gives whole files alone
        content = content[begin : begin + size]
    return np.frombuffer(content, dtype).reshape(shape[1:])


def _by_bands(array: NDArray[Any]) -> NDArray[Any]:
    """(bands, height, width)"""
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3:
        raise CutoutError(f"the shape is {array.shape}; (bands, height, width) is needed")
    if array.shape[-1] < min(array.shape[:2]):  # fewer than rows and columns: bands, at the end
        array = np.moveaxis(array, -1, 0)
    return array


def _as_cube(array: NDArray[Any]) -> NDArray[np.float32]:
    array = _by_bands(array)
    if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        raise CutoutError(f"the pixels are {array.dtype}, not real numbers")
    if np.any(np.isfinite(array) & (np.abs(array) > np.finfo(np.float32).max)):
        raise CutoutError("a pixel is brighter than a float32 holds")
    return np.ascontiguousarray(array, dtype=np.float32)


def read_cutout(
    references: list[str],
    size: int,
    flux_unit: str | None = None,
    options: dict[str, Any] | None = None,
    names: Sequence[str] | None = None,
    bands: Sequence[str] | None = None,
    pad: bool = False,
) -> Cutout:
    """One usable cutout from its file, or from one file a band. Raises CutoutError.

    names: what its bands are called where the file does not say, empty where nothing tells and it
    is not the same for all; bands: which of them to keep, and
    in which order; pad: see `usable_cutout`.
    """
    parts = []
    for number, reference in enumerate(references):
        try:
            parts.append(read_image(reference, flux_unit, options))
        except CutoutError as reason:
            reason.image = number
            raise
    cutout = parts[0]
    if len(parts) > 1:
        if any(len(part.pixels) != 1 for part in parts):
            raise CutoutError("a file of one band holds several")
        if len({(part.pixels.shape, part.units) for part in parts}) > 1:
            raise CutoutError("the files of the bands differ in size or units")
        unknown = (float("nan"),)
        cutout = replace(
            cutout,
            pixels=np.concatenate([part.pixels for part in parts]),
            bands=None,
            sigma=tuple(v for part in parts for v in part.sigma or unknown),
            zero_point=tuple(v for part in parts for v in part.zero_point or unknown),
        )
    if names is not None and cutout.bands is None:
        if len(names) != len(cutout.pixels):
            said = f"are named {', '.join(names)}" if names else "have no names, and others' differ"
            raise CutoutError(
                f"its bands {said}; the image has {len(cutout.pixels)} (columns bands, path_<band>)"
            )
        cutout = replace(cutout, bands=tuple(names))
    if bands:
        cutout = cutout.with_bands(bands)
    return usable_cutout(cutout, size, pad=pad)
