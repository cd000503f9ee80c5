"""What may be done to cutouts in training without changing what they are: a batch at a time, on
its device, before any stretch."""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

MARGIN = 4  # pixels beyond the largest shift, mirrored
SOFTENING = 5.0  # background sigma: asinh is linear over the noise; over a composite, too


def augment(images: Tensor, shift: float, noise: float, turn: bool = True) -> Tensor:
    """Each image (n, bands, height, width) turned, moved and made noisier at random.

    turn: and flipped, see `random_dihedral`; shift: by up to so many pixels along each axis; noise:
    with up to so much more noise, in units of the background's sigma; 0 leaves either out.
    """
    if turn:
        images = random_dihedral(images)
    if shift:
        offsets = shift * (2 * torch.rand(len(images), 2, device=images.device) - 1)
        images = shifted(images, offsets, math.ceil(shift))
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
    places = _orientations(images.shape[-1], images.device)[chosen]
    pixels = images.flatten(2)
    return pixels.gather(2, places[:, None].expand_as(pixels)).view_as(images)


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


def shifted(images: Tensor, offsets: Tensor, largest: int) -> Tensor:
    """Images (n, bands, height, width) moved by offsets (n, 2), in pixels along rows and columns,
    none by more than `largest`.

    By the Fourier shift theorem: an interpolation would smooth the noise, and so tell which images
    were moved. It rings about what is sharper than a telescope makes it, as cosmic rays and bad
    columns are: by their asinh, which is linear in the noise, far below it. What comes in over the
    edge is mirrored.
    """
    height, width = images.shape[-2:]
    margin = min(largest + MARGIN, height - 2, width - 2)
    # Of an odd side: half of an even one's highest frequency would be lost.
    ends = [margin, margin + 1 - width % 2, margin, margin + 1 - height % 2]
    softened = torch.asinh(images.float() / SOFTENING)
    padded = functional.pad(softened, ends, mode="reflect")
    sides = padded.shape[-2:]
    rows = torch.fft.fftfreq(sides[0], device=images.device)[:, None]
    columns = torch.fft.rfftfreq(sides[1], device=images.device)
    dy, dx = offsets.float()[:, :, None, None].unbind(1)
    turn = torch.exp(-2j * torch.pi * (rows * dy + columns * dx))[:, None]
    moved = torch.fft.irfft2(torch.fft.rfft2(padded) * turn, s=sides)
    inside = moved[..., margin : margin + height, margin : margin + width]
    return (SOFTENING * torch.sinh(inside)).to(images.dtype)
