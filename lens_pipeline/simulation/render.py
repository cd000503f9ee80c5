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

from math import pi, sqrt

import numpy as np
import pandas as pd
import torch
from caustics.func import (
    gamma_phi_to_gamma1,
    gamma_phi_to_gamma2,
    reduced_deflection_angle_external_shear,
    reduced_deflection_angle_sie,
)
from numpy.typing import NDArray
from torch import Tensor

from lens_pipeline.simulation import profiles
from lens_pipeline.simulation.profiles import sersic
from lens_pipeline.simulation.psf import PSF_RADIUS, point_spread
from lens_pipeline.simulation.sources import Sources
from lens_pipeline.simulation.surveys import Survey

SUPERSAMPLING = 2
CORE_PIXELS = 8  # side of the block, sampled finer, about the cusp of n = 4; in even cutouts
CORE_SUPERSAMPLING = 8
# Of a sub-pixel's side: keeps the light of the cusp within 1 % for half-light radii over 0.5 arcsec
# wherever the centre falls; the rms radius of a square, 0.41, would lose three times as much.
CUSP_SOFTENING = 0.2
MIN_CUSP_RADIUS = 1.0  # pixels: of n = 4; smaller ones look the same, but would lose their light
POINT_WIDTH = 0.3  # pixels: standard deviation of a star before the PSF
CONTRAST_PIXELS, CONTRAST_SNR = 5, 2.0  # fewer pixels, or fainter ones, are not seen as an arc
# Of light that is added to an image: less than that many of its background's sigmas is what the
# Fourier transform of the PSF leaves everywhere, and is left out.
NEGLIGIBLE = 1e-5
# Its standard deviation is e/sqrt(e + s) for e electrons, s being that part of the background's
# variance: sqrt(e) where it can be seen, and no steeper than 1/sqrt(s) at 0, where another
# batch's rounding would show.
ROUNDED = 1e-4
PLACE_AND_LIGHT = ("x", "y", "component_magnitude", "component_g_r", "component_r_i")


def grid(size: int, pixel_scale: float, sampling: int, device: str) -> tuple[Tensor, Tensor]:
    """x and y in arcsec of the sub-pixels' centres, each (size*sampling, size*sampling)."""
    n = size * sampling
    axis = (torch.arange(n, device=device) - (n - 1) / 2) * (pixel_scale / sampling)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


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


def add_in_order(total: Tensor, owner: NDArray[np.int64], parts: Tensor) -> None:
    """Add each of the parts (m, ...) to that of a total (n, ...) which is its owner, (m,).

    One of each owner at a time: a GPU that sums many in one go takes them in any order, and then
    the last bit is anything, too.
    """
    place = pd.Series(owner).groupby(owner).cumcount().to_numpy()
    for number in range(place.max(initial=-1) + 1):
        now = np.flatnonzero(place == number)
        total[torch.from_numpy(owner[now])] += parts[torch.from_numpy(now)]


def _broadcast(p: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:, None, None] for name, value in p.items()}


def resampling(correlation: float) -> Tensor:
    """Weights (a, 1 - 2a, a) that give white noise that correlation of adjacent pixels."""
    # 2a (1 - 2a) / ((1 - 2a)^2 + 2a^2) = correlation, solved for the smaller a.
    square, linear = 6 * correlation + 4, 4 * correlation + 2
    a = (linear - sqrt(linear**2 - 4 * square * correlation)) / (2 * square)
    return torch.tensor([a, 1 - 2 * a, a])


class Renderer:
    """Draws what a survey's camera would see in cutouts of `size` pixels.

    Parameters of the systems are float32 tensors (B,), named as in `population.candidates`; images
    are (B, size, size), the fraction of the unlensed flux that falls in each pixel.
    compiled: with kernels made for this processor, twice as fast after some 20 s; it takes a
    C++ compiler.
    """

    def __init__(
        self, survey: Survey, sources: Sources, size: int, device: str, compiled: bool = False
    ) -> None:
        self.survey, self.sources, self.size, self.device = survey, sources, size, device
        self.bands = survey.bands
        # Systems that are drawn at a time: what the cache, or the memory of a GPU, likes.
        at_64 = 2048 if torch.device(device).type == "cuda" else 64
        self.together = max(1, at_64 * 64**2 // size**2)
        self._x, self._y = grid(size, survey.pixel_scale, SUPERSAMPLING, device)
        self._core_size = CORE_PIXELS + size % 2
        self._core = grid(self._core_size, survey.pixel_scale, CORE_SUPERSAMPLING, device)
        side = size + 2 * PSF_RADIUS
        self._side = side + side % 2
        self._psf_spectrum = torch.fft.rfft2(
            point_spread(survey, device), s=(self._side, self._side)
        )
        self._others: dict[int, Renderer] = {}
        if compiled:
            for name in ("elliptical", "arcs", "expose"):
                setattr(self, name, torch.compile(getattr(self, name), dynamic=True))

    def of_size(self, size: int) -> "Renderer":
        """The same camera, with cutouts of another size; not compiled."""
        if size not in self._others:
            self._others[size] = Renderer(self.survey, self.sources, size, self.device)
        return self._others[size]

    def parameters(self, table: pd.DataFrame) -> dict[str, Tensor]:
        """A table's numbers as tensors (B,)."""
        values = torch.from_numpy(table.to_numpy(np.float32).T.copy()).to(self.device)
        return dict(zip(table.columns, values, strict=True))

    def darkness(self, n: int) -> Tensor:
        """Electrons (n, bands, size, size) of nothing."""
        return torch.zeros(n, len(self.bands), self.size, self.size, device=self.device)

    def electrons(self, images: Tensor, magnitudes: NDArray[np.float64]) -> Tensor:
        """Expected electrons (B, bands, size, size) of blurred images of unit flux, as `blur` gives
        them; (B, bands) AB mag."""
        flux = torch.from_numpy(self.survey.electrons(magnitudes)).to(self.device, torch.float32)
        return images * flux[:, :, None, None]

    def elliptical(self, p: dict[str, Tensor]) -> Tensor:
        """The lens galaxy, or another early type: n = 4. Its centre, axis ratio and angle are those
        of its mass."""
        p = _broadcast(p)
        pixel = self.survey.pixel_scale

        def light(x: Tensor, y: Tensor, sampling: int) -> Tensor:
            brightness = sersic(
                x - p["x"],
                y - p["y"],
                4,
                p["lens_radius"].clamp_min(MIN_CUSP_RADIUS * pixel),
                p["axis_ratio"],
                p["position_angle"],
                softening=CUSP_SOFTENING * pixel / sampling,
            )
            return self._pixels(brightness, sampling)

        image = light(self._x, self._y, SUPERSAMPLING)
        # The core is where the galaxy is; of one outside the cutout, at the edge.
        low = (self.size - self._core_size) // 2
        left, top = ((p[axis] / pixel).round().clamp(-low, low) for axis in "xy")
        core = light(self._core[0] + left * pixel, self._core[1] + top * pixel, CORE_SUPERSAMPLING)
        step = torch.arange(low, low + self._core_size, device=self.device)
        row, column = top.long() + step[:, None], left.long() + step
        image[torch.arange(len(image), device=self.device)[:, None, None], row, column] = core
        return image

    def arcs(self, p: dict[str, Tensor]) -> Tensor:
        """The lensed images of the source."""
        p = _broadcast(p)
        x, y = deflect(
            self._x - p["x"],
            self._y - p["y"],
            p["einstein_radius"],
            p["axis_ratio"],
            p["position_angle"],
            p["shear"],
            p["shear_angle"],
        )
        brightness = self.sources.brightness(x - p["source_x"], y - p["source_y"], p)
        return self._pixels(brightness, SUPERSAMPLING)

    def component(self, profile: str, p: dict[str, Tensor]) -> Tensor:
        """One thing at x and y.

        profile: `elliptical`; `arcs`, of a source behind the galaxy there; without a lens,
        `source`, `disc` (n = 1), `point`, or a function of `profiles`; the other parameters are
        its.
        """
        if profile in ("elliptical", "arcs"):
            return self.elliptical(p) if profile == "elliptical" else self.arcs(p)
        p = _broadcast(p)
        x, y = self._x - p["x"], self._y - p["y"]
        if profile == "source":
            return self._pixels(self.sources.brightness(x, y, p), SUPERSAMPLING)
        shape = {name: p[name] for name in p if name not in PLACE_AND_LIGHT}
        if profile == "point":
            width = POINT_WIDTH * self.survey.pixel_scale
            brightness = torch.exp(-(x**2 + y**2) / (2 * width**2)) / (2 * pi * width**2)
        elif profile == "disc":
            brightness = sersic(x, y, 1, p["radius"], p["axis_ratio"], p["angle"])
        else:
            brightness = getattr(profiles, profile)(x, y, **shape)
        return self._pixels(brightness, SUPERSAMPLING)

    def stroke(self, **numbers: NDArray[np.float64]) -> Tensor:
        """Straight strokes (B, size, size), drawn on the detector: no PSF is to follow.

        x, y of the middle and length in pixels, angle in radians; height along the middle, width:
        the standard deviation of the Gaussian across it, in pixels; (B,) each.
        """
        p = _broadcast(self.parameters(pd.DataFrame(numbers)))
        x, y = grid(self.size, 1.0, 1, self.device)
        x, y = x - p["x"], y - p["y"]
        cos, sin = torch.cos(p["angle"]), torch.sin(p["angle"])
        beyond = ((x * cos + y * sin).abs() - p["length"] / 2).clamp_min(0)
        beside = y * cos - x * sin
        return p["height"] * torch.exp(-(beyond**2 + beside**2) / (2 * p["width"] ** 2))

    def _pixels(self, brightness: Tensor, sampling: int) -> Tensor:
        cell = self.survey.pixel_scale / sampling
        return torch.nn.functional.avg_pool2d(brightness, sampling) * (cell * sampling) ** 2

    def blur(self, images: Tensor) -> Tensor:
        """Convolve (B, size, size) with the PSF of each band, or the one of all: (B, 1 or bands,
        size, size). Outside the cutout the sky mirrors its edge."""
        pad = torch.nn.functional.pad(images[:, None], [PSF_RADIUS] * 4, mode="reflect")
        shape = (self._side, self._side)
        blurred = torch.fft.irfft2(torch.fft.rfft2(pad, s=shape) * self._psf_spectrum, s=shape)
        inside = slice(2 * PSF_RADIUS, 2 * PSF_RADIUS + self.size)
        return blurred[..., inside, inside].clamp_min(0)

    def expose(self, electrons: Tensor, deviates: Tensor) -> Tensor:
        """Noise and unit: sky-subtracted cutouts in sigmas of each band's background.

        electrons, expected from the objects, and standard normal deviates: (B, bands, size, size).
        Where the survey's noise is correlated, it is that of an image which was resampled: the sum
        over many pixels keeps its noise, and that of each, the background's sigma, is lower (not
        for `signal_to_noise`, `contrast` and `electrons_of_sigma`, which take it to be white). The
        Poisson noise of hundreds of electrons a pixel, or more, is drawn as the normal distribution
        of the same variance; Poisson deviates would jump where the expectation differs in the last
        bit, and then a cutout would depend on the batch that it was drawn in.
        """
        background = self._background()
        noise = deviates * (background + electrons).sqrt()
        if not self.survey.noise_correlation:
            return (electrons + noise) / background.sqrt()
        weights = resampling(self.survey.noise_correlation)
        for axis in (-2, -1):
            noise = sum(  # over the edge, from the opposite one: it is noise, too
                weight * noise.roll(step, axis)
                for weight, step in zip(weights, (-1, 0, 1), strict=True)
            )
        return (electrons + noise) / (background.sqrt() * weights.square().sum())

    def paint(
        self,
        images: Tensor,
        electrons: Tensor,
        deviates: Tensor,
        background: NDArray[np.float64],
    ) -> Tensor:
        """Images (..., bands, size, size), in background sigma, with light that is added to them.

        electrons, expected of that light, and standard normal deviates: as the images; background:
        as in `signal_to_noise`. The images keep their own noise; the light brings its Poisson
        noise, drawn as in `expose`, but white.
        """
        variance = self._background(background)
        sigma = variance.sqrt()
        electrons = electrons * (electrons > NEGLIGIBLE * sigma)
        noise = electrons / (electrons + ROUNDED * variance).sqrt()
        return images + (electrons + deviates * noise) / sigma

    def matched_filter(self, arcs: Tensor, background: NDArray[np.float64]) -> Tensor:
        """Signal-to-noise of arcs alone on the sky in the best band (B,), their shape known.

        By Schwarz's inequality no `signal_to_noise` is higher. background: as there.
        """
        return (
            (arcs**2 / (self._background(background) + arcs)).sum(dim=(-2, -1)).amax(dim=1).sqrt()
        )

    def signal_to_noise(
        self, arcs: Tensor, others: Tensor, background: NDArray[np.float64] | None = None
    ) -> Tensor:
        """Of the arcs in the best band, (B,); both (B, bands, size, size), in electrons.

        background: variance of an empty pixel, electrons^2 (B, bands); by default the survey's.
        The highest that any set of pixels gives, the brightest first, against the noise of sky,
        read-out and all objects (LensPop).
        """
        variance = (self._background(background) + arcs + others).flatten(2)
        signal = arcs.flatten(2)
        order = (signal**2 / variance).argsort(dim=-1, descending=True)
        signal, variance = signal.gather(-1, order), variance.gather(-1, order)
        return (signal.cumsum(-1) / variance.cumsum(-1).sqrt()).amax(dim=(1, 2))

    def contrast(
        self, arcs: Tensor, galaxy: Tensor, background: NDArray[np.float64] | None = None
    ) -> Tensor:
        """Of the arcs over the galaxy's light in the best band, (B,); as in `signal_to_noise`.

        The fifth largest ratio of both (of the arcs to a background's sigma, where the galaxy is
        fainter) among a band's pixels in which the arcs have a signal-to-noise above 2 against the
        noise of sky, read-out and both; 0 where there are fewer. Of faint arcs on a bright galaxy
        it is low, however high their signal-to-noise, and then no eye sees them.
        """
        variance = self._background(background)
        seen = arcs > CONTRAST_SNR * (variance + arcs + galaxy).sqrt()
        ratio = torch.where(seen, arcs / torch.maximum(galaxy, variance.sqrt()), 0).flatten(2)
        return ratio.topk(CONTRAST_PIXELS, dim=-1).values[..., -1].amax(dim=1)

    def electrons_of_sigma(self, images: Tensor, background: NDArray[np.float64]) -> Tensor:
        """Electrons (B, bands, size, size) of images in units of each band's background sigma.

        background: as in `signal_to_noise`.
        """
        return images * self._background(background).sqrt()

    def _background(self, given: NDArray[np.float64] | None = None) -> Tensor:
        variance = torch.from_numpy(self.survey.background_variance if given is None else given)
        return variance.to(self.device, torch.float32)[..., None, None]
