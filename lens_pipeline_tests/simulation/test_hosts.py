"""Real images as hosts: what they show stays as it is, and what is added is right."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kstest

from lens_pipeline.catalogue.images import read_cutout
from lens_pipeline.catalogue.splits import assign_splits
from lens_pipeline.catalogue.table import read_catalogue
from lens_pipeline.simulation import Simulation, SimulationConfig, load_config, simulate
from lens_pipeline.simulation.decoy_kinds import KEEP_HOST, MIXTURE
from lens_pipeline.simulation.decoys import draw_decoys
from lens_pipeline.simulation.hosts import RealHosts, SersicHosts
from lens_pipeline.simulation.lenses import Lenses, draw_lenses
from lens_pipeline.simulation.render import Renderer
from lens_pipeline.simulation.simulate import simulate_catalogue
from lens_pipeline.simulation.sources import make_sources
from lens_pipeline_tests.simulation.pools import (
    BANDS,
    DES,
    MIN_ARC_SNR,
    SIGMA,
    SIZE,
    ZERO_POINT,
    config_of,
    galaxies_of,
    write_pool,
)

POOL = 60  # galaxies


@cache
def image(pool: str, host: str) -> np.ndarray:
    """What is stored of a galaxy, read without the simulation."""
    return read_cutout([paths_of(pool)[host]], SIZE, bands=BANDS).pixels


@cache
def paths_of(pool: str) -> dict[str, str]:
    return dict(read_catalogue(pool).table[["id", "path"]].to_numpy())


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    groups = [f"field{k // 2}" for k in range(POOL)]
    return write_pool(
        tmp_path_factory.mktemp("hosts") / "lrg", POOL, group=groups, ra=150.0, dec=2.0
    )


@pytest.fixture(scope="module")
def config(pool: str) -> SimulationConfig:
    return config_of(pool)


@pytest.fixture(scope="module")
def simulation(config: SimulationConfig) -> Simulation:
    return simulate("des", 160, seed=4, image_size=SIZE, config=config)


@pytest.fixture(scope="module")
def lenses(config: SimulationConfig) -> Iterator[tuple[RealHosts, Lenses]]:
    """The lenses of `simulation`."""
    galaxies = galaxies_of(config)
    with torch.inference_mode():
        yield galaxies, draw_lenses(galaxies, config, 4, range(80))


def test_an_unlensed_galaxy_is_its_image_bit_by_bit(simulation: Simulation, pool: str) -> None:
    table = simulation.table
    unlensed = np.flatnonzero((table["kind"] == "unlensed") & (table["defect"] == ""))
    assert len(unlensed) > 10
    for row in unlensed:
        np.testing.assert_array_equal(simulation.images[row], image(pool, table["host"][row]))
    assert (simulation.table["ra"] == 150).all()
    unknown = ["lens_radius", "lens_magnitude", "lens_g_r", "lens_r_i"]
    assert table[unknown].isna().all(axis=None)


def test_a_lens_is_its_host_and_arcs_with_their_poisson_noise(
    simulation: Simulation, lenses: tuple[RealHosts, Lenses], pool: str
) -> None:
    galaxies, drawn = lenses
    alone = np.stack([image(pool, host) for host in simulation.table["host"][::2]])
    added = (simulation.images[::2] - alone).astype(np.float64)
    sigma = np.sqrt(galaxies.background(drawn.table["host_galaxy"].to_numpy()))[..., None, None]
    arcs = drawn.arcs.numpy().astype(np.float64)
    clean = (simulation.table["defect"][::2] == "").to_numpy()
    added, sigma, arcs = added[clean], sigma[clean], arcs[clean]
    beyond = arcs < 1e-5 * sigma
    assert beyond.sum() > 2000
    assert (added[beyond] == 0).all()
    for least, most in ((0.02, 0.05), (0.05, np.inf)):  # of the background's variance
        bright = (arcs > least * sigma**2) & (arcs < most * sigma**2)
        pull = (added * sigma - arcs)[bright] / np.sqrt(arcs[bright])
        assert len(pull) > 500
        assert kstest(pull, "norm").pvalue > 0.01
        assert pull.std() == pytest.approx(1, abs=4 / np.sqrt(2 * len(pull)) + 0.005)


def test_arcs_have_the_flux_that_the_zero_point_says(simulation: Simulation, pool: str) -> None:
    """Counts of the file, against magnification times the source's flux, by hand."""
    ratios, errors = [], []
    for row in range(0, len(simulation.table), 2):
        truth = simulation.table.loc[row]
        number = int(truth["host"].removeprefix("lrg"))
        if number % 2 or truth["einstein_radius"] > 1.5 or truth["defect"]:
            continue  # no zero point; or so wide that the edge of the cutout matters
        sigma = SIGMA * (0.8 + 0.02 * (number % 20))
        counts = (simulation.images[row] - image(pool, truth["host"])).sum(axis=(1, 2)) * sigma
        r = truth["source_magnitude"]
        magnitude = np.array([r + truth["source_g_r"], r, r - truth["source_r_i"]])
        expected = truth["magnification"] * 10 ** (0.4 * (ZERO_POINT - magnitude))
        electrons = DES.electrons(magnitude) * truth["magnification"]
        ratios.append(counts / expected)
        errors.append(1 / np.sqrt(electrons))
    pull = (np.array(ratios) - 1) / np.hypot(errors, 0.002)  # the cutout's edge, for the others
    assert len(pull) > 25
    assert np.abs(pull).max() < 4.5
    assert np.mean(ratios) == pytest.approx(1, abs=0.01)


def test_signal_to_noise_is_against_the_image_and_its_depth(
    lenses: tuple[RealHosts, Lenses], pool: str
) -> None:
    drawn = lenses[1]
    for place in (0, 5, 9):
        row = drawn.table.iloc[place]
        number = int(row["host_galaxy"])
        counts_per_sigma = SIGMA * (0.8 + 0.02 * (number % 20) if number % 2 == 0 else 1.0)
        one_count = DES.electrons(np.full(3, ZERO_POINT))  # electrons
        sigma = (counts_per_sigma * one_count)[:, None, None]
        light = image(pool, f"lrg{number}").clip(0) * sigma
        signal = drawn.arcs[place].numpy().astype(np.float64)
        noise = sigma**2 + light + signal
        best = 0.0
        for s, n in zip(signal.reshape(3, -1), noise.reshape(3, -1), strict=True):
            order = np.argsort(-(s**2) / n)
            best = max(best, (s[order].cumsum() / np.sqrt(n[order].cumsum())).max())
        assert row["arc_snr"] == pytest.approx(best, rel=1e-3)
        assert row["arc_snr"] > MIN_ARC_SNR


def test_decoys_only_add_to_the_image(simulation: Simulation, pool: str) -> None:
    table = simulation.table
    other = table[table["label"] == 0]
    assert set(other["kind"]) == set(KEEP_HOST)
    share = MIXTURE["singly_imaged"] / sum(MIXTURE[kind] for kind in KEEP_HOST)
    assert load_config("des").decoys == MIXTURE
    assert (other["kind"] == "singly_imaged").mean() == pytest.approx(share, abs=0.15)
    for row in other.index[(other["kind"] != "unlensed") | (other["defect"] != "")]:
        added = simulation.images[row] - image(pool, table["host"][row])
        if table["kind"][row] == "singly_imaged" and not added.any():
            radius = table["einstein_radius"][row - 1]  # so far away that it is beside the cutout
            assert 2.5 * radius > SIZE * DES.pixel_scale / 2
            continue
        # No less than the added light's own noise takes away.
        assert added.sum() > 0
        assert added.min() > -4
        changed = (added != 0).any(axis=(1, 2))
        alone = table["kind"][row] in ("unlensed", "artefact")
        assert changed.sum() == 1 if alone else changed.all()  # a defect is in one band


def test_kinds_that_keep_the_host_need_not_know_its_light_and_take_nothing_of_it() -> None:
    config = load_config("des").model_copy(update={"sources": "sersic"})
    galaxies = SersicHosts(Renderer(DES, make_sources("sersic", "cpu"), SIZE, "cpu"))
    drawn = draw_lenses(galaxies, config, 1, range(3))
    bare = torch.full_like(drawn.galaxy, 1e6)
    unknown = drawn.table.assign(**dict.fromkeys(RealHosts.unknown, np.nan))
    for kind in MIXTURE:
        images = draw_decoys(galaxies, 1, unknown, bare, np.full(3, kind))
        assert (images >= 1e6).all().item() == (kind in KEEP_HOST), kind


def test_no_host_and_no_source_is_in_two_splits(config: SimulationConfig, tmp_path: Path) -> None:
    file = simulate_catalogue(tmp_path / "out", config, 200, seed=1, image_size=SIZE)
    assert sorted(path.name for path in file.parent.iterdir()) == [
        "catalogue.parquet",
        "images-00000.npy",
        "simulation.json",
    ]
    assert f'"hosts": "{config.hosts}"' in (tmp_path / "out" / "simulation.json").read_text()
    table = read_catalogue(file).table
    assert table["host"].nunique() > 40
    field = table["host"].str.removeprefix("lrg").astype(int) // 2  # two galaxies are one group
    assert (table["group"] == table["source_galaxy"]).all()
    split = assign_splits(table, seed=3)
    assert set(split) == {"train", "val", "test"}
    for whom in (table["host"], field, table["source_galaxy"]):
        assert (table["group"].groupby(whom).nunique() == 1).all()
        assert (split.groupby(whom).nunique() == 1).all()


def test_with_smooth_sources_a_group_is_the_pools(pool: str) -> None:
    table = simulate("des", 40, image_size=SIZE, config=config_of(pool, sources="sersic")).table
    field = table["host"].str.removeprefix("lrg").astype(int) // 2
    assert (table["group"] == [f"field{k}" for k in field]).all()


def test_a_host_takes_its_galaxy_by_its_number_alone(
    config: SimulationConfig, simulation: Simulation
) -> None:
    hosts = simulation.table["host"][::2].to_numpy()
    again = simulate("des", 40, seed=9, image_size=SIZE, config=config).table["host"][::2]
    np.testing.assert_array_equal(again, hosts[:20])
    assert len(set(hosts)) > 50  # of 60, in turn; drawn by chance, 80 hosts would have 44 +- 3


def test_a_cutout_depends_on_its_seed_and_number_alone(
    simulation: Simulation, config: SimulationConfig
) -> None:
    batched = simulate("des", 61, seed=4, image_size=SIZE, config=config, batch_size=14)
    np.testing.assert_allclose(batched.images, simulation.images[:61], atol=1e-4)
    pd.testing.assert_frame_equal(batched.table, simulation.table[:61], rtol=1e-5)
