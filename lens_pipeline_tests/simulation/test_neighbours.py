"""Galaxies that happen to be in a cutout, and satellites of its host: as many as on the sky, and in
both of a pair."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
from astropy.cosmology import FlatLambdaCDM

from lens_pipeline.simulation import Simulation, load_config, neighbours, simulate
from lens_pipeline.simulation.neighbours import draw_neighbours
from lens_pipeline.simulation.psf import PSF_RADIUS
from lens_pipeline.simulation.render import Renderer
from lens_pipeline.simulation.sources import SersicDiscs
from lens_pipeline_tests.simulation.drawn import simulation

__all__ = ["simulation"]

DES = load_config("des").survey
SIZE, R_BAND, I_BAND = 64, 1, 2
AREA = (SIZE * DES.pixel_scale / 60) ** 2  # square arcmin


def hosts_of(velocity_dispersion: float, hosts: np.ndarray) -> pd.DataFrame:
    """Hosts at one redshift, in the middle of their cutouts."""
    host = {"z_lens": 0.5, "velocity_dispersion": velocity_dispersion, "x": 0.0, "y": 0.0}
    light = {"lens_radius": 1.0, "lens_magnitude": 18.0, "lens_g_r": 1.86, "lens_r_i": 1.06}
    return pd.DataFrame(host | light, index=hosts)


def alone(hosts: np.ndarray) -> pd.DataFrame:
    """Hosts too light for satellites."""
    return hosts_of(1.0, hosts)


@pytest.fixture(scope="module")
def flux() -> np.ndarray:
    """Electrons in i of the neighbours of each of 500 hosts."""
    renderer = Renderer(DES, SersicDiscs(), SIZE, "cpu")
    hosts = np.arange(500).reshape(2, 250)
    parts = [draw_neighbours(renderer, 4, alone(some)) for some in hosts]
    return np.concatenate([part[:, I_BAND].sum(dim=(1, 2)).numpy() for part in parts])


def electrons_of(i: np.ndarray) -> np.ndarray:
    return DES.electrons(np.broadcast_to(i[..., None], (*i.shape, 3)))[..., I_BAND]


def test_there_are_as_many_as_are_counted_on_the_sky(flux: np.ndarray) -> None:
    """LSST Science Book, section 3.7: 46 x 10^(0.31 (i - 25)) a square arcmin brighter than i."""
    random = np.random.default_rng(0)
    faintest = 25.5  # or thereabouts, a star is seen at 3 sigma
    count = random.poisson(46 * 10 ** (0.31 * (faintest - 25)) * AREA, 20_000)
    i = faintest + np.log10(random.random(count.sum())) / 0.31
    owner = np.arange(len(count)).repeat(count)
    expected = np.bincount(owner[i > 20], electrons_of(i[i > 20]), len(count))
    for limit in electrons_of(np.arange(20.5, 24)):
        # Some of a galaxy's light falls beside the cutout.
        assert (flux > limit).mean() == pytest.approx((expected > limit).mean(), abs=0.05)


def test_their_light_does_not_depend_on_the_pixels() -> None:
    """That of small ones would be missed between sub-pixels, or counted twice."""
    hosts = np.arange(200)
    sums = []
    for finer in (1, 4):
        survey = DES.model_copy(update={"pixel_scale": DES.pixel_scale / finer, "read_noise": 0.0})
        renderer = Renderer(survey, SersicDiscs(), 32 * finer, "cpu")
        drawn = draw_neighbours(renderer, 4, alone(hosts))
        sums.append(drawn[:, I_BAND].sum(dim=(1, 2)).numpy())
    some = sums[1] > 0
    assert (sums[0] > 0).tolist() == some.tolist()
    assert 70 < some.sum() < 200  # and some hosts have none
    ratio = sums[0][some] / sums[1][some]
    assert np.median(ratio) == pytest.approx(1, abs=0.02)
    assert (np.abs(ratio - 1) < 0.15).mean() > 0.9  # but for what lies at an edge


def test_in_large_cutouts_each_is_drawn_on_a_stamp_and_looks_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the time of a cutout would grow with the fourth power of its side."""
    survey = load_config("euclid_vis").survey
    renderer, hosts = Renderer(survey, SersicDiscs(), 192, "cpu"), np.arange(6)
    images = []
    for stamp in (neighbours.STAMP, 192):
        monkeypatch.setattr(neighbours, "STAMP", stamp)
        images.append(draw_neighbours(renderer, 4, hosts_of(300.0, hosts)).numpy())
    inside = (..., slice(PSF_RADIUS, -PSF_RADIUS), slice(PSF_RADIUS, -PSF_RADIUS))
    sigma = np.sqrt(survey.background_variance)[:, None, None]
    on_stamps, whole = (image[inside] / sigma for image in images)
    assert whole.max() > 10
    np.testing.assert_allclose(on_stamps, whole, atol=0.05, rtol=0.01)
    # At an edge the sky mirrors itself only where all of it is drawn at once.
    assert images[0].sum() == pytest.approx(images[1].sum(), rel=0.03)


@cache
def satellites(velocity_dispersion: float) -> np.ndarray:
    """Electrons (hosts, bands, size, size) of the satellites alone, of the more hosts the fewer
    each has."""
    n = {180.0: 1000, 300.0: 700, 400.0: 500}[velocity_dispersion]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "DENSITY", 0.0)  # of galaxies that happen to be there
        renderer = Renderer(DES, SersicDiscs(), SIZE, "cpu")
        return draw_neighbours(renderer, 4, hosts_of(velocity_dispersion, np.arange(n))).numpy()


@pytest.mark.parametrize("velocity_dispersion", [180.0, 300.0, 400.0])
def test_the_heavier_a_host_the_more_satellites_it_has(velocity_dispersion: float) -> None:
    """Of 208 km/s, M = -22.5: 4.5 within 300 kpc and 5 mag. As R^0.9, sigma^3 and exp(-L/L*)."""
    kpc = 1 / FlatLambdaCDM(H0=70, Om0=0.3).arcsec_per_kpc_proper(0.5).value
    # Faber & Jackson's relation of Hyde & Bernardi 2009, and M* of Blanton et al. 2003.
    v = np.log10(velocity_dispersion)
    host = (-0.37 + np.sqrt(0.37**2 - 0.024 * (2.97 + v))) / 0.012
    magnitude = np.linspace(-22.7, -18.2, 4001)
    exists = np.exp(-(10 ** (-0.4 * (magnitude + 21.2)))) * (magnitude > host)
    side = SIZE * DES.pixel_scale
    random = np.random.default_rng(0)
    # R^0.9 within the circle that holds the cutout; of it, what falls into the square.
    radius = side / np.sqrt(2) * random.random(100_000) ** (1 / 0.9)
    angle = 2 * np.pi * random.random(100_000)
    inside = np.abs(radius * [np.cos(angle), np.sin(angle)]).max(axis=0) < side / 2
    below = np.linspace(-22.5, -17.5, 4001)
    a_magnitude = 4.5 / (5 * np.exp(-(10 ** (-0.4 * (below + 21.2)))).mean())
    far = (side / np.sqrt(2) * kpc / 300) ** 0.9
    within = a_magnitude * (velocity_dispersion / 208) ** 3 * far
    count = random.poisson(within * exists.mean() * 4.5 * inside.mean(), 20_000)
    drawn = random.choice(magnitude, count.sum(), p=exists / exists.sum())
    owner = np.arange(len(count)).repeat(count)
    expected = np.bincount(owner, 10 ** (-0.4 * (drawn - host)), len(count))
    of_host = DES.electrons(np.full(3, 18.0))[R_BAND]
    light = satellites(velocity_dispersion)[:, R_BAND].sum(axis=(1, 2)) / of_host
    # Some of it falls beside the cutout, from either side.
    assert light.mean() == pytest.approx(expected.mean(), rel=0.15)
    for share in (0.02, 0.05, 0.1, 0.2):
        assert (light > share).mean() == pytest.approx((expected > share).mean(), abs=0.05)


def test_satellites_have_their_hosts_colours_and_are_nearer_it_than_chance_puts_them() -> None:
    light = satellites(400.0).sum(axis=0)
    g, r, i = (light[band].sum() / DES.electrons(np.full(3, 20.0))[band] for band in range(3))
    assert -2.5 * np.log10(g / r) == pytest.approx(1.86, abs=0.05)
    assert -2.5 * np.log10(r / i) == pytest.approx(1.06, abs=0.05)
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    near = np.hypot(x, y) < SIZE / 4
    assert light[R_BAND][near].sum() / light[R_BAND].sum() > 1.5 * near.mean()


def test_a_batch_may_have_none() -> None:
    """As the only host of a small image often has."""
    renderer = Renderer(load_config("euclid_vis").survey, SersicDiscs(), 32, "cpu")
    alone_of = [draw_neighbours(renderer, 4, alone(np.array([host]))) for host in range(8)]
    assert 1 < sum(not drawn.any() for drawn in alone_of) < 7
    assert len(simulate("euclid_vis", 2, image_size=32).images) == 2


def test_a_lens_and_its_decoy_have_the_same(simulation: Simulation) -> None:
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    beside = np.hypot(x, y) * DES.pixel_scale > 6.5  # beyond all arcs
    clean = (simulation.table["defect"] == "").to_numpy().reshape(-1, 2).all(axis=1)
    clean &= (simulation.table["kind"][1::2] == "unlensed").to_numpy()  # nothing else is there
    lens, decoy = (simulation.images[k::2, I_BAND][clean][:, beside] for k in (0, 1))
    bright = decoy.argmax(axis=1)[:, None]
    found = np.take_along_axis(decoy, bright, 1)[:, 0]
    same = np.take_along_axis(lens, bright, 1)[:, 0]
    assert (found > 10).sum() > 10
    np.testing.assert_allclose(same[found > 10], found[found > 10], atol=8, rtol=0.1)
