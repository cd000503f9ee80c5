"""Surface brightness per arcsec^2 of things of unit flux.

x, y: arcsec from the centre, along columns and rows, (B, n, n); all parameters broadcast against
them. Angles in radians from +x towards +y, of the major axis.
"""

from math import exp, gamma, pi, sqrt

import torch
from caustics.func import k_sersic
from torch import Tensor


def _on_own_axes(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = torch.cos(angle), torch.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def sersic(
    x: Tensor,
    y: Tensor,
    index: int,
    radius: Tensor,
    axis_ratio: Tensor,
    angle: Tensor,
    softening: float = 0.0,
) -> Tensor:
    """I ~ exp(-b_n (R/R_e)^(1/n)), R^2 = q x^2 + y^2/q, with the b_n of Ciotti & Bertin 1999.

    index: n, a power of two. radius: R_e, the circularised half-light radius. softening (arcsec) is
    added to R in quadrature: a fraction of a sampling cell stands for the mean over the cell, which
    the cusp of n = 4 needs.
    """
    b = k_sersic(index)
    total = 2 * pi * index * exp(b) * b ** (-2 * index) * gamma(2 * index)
    major, minor = _on_own_axes(x, y, angle)
    squared = (axis_ratio * major**2 + minor**2 / axis_ratio + softening**2) / radius**2
    root = squared
    for _ in range(index.bit_length()):  # squared^(1/2n), faster than as a power
        root = root.sqrt()
    return torch.exp(b - b * root) / (total * radius**2)


def spiral(
    x: Tensor,
    y: Tensor,
    scale_length: Tensor,
    axis_ratio: Tensor,
    angle: Tensor,
    arms: Tensor,
    contrast: Tensor,
    pitch: Tensor,
    phase: Tensor,
) -> Tensor:
    """exp(-r/R_h) [1 + A cos(N theta + phi(r))] (Metcalf et al. 2019), seen inclined.

    scale_length: R_h in arcsec; axis_ratio: cosine of the inclination; arms: N; contrast: A, below
    1; phi(r) = phase + N ln(r/R_h)/tan(pitch), logarithmic arms of constant pitch (radians).
    """
    major, minor = _on_own_axes(x, y, angle)
    minor = minor / axis_ratio
    r = torch.hypot(major, minor) / scale_length
    winding = arms * torch.log(r.clamp_min(0.05)) / torch.tan(pitch)
    wave = torch.cos(arms * torch.atan2(minor, major) + winding + phase)
    return torch.exp(-r) * (1 + contrast * wave) / (2 * pi * axis_ratio * scale_length**2)


def ring(
    x: Tensor, y: Tensor, radius: Tensor, width: Tensor, axis_ratio: Tensor, angle: Tensor
) -> Tensor:
    """A round ring seen inclined: exp(-(r - radius)^2 / 2 width^2); lengths in arcsec."""
    major, minor = _on_own_axes(x, y, angle)
    r = torch.hypot(major, minor / axis_ratio)
    peak = radius / (width * sqrt(2))
    total = width**2 * (torch.exp(-(peak**2)) + sqrt(pi) * peak * (1 + torch.erf(peak)))
    return torch.exp(-(((r - radius) / width) ** 2) / 2) / (2 * pi * axis_ratio * total)


def tail(x: Tensor, y: Tensor, radius: Tensor, width: Tensor, angle: Tensor) -> Tensor:
    """A tidal tail: from the centre along a circle of that radius, fading within some 40 degrees.

    angle: the direction in which it leaves the centre.
    """
    major, minor = _on_own_axes(x, y, angle)
    minor = minor + radius
    theta = torch.atan2(major, minor)
    begins = torch.sigmoid(theta / 0.1)
    across = torch.exp(-(((torch.hypot(major, minor) - radius) / width) ** 2) / 2)
    # The integral of both factors along the circle is 0.70 radians.
    total = 0.70 * radius * width * sqrt(2 * pi)
    return begins * torch.exp(-theta.clamp_min(0) / 0.7) * across / total
