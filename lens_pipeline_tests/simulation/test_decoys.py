"""Decoys: the light of the lens that they are paired with, in another arrangement."""

import numpy as np
import pytest
import torch
from lenstronomy.LensModel.lens_model import LensModel
from lenstronomy.Util import param_util

from lens_pipeline.simulation import load_config
from lens_pipeline.simulation.decoy_kinds import MIXTURE
from lens_pipeline.simulation.decoys import draw_decoys
from lens_pipeline.simulation.hosts import SersicHosts
from lens_pipeline.simulation.lenses import Lenses, draw_lenses
from lens_pipeline.simulation.render import Renderer
from lens_pipeline.simulation.sources import make_sources

CONFIG = load_config("des")
HOSTS = range(30)
G, R, I_BAND = 0, 1, 2


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


@pytest.mark.parametrize("kind", ["intruders", "singly_imaged", "group", "star"])
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


@pytest.mark.parametrize("kind", ["spiral", "ring", "edge_on", "merger"])
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


def test_a_singly_imaged_source_is_drawn_out_and_has_no_counter_image(
    galaxies: SersicHosts, lenses: Lenses
) -> None:
    y, x = (torch.arange(64) - 31.5).tile(64, 1).T, (torch.arange(64) - 31.5).tile(64, 1)
    pixel = CONFIG.survey.pixel_scale

    def opposite(light: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Share of the light beyond the host as seen from the centroid, and how much longer across
        the direction to the host than along it."""
        shares, stretched = [], []
        for image, x0, y0 in zip(light, lenses.table["x"], lenses.table["y"], strict=True):
            dx, dy = x - x0 / pixel, y - y0 / pixel
            cx, cy = ((image * d).sum() / image.sum() for d in (dx, dy))
            distance = torch.hypot(cx, cy)
            along, across = (dx * cx + dy * cy) / distance, (dy * cx - dx * cy) / distance
            shares.append(image[along < 0].sum() / image.sum())
            spread = [(image * d**2).sum() / image.sum() for d in (along - distance, across)]
            stretched.append((spread[1] / spread[0]).sqrt())
        return torch.stack(shares), torch.stack(stretched)

    single = (decoys(galaxies, lenses, "singly_imaged") - lenses.galaxy)[:, R]
    share, stretched = opposite(single)
    assert share.median() < 0.01
    assert (share < 0.06).float().mean() > 0.9
    assert stretched.median() > 1.1
    assert opposite(lenses.arcs[:, R])[0].median() > 0.1


@pytest.mark.parametrize("host", [1, 7, 11, 65])
def test_no_clump_of_a_singly_imaged_source_is_seen_twice(host: int, galaxies: SersicHosts) -> None:
    """Sources of these hosts reach far beyond their half-light radius: behind the caustics, where a
    second image would be bright, though their middles have none."""
    lenses = draw_lenses(galaxies, CONFIG, 1, range(host, host + 1))
    kinds = np.array(["singly_imaged"])
    drawn = draw_decoys(galaxies, 1, lenses.table, lenses.galaxy, kinds) - lenses.galaxy
    p = lenses.table.iloc[0]
    e1, e2 = param_util.phi_q2_ellipticity(p["position_angle"], p["axis_ratio"])
    gamma1, gamma2 = param_util.shear_polar2cartesian(p["shear_angle"], p["shear"])
    mass = {"theta_E": p["einstein_radius"], "e1": e1, "e2": e2}
    mass |= {"center_x": p["x"], "center_y": p["y"]}
    field = {"gamma1": gamma1, "gamma2": gamma2, "ra_0": p["x"], "dec_0": p["y"]}
    y, x = (np.mgrid[:64, :64] - 31.5) * CONFIG.survey.pixel_scale
    xx, xy, yx, yy = LensModel(["SIE", "SHEAR"]).hessian(x.ravel(), y.ravel(), [mass, field])
    # Within the critical curve, where counter-images are, by lenstronomy.
    inside = torch.from_numpy(((1 - xx) * (1 - yy) - xy * yx < 0).reshape(64, 64))
    light = drawn[0][:, inside].sum(dim=1).numpy()
    noise = np.sqrt(CONFIG.survey.background_variance * int(inside.sum()))
    assert (light / noise).max() < 2.5


@pytest.mark.parametrize("kind", ["spiral", "ring", "edge_on"])
def test_a_disc_lies_along_its_host_and_has_young_stars(
    kind: str, galaxies: SersicHosts, lenses: Lenses
) -> None:
    drawn = decoys(galaxies, lenses, kind)
    colour, of_host = (
        2.5 * torch.log10(image[:, G].sum(dim=(1, 2)) / image[:, R].sum(dim=(1, 2)))
        for image in (drawn, lenses.galaxy)
    )
    assert (colour > of_host).all()
    assert (colour - of_host).median() > 0.1
    y, x = np.mgrid[:64, :64] - 31.5
    light = drawn[:, R].numpy() * (np.hypot(x, y) < 20)
    light /= light.sum(axis=(1, 2), keepdims=True)
    xx, yy, xy = ((light * product).sum(axis=(1, 2)) for product in (x * x, y * y, x * y))
    # Of the second moments: the major axis, and how much longer it is.
    angle, flattening = np.arctan2(2 * xy, xx - yy) / 2, np.hypot(2 * xy, xx - yy) / (xx + yy)
    turned = (angle - lenses.table["position_angle"] + np.pi / 2) % np.pi - np.pi / 2
    flat = flattening > 0.15
    assert flat.sum() >= 5
    assert np.abs(turned[flat]).max() < np.radians(15)


def test_a_late_type_is_blue_to_its_middle_and_smaller(
    galaxies: SersicHosts, lenses: Lenses
) -> None:
    """What lens finders take for arcs around a red galaxy: no red galaxy is there."""
    drawn, host = decoys(galaxies, lenses, "late_type"), lenses.galaxy
    middle = (..., slice(29, 35), slice(29, 35))
    # An old galaxy that is as much nearer would be bluer by 0.4 and 0.3 mag.
    for blue, red, bluer in ((G, R, 0.6), (R, I_BAND, 0.4)):
        colour, of_host = (
            -2.5
            * torch.log10(image[middle][:, blue].sum((1, 2)) / image[middle][:, red].sum((1, 2)))
            for image in (drawn, host)
        )
        assert (of_host - colour).median() > bluer
        assert (of_host > colour).all()
    share, of_host = (
        image[middle][:, R].sum((1, 2)) / image[:, R].sum((1, 2)) for image in (drawn, host)
    )
    assert (share > of_host).float().mean() > 0.6


def test_kinds_differ_from_each_other(galaxies: SersicHosts, lenses: Lenses) -> None:
    images = {kind: decoys(galaxies, lenses, kind)[:, R].numpy() for kind in MIXTURE}
    for one in MIXTURE:
        for other in MIXTURE:
            if one < other and {one, other} != {"artefact", "unlensed"}:  # but for a defect
                assert not np.allclose(images[one], images[other], rtol=0.05), (one, other)
