"""Image files -> float32 cutouts (bands, height, width).

Linear flux is expressed in units of each band's background sigma; an 8- or 16-bit composite (PNG,
JPEG, integer TIFF) is value / full scale. Nothing else is done to a pixel: the stretch belongs to
the model's input.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
from astropy.stats import sigma_clipped_stats
from numpy.typing import NDArray

SIGMA_UNITS = "background_sigma"
COMPOSITE = "composite"
FLUX = "flux"  # as read: becomes SIGMA_UNITS
FLOAT16_MAX = float(np.finfo(np.float16).max)
STACK_ROW = re.compile(r"^(?P<file>.*\.npy)#(?P<row>\d+)$")


class CutoutError(Exception):
    """A cutout that cannot be used; the message is the reject's reason.

    image: which of its files is to blame, counted in the order of the image columns.
    """

    image = 0


@dataclass(frozen=True)
class Cutout:
    """pixels: float32 (bands, height, width); units: `background_sigma`, `composite` or `flux`."""

    pixels: NDArray[np.float32]
    units: str
    bands: tuple[str, ...] | None = None
    nan_fraction: float = 0.0


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
    for path in sorted({file_of(reference) for reference in references}):
        try:
            filesystem, inside = fsspec.url_to_fs(path, **(options or {}))
            info = filesystem.info(inside)
            changed = info.get("ETag") or info.get("etag") or info.get("mtime")
            state = f"{info['size']} {changed}"
        except Exception:  # noqa: BLE001  (what is wrong is told when it is read)
            state = "missing"
        digest.update(f"{path}\0{state}\0".encode())
    return digest.hexdigest()


@contextmanager
def strict_fits() -> Iterator[None]:
    """While cutouts are read: a truncated FITS file is an error, for astropy only warns of it.

    Filters of warnings belong to the process, so this is set once around all reading threads.
    """
    from astropy.io import fits
    from astropy.utils.exceptions import AstropyWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", AstropyWarning)
        warnings.filterwarnings("ignore", category=fits.verify.VerifyWarning)
        yield


def read_image(
    reference: str, flux_unit: str | None = None, options: dict[str, Any] | None = None
) -> Cutout:
    """Read one file, as it is.

    flux_unit: `background_sigma` says that a FITS or NPY image is in these units already; else it
    is linear flux. Raises CutoutError with the reason; within `strict_fits`, for a truncated FITS
    file, too.
    """
    path = file_of(reference)
    suffix = path.rpartition(".")[2].lower()
    linear = SIGMA_UNITS if flux_unit == SIGMA_UNITS else FLUX
    try:
        if suffix == "npy":
            pixels = _read_npy(reference, path, options)
            return Cutout(_as_cube(pixels), linear)
        with fsspec.open(path, "rb", **(options or {})) as file:
            content = io.BytesIO(file.read())
        if suffix in ("fits", "fit", "fz"):
            pixels, bands = _read_fits(content)
            return Cutout(_as_cube(pixels), linear, bands)
        if suffix in ("png", "jpg", "jpeg", "tif", "tiff"):
            pixels, composite = _read_pillow(content)
            return Cutout(pixels, COMPOSITE if composite else linear)
    except FileNotFoundError:
        raise CutoutError("the file is missing") from None
    except CutoutError:
        raise
    except Exception as problem:  # noqa: BLE001  (decoders raise anything on a damaged file)
        reason = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise CutoutError(f"the file cannot be read ({reason})") from None
    raise CutoutError(f"the file type .{suffix} is not known; use FITS, NPY, PNG, JPEG or TIFF")


def _read_npy(reference: str, path: str, options: dict[str, Any] | None) -> NDArray[Any]:
    row = STACK_ROW.match(reference)
    if "://" in path:
        with fsspec.open(path, "rb", **(options or {})) as file:
            array = np.load(io.BytesIO(file.read()), allow_pickle=False)
    else:
        array = np.load(path, mmap_mode="r" if row else None, allow_pickle=False)
    if row:
        if array.ndim != 4 or int(row["row"]) >= len(array):
            raise CutoutError(f"there is no row {row['row']} in a stack of shape {array.shape}")
        array = array[int(row["row"])]
    return array


def _read_fits(content: io.BytesIO) -> tuple[NDArray[Any], tuple[str, ...] | None]:
    from astropy.io import fits

    with fits.open(content, memmap=False) as hdus:
        images = [(h.name, np.asarray(h.data)) for h in hdus if h.is_image and h.data is not None]
    if not images:
        raise CutoutError("the FITS file holds no image")
    if len(images) == 1:
        return images[0][1], None
    shapes = {data.shape for _, data in images}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise CutoutError(f"the FITS images differ in shape: {sorted(shapes)}")
    names = tuple(name for name, _ in images)
    return np.stack([data for _, data in images]), names if all(names) else None


def _read_pillow(content: io.BytesIO) -> tuple[NDArray[np.float32], bool]:
    from PIL import Image

    with Image.open(content) as image:
        mode = {"P": "RGB", "RGBA": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "LA": "L", "1": "L"}
        array = np.asarray(image.convert(mode.get(image.mode, image.mode)))
    cube = array.transpose(2, 0, 1) if array.ndim == 3 else array[None]
    if np.issubdtype(array.dtype, np.floating):
        return cube.astype(np.float32), False
    full_scale = 255 if array.dtype == np.uint8 else 65535
    return (cube / np.float32(full_scale)).astype(np.float32), True


def _as_cube(array: NDArray[Any]) -> NDArray[np.float32]:
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3:
        raise CutoutError(f"the shape is {array.shape}; (bands, height, width) is needed")
    if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        raise CutoutError(f"the pixels are {array.dtype}, not real numbers")
    return np.ascontiguousarray(array, dtype=np.float32)


def background_sigma(band: NDArray[np.float32]) -> float:
    """Standard deviation of the background of one image, its unit that of the pixels.

    1.4826 times the median absolute deviation of what three rounds of clipping at 3 sigma leave.
    """
    values = band[np.isfinite(band)].astype(np.float64)
    _, _, sigma = sigma_clipped_stats(values, sigma=3, maxiters=3, stdfunc="mad_std")
    return float(sigma)


def usable_cutout(cutout: Cutout, size: int, max_nan_fraction: float = 0.1) -> Cutout:
    """The central `size` x `size` pixels, in the stored units, with every pixel finite.

    A pixel that is not finite becomes the median of its band. Raises CutoutError where the image is
    smaller than `size`, has too many such pixels, has no background noise to measure, or exceeds
    what a float16 holds.
    """
    height, width = cutout.pixels.shape[1:]
    if min(height, width) < size:
        raise CutoutError(f"{width} x {height} pixels; at least {size} x {size} are needed")
    finite = np.isfinite(cutout.pixels)
    nan_fraction = 1 - finite.mean(axis=(1, 2)).min()
    if nan_fraction == 1:
        raise CutoutError("a band has no finite pixel")
    if nan_fraction > max_nan_fraction:
        raise CutoutError(
            f"{nan_fraction:.0%} of a band's pixels are not finite; {max_nan_fraction:.0%} may be"
        )
    pixels, units = cutout.pixels, cutout.units
    if units == FLUX:
        sigma = np.array([background_sigma(band) for band in pixels], dtype=np.float32)
        if not (sigma > 0).all():
            raise CutoutError("the background is constant: there is no noise to measure")
        pixels, units = pixels / sigma[:, None, None], SIGMA_UNITS
    if nan_fraction:
        median = np.array([np.median(b[f]) for b, f in zip(pixels, finite, strict=True)])
        pixels = np.where(finite, pixels, median[:, None, None])
    top, left = (height - size) // 2, (width - size) // 2
    pixels = pixels[:, top : top + size, left : left + size].astype(np.float32)
    if np.abs(pixels).max() > FLOAT16_MAX:
        raise CutoutError("a pixel is brighter than 65504 background sigma")
    return Cutout(pixels, units, cutout.bands, float(nan_fraction))


def read_cutout(
    references: list[str],
    size: int,
    flux_unit: str | None = None,
    options: dict[str, Any] | None = None,
) -> Cutout:
    """One usable cutout from its file, or from one file a band. Raises CutoutError."""
    parts = []
    for number, reference in enumerate(references):
        try:
            parts.append(read_image(reference, flux_unit, options))
        except CutoutError as reason:
            reason.image = number
            raise
    if len(parts) > 1:
        if any(len(part.pixels) != 1 for part in parts):
            raise CutoutError("a file of one band holds several")
        if len({(part.pixels.shape, part.units) for part in parts}) > 1:
            raise CutoutError("the files of the bands differ in size or units")
    pixels = np.concatenate([part.pixels for part in parts]) if len(parts) > 1 else parts[0].pixels
    return usable_cutout(Cutout(pixels, parts[0].units, parts[0].bands), size)
