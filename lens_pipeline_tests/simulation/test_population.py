"""The population against lenstronomy, astropy and the published distributions."""

import numpy as np
import pandas as pd
import pytest
from astropy.cosmology import FlatLambdaCDM
from lenstronomy.Cosmo.lens_cosmo import LensCosmo
from lenstronomy.LensModel.lens_model import LensModel
from lenstronomy.LensModel.Solver.lens_equation_solver import LensEquationSolver
from lenstronomy.Util.param_util import phi_q2_ellipticity, shear_polar2cartesian
from scipy.integrate import quad
from scipy.stats import gamma, kstest

from lens_pipeline.simulation import SimulationConfig, load_config, population
from lens_pipeline.simulation.config import Population
from lens_pipeline.simulation.multiplicity import is_multiply_imaged

COSMOLOGY = FlatLambdaCDM(H0=70, Om0=0.3)
U = np.random.default_rng(0).uniform(size=4000)


@pytest.mark.parametrize(
    ("sigma", "z_lens", "z_source"), [(200.0, 0.3, 1.0), (250.0, 0.5, 2.0), (320.0, 0.8, 3.0)]
)
def test_einstein_radius_is_that_of_lenstronomy(
    sigma: float, z_lens: float, z_source: float
) -> None:
    theirs = LensCosmo(z_lens, z_source, COSMOLOGY).sis_sigma_v2theta_E(sigma)
    ours = population.einstein_radius(np.array(sigma), np.array(z_lens), np.array(z_source))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_source_in_front_of_the_lens_is_not_lensed() -> None:
    assert population.einstein_radius(np.array(250.0), np.array(1.0), np.array(0.5)) == 0


def test_distances_are_those_of_astropy() -> None:
    z = np.array([0.1, 0.5, 1.0, 2.5])
    np.testing.assert_allclose(
        population.distance_modulus(z), COSMOLOGY.distmod(z).value, atol=1e-3
    )
    np.testing.assert_allclose(
        population.kpc_to_arcsec(z), COSMOLOGY.arcsec_per_kpc_proper(z).value, rtol=1e-4
    )


def test_lenses_fill_the_comoving_volume() -> None:
    volume = COSMOLOGY.comoving_volume
    z = population.lens_redshift(U)
    assert kstest(volume(z).value / volume(2.0).value, "uniform").pvalue > 0.01


def phi(s: float) -> float:
    """Velocity dispersions of galaxies, Choi, Park & Vogeley 2007."""
    return (s / 161) ** 2.32 * np.exp(-((s / 161) ** 2.67)) / s


def test_velocity_dispersions_follow_the_published_function_and_the_cross_section() -> None:
    def lenses(s: float) -> float:
        return phi(s) * s**4

    total = quad(lenses, 100, 400)[0]
    found = population.velocity_dispersion(U)
    assert kstest(found, np.vectorize(lambda s: quad(lenses, 100, s)[0] / total)).pvalue > 0.01


def every_pair() -> SimulationConfig:
    """No cut but those on redshifts and Einstein radii, of at least 1 arcsec, that matters."""
    return SimulationConfig.model_validate(
        {
            "survey": load_config("des").survey.model_dump() | {"seeing": 0.1, "pixel_scale": 0.05},
            "population": {
                "source_i_magnitude": {"distribution": "constant", "value": 26.5},  # small, and far
                "min_einstein_radius": 1.0,
                "min_magnification": 0,
                "min_arc_snr": 0,
            },
        }
    )


def test_a_galaxy_lenses_as_often_as_its_einstein_radius_squared() -> None:
    """Of the Einstein radii of all pairs of galaxies, each weighing its area: here by weights."""
    config = every_pair()
    random = np.random.default_rng(1)
    found = population.candidates(random.random((400_000, population.COLUMNS)), config)
    n = 1_000_000
    grid = np.linspace(100, 400, 3001)
    sigma = random.choice(grid, n, p=phi(grid) / phi(grid).sum())
    z_lens = population.lens_redshift(random.random(n))
    z_source = population.source_redshift(random.random(n), np.full(n, 26.5))
    theta = population.einstein_radius(sigma, z_lens, z_source)
    kept = (theta >= 1) & (theta <= 3) & (z_source - z_lens > 0.4)
    for name, all_pairs in (
        ("einstein_radius", theta),
        ("z_lens", z_lens),
        ("z_source", z_source),
        ("velocity_dispersion", sigma),
    ):
        ours, theirs, weight = found[name], all_pairs[kept], theta[kept] ** 2
        order = theirs.argsort()
        cumulative = weight[order].cumsum() / weight.sum()
        theirs_at = np.interp(np.sort(ours), theirs[order], cumulative)
        distance = np.abs(theirs_at - (np.arange(len(ours)) + 0.5) / len(ours)).max()
        assert distance < 0.03, name


def test_sources_down_to_a_limit_have_the_published_redshifts() -> None:
    """LSST Science Book, section 3.8: its z0 is of all galaxies brighter than i, not of those at i,
    which are farther."""
    random = np.random.default_rng(4)
    i = population.source_i_magnitude(random.random(1_000_000))
    z = population.source_redshift(random.random(len(i)), i)
    for limit in (25.0, 26.5):
        published = gamma(3, scale=0.0417 * limit - 0.744)
        assert kstest(z[i < limit][:20_000], published.cdf).statistic < 0.03
        faintest = z[(i < limit) & (i > limit - 0.1)]
        assert np.median(faintest) > 1.1 * published.median()


@pytest.mark.parametrize(("r_i", "brighter"), [(0.0, 0.0), (1.06, 0.84), (1.55, 1.2)])
def test_vis_is_brighter_than_r_by_what_its_red_end_sees(r_i: float, brighter: float) -> None:
    """Of red galaxies at redshift 0.5 and 0.7, near (r + i + z) / 3 with i - z = 0.5, as LensPop
    has it (Collett 2015)."""
    table = pd.DataFrame({"lens_magnitude": [20.0], "lens_g_r": [1.8], "lens_r_i": [r_i]})
    (vis,) = population.magnitudes(table, "lens", ("VIS",))[0]
    assert vis == pytest.approx(20 - brighter, abs=0.12)


def test_there_are_no_galaxies_beyond_the_relations() -> None:
    """A distribution may well reach further: the lens's magnitude would be no number."""
    wide = {"distribution": "uniform", "low": 300, "high": 700}
    config = load_config("des").model_copy(
        update={"population": Population.model_validate({"velocity_dispersion": wide})}
    )
    found = population.candidates(
        np.random.default_rng(0).random((60_000, population.COLUMNS)), config
    )
    assert found["velocity_dispersion"].between(300, 500).all()
    assert found.notna().all(axis=None)
    none = {"distribution": "constant", "value": 550}
    with pytest.raises(ValueError, match="velocity_dispersion: half of it is above 500 km/s"):
        Population.model_validate({"velocity_dispersion": none})


def test_a_given_galaxy_weighs_its_own_sources_and_finds_them_soon() -> None:
    """A pool of far galaxies is not worn out by what near ones would lens."""
    n, z, sigma = 200_000, 1.2, 300.0
    u = np.random.default_rng(2).random((n, population.COLUMNS))
    given = {"z_lens": np.full(n, z), "velocity_dispersion": np.full(n, sigma)}
    found = population.candidates(u, every_pair(), given)
    random = np.random.default_rng(3).random(n)
    z_source = np.sort(population.source_redshift(random, np.full(n, 26.5)))
    theta = population.einstein_radius(np.array(sigma), np.array(z), z_source)
    weight = np.where((theta >= 1) & (z_source - z > 0.4), theta**2, 0)
    theirs = np.interp(np.sort(found["z_source"]), z_source, weight.cumsum() / weight.sum())
    ours = (np.arange(len(found)) + 0.5) / len(found)
    assert np.abs(theirs - ours).max() < 0.03
    largest = population.einstein_radius(np.array(sigma), np.array(0.0), np.array(10.0))
    assert len(found) > 2 * weight.sum() / largest**2  # had it been weighed against any galaxy


def test_axis_ratios_are_rayleigh_and_stay_in_bounds() -> None:
    sigma = np.full_like(U, 250.0)
    q = population.lens_axis_ratio(U, sigma)
    assert q.min() >= 0.2
    assert q.max() <= 1
    scale = 0.378 - 0.000572 * 250
    below = 1 - np.exp(-0.5 * (0.8 / scale) ** 2)
    assert kstest(1 - q, lambda e: (1 - np.exp(-0.5 * (e / scale) ** 2)) / below).pvalue > 0.01


def test_lens_sizes_follow_the_relation_with_its_scatter() -> None:
    radius = np.log10(population.lens_radius(U, np.full_like(U, 250.0)))
    v = np.log10(250)
    assert np.median(radius) == pytest.approx(2.46 - 2.79 * v + 0.84 * v**2, abs=0.01)
    assert radius.std() == pytest.approx(0.11, rel=0.05)


def test_source_sizes_follow_the_relation_with_its_scatter() -> None:
    z, magnitude = np.full_like(U, 1.5), np.full_like(U, 24.0)
    radius = np.log10(population.source_radius(U, magnitude, z))
    absolute = 24 - COSMOLOGY.distmod(1.5).value
    expected = -(absolute + 18) / 4 - 1.2 * np.log10(2.5 / 1.6)
    assert np.median(radius) == pytest.approx(expected, abs=0.03)
    assert radius.std() == pytest.approx(0.35, rel=0.05)


@pytest.mark.parametrize("shear", [0.0, 0.1, 0.4])
def test_where_a_source_is_multiply_imaged_is_where_lenstronomy_finds_images(shear: float) -> None:
    random = np.random.default_rng(4)
    n = 60
    table = pd.DataFrame(
        {
            "einstein_radius": random.uniform(0.5, 3, n),
            "axis_ratio": random.uniform(0.25, 1, n),
            "position_angle": random.uniform(0, np.pi, n),
            "shear": shear,
            "shear_angle": random.uniform(0, np.pi, n),
        }
    )
    for axis in ("source_x", "source_y"):
        table[axis] = table["einstein_radius"] * random.uniform(-1, 1, n)
    solver = LensEquationSolver(LensModel(["SIE", "SHEAR"]))
    count = []
    for row in table.itertuples():
        e1, e2 = phi_q2_ellipticity(row.position_angle, row.axis_ratio)
        gamma1, gamma2 = shear_polar2cartesian(row.shear_angle, row.shear)
        mass = {"theta_E": row.einstein_radius, "e1": e1, "e2": e2, "center_x": 0, "center_y": 0}
        around = {"gamma1": gamma1, "gamma2": gamma2, "ra_0": 0, "dec_0": 0}
        images = solver.image_position_from_source(
            row.source_x,
            row.source_y,
            [mass, around],
            min_distance=0.05 * row.einstein_radius,
            search_window=6 * row.einstein_radius,
        )
        count.append(len(images[0]))
    several = np.array(count) > 1
    assert 10 < several.sum() < 58
    # An image that is about to vanish on the lens is too faint for their solver, one in some.
    assert (is_multiply_imaged(table) != several).sum() <= 1
