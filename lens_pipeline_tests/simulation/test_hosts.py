"""Real images as hosts: what they show stays as it is, and what is added is right."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from astropy.io import fits
from PIL import Image
from scipy.stats import kstest

from lens_pipeline.catalogue.images import read_cutout
from lens_pipeline.catalogue.splits import assign_splits
from lens_pipeline.catalogue.table import read_catalogue
from lens_pipeline.errors import InputError
from lens_pipeline.evaluation.plots import png_bytes
from lens_pipeline.evaluation.sheets import kinds_sheet
from lens_pipeline.simulation import Simulation, SimulationConfig, load_config, simulate
from lens_pipeline.simulation.decoy_kinds import KEEP_HOST, MIXTURE
from lens_pipeline.simulation.decoys import draw_decoys
from lens_pipeline.simulation.hosts import RealHosts, SersicHosts
from lens_pipeline.simulation.lenses import Lenses, draw_lenses
from lens_pipeline.simulation.pool import read_pool
from lens_pipeline.simulation.population import einstein_radius
from lens_pipeline.simulation.render import Renderer
from lens_pipeline.simulation.simulate import simulate_catalogue
from lens_pipeline.simulation.sources import make_sources

# With a point spread function that ends within images as small as these.
DES = load_config("des").survey.model_copy(update={"moffat_beta": 8.0})
BANDS = DES.bands
SIZE = 32
POOL = 60
ZERO_POINT = 27.5
MIN_ARC_SNR = 10.0
# Counts of DES's own background sigma at that zero point, by way of one electron's magnitude.
ONE_ELECTRON = -2.5 * np.log10(1 / DES.electrons(np.zeros(3)))
SIGMA = np.sqrt(DES.background_variance) * 10 ** (0.4 * (ZERO_POINT - ONE_ELECTRON))


def write_image(path: Path, number: int, sigma: np.ndarray, stated: bool) -> None:
    """A red galaxy and its noise: with zero points and noise maps, or a cube of counts alone."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[:36, :36] - 17.5
    light = 20 * np.exp(-np.hypot(x, y) / 2.5)
    images = {
        band: (sigma[k] * ((k + 1) * light + random.standard_normal((36, 36)))).astype(np.float32)
        for k, band in enumerate(BANDS)
    }
    if not stated:
        fits.PrimaryHDU(np.stack([images[band] for band in BANDS])).writeto(path)
        return
    hdus = [fits.PrimaryHDU()]
    for k, band in ((1, "r"), (0, "g"), (2, "i")):
        hdus.append(fits.ImageHDU(images[band], name=f"{band}_FLUX"))
        hdus[-1].header["MAGZERO"] = ZERO_POINT
        hdus.append(fits.ImageHDU(np.full((36, 36), sigma[k], np.float32), name=f"{band}_RMS"))
    fits.HDUList(hdus).writeto(path)


def write_pool(folder: Path, n: int = POOL, **columns: object) -> str:
    """A catalogue of n galaxies: even rows state their zero point, and are deeper or shallower."""
    folder.mkdir()
    for number in range(n):
        stated = number % 2 == 0
        depth = 0.8 + 0.02 * (number % 20) if stated else 1.0
        write_image(folder / f"{number}.fits", number, SIGMA * depth, stated)
    table = pd.DataFrame({"id": [f"lrg{k}" for k in range(n)]}).assign(**columns)
    table["path"] = [f"{k}.fits" for k in range(n)]
    table.to_csv(folder / "catalogue.csv", index=False)
    return str(folder / "catalogue.csv")


def config_of(hosts: str, **changes: object) -> SimulationConfig:
    """Fainter arcs than by default will do, and are found sooner."""
    cuts = {"min_arc_snr": MIN_ARC_SNR}
    return SimulationConfig.model_validate(
        {"survey": DES, "hosts": hosts, "population": cuts} | changes
    )


def galaxies_of(config: SimulationConfig, size: int = SIZE) -> RealHosts:
    renderer = Renderer(config.survey, make_sources(config.sources, "cpu"), size, "cpu")
    return RealHosts(renderer, read_pool(str(config.hosts), config, size))


def image(pool: str, host: str) -> np.ndarray:
    """What is stored of a galaxy, read without the simulation."""
    table = read_catalogue(pool).table.set_index("id")
    return read_cutout([table.loc[host, "path"]], SIZE, bands=BANDS).pixels


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> str:
    groups = [f"field{k // 2}" for k in range(POOL)]
    return write_pool(tmp_path_factory.mktemp("hosts") / "lrg", group=groups, ra=150.0, dec=2.0)


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
    file = simulate_catalogue(tmp_path, config, 200, seed=1, image_size=SIZE)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "catalogue.parquet",
        "images-00000.npy",
        "simulation.json",
    ]
    assert f'"hosts": "{config.hosts}"' in (tmp_path / "simulation.json").read_text()
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
    assert len(set(hosts)) > 35  # of 60, in 80 draws: 44 +- 3


def test_a_cutout_depends_on_its_seed_and_number_alone(
    simulation: Simulation, config: SimulationConfig
) -> None:
    batched = simulate("des", 61, seed=4, image_size=SIZE, config=config, batch_size=14)
    np.testing.assert_allclose(batched.images, simulation.images[:61], atol=1e-4)
    pd.testing.assert_frame_equal(batched.table, simulation.table[:61], rtol=1e-5)


def test_what_a_catalogue_knows_is_not_drawn_and_hopeless_galaxies_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = {
        "redshift": [0.3, 0.4, 1.9, 0.3, 0.3, np.nan],
        "velocity_dispersion": [300.0, np.nan, 220, 90, 300, 320],
        "axis_ratio": [0.5, np.nan, 0.5, 0.5, 0.5, 1.0],
        "position_angle": [1.2, -0.4, 0, 0, 0, np.nan],
        "x": [0.3, np.nan, 0, 0, 0, 0],
        "y": [-0.2, 0.1, 0, 0, 0, 0],
        "label": [0, None, None, 0, 1, None],
    }
    file = Path(write_pool(tmp_path / "lrg", 7, **{k: [*v, v[0]] for k, v in known.items()}))
    (tmp_path / "lrg" / "6.fits").write_bytes(b"none")
    with caplog.at_level(logging.INFO):
        table = simulate("des", 60, image_size=SIZE, config=config_of(str(file))).table
    assert set(table["host"]) == {"lrg0", "lrg1", "lrg5"}
    assert "3 of 7 galaxies" in caplog.text
    assert "1 labelled lenses, 2 that cannot lens within the population's cuts" in caplog.text
    assert "1 that cannot be used (the first: row 7, column path, " in caplog.text
    given = pd.DataFrame(known).rename(columns={"redshift": "z_lens"}).drop(columns="label")
    for host, of_host in table.groupby("host"):
        for name, value in given.loc[int(str(host)[-1])].items():
            if np.isnan(value):  # drawn, or measured
                drawn = name in ("z_lens", "velocity_dispersion")
                assert (of_host[name].nunique() > 2) == drawn, (host, name)
            else:
                assert (of_host[name] == value).all(), (host, name)
    lens = table[table["label"] == 1]
    expected = einstein_radius(
        *(lens[n].to_numpy() for n in ("velocity_dispersion", "z_lens", "z_source"))
    )
    np.testing.assert_allclose(lens["einstein_radius"], expected)


def test_what_a_catalogue_does_not_tell_is_measured_on_the_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Smooth galaxies as they are simulated, whose shapes are known: the mass lies as the light."""
    plain = load_config("des").model_copy(update={"decoys": {"unlensed": 1.0}})
    drawn = simulate("des", 80, seed=3, config=plain)
    chosen = np.flatnonzero((drawn.table["label"] == 0) & (drawn.table["defect"] == ""))
    truth = drawn.table.iloc[chosen].set_index("id")
    for name, row in zip(truth.index, chosen, strict=True):
        fits.PrimaryHDU(drawn.images[row]).writeto(tmp_path / f"{name}.fits")
    table = pd.DataFrame({"id": truth.index, "path": [f"{name}.fits" for name in truth.index]})
    table.loc[0, "redshift"], table.loc[1, "velocity_dispersion"] = 0.4, 250
    table.loc[2, ["x", "axis_ratio"]] = 0.1, 0.77
    table.to_csv(tmp_path / "catalogue.csv", index=False)
    with caplog.at_level(logging.WARNING):
        pool = read_pool(str(tmp_path / "catalogue.csv"), config_of("-", survey=plain.survey), 64)
    unknown = f"of {len(table) - 2} of {len(table)} galaxies"
    assert f"{unknown} of {tmp_path}/catalogue.csv neither redshift nor velocity" in caplog.text
    found = pool.table.set_index("id")
    assert found.loc[table["id"][2], ["x", "axis_ratio"]].tolist() == [0.1, 0.77]
    found, truth = found.iloc[3:], truth.iloc[3:]
    assert found[["x", "y", "axis_ratio"]].notna().mean().min() > 0.9
    for axis in ("x", "y"):
        assert (found[axis] - truth[axis]).abs().median() < 0.05  # arcsec, a fifth of a pixel
    assert (found["axis_ratio"] - truth["axis_ratio"]).abs().median() < 0.1
    assert abs((found["axis_ratio"] - truth["axis_ratio"]).median()) < 0.03
    turned = (found["position_angle"] - truth["position_angle"] + np.pi / 2) % np.pi - np.pi / 2
    flat = truth["axis_ratio"] < 0.8
    assert flat.sum() > 10
    assert np.degrees(turned[flat].abs().median()) < 8  # at random, 45


def test_one_galaxy_among_many_is_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """However many do not show what is behind them, and they are named."""
    file = write_pool(tmp_path / "lrg", 8)
    for number in range(8):
        if number != 5:
            (tmp_path / "lrg" / f"{number}.fits").unlink()
            write_image(tmp_path / "lrg" / f"{number}.fits", number, SIGMA * 1000, stated=True)
    config = config_of(file, sources="sersic")
    with caplog.at_level(logging.WARNING):
        table = simulate("des", 8, image_size=SIZE, config=config, batch_size=2).table
    assert set(table["host"]) == {"lrg5"}
    assert "no lens can be seen behind lrg" in caplog.text
    named = re.findall(r"lrg\d(?=[,;])", caplog.text)
    assert len(named) == len(set(named)) > 3  # of each once, whatever the number of batches
    (tmp_path / "lrg" / "5.fits").unlink()
    with pytest.raises(InputError, match=r"host 0 behind (lrg\d, ){4}lrg\d and 2 more is"):
        simulate("des", 2, image_size=SIZE, config=config)


def test_a_galaxy_behind_which_nothing_is_seen_starves_no_host(tmp_path: Path) -> None:
    file = write_pool(tmp_path / "lrg", 3)
    (tmp_path / "lrg" / "0.fits").unlink()
    write_image(tmp_path / "lrg" / "0.fits", 0, SIGMA * 1000, stated=True)
    config = config_of(file, sources="sersic")
    galaxies = galaxies_of(config)
    assert 0 in [galaxies.number(host, 0) for host in range(8)]
    assert set(simulate("des", 16, image_size=SIZE, config=config).table["host"]) == {
        "lrg1",
        "lrg2",
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("hosts: none.csv", r"hosts: .*/none\.csv: there is no such file or folder"),
        ("hosts: [a]", r"simulation\.yaml: hosts: "),
        (
            "hosts: lrg/catalogue.csv\ndecoys: {unlensed: 1, ring: 1}",
            "decoys: ring is made of",
        ),
        (
            "hosts: lrg/catalogue.csv\nsurvey: {pixel_scale: 0.25}",
            "row 2, column pixel_scale: '0.26'",
        ),
        (
            "hosts: lrg/euclid.csv\nsurvey: {bands: [g, r, VIS]}",
            "row 1, column path, .*no band VIS",
        ),
        ("hosts: lrg/pictures.csv", r"row 1, column path, .*a\.png: is a composite"),
        ("hosts: lrg/radians.csv", "row 2, column position_angle: '45.0' must be radians"),
        ("hosts: lrg/words.csv", "row 1, column redshift: 'photometric' must be a redshift"),
        ("hosts: lrg/lenses.csv", "none of its 2 galaxies can be a host: 2 labelled lenses"),
    ],
)
def test_what_is_wrong_with_a_pool_is_named(text: str, named: str, tmp_path: Path) -> None:
    write_pool(tmp_path / "lrg", 2, pixel_scale=[np.nan, 0.26])
    Image.fromarray(np.arange(40 * 40 * 3, dtype=np.uint8).reshape(40, 40, 3)).save(
        tmp_path / "lrg" / "a.png"
    )
    paths = "0.fits", "1.fits"
    for name, rows in {
        "euclid": ["id,path", "a,0.fits"],
        "pictures": ["id,path", "a,a.png"],
        "radians": ["id,path,position_angle", "a,0.fits,", "b,1.fits,45"],
        "words": ["id,path,redshift", "a,0.fits,photometric"],
        "lenses": ["id,path,label", *(f"{path},{path},1" for path in paths)],
    }.items():
        (tmp_path / "lrg" / f"{name}.csv").write_text("\n".join(rows) + "\n")
    file = tmp_path / "simulation.yaml"
    file.write_text(text + "\n")
    with pytest.raises(InputError, match=named):
        simulate("des", 2, config=load_config("des", file), image_size=SIZE)


def test_a_path_in_a_users_file_is_beside_it_and_a_url_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "simulation.yaml"
    for text, found in {
        "lrg/catalogue.csv": f"{tmp_path}/lrg/catalogue.csv",
        "/data/lrg.csv": "/data/lrg.csv",
        "s3://bucket/lrg.parquet": "s3://bucket/lrg.parquet",
    }.items():
        file.write_text(f"hosts: {text}\n")
        config = load_config("des", file)
        assert config.hosts == found
        assert set(config.decoys) == set(KEEP_HOST)


def test_a_copy_of_a_configuration_is_checked_too(pool: str) -> None:
    config = load_config("des").model_copy(update={"hosts": pool})
    with pytest.raises(ValueError, match="decoys: spiral is made of"):
        simulate("des", 2, config=config, image_size=SIZE)


def test_another_image_in_the_pool_is_another_catalogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lens_pipeline.defs.catalogue import catalogue_recipe
    from lens_pipeline.settings import Settings

    write_pool(tmp_path / "lrg", 2)
    (tmp_path / "simulation.yaml").write_text("hosts: lrg/catalogue.csv\n")
    monkeypatch.setenv("LENS_SIMULATION", str(tmp_path / "simulation.yaml"))
    before = catalogue_recipe(Settings()).key
    assert catalogue_recipe(Settings()).key == before
    (tmp_path / "lrg" / "1.fits").write_bytes(b"none")
    assert catalogue_recipe(Settings()).key != before


def test_arcs_on_real_galaxies(shared_data: Path, tmp_path: Path) -> None:
    """Pan-STARRS1: the ordinary galaxies of a catalogue, whose lenses are left out."""
    file = tmp_path / "simulation.yaml"
    survey = "{name: ps1, pixel_scale: 0.25, seeing: 1.2, zero_point: [24.6, 24.8, 24.7], gain: 1}"
    catalogue = shared_data / "ps1_grizy" / "catalogue.csv"
    file.write_text(f"survey: {survey}\nhosts: {catalogue}\npopulation: {{min_arc_snr: 4}}\n")
    drawn = simulate("des", 80, config=load_config("des", file), image_size=40)
    table = drawn.table
    assert np.isfinite(drawn.images).all()
    assert table["host"].str.contains("_n").all()  # a neighbour of a lens
    assert 15 < table["host"].nunique() <= 40
    clean = (table["defect"] == "").to_numpy().reshape(-1, 2).all(axis=1).repeat(2)
    pairs = np.flatnonzero((table["kind"] == "unlensed") & clean)
    added = drawn.images[pairs - 1] - drawn.images[pairs]
    assert (added.sum(axis=(1, 2, 3)) > 0).all()
    png_bytes(kinds_sheet(drawn.images, table["kind"].tolist(), "background_sigma"))
