"""What may be done to cutouts in training without changing what they are: a batch at a time, on
its device, before any stretch."""

import torch
from torch import Tensor
from torch.nn import functional

MARGIN = 4  # pixels beyond the largest shift, mirrored


def augment(images: Tensor, shift: float, noise: float) -> Tensor:
    """Each image (n, bands, height, width) turned, moved and made noisier at random.

    shift: by up to so many pixels along each axis; noise: with up to so much more noise, in units
    of the background's sigma; 0 leaves either out.
    """
    images = random_dihedral(images)
    if shift:
        offsets = shift * (2 * torch.rand(len(images), 2, device=images.device) - 1)
        images = shifted(images, offsets)
    if noise:
        more = noise * torch.rand(len(images), 1, 1, 1, device=images.device)
        # As a shallower exposure would show it: the background's sigma stays the unit.
        images = (images + more * torch.randn_like(images)) / (1 + more**2).sqrt()
    return images


def random_dihedral(images: Tensor) -> Tensor:
    """Each image of the batch turned by a random multiple of 90 degrees and flipped or not.

    No pixel is interpolated, so noise stays noise.
    """
    flip, mirror, transpose = torch.randint(2, (3, len(images), 1, 1, 1), device=images.device)
    images = torch.where(flip == 1, images.flip(-1), images)
    images = torch.where(mirror == 1, images.flip(-2), images)
    # In this order the result has the layout of the images: networks take the other more slowly.
    return torch.where(transpose == 0, images, images.transpose(-1, -2))


def shifted(images: Tensor, offsets: Tensor) -> Tensor:
    """Images (n, bands, height, width) moved by offsets (n, 2), in pixels along rows and columns.

    By the Fourier shift theorem: an interpolation would smooth the noise, and so tell which images
    were moved. What comes in over the edge is mirrored.
    """
    height, width = images.shape[-2:]
    margin = min(int(offsets.abs().max().ceil()) + MARGIN, height - 2, width - 2)
    # Of an odd side: half of an even one's highest frequency would be lost.
    ends = [margin, margin + 1 - width % 2, margin, margin + 1 - height % 2]
    padded = functional.pad(images.float(), ends, mode="reflect")
    sides = padded.shape[-2:]
    rows = torch.fft.fftfreq(sides[0], device=images.device)[:, None]
    columns = torch.fft.rfftfreq(sides[1], device=images.device)
    dy, dx = offsets.float()[:, :, None, None].unbind(1)
    turn = torch.exp(-2j * torch.pi * (rows * dy + columns * dx))[:, None]
    moved = torch.fft.irfft2(torch.fft.rfft2(padded) * turn, s=sides)
    return moved[..., margin : margin + height, margin : margin + width].to(images.dtype)
