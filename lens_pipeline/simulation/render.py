"""Images from parameters, batched: ray tracing with caustics, Sersic light, PSF, noise.

Everything is float32, for a batch of B systems on a square grid of `size` pixels, sampled twice as
finely and averaged. Conventions are those of `population`: x along columns, y along rows, in
arcsec from the middle of the cutout; angles in radians from +x towards +y, of the major axis.

Mass: a singular isothermal ellipsoid, kappa = theta_E / 2 sqrt(q x^2 + y^2/q) on its own axes (the
convention of caustics and of lenstronomy: theta_E is the mean of the critical curve's axes in the
geometric sense), plus an external shear gamma_1 = g cos 2 phi, gamma_2 = g sin 2 phi about the
lens. Light: Sersic profiles of unit total flux, I ~ exp(-b_n (R/R_e)^(1/n)) with
R^2 = q x^2 + y^2/q, so R_e is the circularised half-light radius, and the b_n of Ciotti & Bertin
1999.
"""

from math import exp, gamma, pi

import numpy as np
import pandas as pd
import torch
from caustics.func import (
    gamma_phi_to_gamma1,
    gamma_phi_to_gamma2,
    k_sersic,
    reduced_deflection_angle_external_shear,
    reduced_deflection_angle_sie,
)
from numpy.typing import NDArray
from torch import Tensor

from lens_pipeline.simulation.surveys import Survey

SUPERSAMPLING = 2
CORE_PIXELS = 8  # side of the middle block, sampled finer for the cusp of n = 4; even cutouts
CORE_SUPERSAMPLING = 8
# Of a sub-pixel's side: keeps the light of the cusp within 1 % for half-light radii over 0.5 arcsec
# wherever the centre falls; the rms radius of a square, 0.41, would lose three times as much.
CUSP_SOFTENING = 0.2
PSF_RADIUS = 12  # pixels


def grid(size: int, pixel_scale: float, sampling: int, device: str) -> tuple[Tensor, Tensor]:
    """x and y in arcsec of the sub-pixels' centres, each (size*sampling, size*sampling)."""
    n = size * sampling
    axis = (torch.arange(n, device=device) - (n - 1) / 2) * (pixel_scale / sampling)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def sersic(
    x: Tensor,
    y: Tensor,
    index: int,
    radius: Tensor,
    axis_ratio: Tensor,
    angle: Tensor,
    softening: float = 0.0,
) -> Tensor:
    """Surface brightness per arcsec^2 of a profile of unit flux, at x and y from its centre.

    radius, axis_ratio and angle broadcast against x and y. softening (arcsec) is added to R in
    quadrature: a fraction of a sampling cell stands for the mean over the cell, which the cusp of
    n = 4 needs.
    """
    b = k_sersic(index)
    total = 2 * pi * index * exp(b) * b ** (-2 * index) * gamma(2 * index)
    cos, sin = torch.cos(angle), torch.sin(angle)
    major, minor = x * cos + y * sin, y * cos - x * sin
    squared = (axis_ratio * major**2 + minor**2 / axis_ratio + softening**2) / radius**2
    return torch.exp(b - b * squared ** (0.5 / index)) / (total * radius**2)


def deflect(
    x: Tensor,
    y: Tensor,
    einstein_radius: Tensor,
    axis_ratio: Tensor,
    angle: Tensor,
    shear: Tensor,
    shear_angle: Tensor,
) -> tuple[Tensor, Tensor]:
    """Source-plane position, in arcsec, of the rays at x and y from the lens (arcsec)."""
    zero = torch.zeros((), device=x.device)
    ax, ay = reduced_deflection_angle_sie(zero, zero, axis_ratio, angle, einstein_radius, x, y)
    gamma1 = gamma_phi_to_gamma1(shear, shear_angle)
    gamma2 = gamma_phi_to_gamma2(shear, shear_angle)
    sx, sy = reduced_deflection_angle_external_shear(zero, zero, gamma1, gamma2, x, y)
    return x - ax - sx, y - ay - sy


def moffat(fwhm: float, beta: float, device: str) -> Tensor:
    """A point spread function of unit sum, (2*PSF_RADIUS+1) pixels a side; fwhm in pixels."""
    x, y = grid(2 * PSF_RADIUS + 1, 1.0, 1, device)
    scale = fwhm / (2 * (2 ** (1 / beta) - 1) ** 0.5)
    kernel = (1 + (x**2 + y**2) / scale**2) ** -beta
    return kernel / kernel.sum()


class Renderer:
    """Draws what a survey's camera would see in cutouts of `size` pixels.

    Parameters of the systems are float32 tensors (B,), named as in `population.candidates`; images
    are (B, size, size), the fraction of the unlensed flux that falls in each pixel.
    """

    def __init__(self, survey: Survey, size: int, device: str) -> None:
        self.survey, self.size, self.device = survey, size, device
        self.bands = survey.bands
        self._x, self._y = grid(size, survey.pixel_scale, SUPERSAMPLING, device)
        self._core_size = CORE_PIXELS + size % 2
        self._core = grid(self._core_size, survey.pixel_scale, CORE_SUPERSAMPLING, device)
        self._psf = moffat(survey.seeing / survey.pixel_scale, survey.moffat_beta, device)
        side = size + 2 * PSF_RADIUS
        self._side = side + side % 2
        self._psf_spectrum = torch.fft.rfft2(self._psf, s=(self._side, self._side))

    def parameters(self, table: pd.DataFrame) -> dict[str, Tensor]:
        """A table's numbers as tensors (B,)."""
        values = torch.from_numpy(table.to_numpy(np.float32).T.copy()).to(self.device)
        return dict(zip(table.columns, values, strict=True))

    def electrons(self, images: Tensor, magnitudes: NDArray[np.float64]) -> Tensor:
        """Expected electrons (B, bands, size, size) of images of unit flux; (B, bands) AB mag."""
        flux = torch.from_numpy(self.survey.electrons(magnitudes)).to(self.device, torch.float32)
        return images[:, None] * flux[:, :, None, None]

    def elliptical(self, p: dict[str, Tensor]) -> Tensor:
        """The lens galaxy: n = 4, sharing centre, axis ratio and angle with its mass."""
        p = {name: value[:, None, None] for name, value in p.items()}

        def light(x: Tensor, y: Tensor, sampling: int) -> Tensor:
            cell = self.survey.pixel_scale / sampling
            brightness = sersic(
                x - p["x"],
                y - p["y"],
                4,
                p["lens_radius"],
                p["axis_ratio"],
                p["position_angle"],
                softening=CUSP_SOFTENING * cell,
            )
            return self._pixels(brightness, sampling)

        image = light(self._x, self._y, SUPERSAMPLING)
        low = (self.size - self._core_size) // 2
        core = slice(low, low + self._core_size)
        image[:, core, core] = light(*self._core, CORE_SUPERSAMPLING)
        return image

    def arcs(self, p: dict[str, Tensor]) -> Tensor:
        """The lensed images of the source: n = 1."""
        p = {name: value[:, None, None] for name, value in p.items()}
        x, y = deflect(
            self._x - p["x"],
            self._y - p["y"],
            p["einstein_radius"],
            p["axis_ratio"],
            p["position_angle"],
            p["shear"],
            p["shear_angle"],
        )
        brightness = sersic(
            x - p["source_x"],
            y - p["source_y"],
            1,
            p["source_radius"],
            p["source_axis_ratio"],
            p["source_angle"],
        )
        return self._pixels(brightness, SUPERSAMPLING)

    def disc(self, p: dict[str, Tensor]) -> Tensor:
        """A galaxy as it is, without a lens: n = 1, at x and y."""
        p = {name: value[:, None, None] for name, value in p.items()}
        brightness = sersic(
            self._x - p["x"], self._y - p["y"], 1, p["radius"], p["axis_ratio"], p["angle"]
        )
        return self._pixels(brightness, SUPERSAMPLING)

    def _pixels(self, brightness: Tensor, sampling: int) -> Tensor:
        cell = self.survey.pixel_scale / sampling
        return torch.nn.functional.avg_pool2d(brightness, sampling) * (cell * sampling) ** 2

    def blur(self, images: Tensor) -> Tensor:
        """Convolve (B, size, size) with the PSF; outside the cutout the sky mirrors its edge."""
        pad = torch.nn.functional.pad(images[:, None], [PSF_RADIUS] * 4, mode="reflect")[:, 0]
        shape = (self._side, self._side)
        blurred = torch.fft.irfft2(torch.fft.rfft2(pad, s=shape) * self._psf_spectrum, s=shape)
        inside = slice(2 * PSF_RADIUS, 2 * PSF_RADIUS + self.size)
        return blurred[:, inside, inside].clamp_min(0)

    def expose(self, electrons: Tensor, deviates: Tensor) -> Tensor:
        """Noise and unit: sky-subtracted cutouts in sigmas of each band's background.

        electrons, expected from the objects, and standard normal deviates: (B, bands, size, size).
        The Poisson noise of thousands of electrons a pixel is drawn as the normal distribution of
        the same variance; Poisson deviates would jump where the expectation differs in the last
        bit, and then a cutout would depend on the batch that it was drawn in.
        """
        background = self._background()
        return (electrons + deviates * (background + electrons).sqrt()) / background.sqrt()

    def signal_to_noise(self, arcs: Tensor, others: Tensor) -> Tensor:
        """Of the arcs in the best band, (B,); both (B, bands, size, size), in electrons.

        The highest that any set of pixels gives, the brightest first, against the noise of sky,
        read-out and all objects (LensPop).
        """
        variance = (self._background() + arcs + others).flatten(2)
        signal = arcs.flatten(2)
        order = (signal**2 / variance).argsort(dim=-1, descending=True)
        signal, variance = signal.gather(-1, order), variance.gather(-1, order)
        return (signal.cumsum(-1) / variance.cumsum(-1).sqrt()).amax(dim=(1, 2))

    def _background(self) -> Tensor:
        variance = torch.from_numpy(self.survey.background_variance)
        return variance.to(self.device, torch.float32)[:, None, None]
