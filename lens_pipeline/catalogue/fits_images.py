"""FITS files -> bands: a cube, or extensions that say by their names what they are."""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from numpy.typing import NDArray

from lens_pipeline.catalogue.background import background_sigma
from lens_pipeline.catalogue.cutout import MIDDLE

# `VIS_FLUX`, `VIS_RMS`, `VIS_PSF`: an extension of another role goes with the image of its band;
# `SCI`, `ERR`: those of a band without a name.
_ROLES = {
    "image": ("BGSUB", "FLUX", "SCI", "IMAGE"),  # BGSUB, or else the first in the file
    "rms": ("RMS", "NOISE", "NOISEMAP", "ERR", "ERROR", "SIGMA", "STD", "UNCERT"),
    "variance": ("VARIANCE", "VAR"),
    "weight": ("WHT", "WGT", "WEIGHT", "IVAR", "INVVAR"),  # inverse variance, as a rule
    "mask": ("MASK", "MSK", "FLAG", "FLAGS", "FLG", "DQ"),  # 0 is good
    "other": ("PSF", "CTX", "VAR_POISSON", "VAR_RNOISE", "VAR_FLAT"),
}
_SUFFIX = {suffix: role for role, suffixes in _ROLES.items() for suffix in suffixes}
_ANY = f"(?P<suffix>{'|'.join(_SUFFIX)})"
_NAMES = (  # `VIS_RMS`, or else `RMS_VIS`
    re.compile(rf"^((?P<band>.+)[-_. ])?{_ANY}$", re.IGNORECASE),
    re.compile(rf"^{_ANY}[-_. ](?P<band>.+)$", re.IGNORECASE),
)
_KINDS = (fits.PrimaryHDU, fits.ImageHDU, fits.CompImageHDU, fits.BinTableHDU, fits.TableHDU)
_UNNAMED = ("", "COMPRESSED_IMAGE")  # the second: what astropy calls it, compressed
_BEGINS = b"XTENSION"  # an extension
_FIRST = "PRIMARY"  # what astropy calls the first of a file, which need not have a name
_PLAIN = ""  # the band of an extension that is named by its role alone
# Masks whose header says what their bits mean (`MP_SAT = 1`: HSC, Rubin) have one for the pixels of
# detected sources, and for others that are as good as any.
_PLANE = "MP_"
_BAD_PLANES = ("BAD", "SAT", "CR", "NO_DATA", "UNMASKEDNAN")
WEIGHTS_FIT = 3.0  # the noise that they state is at most so many times what is measured, or less
_ZERO_POINTS = ("MAGZERO", "MAGZPT", "MAGZP", "ZEROPNT", "PHOTZP", "ZP")


@dataclass(frozen=True)
class FitsImage:
    """pixels: as stored, masked ones NaN; bands: their names, None where they have none (a cube, or
    one image); sigma: of the background of each band by the file's own noise maps, NaN where it has
    none, () of a cube; zero_point: AB, likewise, of a cube one for all bands."""

    pixels: NDArray[Any]
    bands: tuple[str, ...] | None
    sigma: tuple[float, ...]
    zero_point: tuple[float, ...]


def role_of(name: str) -> str | None:
    """`image`, `rms`, `mask`, ...: what the suffix of a name says; None where it has none."""
    match = _match(name)
    return _SUFFIX[match["suffix"].upper()] if match else None


def _match(name: str) -> re.Match[str] | None:
    return next(filter(None, (pattern.match(name) for pattern in _NAMES)), None)


@dataclass(frozen=True)
class _Extension:
    name: str
    data: NDArray[Any]
    header: fits.Header

    @property
    def role(self) -> str | None:
        return role_of(self.name)

    @property
    def band(self) -> str:
        match = _match(self.name)
        return (match["band"] or _PLAIN) if match else self.name

    @property
    def preferred(self) -> bool:
        return self.name.upper().endswith("BGSUB")

    @property
    def zero_point(self) -> float:
        """NaN where it states none that is a number."""
        stated = (self.header[key] for key in _ZERO_POINTS if key in self.header)
        try:
            return float(next(stated, float("nan")))
        except (TypeError, ValueError, fits.VerifyError):
            return float("nan")

    @property
    def bad(self) -> NDArray[np.bool_]:
        """Of a mask: which pixels it says to be bad."""
        if not any(key.startswith(_PLANE) for key in self.header):
            return self.data != 0
        planes = (self.header.get(_PLANE + name) for name in _BAD_PLANES)
        bits = sum(1 << plane for plane in planes if plane is not None)
        return self.data.astype(np.int64) & bits != 0


@dataclass
class _Band:
    image: _Extension | None = None
    maps: dict[str, _Extension] = field(default_factory=dict)


@contextmanager
def strict_fits() -> Iterator[None]:
    """While cutouts are read: a truncated FITS file is an error, for astropy only warns of it.

    Filters of warnings belong to the process, so this is set once around all reading threads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AstropyWarning)  # of headers: the pixels are as good
        warnings.filterwarnings("error", ".*truncated", AstropyWarning)
        yield


def read_fits(content: io.BytesIO) -> FitsImage:
    """Raises ValueError where there is no image, where the bands' images differ in shape, and where
    the extensions' names leave open what goes together."""
    with fits.open(content, memmap=False, uint=False) as hdus:
        for hdu in hdus:
            if not isinstance(hdu, _KINDS):  # for astropy, one of a kind to come
                raise ValueError(f"the header of the extension {hdu.name} is damaged")
        # Of one whose header is cut astropy says nothing: a mask, say, would not be there.
        last = hdus[-1].fileinfo()
        behind = content.getvalue()[last["datLoc"] + last["datSpan"] :][: len(_BEGINS)]
        if behind and _BEGINS.startswith(behind):
            raise ValueError("the file is truncated")
        extensions = [
            _Extension("" if hdu.name in _UNNAMED else hdu.name, np.asarray(hdu.data), hdu.header)
            for hdu in hdus
            if hdu.is_image and hdu.data is not None
        ]
    if not extensions:
        raise ValueError("the FITS file holds no image")
    if len(extensions) == 1:
        (image,) = extensions
        return FitsImage(image.data, None, (), (image.zero_point,))
    found = _found(extensions)
    images = {name: band.image for name, band in found.items() if band.image is not None}
    shapes = {image.data.shape for image in images.values()}
    if len(shapes) > 1:
        raise ValueError(f"the FITS images differ in shape: {sorted(shapes)}")
    if len(shape := shapes.pop()) != 2:
        raise ValueError(f"of several extensions each holds one band; the shape of one is {shape}")
    nameless = any(name.startswith("#") for name in found) or [*found] in ([_PLAIN], [_FIRST])
    return FitsImage(
        np.stack([_masked(image, found[name].maps.get("mask")) for name, image in images.items()]),
        None if nameless else tuple(found),
        tuple(_sigma(band.maps, images[name].data) for name, band in found.items()),
        tuple(image.zero_point for image in images.values()),
    )


def _found(extensions: Sequence[_Extension]) -> dict[str, _Band]:
    """{band: its image and maps}.

    What is named by its role alone belongs to the image that is, else to the only one. Where any
    says that it is an image, those that do not say what they are hold something else.
    """
    names = [extension.name for extension in extensions]
    other = "other" if any(extension.role == "image" for extension in extensions) else "image"
    bands: dict[str, _Band] = {}
    for number, extension in enumerate(extensions):
        name, role = extension.name, extension.role or other
        if name and role != "other" and name in names[:number]:
            raise ValueError(
                f"{names.count(name)} extensions are named {name}; of several bands each needs a "
                "name of its own, as G_SCI, R_SCI"
            )
        nameless = extension.role is None and not name
        band = bands.setdefault(f"#{number}" if nameless else extension.band, _Band())
        if role != "image":
            band.maps[role] = extension
        elif band.image is None or extension.preferred:
            band.image = extension
    found = {name: band for name, band in bands.items() if band.image is not None}
    if not found:
        raise ValueError(f"none of the extensions {', '.join(names)} is an image")
    if _PLAIN in found:
        only = len(found) == 1
        return {
            (name if name or only or band.image is None else band.image.name): band
            for name, band in found.items()
        }
    maps = bands[_PLAIN].maps if _PLAIN in bands else {}
    if maps.keys() - {"other"}:
        if len(found) > 1:
            plain = next(n for n in names if _SUFFIX.get(n, "other") != "other")
            raise ValueError(
                f"the extension {plain} does not say of which band it is; name it "
                f"{next(iter(found))}_{plain}, say"
            )
        (one,) = found.values()
        one.maps = maps | one.maps
    return found


def _masked(image: _Extension, mask: _Extension | None) -> NDArray[Any]:
    if mask is None:
        return image.data
    if mask.data.shape != image.data.shape:
        raise ValueError(f"a mask has the shape {mask.data.shape}, its image another")
    bad = mask.bad
    y, x = (
        slice(side // 2 - side // MIDDLE // 2, -(-side // 2) + side // MIDDLE // 2)
        for side in bad.shape
    )
    if bad[y, x].mean() > 0.5:
        raise ValueError(
            f"the mask {mask.name} covers the middle, where the object is; in a mask 0 is good, "
            "and what is detected must not be marked"
        )
    return np.where(bad, np.nan, image.data.astype(np.float32))


def _sigma(maps: Mapping[str, _Extension], image: NDArray[Any]) -> float:
    """The median of the noise map: most pixels of a cutout are background. NaN where there is none.

    Nor is there one where weights are not those of this noise: drizzled images may have exposure
    times for weights, coadded ones relative numbers.
    """
    for role, power in (("rms", 1), ("variance", 0.5), ("weight", -0.5)):
        if role in maps:
            values = np.asarray(maps[role].data, dtype=np.float64)
            good = values[np.isfinite(values) & (values > 0)]
            sigma = float(np.median(good**power)) if len(good) else float("nan")
            if role == "weight":
                measured = background_sigma(image)
                if not measured / WEIGHTS_FIT <= sigma <= measured * WEIGHTS_FIT:
                    return float("nan")
            return sigma
    return float("nan")
