"""A cutout, and what makes it usable: its units, its middle, every pixel finite.

Linear flux is expressed in units of each band's background sigma; a composite for the eye is value
/ full scale. Nothing else is done to a pixel: the stretch belongs to the model's input.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lens_pipeline.catalogue.background import background_sigma
from lens_pipeline.errors import masked

SIGMA_UNITS = "background_sigma"
COMPOSITE = "composite"
COMPOSITE_BANDS = ("red", "green", "blue")
FLUX = "flux"  # as read: becomes SIGMA_UNITS
PIXELS = {  # in words
    SIGMA_UNITS: "linear flux (FITS, NPY, a TIFF of floats)",
    COMPOSITE: "a composite for the eye (PNG, JPEG, a TIFF of integers)",
}
FLOAT16_MAX = float(np.finfo(np.float16).max)
MAX_NAN_FRACTION = 0.1  # of a band, in the middle
MAX_ZEROS = 0.01  # of the pixels beside blocks of zeros, or these are none of a filler
MIDDLE = 8  # of a cutout, where the object is: this part of its side


class CutoutError(Exception):
    """A cutout that cannot be used; the message is the reject's reason.

    image: which of its files is to blame, counted in the order of the image columns.
    """

    image = 0

    def __init__(self, reason: str) -> None:
        super().__init__(masked(reason))


@dataclass(frozen=True)
class Cutout:
    """pixels: float32 (bands, height, width); units: `background_sigma`, `composite` or `flux`.

    nan_fraction, padded_fraction: what `usable_cutout` has filled in; middle: where the middle of
    the file's image then is, (x, y) pixels from that of these: half of one where a side that was
    even is odd, or the other way.
    sigma, zero_point: of each band, where the file tells them, else NaN; () where it tells neither.
    """

    pixels: NDArray[np.float32]
    units: str
    bands: tuple[str, ...] | None = None
    nan_fraction: float = 0.0
    padded_fraction: float = 0.0
    middle: tuple[float, float] = (0.0, 0.0)
    sigma: tuple[float, ...] = ()
    zero_point: tuple[float, ...] = ()

    @property
    def background_magnitude(self) -> tuple[float, ...]:
        """AB magnitude of one background sigma in a pixel: m = this - 2.5 log10(stored value).

        NaN where the zero point is not known.
        """
        unknown = (float("nan"),) * len(self.pixels)
        return tuple(
            zero_point - 2.5 * float(np.log10(sigma))
            for sigma, zero_point in zip(
                self.sigma or unknown, self.zero_point or unknown, strict=True
            )
        )

    def with_bands(self, wanted: Sequence[str]) -> "Cutout":
        """These bands alone, in this order, by name: in any case of letters where that leaves no
        doubt, as it does of Rubin's `y` and Euclid's `Y`.

        Raises CutoutError where there is no such band, or the file does not name its bands.
        """
        bands = self.bands
        if bands is None and self.units == COMPOSITE and len(self.pixels) == len(COMPOSITE_BANDS):
            colours = {band.lower() for band in wanted} <= {*COMPOSITE_BANDS}
            bands = COMPOSITE_BANDS if colours else None
        if bands is None:
            if len(wanted) == len(self.pixels):
                return replace(self, bands=tuple(wanted))
            raise CutoutError(f"{len(self.pixels)} bands without names; {len(wanted)} are needed")
        chosen = [_place_of(band, bands) for band in wanted]
        return replace(
            self,
            pixels=self.pixels[chosen],
            bands=tuple(wanted),
            sigma=tuple(self.sigma[i] for i in chosen) if self.sigma else (),
            zero_point=tuple(self.zero_point[i] for i in chosen) if self.zero_point else (),
        )


def _place_of(band: str, bands: Sequence[str]) -> int:
    if band in bands:
        return bands.index(band)
    alike = [place for place, name in enumerate(bands) if name.lower() == band.lower()]
    if len(alike) != 1:
        what = "several bands" if alike else "no band"
        raise CutoutError(f"there is {what} {band}; there are {', '.join(bands)}")
    return alike[0]


def _filled(pixels: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which pixels (bands, height, width) of linear flux hold a filler, as beyond the edge of a
    tile: blocks of zeros, at least 3 x 3, where zeros are rare else, as they are not in counts."""
    zero = pixels == 0
    constant = (zero | ~np.isfinite(pixels)).all(axis=(1, 2), keepdims=True)
    zero &= ~constant  # of which others tell
    if zero.sum() < 9:
        return np.zeros_like(zero)
    blocks = ndimage.binary_opening(zero, np.ones((1, 3, 3)))
    others = (zero & ~blocks).sum(axis=(1, 2), keepdims=True)
    return blocks & (others <= MAX_ZEROS * (~blocks).sum(axis=(1, 2), keepdims=True))


def usable_cutout(cutout: Cutout, size: int, *, pad: bool = False) -> Cutout:
    """The central `size` x `size` pixels, in the stored units, with every pixel finite.

    A band's sigma is the file's own where it tells it, else `background_sigma` of the whole image.
    A pixel that is not finite becomes the median of its band, and so does one of a block of zeros
    in linear flux, and what lacks of a smaller image if `pad` asks for it. Raises CutoutError where
    an image is smaller without, is constant (in flux: a band of it), has too many such pixels, or
    they are its middle, has no background noise to measure, or exceeds what a float16 holds.
    """
    if not cutout.pixels.size:
        raise CutoutError("the image holds no pixel")
    height, width = cutout.pixels.shape[1:]
    if min(height, width) < size and not pad:
        raise CutoutError(
            f"{width} x {height} pixels; at least {size} x {size} are needed (LENS_IMAGE_SIZE), or "
            "LENS_PAD"
        )
    pixels, units, sigma = cutout.pixels, cutout.units, cutout.sigma
    if units == FLUX:
        pixels = np.where(_filled(pixels), np.float32(np.nan), pixels)
    finite = np.isfinite(pixels)
    nan_fraction = float(1 - central(finite, size).mean(axis=(1, 2)).min())
    if nan_fraction == 1:
        raise CutoutError("a band has no finite pixel")
    if nan_fraction > MAX_NAN_FRACTION:
        raise CutoutError(
            f"{nan_fraction:.0%} of a band's pixels are not finite, or zeros side by side; "
            f"{MAX_NAN_FRACTION:.0%} may be"
        )
    if (central(finite, max(1, size // MIDDLE)).mean(axis=(1, 2)) < 0.5).any():
        raise CutoutError(
            "the middle, where the object is, is not finite, or zeros side by side (saturated?)"
        )
    if units == FLUX:
        stated = sigma or (float("nan"),) * len(pixels)
        sigma = tuple(
            known if np.isfinite(known) else background_sigma(band)
            for band, known in zip(pixels, stated, strict=True)
        )
        if not all(value > 0 for value in sigma):
            raise CutoutError("the background is constant: there is no noise to measure")
        pixels = pixels / np.array(sigma, dtype=np.float32)[:, None, None]
        units = SIGMA_UNITS
    median = [np.median(band[good]) for band, good in zip(pixels, finite, strict=True)]
    filler = np.array(median, np.float32)[:, None, None]
    # A copy: a part of a large image would hold all of it in memory.
    pixels = central(np.where(finite, pixels, filler), size).astype(np.float32)
    flat = np.ptp(pixels, axis=(1, 2)) == 0
    if flat.all() or (units == SIGMA_UNITS and flat.any()):
        raise CutoutError("the image is constant" if flat.all() else "a band is constant")
    if not np.abs(pixels).max() <= FLOAT16_MAX:
        raise CutoutError("a pixel is more than 65504 background sigma from zero")
    padded_fraction = 1 - pixels[0].size / size**2
    if padded_fraction:
        canvas = np.broadcast_to(filler, (len(pixels), size, size)).copy()
        central_of = central(canvas, *pixels.shape[1:])
        central_of[:] = pixels
        pixels = canvas
    return replace(
        cutout,
        pixels=pixels,
        units=units,
        nan_fraction=nan_fraction,
        padded_fraction=padded_fraction,
        middle=(_off_middle(width, size), _off_middle(height, size)),
        sigma=sigma,
    )


def _off_middle(has: int, side: int) -> float:
    """As `central` cuts, or pads, along an axis."""
    return (has - side) % 2 * (0.5 if has > side else -0.5)


def central(images: NDArray[Any], height: int, width: int | None = None) -> NDArray[Any]:
    """The middle (..., height, width) of images, square by default; all of a side that is shorter.

    Where it cannot be in the middle, it is half a pixel nearer to the origin.
    """
    found, sides = images.shape[-2:], (height, width or height)
    low = [max(0, (has - side) // 2) for has, side in zip(found, sides, strict=True)]
    return images[..., low[0] : low[0] + sides[0], low[1] : low[1] + sides[1]]
