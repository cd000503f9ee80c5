"""Who lenses whom: the galaxies, their redshifts and the geometry of every candidate lens.

Every distribution is a function of uniform deviates (`u` in [0, 1), any shape), so that a host
galaxy's candidates depend on its own stream of random numbers and on nothing else. The numbers
follow LensPop (Collett 2015, ApJ 811, 20) unless a docstring says otherwise. Cosmology: flat
Lambda-CDM, H0 = 70 km/s/Mpc, Omega_m = 0.3.

Conventions: x along columns, y along rows, in arcsec from the middle of the cutout; angles in
radians from +x towards +y, of the major axis; half-light radii are circularised, that is, along
sqrt(major x minor axis).
"""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import numpy as np
import pandas as pd
from astropy.constants import c
from astropy.cosmology import FlatLambdaCDM
from numpy.typing import NDArray
from scipy.integrate import cumulative_trapezoid
from scipy.special import gammaincinv, ndtri

from lens_pipeline.simulation.config import (
    FARTHEST,
    MAX_VELOCITY_DISPERSION,
    Population,
    SimulationConfig,
)
from lens_pipeline.simulation.multiplicity import is_multiply_imaged
from lens_pipeline.simulation.surveys import Survey

Array = NDArray[np.float64]

VERSION = 9  # of the population: raise it with any change to what is drawn

COSMOLOGY = FlatLambdaCDM(H0=70, Om0=0.3)
ARCSEC = np.pi / 180 / 3600
MAX_LENS_REDSHIFT = 2.0
MAX_SHEAR = 0.1
MIN_SOURCE_RADIUS = 0.4  # pixels
RARE = 1e-4  # of sources, or of lenses: what is rarer is not waited for
CANDIDATES = 192  # drawn at a time for each host
COLUMNS = 22  # uniform deviates that a candidate takes


@cache
def _distances() -> tuple[Array, Array]:
    """Redshifts and their comoving distances in Mpc, tabulated once."""
    z = np.linspace(0, FARTHEST, 6001)
    return z, np.asarray(COSMOLOGY.comoving_distance(z).value)


def comoving_distance(z: Array) -> Array:
    """In Mpc, interpolated."""
    return np.interp(z, *_distances())


def distance_modulus(z: Array) -> Array:
    """In magnitudes."""
    return 5 * np.log10(comoving_distance(z) * (1 + z) * 1e5)


def kpc_to_arcsec(z: Array) -> Array:
    """Angle in arcsec that one kpc subtends at redshift z."""
    return (1 + z) / (comoving_distance(z) * 1e3 * ARCSEC)


def distance_ratio(z_lens: Array, z_source: Array) -> Array:
    """D_ls/D_s, in a flat universe 1 - D_C(z_lens)/D_C(z_source). Zero for a source in front."""
    return np.clip(1 - comoving_distance(z_lens) / comoving_distance(z_source), 0, None)


def einstein_radius(velocity_dispersion: Array, z_lens: Array, z_source: Array) -> Array:
    """4 pi (sigma_v/c)^2 D_ls/D_s in arcsec, of a singular isothermal sphere; sigma_v in km/s."""
    beta = velocity_dispersion / c.to_value("km/s")
    return 4 * np.pi * beta**2 * distance_ratio(z_lens, z_source) / ARCSEC


def lens_redshift(u: Array) -> Array:
    """Volume weighted: constant comoving density out to MAX_LENS_REDSHIFT."""
    z, distance = _distances()
    return np.interp(np.cbrt(u) * comoving_distance(np.asarray(MAX_LENS_REDSHIFT)), distance, z)


@cache
def _velocity_dispersion_table() -> tuple[Array, Array]:
    sigma = np.linspace(100, 400, 3001)
    density = (sigma / 161) ** 2.32 * np.exp(-((sigma / 161) ** 2.67)) / sigma * sigma**4
    cumulative = cumulative_trapezoid(density, initial=0)
    return cumulative / cumulative[-1], sigma


def velocity_dispersion(u: Array) -> Array:
    """Of lens galaxies: phi s^4, from 100 to 400 km/s, at every redshift.

    phi ~ (s/161)^2.32 exp[-(s/161)^2.67]/s of galaxies (Choi, Park & Vogeley 2007); what is behind
    one is multiply imaged over an area of pi theta_E^2, which grows as s^4.
    """
    return np.interp(u, *_velocity_dispersion_table())


def lens_axis_ratio(u: Array, velocity_dispersion: Array) -> Array:
    """1 - Rayleigh(0.378 - 0.000572 sigma_v), cut to [0.2, 1]; of the mass and of the light."""
    return 1 - _rayleigh_up_to(0.8, u, 0.378 - 0.000572 * velocity_dispersion)


def shear(u: Array) -> Array:
    """Uniform from 0 to MAX_SHEAR."""
    return MAX_SHEAR * u


def source_axis_ratio(u: Array) -> Array:
    """1 - Rayleigh(0.3), cut to [0.2, 1]."""
    return 1 - _rayleigh_up_to(0.8, u, 0.3)


def _rayleigh_up_to(limit: float, u: Array, scale: Array | float) -> Array:
    below = 1 - np.exp(-0.5 * (limit / scale) ** 2)
    return scale * np.sqrt(-2 * np.log1p(-u * below))


def lens_radius(u: Array, velocity_dispersion: Array) -> Array:
    """Half-light radius in kpc: log R = 2.46 - 2.79 log s + 0.84 log^2 s, 0.11 dex of scatter."""
    v = np.log10(velocity_dispersion)
    return 10 ** (2.46 - 2.79 * v + 0.84 * v**2 + 0.11 * ndtri(u))


def lens_absolute_magnitude(u: Array, velocity_dispersion: Array) -> Array:
    """Absolute r magnitude: log s = -2.97 - 0.37 M - 0.006 M^2, scatter 0.0625 mag.

    The Faber-Jackson relation of Hyde & Bernardi 2009, solved for M.
    """
    v = np.log10(velocity_dispersion)
    return (-0.37 + np.sqrt(0.37**2 - 0.024 * (2.97 + v))) / 0.012 + 0.0625 * ndtri(u)


# Redshift, k-correction in r, g - r and r - i of an old (10 Gyr) stellar population, read off the
# lens magnitudes of LensPop's published forecast for DES.
RED_SEQUENCE = np.array(
    [
        (0.00, 0.00, 0.75, 0.35),
        (0.10, 0.15, 1.07, 0.38),
        (0.20, 0.33, 1.44, 0.52),
        (0.30, 0.50, 1.78, 0.63),
        (0.35, 0.60, 1.95, 0.65),
        (0.40, 0.73, 1.95, 0.73),
        (0.45, 0.93, 1.91, 0.87),
        (0.50, 1.20, 1.86, 1.06),
        (0.55, 1.42, 1.84, 1.22),
        (0.60, 1.62, 1.87, 1.34),
        (0.65, 1.80, 1.93, 1.45),
        (0.70, 1.98, 2.00, 1.55),
        (0.75, 2.13, 2.26, 1.48),
        (0.80, 2.22, 2.48, 1.36),
        (0.85, 2.32, 2.70, 1.27),
        (0.90, 2.44, 2.79, 1.23),
        (1.00, 2.85, 2.82, 1.26),
        (1.07, 3.17, 2.86, 1.27),
        (1.24, 4.10, 2.16, 1.85),
        (2.00, 6.50, 2.00, 1.80),
    ]
)
RED_SCATTER = 0.05  # mag


def lens_light(u: Array, z: Array, absolute_magnitude: Array) -> tuple[Array, Array, Array]:
    """Apparent r magnitude, g - r and r - i of a red elliptical.

    u: (2, ...), for the red sequence's scatter in each colour.
    """
    k = np.interp(z, RED_SEQUENCE[:, 0], RED_SEQUENCE[:, 1])
    g_r, r_i = red_sequence(z) + RED_SCATTER * ndtri(u)
    return absolute_magnitude + distance_modulus(z) + k, g_r, r_i


def red_sequence(z: Array) -> Array:
    """g - r and r - i of an old galaxy, (2, ...)."""
    return np.stack([np.interp(z, RED_SEQUENCE[:, 0], colour) for colour in RED_SEQUENCE.T[2:]])


COUNTS = 0.31  # counts of galaxies ~ 10^(COUNTS i) (LSST Science Book, section 3.7)
DEEPER = 0.0417  # by which z0 grows per magnitude


def source_i_magnitude(u: Array) -> Array:
    """Unlensed i magnitude, 20 to 27, as galaxies are counted."""
    bright, faint = 10 ** (COUNTS * 20), 10 ** (COUNTS * 27)
    return np.log10(bright + u * (faint - bright)) / COUNTS


def source_redshift(u: Array, i_magnitude: Array) -> Array:
    """Of galaxies of one i magnitude.

    Those down to a limit i have p3 ~ z^2 exp(-z/z0), z0 = 0.0417 i - 0.744 (LSST Science Book,
    section 3.8). Of its derivative, d/di [10^(0.31 i) p3(z | i)], those at i itself have
    (1 - w) p3 + w p4, where p4 ~ z^3 exp(-z/z0) and w = 3 x 0.0417 / (0.31 ln 10 z0); at the bright
    end, where w would exceed it, 1.
    """
    z0 = DEEPER * i_magnitude - 0.744
    w = np.minimum(3 * DEEPER / (COUNTS * np.log(10) * z0), 1)
    nearer = u < 1 - w
    with np.errstate(divide="ignore", invalid="ignore"):  # of the one that is not taken
        shape, at = np.where(nearer, (3 + 0 * u, u / (1 - w)), (4 + 0 * u, 1 - (1 - u) / w))
    return gammaincinv(shape, at) * z0


# Redshift, g - r and r - i of star-forming galaxies: medians of the sources in LensPop's published
# forecast for DES (blue beyond z = 1; the Lyman break enters g at z = 3), and before the nearest of
# those, the blue galaxies of SDSS (Blanton et al. 2003, ApJ 594, 186).
STAR_FORMING = np.array(
    [
        (0.1, 0.45, 0.30),
        (0.3, 0.80, 0.30),
        (0.6, 0.80, 0.60),
        (0.9, 0.40, 0.60),
        (1.2, 0.10, 0.22),
        (1.6, -0.05, 0.20),
        (2.0, -0.10, 0.00),
        (2.5, 0.00, -0.10),
        (3.0, 0.20, -0.10),
        (3.6, 0.50, -0.05),
    ]
)


def source_colours(u: Array, z: Array) -> tuple[Array, Array]:
    """g - r and r - i of a star-forming galaxy, 0.12 mag of scatter in each; u: (2, ...)."""
    g_r, r_i = (np.interp(z, STAR_FORMING[:, 0], column) for column in STAR_FORMING.T[1:])
    scatter = 0.12 * ndtri(u)
    return g_r + scatter[0], r_i + scatter[1]


def source_radius(u: Array, i_magnitude: Array, z: Array) -> Array:
    """Half-light radius in kpc: log R = -(M+18)/4, x [(1+z)/1.6]^-1.2, 0.35 dex of scatter.

    M is i minus the distance modulus: the k-correction, a few tenths of a magnitude for these
    galaxies, moves log R by less than 0.1, well within the scatter.
    """
    M = i_magnitude - distance_modulus(z)
    return 10 ** (-(M + 18) / 4 + 0.35 * ndtri(u)) * ((1 + z) / 1.6) ** -1.2


def magnitudes(table: pd.DataFrame, galaxy: str, bands: tuple[str, ...]) -> Array:
    """AB magnitudes (rows, bands) from `<galaxy>_magnitude` (r) and the two colours beside it."""
    r, g_r, r_i = (
        table[f"{galaxy}_{name}"].to_numpy(np.float64) for name in ("magnitude", "g_r", "r_i")
    )
    # Euclid's VIS, 550 to 900 nm, spans r (to 700 nm), i (to 850 nm) and the beginning of z: their
    # fluxes per frequency, each by its share of ln(wavelength). i - z is about a third of r - i.
    spanned = {0.0: 0.490, 1.0: 0.394, 4 / 3: 0.116}  # {of r - i, how much brighter than r: share}
    flux = sum(share * 10 ** (0.4 * times * r_i) for times, share in spanned.items())
    known = {"g": r + g_r, "r": r, "i": r - r_i, "VIS": r - 2.5 * np.log10(flux)}
    return np.stack([known[band] for band in bands], axis=1)


def candidates(
    u: Array,
    config: SimulationConfig,
    known: Mapping[str, Array] = MappingProxyType({}),
    background: Array | None = None,
) -> pd.DataFrame:
    """The systems among u (rows, COLUMNS) that may be detectable lenses; the index is u's rows.

    Cuts on redshift, velocity dispersion, Einstein radius, 2 theta_E^2 > (2 r_s)^2 + seeing^2 and
    on a source whose centre is multiply imaged are final; those on magnification, signal-to-noise
    and magnification x r_s > seeing only drop what cannot pass, and wait for the rendered arcs.
    Sources are placed uniformly over the box |beta_x|, |beta_y| <= theta_E, whose corners lie at
    beta^2 = 2 theta_E^2; a pair of redshifts is kept with the chance (D_ls/D_s)^2, for the area of
    that box, and with it how many sources there are, grows as theta_E^2 (its other factor is in
    `velocity_dispersion`). Sources smaller than the renderer's sub-pixels resolve are left out.

    known: columns of the lens galaxy (rows,) that are not drawn but given, where they are not NaN.
    background: variance of an empty pixel (rows, bands), electrons^2; by default the survey's.

    Columns: z_lens, z_source; velocity_dispersion (km/s); einstein_radius (arcsec); axis_ratio,
    position_angle, x, y of the lens; shear, shear_angle; <galaxy>_radius (arcsec) and
    <galaxy>_magnitude (r), _g_r, _r_i, where <galaxy> is lens or source; source_x, source_y
    (arcsec from the lens), source_axis_ratio, source_angle.
    """
    survey, chosen = config.survey, config.population

    def known_or(name: str, drawn: Array) -> Array:
        return np.where(np.isnan(known[name]), drawn, known[name]) if name in known else drawn

    z_lens = known_or("z_lens", chosen.named(lens_redshift, u[:, 0]))
    sigma = known_or("velocity_dispersion", chosen.named(velocity_dispersion, u[:, 1]))
    i_magnitude = chosen.named(source_i_magnitude, u[:, 2])
    z_source = chosen.named(source_redshift, u[:, 3], i_magnitude)
    theta = einstein_radius(sigma, z_lens, z_source)
    keep = (z_source - z_lens > chosen.min_redshift_gap) & (theta >= chosen.min_einstein_radius)
    keep &= theta <= chosen.max_einstein_radius
    # Of a galaxy whose redshift is given, what counts is its own sources: the best of them pass.
    given = known.get("z_lens", np.full(len(u), np.nan))
    best = np.where(np.isnan(given), 1, distance_ratio(given, _farthest_source(chosen)) ** 2)
    keep &= u[:, 21] * best < distance_ratio(z_lens, z_source) ** 2
    keep &= sigma <= MAX_VELOCITY_DISPERSION

    index = np.flatnonzero(keep)
    u, z_lens, sigma, i_magnitude, z_source, theta = (
        column[index] for column in (u, z_lens, sigma, i_magnitude, z_source, theta)
    )
    known = {name: column[index] for name, column in known.items()}
    background = survey.background_variance if background is None else background[index]
    r_lens, lens_g_r, lens_r_i = lens_light(
        u[:, 4:6].T, z_lens, lens_absolute_magnitude(u[:, 6], sigma)
    )
    source_g_r, source_r_i = source_colours(u[:, 7:9].T, z_source)
    table = pd.DataFrame(
        {
            "z_lens": z_lens,
            "z_source": z_source,
            "velocity_dispersion": sigma,
            "einstein_radius": theta,
            "axis_ratio": known_or("axis_ratio", chosen.named(lens_axis_ratio, u[:, 9], sigma)),
            "position_angle": known_or("position_angle", np.pi * u[:, 10]),
            "x": known_or("x", survey.pixel_scale * (u[:, 11] - 0.5)),
            "y": known_or("y", survey.pixel_scale * (u[:, 12] - 0.5)),
            "shear": chosen.named(shear, u[:, 13]),
            "shear_angle": np.pi * u[:, 14],
            "lens_radius": lens_radius(u[:, 15], sigma) * kpc_to_arcsec(z_lens),
            "lens_magnitude": r_lens,
            "lens_g_r": lens_g_r,
            "lens_r_i": lens_r_i,
            "source_x": theta * (2 * u[:, 16] - 1),
            "source_y": theta * (2 * u[:, 17] - 1),
            "source_axis_ratio": chosen.named(source_axis_ratio, u[:, 18]),
            "source_angle": np.pi * u[:, 19],
            "source_radius": source_radius(u[:, 20], i_magnitude, z_source)
            * kpc_to_arcsec(z_source),
            "source_magnitude": i_magnitude + source_r_i,
            "source_g_r": source_g_r,
            "source_r_i": source_r_i,
        },
        index=index,
    )
    table = table[_may_be_detectable(table, survey, chosen, background)]
    return table[is_multiply_imaged(table)]


def _may_be_detectable(
    table: pd.DataFrame, survey: Survey, cuts: Population, background: Array
) -> NDArray[np.bool_]:
    theta, radius = table["einstein_radius"].to_numpy(), table["source_radius"].to_numpy()
    resolved = 2 * theta**2 > (2 * radius) ** 2 + survey.best_seeing**2
    sampled = radius > MIN_SOURCE_RADIUS * survey.pixel_scale
    # An exponential disc behind an isothermal sphere is magnified 2 theta_E/beta off the centre and
    # 2 theta_E/h (h: its scale length) on it. Twice that leaves room for ellipticity and shear, and
    # no shape is easier to detect than a star against the empty sky.
    beta = np.hypot(table["source_x"].to_numpy(), table["source_y"].to_numpy())
    magnification = 2 * (1 + 2 * theta / np.hypot(beta, radius / 1.678))
    snr = magnification * star_snr(survey, magnitudes(table, "source", survey.bands), background)
    detectable = (magnification > cuts.min_magnification) & (snr > cuts.min_arc_snr)
    sheared = magnification * radius > survey.best_seeing
    return resolved & sampled & detectable & sheared


def star_snr(survey: Survey, magnitudes: Array, background: Array) -> Array:
    """Signal-to-noise (n,) of stars of AB magnitudes (n, bands) on the empty sky, in the best band.

    Within the best aperture for a Gaussian of the survey's seeing. background: variance of an empty
    pixel, electrons^2, (n, bands) or (bands,).
    """
    # Of a radius of 1.585 standard deviations, where (1 - exp(-r^2/2)) / (sqrt(pi) r) is highest.
    share = 0.2546 / (np.array(survey.seeings) / survey.pixel_scale / 2.3548)
    return (share * survey.electrons(magnitudes) / np.sqrt(background)).max(axis=1)


def _farthest_source(chosen: Population) -> Array:
    """The redshift of the farthest source that is waited for."""
    high = np.array(1 - RARE)
    return chosen.named(source_redshift, high, chosen.named(source_i_magnitude, high))


def may_lens(config: SimulationConfig, sigma: Array, z: Array) -> NDArray[np.bool_]:
    """Whether lens galaxies may pass the cuts on geometry, with the most favourable of sources.

    sigma: velocity dispersion, km/s; z: redshift; (n,), NaN where they are drawn. The most
    favourable that is waited for, of what is drawn, is one in 1 / RARE.
    """
    survey, chosen = config.survey, config.population
    low, high = np.array(RARE), np.array(1 - RARE)
    z_source = _farthest_source(chosen)
    near, far = (np.where(np.isnan(z), chosen.named(lens_redshift, u), z) for u in (low, high))
    light, heavy = (
        np.where(np.isnan(sigma), chosen.named(velocity_dispersion, u), sigma) for u in (low, high)
    )
    widest = einstein_radius(heavy, near, z_source)
    narrowest = einstein_radius(light, far, far + chosen.min_redshift_gap)
    smallest = MIN_SOURCE_RADIUS * survey.pixel_scale
    return (
        (z_source - near > chosen.min_redshift_gap)
        & (widest >= chosen.min_einstein_radius)
        & (narrowest <= chosen.max_einstein_radius)
        & (2 * widest**2 > (2 * smallest) ** 2 + survey.best_seeing**2)
    )
