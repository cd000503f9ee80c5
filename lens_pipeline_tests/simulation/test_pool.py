"""What a pool of real galaxies knows, measures and leaves out; what is wrong with it is named."""

import logging
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from PIL import Image

from lens_pipeline.errors import InputError
from lens_pipeline.evaluation.plots import png_bytes
from lens_pipeline.evaluation.sheets import kinds_sheet
from lens_pipeline.simulation import load_config, simulate
from lens_pipeline.simulation.decoy_kinds import KEEP_HOST
from lens_pipeline.simulation.pool import read_pool
from lens_pipeline.simulation.population import einstein_radius
from lens_pipeline_tests.simulation.pools import (
    DES,
    SIGMA,
    SIZE,
    config_of,
    galaxies_of,
    write_image,
    write_pool,
)


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
    unknown = f"of {len(table) - 1} of {len(table)} galaxies"
    assert f"{unknown} of {tmp_path}/catalogue.csv the velocity dispersion is not" in caplog.text
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


@pytest.mark.parametrize(("side", "size"), [(65, 64), (65, 63), (66, 63)])
def test_places_are_of_the_middle_of_the_file_and_become_that_of_the_cutout(
    side: int, size: int, tmp_path: Path
) -> None:
    """Where one side is odd and the other even, these are half a pixel apart."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    noise = np.random.default_rng(0).standard_normal((3, side, side))
    light = 500 * np.exp(-0.5 * (x**2 + y**2) / 3**2)
    fits.PrimaryHDU((noise + light).astype(np.float32)).writeto(tmp_path / "a.fits")
    (tmp_path / "catalogue.csv").write_text("id,path,x,y\nmeasured,a.fits,,\ngiven,a.fits,0,0\n")
    config = config_of(str(tmp_path / "catalogue.csv"))
    places = read_pool(str(config.hosts), config, size).table[["x", "y"]].to_numpy()
    np.testing.assert_allclose(places[0], places[1], atol=0.01)
    np.testing.assert_allclose(places[1], ((side - size) % 2) * DES.pixel_scale / 2)


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


def test_a_copy_of_a_configuration_is_checked_too(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "lrg", 1)
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
