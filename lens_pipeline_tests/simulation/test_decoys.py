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


@pytest.mark.parametrize("kind", sorted(set(MIXTURE) - {"unlensed", "artefact", "group"}))
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


@pytest.mark.parametrize("kind", ["unlensed", "artefact"])
def test_some_are_the_galaxy_alone(kind: str, galaxies: SersicHosts, lenses: Lenses) -> None:
    torch.testing.assert_close(decoys(galaxies, lenses, kind), lenses.galaxy)


@pytest.mark.parametrize("kind", ["intruders", "edge_on", "group", "star"])
def test_galaxies_and_stars_beside_a_host_take_nothing_of_it(
    kind: str, galaxies: SersicHosts, lenses: Lenses
) -> None:
    added = decoys(galaxies, lenses, kind) - lenses.galaxy
    assert (added >= -1e-6 * lenses.galaxy.amax(dim=(2, 3), keepdim=True)).all()
    assert (added.sum(dim=(2, 3)) > 0).all()


def test_members_of_a_group_have_light_of_their_own(galaxies: SersicHosts, lenses: Lenses) -> None:
    """Two to four, 0.5 to 3 mag fainter than the host, and the arcs' light on a blue one."""
    drawn, host = decoys(galaxies, lenses, "group")[:, R], lenses.galaxy[:, R]
    members = (drawn - host - lenses.arcs[:, R]).sum(dim=(1, 2)) / host.sum(dim=(1, 2))
    brightest, faintest = 10 ** (-0.4 * 0.5), 10 ** (-0.4 * 3)
    # Some light falls beside the cutout, of the blue one, too.
    assert ((members > 1.2 * faintest) & (members < 4 * brightest)).float().mean() > 0.85
    assert members.median().item() == pytest.approx(3 * 0.16, abs=0.15)


def test_the_share_of_light_in_the_middle_is_not_enough_to_know_a_group(
    galaxies: SersicHosts, lenses: Lenses
) -> None:
    y, x = np.mgrid[:64, :64] - 31.5
    middle = torch.from_numpy(np.hypot(x, y) < 3.8)
    lens, group = (
        image[:, R][:, middle].sum(dim=1) / image[:, R].sum(dim=(1, 2))
        for image in (lenses.galaxy + lenses.arcs, decoys(galaxies, lenses, "group"))
    )
    assert (lens[:, None] > group).float().mean() < 0.93  # 0.5 would be none, 1 all of it


@pytest.mark.parametrize("kind", ["spiral", "ring", "merger"])
def test_what_surrounds_a_galaxy_takes_little_of_its_middle(
    kind: str, galaxies: SersicHosts, lenses: Lenses
) -> None:
    """Else "less concentrated" would be enough to know a decoy."""
    middle = (slice(None), R, slice(30, 34), slice(30, 34))
    kept = decoys(galaxies, lenses, kind)[middle].sum(dim=(1, 2)) / (
        lenses.galaxy[middle].sum(dim=(1, 2))
    )
    assert kept.median() > 0.75
    assert kept.min() > 0.5


def test_kinds_differ_from_each_other(galaxies: SersicHosts, lenses: Lenses) -> None:
    images = {kind: decoys(galaxies, lenses, kind)[:, R].numpy() for kind in MIXTURE}
    for one in MIXTURE:
        for other in MIXTURE:
            if one < other and {one, other} != {"artefact", "unlensed"}:  # but for a defect
                assert not np.allclose(images[one], images[other], rtol=0.05), (one, other)
