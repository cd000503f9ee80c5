"""What a cutout shows besides its host, lens or not: galaxies that happen to be near the line of
sight, and the host's satellites."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from lens_pipeline.simulation.population import (
    RED_SCATTER,
    Array,
    kpc_to_arcsec,
    lens_absolute_magnitude,
    magnitudes,
    source_axis_ratio,
    source_colours,
    source_i_magnitude,
    source_radius,
    source_redshift,
    star_snr,
)
from lens_pipeline.simulation.psf import PSF_RADIUS
from lens_pipeline.simulation.render import Renderer, add_in_order
from lens_pipeline.simulation.streams import Purpose, stream

# Per square arcsec, of the magnitudes that `source_i_magnitude` draws, 20 to 27 (one cutout in ten
# of DES has a brighter one): 46 x 10^(0.31 (i - 25)) per square arcmin are brighter than i (LSST
# Science Book, section 3.7).
DENSITY = 46 * (10 ** (0.31 * (27 - 25)) - 10 ** (0.31 * (20 - 25))) / 3600
MIN_SNR = 3.0  # of a star as bright; what is fainter drowns in the sky's noise
MIN_RADIUS = 0.6  # pixels: smaller ones look the same, but sub-pixels would miss their light
DEVIATES = 9
STAMP = 64  # pixels: the side of the smallest stamp
# Half-light radii along the major axis: beyond is 1 in 500 of a disc's light, and an elliptical is
# 1 in 400 as bright as at its half-light radius.
HELD = {"disc": 5, "elliptical": 10}

# Ellipticals of 1 to 2 x 10^11 solar masses, M = -22.5 in r, have 4.5 satellites within 300 kpc and
# 5 mag (Ruiz et al. 2015, MNRAS 454, 1605). The integral of exp(-L/L*) over those is 3.1 mag: where
# many are seen, there are 1.45 a magnitude. Within R there are ~ R^0.9 of them at all redshifts
# below 0.8, of all magnitudes (Nierenberg et al. 2012, ApJ 752, 99: a surface density ~ R^-1.1),
# and as many more as the halo has mass (Wang & White 2012, MNRAS 424, 2574), which is taken to grow
# as the cube of the velocity dispersion: 208 km/s at that magnitude.
SATELLITES, WITHIN, VELOCITY_DISPERSION = 1.45, 300, 208
RADIAL_SLOPE = 0.9
CHARACTERISTIC = -21.2  # M* in r of the galaxies' luminosity function (Blanton et al. 2003)
BRIGHTEST, FAINTEST = -22.7, -18.2  # beyond is 1 in 50 of a magnitude's, and 1/16 of L*

Neighbours = tuple[pd.DataFrame, NDArray[np.int64]]  # a row each, and the place of its host


def draw_neighbours(renderer: Renderer, seed: int, lenses: pd.DataFrame) -> Tensor:
    """Expected electrons (hosts, bands, size, size), after the PSF. lenses: a row a host."""
    electrons = renderer.darkness(len(lenses))
    for profile, draw in {"disc": _unrelated, "elliptical": _satellites}.items():
        table, owner = draw(renderer, seed, lenses)
        sides = _stamps(profile, table, renderer)
        for side in np.unique(sides):
            add = add_components if side == renderer.size else _add_stamps
            here = sides == side
            add(electrons, owner[here], renderer.of_size(side), profile, table[here])
    return electrons


def _unrelated(renderer: Renderer, seed: int, lenses: pd.DataFrame) -> Neighbours:
    """Exponential discs with the sizes, colours and redshifts of `population`'s sources, uniformly
    over the cutout, as many as number counts say."""
    mean = np.full(len(lenses), DENSITY * (renderer.size * renderer.survey.pixel_scale) ** 2)
    u, owner = _deviates(seed, lenses, Purpose.NEIGHBOURS, mean)
    return _seen(_galaxies(u, renderer), owner, renderer)


def _satellites(renderer: Renderer, seed: int, lenses: pd.DataFrame) -> Neighbours:
    """Ellipticals with the host's surface brightness and, but for their scatter, its colours.

    Their luminosity function is Schechter's with alpha = -1: as many of every magnitude, but that
    exp(-L/L*) of them are left, and none that is brighter than the host.
    """
    scale = kpc_to_arcsec(lenses["z_lens"].to_numpy())
    farthest = renderer.size * renderer.survey.pixel_scale / np.sqrt(2) / scale
    mass = (lenses["velocity_dispersion"].to_numpy() / VELOCITY_DISPERSION) ** 3
    mean = SATELLITES * mass * (farthest / WITHIN) ** RADIAL_SLOPE * (FAINTEST - BRIGHTEST)
    u, owner = _deviates(seed, lenses, Purpose.SATELLITES, mean)
    magnitude = BRIGHTEST + (FAINTEST - BRIGHTEST) * u[:, 0]
    of_host = lens_absolute_magnitude(
        np.full(len(lenses), 0.5), lenses["velocity_dispersion"].to_numpy()
    )[owner]
    exist = u[:, 1] < np.exp(-(10 ** (-0.4 * (magnitude - CHARACTERISTIC))))
    exist &= magnitude > of_host
    u, owner, fainter = u[exist], owner[exist], (magnitude - of_host)[exist]
    host = lenses.iloc[owner]
    distance = (farthest * scale)[owner] * u[:, 2] ** (1 / RADIAL_SLOPE)
    scatter = RED_SCATTER * ndtri(u[:, 6:8])
    table = pd.DataFrame(
        {
            "x": host["x"].to_numpy() + distance * np.cos(2 * np.pi * u[:, 3]),
            "y": host["y"].to_numpy() + distance * np.sin(2 * np.pi * u[:, 3]),
            "lens_radius": host["lens_radius"].to_numpy() * 10 ** (-0.2 * fainter),
            "axis_ratio": 0.5 + 0.5 * u[:, 4],
            "position_angle": np.pi * u[:, 5],
            "component_magnitude": host["lens_magnitude"].to_numpy() + fainter,
            "component_g_r": host["lens_g_r"].to_numpy() + scatter[:, 0],
            "component_r_i": host["lens_r_i"].to_numpy() + scatter[:, 1],
        }
    )
    return _seen(table, owner, renderer)


def _deviates(
    seed: int, lenses: pd.DataFrame, purpose: Purpose, mean: Array
) -> tuple[Array, NDArray[np.int64]]:
    """Uniform deviates (n, DEVIATES) of what there is around each host, `mean` on average (hosts,),
    and the host of each, (n,)."""
    streams = [stream(seed, host, purpose) for host in lenses.index]
    drawn = [
        random.random((random.poisson(many), DEVIATES))
        for random, many in zip(streams, mean, strict=True)
    ]
    return np.concatenate(drawn), np.arange(len(lenses)).repeat([len(u) for u in drawn])


def _seen(table: pd.DataFrame, owner: NDArray[np.int64], renderer: Renderer) -> Neighbours:
    light = magnitudes(table, "component", renderer.bands)
    seen = star_snr(renderer.survey, light, renderer.survey.background_variance) > MIN_SNR
    return table[seen], owner[seen]


def _stamps(profile: str, table: pd.DataFrame, renderer: Renderer) -> NDArray[np.int64]:
    """The side in pixels of the stamp that holds the light of each, (rows,): the cutout's own, or a
    smaller one, for the number of neighbours grows with the area of what each would be drawn on."""
    radius = table["radius" if profile == "disc" else "lens_radius"]
    major = radius / np.sqrt(table["axis_ratio"]) / renderer.survey.pixel_scale
    wanted = 2 * (PSF_RADIUS + HELD[profile] * major.to_numpy())
    stamp = (STAMP * 2 ** np.ceil(np.log2(np.maximum(wanted / STAMP, 1)))).astype(np.int64)
    return np.minimum(stamp, renderer.size)


def _add_stamps(
    electrons: Tensor,
    owner: NDArray[np.int64],
    stamp: Renderer,
    profile: str,
    table: pd.DataFrame,
) -> None:
    """As `add_components`, each drawn on a stamp of its own, smaller than the cutout."""
    size, side, pixel = electrons.shape[-1], stamp.size, stamp.survey.pixel_scale
    place = table[["x", "y"]].to_numpy() / pixel + (size - 1) / 2  # in pixels of the cutout
    low = np.round(place - (side - 1) / 2).astype(int)
    table = table.assign(**dict(zip("xy", (place - low - (side - 1) / 2).T * pixel, strict=True)))
    for start in range(0, len(table), stamp.together):
        rows = slice(start, start + stamp.together)
        light = stamp.darkness(len(table[rows]))
        add_components(light, np.arange(len(light)), stamp, profile, table[rows])
        for one, number, (left, top) in zip(light, owner[rows], low[rows], strict=True):
            inside = [slice(max(begin, 0), max(begin + side, 0)) for begin in (top, left)]
            shown = electrons[number][:, inside[0], inside[1]]
            above, before = max(-top, 0), max(-left, 0)
            shown += one[:, above : above + shown.shape[1], before : before + shown.shape[2]]


def _galaxies(u: Array, renderer: Renderer) -> pd.DataFrame:
    i_magnitude = source_i_magnitude(u[:, 0])
    z = source_redshift(u[:, 1], i_magnitude)
    g_r, r_i = source_colours(u[:, 2:4].T, z)
    pixel = renderer.survey.pixel_scale
    side = renderer.size * pixel
    radius = source_radius(u[:, 6], i_magnitude, z) * kpc_to_arcsec(z)
    return pd.DataFrame(
        {
            "x": side * (u[:, 4] - 0.5),
            "y": side * (u[:, 5] - 0.5),
            "radius": np.maximum(radius, MIN_RADIUS * pixel),
            "axis_ratio": source_axis_ratio(u[:, 7]),
            "angle": np.pi * u[:, 8],
            "component_magnitude": i_magnitude + r_i,
            "component_g_r": g_r,
            "component_r_i": r_i,
        }
    )


def add_components(
    electrons: Tensor,
    owner: NDArray[np.int64],
    renderer: Renderer,
    profile: str,
    table: pd.DataFrame,
) -> None:
    """Add to the electrons (n, bands, size, size) the light of a table's rows, after the PSF, each
    to its owner's, (rows,); of a profile as in `Renderer.component`."""
    for start in range(0, len(table), renderer.together):
        rows = slice(start, start + renderer.together)
        part = table.iloc[rows]
        image = renderer.blur(renderer.component(profile, renderer.parameters(part)))
        light = renderer.electrons(image, magnitudes(part, "component", renderer.bands))
        add_in_order(electrons, owner[rows], light)
