"""Decoys: the light of the lens that they are paired with, in another arrangement."""

import numpy as np
import pytest
import torch

from lens_pipeline.simulation import load_config
from lens_pipeline.simulation.decoy_kinds import MIXTURE
from lens_pipeline.simulation.decoys import draw_decoys
from lens_pipeline.simulation.hosts import SersicHosts
from lens_pipeline.simulation.lenses import Lenses, draw_lenses
from lens_pipeline.simulation.render import Renderer
from lens_pipeline.simulation.sources import make_sources

CONFIG = load_config("des")
HOSTS = range(30)
R = 1


@pytest.fixture(scope="module")
def galaxies() -> SersicHosts:
    return SersicHosts(Renderer(CONFIG.survey, make_sources("hubble", "cpu"), 64, "cpu"))


@pytest.fixture(scope="module")
def lenses(galaxies: SersicHosts) -> Lenses:
    return draw_lenses(galaxies, CONFIG, 7, HOSTS)


def decoys(galaxies: SersicHosts, lenses: Lenses, kind: str) -> torch.Tensor:
    kinds = np.full(len(HOSTS), kind)
    return draw_decoys(galaxies, 7, lenses.table, lenses.galaxy, kinds)


@pytest.mark.parametrize("kind", sorted(set(MIXTURE) - {"unlensed", "artefact"}))
def test_a_decoy_has_the_light_of_its_lens_and_not_its_shape(
    kind: str, galaxies: SersicHosts, lenses: Lenses
) -> None:
    drawn, lens = decoys(galaxies, lenses, kind)[:, R], (lenses.galaxy + lenses.arcs)[:, R]
    ratio = drawn.sum(dim=(1, 2)) / lens.sum(dim=(1, 2))
    # In the cutout: of the largest some light falls beside it.
    assert ratio.median().item() == pytest.approx(1, abs=0.06)
    assert ((ratio > 0.7) & (ratio < 1.3)).float().mean() > 0.9
    moved = (drawn - lens).abs().sum(dim=(1, 2)) / 2
    arcs = lenses.arcs[:, R].sum(dim=(1, 2))
    assert (moved / arcs).median() > 0.1


def test_unlensed_is_the_galaxy_alone_and_an_artefact_is_in_one_band(
    galaxies: SersicHosts, lenses: Lenses
) -> None:
    torch.testing.assert_close(decoys(galaxies, lenses, "unlensed"), lenses.galaxy)
    added = decoys(galaxies, lenses, "artefact") - lenses.galaxy
    background = torch.from_numpy(CONFIG.survey.background_variance).float().sqrt()
    height = added.amax(dim=(2, 3)) / background
    assert ((height > 2).sum(dim=1) == 1).all()


def test_kinds_differ_from_each_other(galaxies: SersicHosts, lenses: Lenses) -> None:
    images = {kind: decoys(galaxies, lenses, kind)[:, R].numpy() for kind in MIXTURE}
    for one in MIXTURE:
        for other in MIXTURE:
            if one < other:
                assert not np.allclose(images[one], images[other], rtol=0.05), (one, other)
