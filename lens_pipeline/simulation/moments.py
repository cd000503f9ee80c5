"""Where a galaxy in an image is, how round, and which way it lies."""

from dataclasses import dataclass

import numpy as np

from lens_pipeline.simulation.config import Array

STEPS = 60
CONVERGED = 1e-3  # of the weight's own size
MIN_SNR = 10.0  # within the weight
MIN_AXIS_RATIO = 0.2  # as of the population: seen edge-on, no mass is as flat as its disc
RESOLVED = 0.1  # of the point spread function's second moment: what is smaller is a star
NARROWEST = 0.3  # pixels^2: the second moment of a point spread function within one pixel
SMALLEST_START = 1.0  # pixels: a narrower Gaussian falls between the pixels
NEAR = 1.0  # pixels, or the width of the point spread function: what is farther is a neighbour
BRIGHT = 1e4  # sigmas, at the peak of a point spread function, which has no noise


@dataclass(frozen=True)
class Shape:
    """x, y: pixels from the middle; axis_ratio; position_angle: radians from +x towards +y, of the
    major axis. NaN where the image does not tell."""

    x: float = np.nan
    y: float = np.nan
    axis_ratio: float = np.nan
    position_angle: float = np.nan


def second_moments(
    image: Array, x: float, y: float, start: float, reach: float
) -> tuple[Array, Array] | None:
    """The centre (2,) and the second moments (2, 2), in pixels, of what is at x, y; None where
    nothing is, or where a neighbour is so near or bright that it would be measured with it.

    Adaptive moments (Bernstein & Jarvis 2002): those of the image under the elliptical Gaussian
    that matches it, so that neither noise nor neighbours far away count. start: the standard
    deviation of the first Gaussian; reach: how far the centre may be from x, y; pixels.
    """
    side = len(image)
    row, column = np.mgrid[:side, :side] - (side - 1) / 2
    centre, moments = np.array([x, y], np.float64), np.eye(2) * start**2
    for _ in range(STEPS):
        d = np.stack([column - centre[0], row - centre[1]])
        weight = np.exp(-0.5 * np.einsum("iyx,ij,jyx->yx", d, np.linalg.inv(moments), d))
        light = weight * image
        flux = light.sum()
        if flux < MIN_SNR * np.sqrt((weight**2).sum()):
            return None
        # Under a Gaussian of their own size, moments and shifts look half as large as they are.
        shift = 2 * (d * light).sum(axis=(1, 2)) / flux
        found = 2 * np.einsum("iyx,jyx,yx->ij", d, d, light) / flux
        size = np.sqrt(np.trace(moments))
        change = max(np.abs(shift).max() / size, np.abs(found - moments).max() / size**2)
        centre, moments = centre + shift, found
        largest = (side / 4) ** 2
        if np.linalg.det(moments) <= 0 or not 0 < np.trace(moments) < largest:
            return None
        if np.hypot(*(centre - (x, y))) > reach:
            return None
        if change < CONVERGED:
            return centre, moments
    return None


def moments_of_psf(psf: Array) -> Array:
    """Second moments (2, 2), pixels^2, of a point spread function, an image of odd side.

    Of one as narrow as a pixel, whose adaptive moments end nowhere, those of the round Gaussian
    whose area within half its maximum, 2 pi ln 2 sigma^2, is the same.
    """
    # With a margin: one nearly as wide as its image is not too wide to be measured.
    image = np.pad(psf * (BRIGHT / psf.max()), len(psf) // 2)
    found = second_moments(image, 0.0, 0.0, 1.5, NEAR)
    if found is not None:
        return found[1]
    area = float((psf > psf.max() / 2).sum())
    return np.eye(2) * max(area / (2 * np.pi * np.log(2)), NARROWEST)


def shape_of(image: Array, psf: Array, x: float = 0.0, y: float = 0.0, seen: float = 1.0) -> Shape:
    """The shape of the galaxy at x, y (pixels from the middle) before the point spread function.

    image: (side, side), in sigmas of its noise; psf: as `moments_of_psf` gives them, which are
    taken from the galaxy's. seen: how much of a galaxy's ellipticity, (1 - q^2)/(1 + q^2) for an
    axis ratio q, is left then: neither cusp nor wings are Gaussian, and look round.
    """
    width = np.trace(psf) / 2
    sigma = float(np.sqrt(width))
    start = max(1.5 * sigma, SMALLEST_START)
    found = second_moments(image, x, y, start, reach=max(sigma, NEAR))
    if found is None:
        return Shape()
    centre, moments = found
    values, vectors = np.linalg.eigh(moments - psf)
    if values[1] < RESOLVED * width:
        return Shape(float(centre[0]), float(centre[1]))
    minor, major = max(values[0], 0), values[1]
    ellipticity = min((major - minor) / (major + minor) / seen, 1.0)
    ratio = np.sqrt((1 - ellipticity) / (1 + ellipticity))
    return Shape(
        float(centre[0]),
        float(centre[1]),
        float(np.clip(ratio, MIN_AXIS_RATIO, 1)),
        float(np.arctan2(vectors[1, 1], vectors[0, 1]) % np.pi),
    )
