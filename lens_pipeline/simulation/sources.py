"""What is lensed: real galaxies, cut out of the Hubble deep field, or smooth discs.

The deep field is the colour picture that scikit-image ships: 8 bits, stretched for the eye. So it
gives shapes alone; sizes, magnitudes and colours are those that the population draws.
"""

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lens_pipeline.simulation.profiles import sersic
from lens_pipeline.simulation.streams import number_of

STAMP = 64  # pixels of the deep field
MIN_AREA = 80  # pixels over the detection threshold: large enough to show a shape
SATURATED = 250
MAX_SATURATED = 0.01  # of a galaxy's pixels; stars have more
MAX_SEAM = 0.3  # of a galaxy's peak, where it touches another; more, and it was cut in two
DETECTION_SIGMA = 3.0


class Sources(Protocol):
    """A kind of source. `names`: of the galaxies it chooses from; empty where each is its own."""

    names: tuple[str, ...]

    def brightness(self, x: Tensor, y: Tensor, p: dict[str, Tensor]) -> Tensor:
        """Surface brightness per arcsec^2 of sources of unit flux (B, n, n).

        x, y: arcsec from the source's centre, along columns and rows. p, each (B, 1, 1):
        `source_radius` (half-light, arcsec), `source_axis_ratio`, `source_angle` (radians),
        `source_galaxy` (place in `names`).
        """
        ...


class SersicDiscs:
    """Exponential discs (Sersic n = 1)."""

    names: tuple[str, ...] = ()

    def brightness(self, x: Tensor, y: Tensor, p: dict[str, Tensor]) -> Tensor:
        return sersic(x, y, 1, p["source_radius"], p["source_axis_ratio"], p["source_angle"])


class DeepFieldGalaxies:
    """Galaxies of the Hubble deep field; their shape is their own, not `source_axis_ratio`."""

    def __init__(self, device: str) -> None:
        galaxies = deep_field_galaxies()
        self.names = tuple(f"hdf-{galaxy.row:04d}-{galaxy.column:04d}" for galaxy in galaxies)
        stamps = np.stack([galaxy.stamp for galaxy in galaxies])
        self._stamps = torch.from_numpy(stamps).to(device)[:, None]
        radii = np.array([galaxy.half_light_radius for galaxy in galaxies], np.float32)
        self._radii = torch.from_numpy(radii).to(device)

    def brightness(self, x: Tensor, y: Tensor, p: dict[str, Tensor]) -> Tensor:
        which = p["source_galaxy"].flatten().long()
        scale = p["source_radius"] / self._radii[which][:, None, None]  # arcsec per stamp pixel
        cos, sin = torch.cos(p["source_angle"]), torch.sin(p["source_angle"])
        along, across = (x * cos + y * sin) / scale, (y * cos - x * sin) / scale
        # grid_sample counts from -1 to 1 between the outer edges of the outer pixels.
        place = torch.stack([along, across], dim=-1) * (2 / STAMP)
        sampled = torch.nn.functional.grid_sample(
            self._stamps[which], place, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        return sampled[:, 0] / scale**2


@dataclass(frozen=True)
class Galaxy:
    """stamp: float32 (STAMP, STAMP), unit sum, the centroid in its middle, zero outside the galaxy;
    half_light_radius: in pixels, of the circle round the centroid; row, column: in the deep field.
    """

    stamp: NDArray[np.float32]
    half_light_radius: float
    row: int
    column: int


@cache
def deep_field_galaxies() -> tuple[Galaxy, ...]:
    """The galaxies of the deep field that are large, whole and no stars, in the order of position.

    Background and noise are measured by sigma clipping; sources are what exceeds DETECTION_SIGMA
    after smoothing, split at their saddles (watershed). Each stamp is smoothed a little, and fades
    to zero within two pixels of its outline.
    """
    from astropy.stats import sigma_clipped_stats
    from scipy import ndimage
    from skimage.data import hubble_deep_field
    from skimage.feature import peak_local_max
    from skimage.segmentation import watershed

    picture = hubble_deep_field()
    light = picture.mean(axis=-1)
    light -= sigma_clipped_stats(light, sigma=3)[1]
    smooth = ndimage.gaussian_filter(light, 1.5)
    noise = sigma_clipped_stats(smooth, sigma=3)[2]
    detected = smooth > DETECTION_SIGMA * noise
    peaks = peak_local_max(smooth, min_distance=5, labels=ndimage.label(detected)[0])
    markers = np.zeros(light.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    segments = watershed(-smooth, markers, mask=detected)
    found = []
    for number, window in enumerate(ndimage.find_objects(segments), start=1):
        own = segments[window] == number
        saturated = (picture[window][own] >= SATURATED).any(axis=-1).mean()
        if own.sum() < MIN_AREA or saturated > MAX_SATURATED:
            continue
        middle = ndimage.center_of_mass(light[window] * own)
        row, column = (round(part.start + c) for part, c in zip(window, middle, strict=True))
        top, left = row - STAMP // 2, column - STAMP // 2
        around = (slice(top, top + STAMP), slice(left, left + STAMP))
        own = segments[around] == number
        if own.shape != (STAMP, STAMP) or own.sum() < (segments[window] == number).sum():
            continue  # it reaches beyond the picture or the stamp
        edge = np.concatenate([own[0], own[-1], own[:, 0], own[:, -1]])
        neighbour = ndimage.binary_dilation(own) & (segments[around] > 0) & ~own
        seam = smooth[around][neighbour].max(initial=0)
        if not edge.any() and seam < MAX_SEAM * smooth[around][own].max():
            stamp = _stamp(light[around], own)
            found.append(Galaxy(stamp, _half_light_radius(stamp), row, column))
    return tuple(sorted(found, key=lambda galaxy: (galaxy.row, galaxy.column)))


def _stamp(light: NDArray[np.float64], own: NDArray[np.bool_]) -> NDArray[np.float32]:
    from scipy import ndimage

    fade = ndimage.gaussian_filter(ndimage.binary_dilation(own).astype(np.float64), 1.0)
    stamp = (ndimage.gaussian_filter(light, 0.8) * fade).clip(0)
    middle = (STAMP - 1) / 2
    offset = middle - np.array(ndimage.center_of_mass(stamp))
    stamp = ndimage.shift(stamp, offset, order=1, mode="constant")
    return (stamp / stamp.sum()).astype(np.float32)


def _half_light_radius(stamp: NDArray[np.float32]) -> float:
    axis = np.arange(STAMP) - (STAMP - 1) / 2
    distance = np.hypot(axis[:, None], axis).ravel()
    order = distance.argsort(kind="stable")
    enclosed = stamp.ravel()[order].astype(np.float64).cumsum()
    return float(np.interp(0.5, enclosed, distance[order]))


def make_sources(kind: str, device: str) -> Sources:
    """`hubble` or `sersic`."""
    return DeepFieldGalaxies(device) if kind == "hubble" else SersicDiscs()


def galaxy_behind(sources: Sources, host: str) -> int:
    """Which galaxy a host of that name lenses: the same for every seed, spread evenly over them."""
    return number_of(host, len(sources.names)) if sources.names else 0
