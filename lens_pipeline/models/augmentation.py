"""What may be done to cutouts in training without changing what they are: a batch at a time, on
its device, before any stretch."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor


def augment(images: Tensor, shift: int, noise: float, turn: bool = True) -> Tensor:
    """Each image (n, bands, height, width) turned, moved and made noisier at random.

    turn: and flipped, see `random_dihedral`; shift: by up to so many pixels along each axis; noise:
    with up to so much more noise, in units of the background's sigma; 0 leaves either out.
    """
    if turn:
        images = random_dihedral(images)
    if shift:
        by = torch.randint(-shift, shift + 1, (len(images), 2), device=images.device)
        images = shifted(images, by)
    if noise:
        more = noise * torch.rand(len(images), 1, 1, 1, device=images.device)
        # As a shallower exposure would show it: the background's sigma stays the unit.
        images = (images + more * torch.randn_like(images)) / (1 + more**2).sqrt()
    return images


def random_dihedral(images: Tensor) -> Tensor:
    """Each square image of the batch turned by a random multiple of 90 degrees and flipped or not.

    No pixel is interpolated, so noise stays noise.
    """
    chosen = torch.randint(8, (len(images),), device=images.device)
    # One pass over the pixels, where turning all and choosing takes three.
    return _gathered(images, _orientations(images.shape[-1], images.device)[chosen])


def all_dihedral(images: Tensor) -> Iterator[Tensor]:
    """Square images (n, bands, height, width) in each of their eight turns and flips, the first as
    they are."""
    for places in _orientations(images.shape[-1], images.device):
        yield images.flatten(2)[..., places].view_as(images)


@lru_cache(maxsize=8)
def _orientations(side: int, device: torch.device) -> Tensor:
    """(8, side * side): where the pixels of a square image come from, for each of its turns."""
    with torch.inference_mode(False):  # kept for trainings, too, whoever asks first
        place = torch.arange(side * side, device=device).view(side, side)
        turned = [
            orientation
            for mirrored in (place, place.flip(-2))
            for flipped in (mirrored, mirrored.flip(-1))
            for orientation in (flipped, flipped.T)
        ]
        return torch.stack(turned).flatten(1)


def shifted(images: Tensor, offsets: Tensor) -> Tensor:
    """Images (n, bands, height, width) moved by offsets int (n, 2), in pixels along rows and
    columns; what comes in over the edge is mirrored.

    By whole pixels: to interpolate parts of them would smooth the noise, and so tell which images
    were moved, or (by the Fourier shift theorem) ring about cosmic rays and bad columns.
    """
    rows, columns = (
        _mirrored(torch.arange(side, device=images.device) - by[:, None], side)
        for side, by in zip(images.shape[-2:], offsets.unbind(1), strict=True)
    )
    places = (rows[:, :, None] * images.shape[-1] + columns[:, None, :]).flatten(1)
    return _gathered(images, places)


def _mirrored(place: Tensor, side: int) -> Tensor:
    """Places up to an image's side beyond its edges -> those in it that they mirror."""
    last = side - 1
    return last - (last - place.abs()).abs()


def _gathered(images: Tensor, places: Tensor) -> Tensor:
    """Images whose pixels come from places (n, height * width) of their own."""
    pixels = images.flatten(2)
    return pixels.gather(2, places[:, None].expand_as(pixels)).view_as(images)
