"""FITS files -> bands: a cube, or extensions that say by their names what they are."""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from numpy.typing import NDArray

# `VIS_FLUX`, `VIS_RMS`, `VIS_PSF`: an extension of another role goes with the image of its band;
# `SCI`, `ERR`: those of a band without a name.
_ROLES = {
    "image": ("BGSUB", "FLUX", "SCI", "IMAGE"),  # BGSUB, or else the first in the file
    "rms": ("RMS", "NOISE", "ERR"),
    "weight": ("WHT", "IVAR"),  # inverse variance
    "mask": ("MASK", "FLAG", "FLG", "DQ"),  # 0 is good
    "other": ("PSF",),
}
_SUFFIX = {suffix: role for role, suffixes in _ROLES.items() for suffix in suffixes}
_NAME = re.compile(rf"^((?P<band>.+)_)?(?P<suffix>{'|'.join(_SUFFIX)})$")
_FIRST = "PRIMARY"  # what astropy calls the first of a file, which need not have a name
_PLAIN = ""  # the band of an extension that is named by its role alone
_ZERO_POINTS = ("MAGZERO", "MAGZPT", "MAGZP", "ZEROPNT", "PHOTZP", "ZP")


@dataclass(frozen=True)
class FitsImage:
    """pixels: as stored, masked ones NaN; bands: their names, None where they have none (a cube, or
    one image); sigma: of the background by the file's own noise maps, NaN where it has none;
    zero_point: AB, likewise."""

    pixels: NDArray[Any]
    bands: tuple[str, ...] | None
    sigma: tuple[float, ...]
    zero_point: tuple[float, ...]


@dataclass
class _Band:
    image: NDArray[Any] | None = None
    named: str = ""  # the image's extension
    zero_point: float = float("nan")
    maps: dict[str, NDArray[Any]] = field(default_factory=dict)


@contextmanager
def strict_fits() -> Iterator[None]:
    """While cutouts are read: a truncated FITS file is an error, for astropy only warns of it.

    Filters of warnings belong to the process, so this is set once around all reading threads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", AstropyWarning)
        warnings.filterwarnings("ignore", category=fits.verify.VerifyWarning)
        yield


def read_fits(content: io.BytesIO) -> FitsImage:
    """Raises ValueError where there is no image, where the bands' images differ in shape, and where
    the extensions' names leave open what goes together."""
    with fits.open(content, memmap=False) as hdus:
        images = [
            (hdu.name, np.asarray(hdu.data), _zero_point(hdu.header))
            for hdu in hdus
            if hdu.is_image and hdu.data is not None
        ]
    if not images:
        raise ValueError("the FITS file holds no image")
    if len(images) == 1:
        _, cube, zero_point = images[0]
        n_bands = len(cube) if cube.ndim == 3 else 1
        unknown = (float("nan"),) * n_bands
        return FitsImage(cube, None, unknown, (zero_point,) * n_bands)
    found = _found(images)
    shapes = {band.image.shape for band in found.values() if band.image is not None}
    if len(shapes) > 1:
        raise ValueError(f"the FITS images differ in shape: {sorted(shapes)}")
    if len(shape := shapes.pop()) != 2:
        raise ValueError(f"of several extensions each holds one band; the shape of one is {shape}")
    named = not any(name.startswith("#") for name in found) and [*found] not in ([_PLAIN], [_FIRST])
    return FitsImage(
        np.stack([_masked(band) for band in found.values()]),
        tuple(found) if named else None,
        tuple(_sigma(band) for band in found.values()),
        tuple(band.zero_point for band in found.values()),
    )


def _found(images: Sequence[tuple[str, NDArray[Any], float]]) -> dict[str, _Band]:
    """{band: its image and maps} of extensions (name, data, zero point).

    What is named by its role alone belongs to the image that is, else to the only one.
    """
    names = [name for name, _, _ in images]
    bands: dict[str, _Band] = {}
    for number, (name, data, zero_point) in enumerate(images):
        match = _NAME.match(name)
        role = _SUFFIX[match["suffix"]] if match else "image"
        if name and role != "other" and name in names[:number]:
            raise ValueError(
                f"{names.count(name)} extensions are named {name}; of several bands each needs a "
                "name of its own, as G_SCI, R_SCI"
            )
        key = (match["band"] or _PLAIN) if match else name or f"#{number}"
        band = bands.setdefault(key, _Band())
        if role != "image":
            band.maps[role] = data
        elif band.image is None or (match and match["suffix"] == "BGSUB"):
            band.image, band.named, band.zero_point = data, name, zero_point
    found = {name: band for name, band in bands.items() if band.image is not None}
    if not found:
        raise ValueError(f"none of the extensions {', '.join(names)} is an image")
    if _PLAIN in found:
        alone = len(found) == 1
        return {(name if name or alone else band.named): band for name, band in found.items()}
    maps = bands[_PLAIN].maps if _PLAIN in bands else {}
    if maps.keys() - {"other"}:
        if len(found) > 1:
            plain = next(n for n in names if _SUFFIX.get(n, "other") != "other")
            raise ValueError(
                f"the extension {plain} does not say of which band it is; name it "
                f"{next(iter(found))}_{plain}, say"
            )
        (only,) = found.values()
        only.maps = maps | only.maps
    return found


def _zero_point(header: fits.Header) -> float:
    stated = (header[key] for key in _ZERO_POINTS if key in header)
    return float(next(stated, float("nan")))


def _masked(band: _Band) -> NDArray[Any]:
    assert band.image is not None
    if "mask" not in band.maps:
        return band.image
    if band.maps["mask"].shape != band.image.shape:
        raise ValueError(f"a mask has the shape {band.maps['mask'].shape}, its image another")
    return np.where(band.maps["mask"] == 0, band.image.astype(np.float32), np.nan)


def _sigma(band: _Band) -> float:
    """The median of the noise map: most pixels of a cutout are background."""
    if "rms" in band.maps:
        noise = np.asarray(band.maps["rms"], dtype=np.float64)
    elif "weight" in band.maps:
        weight = np.asarray(band.maps["weight"], dtype=np.float64)
        noise = np.sqrt(1 / np.where(weight > 0, weight, np.nan))
    else:
        return float("nan")
    good = noise[np.isfinite(noise) & (noise > 0)]
    return float(np.median(good)) if len(good) else float("nan")
