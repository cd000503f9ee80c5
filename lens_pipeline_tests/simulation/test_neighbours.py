"""Galaxies that happen to be in a cutout: as many as on the sky, and in both of a pair."""

import numpy as np
import pytest

from lens_pipeline.simulation import Simulation, load_config, neighbours, simulate
from lens_pipeline.simulation.neighbours import draw_neighbours
from lens_pipeline.simulation.render import PSF_RADIUS, Renderer
from lens_pipeline.simulation.sources import SersicDiscs

DES = load_config("des").survey
SIZE, I_BAND = 64, 2
AREA = (SIZE * DES.pixel_scale / 60) ** 2  # square arcmin


@pytest.fixture(scope="module")
def flux() -> np.ndarray:
    """Electrons in i of the neighbours of each of 1000 hosts."""
    renderer = Renderer(DES, SersicDiscs(), SIZE, "cpu")
    parts = [draw_neighbours(renderer, 4, np.arange(k, k + 250)) for k in range(0, 1000, 250)]
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
    hosts = np.arange(300)
    sums = []
    for finer in (1, 4):
        survey = DES.model_copy(update={"pixel_scale": DES.pixel_scale / finer, "read_noise": 0.0})
        renderer = Renderer(survey, SersicDiscs(), 32 * finer, "cpu")
        sums.append(draw_neighbours(renderer, 4, hosts)[:, I_BAND].sum(dim=(1, 2)).numpy())
    some = sums[1] > 0
    assert (sums[0] > 0).tolist() == some.tolist()
    assert 100 < some.sum() < 300  # and some hosts have none
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
        images.append(draw_neighbours(renderer, 4, hosts).numpy())
    inside = (..., slice(PSF_RADIUS, -PSF_RADIUS), slice(PSF_RADIUS, -PSF_RADIUS))
    sigma = np.sqrt(survey.background_variance)[:, None, None]
    on_stamps, whole = (image[inside] / sigma for image in images)
    assert whole.max() > 10
    np.testing.assert_allclose(on_stamps, whole, atol=0.05, rtol=0.01)
    # At an edge the sky mirrors itself only where all of it is drawn at once.
    assert images[0].sum() == pytest.approx(images[1].sum(), rel=0.03)


def test_a_batch_may_have_none() -> None:
    """As the only host of a small image often has."""
    for seed in range(20):
        assert len(simulate("euclid_vis", 2, seed=seed, image_size=32).images) == 2


@pytest.fixture(scope="module")
def pairs() -> Simulation:
    config = load_config("des").model_copy(update={"decoys": {"unlensed": 1.0}})
    return simulate("des", 200, seed=6, config=config)


def test_a_lens_and_its_decoy_have_the_same(pairs: Simulation) -> None:
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    beside = np.hypot(x, y) * DES.pixel_scale > 6.5  # beyond all arcs
    clean = (pairs.table["defect"] == "").to_numpy().reshape(-1, 2).all(axis=1)
    lens, decoy = (pairs.images[k::2, I_BAND][clean][:, beside] for k in (0, 1))
    bright = decoy.argmax(axis=1)[:, None]
    found = np.take_along_axis(decoy, bright, 1)[:, 0]
    same = np.take_along_axis(lens, bright, 1)[:, 0]
    assert (found > 10).sum() > 10
    np.testing.assert_allclose(same[found > 10], found[found > 10], atol=8, rtol=0.1)
