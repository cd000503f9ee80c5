"""Simulated catalogues: what is in them, and that no shortcut tells lenses apart."""

import errno
import json
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lens_pipeline.cli import main
from lens_pipeline.errors import InputError
from lens_pipeline.simulation import Simulation, load_config, simulate
from lens_pipeline.simulation.decoy_kinds import MIXTURE
from lens_pipeline.simulation.decoys import choose_kinds
from lens_pipeline.simulation.multiplicity import is_multiply_imaged
from lens_pipeline.simulation.simulate import simulate_catalogue, simulate_surveys
from lens_pipeline_tests.simulation.drawn import simulation

__all__ = ["simulation"]


def test_every_lens_is_detectable(simulation: Simulation) -> None:
    lenses = simulation.table[simulation.table["label"] == 1]
    assert len(lenses) == 300
    theta = lenses["einstein_radius"]
    assert theta.between(0.5, 3).all()
    assert (lenses["z_source"] - lenses["z_lens"] > 0.4).all()
    assert (lenses["z_lens"] < 2).all()
    assert (lenses["magnification"] > 3).all()
    assert (lenses["arc_snr"] > 20).all()
    assert (lenses["arc_contrast"] >= 0.1).all()
    assert is_multiply_imaged(lenses).all()
    assert (2 * theta**2 > (2 * lenses["source_radius"]) ** 2 + 0.9**2).all()
    assert (lenses["magnification"] * lenses["source_radius"] > 0.9).all()


# Quartiles of the first hundred lenses of LensPop's published forecast for DES (Collett 2015;
# `lenses_DESc.txt`), and how near ours are. Its sources are those of a mock catalogue, which are
# farther; so its Einstein radii are wider.
LENSPOP = {
    "einstein_radius": ((1.03, 1.30, 1.54), 0.2),
    "velocity_dispersion": ((243.4, 266.2, 290.2), 0.08),
    "z_lens": ((0.273, 0.446, 0.615), 0.12),
    "z_source": ((1.37, 1.88, 2.39), 0.22),
}


@pytest.mark.parametrize("name", LENSPOP)
def test_the_lenses_are_near_those_of_the_published_forecast(
    simulation: Simulation, name: str
) -> None:
    expected, near = LENSPOP[name]
    found = simulation.table[name].dropna().quantile([0.25, 0.5, 0.75])
    np.testing.assert_allclose(found, expected, rtol=near)


def test_each_lens_is_paired_with_its_own_galaxy_unlensed(simulation: Simulation) -> None:
    lens, other = simulation.table.iloc[::2], simulation.table.iloc[1::2]
    assert (lens["label"] == 1).all()
    assert (other["label"] == 0).all()
    same = ["group", "source_galaxy", "x", "y", "position_angle"]
    host = ["z_lens", "velocity_dispersion", "axis_ratio", "lens_magnitude", "lens_radius"]
    late = (other["kind"] == "late_type").to_numpy()  # it stands where the host would be
    for columns, rows in ((same, slice(None)), (host, ~late)):
        pd.testing.assert_frame_equal(
            lens[columns][rows].reset_index(drop=True), other[columns][rows].reset_index(drop=True)
        )
    assert other[host][late].isna().all(axis=None)
    assert other[["einstein_radius", "source_magnitude"]].isna().all(axis=None)


def test_an_unlensed_decoy_is_an_image_of_the_galaxy_that_its_lens_is(
    simulation: Simulation,
) -> None:
    """By the light of its middle, of which there is little of the arcs, and which others lack."""
    lens, other = (simulation.table.iloc[k::2].reset_index(drop=True) for k in (0, 1))
    clean = (other["kind"] == "unlensed") & (lens["defect"] == "") & (other["defect"] == "")
    of_lens, of_other = (
        simulation.images[k::2][clean][:, 1, 29:35, 29:35].sum(axis=(1, 2)) for k in (0, 1)
    )
    assert clean.sum() > 30
    assert spearmanr(of_lens, of_other).statistic > 0.98
    assert spearmanr(of_lens, np.roll(of_other, 1)).statistic < 0.6


def test_decoys_come_in_the_stated_mixture(simulation: Simulation) -> None:
    kinds = choose_kinds(1, range(4000), MIXTURE)
    assert simulation.table["kind"][1::2].tolist() == kinds[:300].tolist()
    counts = pd.Series(kinds).value_counts()
    assert set(counts.index) == set(MIXTURE)
    for kind, share in MIXTURE.items():
        assert counts[kind] == pytest.approx(4000 * share, abs=4 * np.sqrt(4000 * share))


def test_one_galaxy_of_the_deep_field_is_one_group(simulation: Simulation) -> None:
    """Else a network would know sources of the test split from training."""
    table = simulation.table
    assert (table["group"] == table["source_galaxy"]).all()
    assert 100 < table["group"].nunique() < 220
    assert set(simulate("hsc", 12, image_size=32).table["group"]) <= set(table["group"])
    smooth = simulate("des", 8, config=load_config("des").model_copy(update={"sources": "sersic"}))
    assert smooth.table["group"].nunique() == 4


def test_arcs_are_the_light_that_a_lens_adds(simulation: Simulation) -> None:
    """Lens minus the same galaxy unlensed: a flux of magnification times the source's."""
    from lens_pipeline.simulation.surveys import find_survey

    survey = find_survey("des")
    table = simulation.table
    clean = table["defect"] == ""
    pairs = np.flatnonzero((table["kind"] == "unlensed") & clean & clean.shift(1, fill_value=False))
    added = simulation.images[pairs - 1] - simulation.images[pairs]
    lenses = table.iloc[pairs - 1]
    g = lenses["source_magnitude"] + lenses["source_g_r"]
    electrons = survey.electrons(g.to_numpy()[:, None])[:, 0] * lenses["magnification"].to_numpy()
    expected = electrons / np.sqrt(survey.background_variance[0])
    # Each difference carries the noise of two cutouts; their mean over all pairs does not.
    ratio = added[:, 0].sum(axis=(1, 2)).sum() / expected.sum()
    assert ratio == pytest.approx(1, abs=0.05)


def test_the_background_is_the_unit(simulation: Simulation) -> None:
    corners = simulation.images[:, :, :6, :6].reshape(600, 3, 36)
    # Galaxies reach into some corners.
    spread = np.median(corners.std(axis=2, ddof=1), axis=0)
    np.testing.assert_allclose(spread, 1, atol=0.05)
    assert simulation.images.dtype == np.float32


def test_brightness_and_colours_alone_tell_little(simulation: Simulation) -> None:
    """A classifier of brightness, variance, border and colour, blind to shape, hardly tells lenses.

    On real graded candidates colour alone reached an AUROC of 0.69.
    """
    images, table = simulation.images, simulation.table
    border = np.concatenate(
        [images[:, :, :4].reshape(len(images), -1), images[:, :, -4:].reshape(len(images), -1)], 1
    )
    total = np.arcsinh(images.sum(axis=(2, 3)))
    features = np.concatenate(
        [
            total,
            total[:, :-1] - total[:, 1:],
            np.arcsinh(images[:, :, 22:42, 22:42].sum(axis=(2, 3))),
            np.arcsinh(images.max(axis=(2, 3))),
            images.std(axis=(2, 3)),
            border.mean(axis=1, keepdims=True),
            border.std(axis=1, keepdims=True),
            np.arcsinh(np.abs(border).max(axis=1, keepdims=True)),
        ],
        axis=1,
    )
    label = table["label"].to_numpy()
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    score = cross_val_predict(
        model,
        features,
        label,
        groups=table["group"],
        cv=GroupKFold(5),
        method="decision_function",
    )
    assert roc_auc_score(label, score) < 0.75


def assert_same_images(ours: np.ndarray, theirs: np.ndarray) -> None:
    """As far as float32 holds them: see `simulate`."""
    peak = theirs.max(axis=(1, 2, 3), keepdims=True)
    assert (np.abs(ours - theirs) <= np.maximum(1e-4, 5e-7 * peak)).all()


def test_a_cutout_depends_on_its_seed_and_number_alone(simulation: Simulation) -> None:
    fewer = simulate("des", 45, seed=1)
    np.testing.assert_array_equal(fewer.images[:25], simulation.images[:25])
    batched = simulate("des", 45, seed=1, batch_size=16)
    assert_same_images(batched.images, simulation.images[:45])
    pd.testing.assert_frame_equal(batched.table, simulation.table[:45], rtol=1e-5)
    other = simulate("des", 2, seed=2)
    assert not np.array_equal(other.images, simulation.images[:2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"survey": "sdss", "n": 10},
            "survey: unknown 'sdss'; there are des, hsc, lsst, euclid_vis, cfhtls",
        ),
        ({"survey": "des", "n": 0}, "n: 0"),
        ({"survey": "des", "n": -3}, "n: -3 is too small; at least 1"),
        ({"survey": "des", "n": 2.0}, "n: 2.0 must be a whole number"),
        ({"survey": "des", "n": 10, "seed": 2**70}, "seed: 1180591620717411303424 is too large"),
        ({"survey": "des", "n": 10, "image_size": 64.5}, "image_size: 64.5 must be a whole"),
        ({"survey": "des", "n": 10, "image_size": 513}, "image_size: 513 is too large; at most"),
        ({"survey": "des", "n": 10, "seed": -1}, "seed: -1"),
        ({"survey": "des", "n": 10, "image_size": 16}, "image_size: 16"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulate(**arguments)  # type: ignore[arg-type]


def test_of_several_surveys_none_is_renamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cutouts of both would be of one survey, and of two depths."""
    (tmp_path / "deeper.yaml").write_text("survey: {name: deeper}")
    arguments = ["simulate", "--n", "20", "--config", str(tmp_path / "deeper.yaml"), "--survey"]
    assert main([*arguments, "des,hsc", "--out", str(tmp_path / "two")]) == 2
    assert "LENS_SURVEY: des: the simulation calls it deeper; name it so" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()
    with pytest.raises(InputError, match="unknown 'dess'; did you mean des"):
        simulate("dess", 10)


def test_the_command_writes_the_same_files_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["simulate", "--n", "8", "--image-size", "32", "--seed", "5", "--out"]
    assert main([*arguments, str(tmp_path / "first")]) == 0
    monkeypatch.setenv("LENS_SEED", "5")
    without_seed = [*arguments[:5], "--out"]
    assert main([*without_seed, str(tmp_path / "second")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "8 cutouts: 4 lenses, 4 decoys"
    assert said[1] == str(tmp_path / "first" / "catalogue.parquet")
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == ["catalogue.parquet", "images-00000.npy", "kinds.jpg", "simulation.json"]
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert json.loads((tmp_path / "first" / "simulation.json").read_text())["seed"] == 5
    table = pd.read_parquet(tmp_path / "first" / "catalogue.parquet")
    assert (table["bands"] == "g,r,i").all()
    (tmp_path / "empty").mkdir()
    assert main([*arguments, str(tmp_path / "empty")]) == 0
    assert (tmp_path / "empty" / files[0]).is_file()
    assert main([*arguments, str(tmp_path / "first")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_what_made_a_catalogue_is_told_of_numbers_of_numpy_and_without_bounds(
    tmp_path: Path,
) -> None:
    file = tmp_path / "bright.yaml"
    file.write_text("population: {velocity_dispersion: {distribution: normal, mean: 260, std: 9}}")
    numbers = {"n": np.int64(2), "seed": np.int64(7), "image_size": np.int64(32)}
    simulate_catalogue(tmp_path / "out", load_config("des", file), **numbers)  # type: ignore[arg-type]

    def refused(name: str) -> NoReturn:
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / "out" / "simulation.json").read_text()
    told = json.loads(text, parse_constant=refused)
    assert {name: told[name] for name in numbers} == {"n": 2, "seed": 7, "image_size": 32}
    assert told["population"]["velocity_dispersion"]["low"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--survey", "des,euclid_vis"],
            "euclid_vis: bands: the cutouts have VIS, those of des g, r, i, and a network takes",
        ),
        (["--survey", "des,hsc", "--n", "1"], "n: 1 is too small; at least 2 is needed"),
        (["--image-size", "1024"], "image_size: 1024 is too large; at most 512 is possible"),
    ],
)
def test_what_cannot_come_to_an_end_is_refused_before_anything_is_simulated(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """So many cutouts as here would take days."""
    out = ["--out", str(tmp_path / "out")]
    assert main(["simulate", "--n", "10000000", *arguments, *out]) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_compiled_kernels_draw_the_same() -> None:
    eager, compiled = (simulate("des", 64, seed=3, compiled=c) for c in (False, True))
    assert_same_images(compiled.images, eager.images)
    pd.testing.assert_frame_equal(compiled.table, eager.table, rtol=1e-4)


def test_compiling_without_a_compiler_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    # What torch has read of CXX, when it was imported; and no processes that stay.
    monkeypatch.setattr(config.cpp, "cxx", (None, "/nonexistent"))
    monkeypatch.setattr(config, "compile_threads", 1)
    assert main(["simulate", "--n", "2", "--compile", "--out", str(tmp_path / "out")]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: compiled: torch cannot compile .*; install g\+\+$", last)
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_draws_the_same(compiled: bool) -> None:
    on_cpu = simulate("des", 256, seed=3)
    on_gpu, again = (simulate("des", 256, seed=3, device="cuda", compiled=compiled) for _ in "12")
    assert_same_images(on_gpu.images, on_cpu.images)
    pd.testing.assert_frame_equal(on_gpu.table, on_cpu.table, rtol=1e-4)
    np.testing.assert_array_equal(on_gpu.images, again.images)


def test_a_folder_that_is_used_is_not_written_again_and_one_that_was_not_filled_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has its stacks mapped would see other pixels."""
    both = [load_config(name) for name in ("des", "hsc")]
    config, other = (one.model_copy(update={"sources": "sersic"}) for one in both)
    table = simulate_catalogue(tmp_path / "one", config, 2, image_size=32)
    for configs in ([config], [config, other]):
        with pytest.raises(InputError, match="one: exists and is not empty; name another folder"):
            simulate_surveys(tmp_path / "one", configs, 2, seed=1, image_size=32)
    assert len(pd.read_parquet(table)) == 2
    written = pd.DataFrame.to_parquet

    def full(frame: pd.DataFrame, path: Path, **how: Any) -> None:
        if path.parent.name == "hsc":
            raise OSError(errno.ENOSPC, "No space left on device")
        written(frame, path, **how)

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(OSError, match="No space left"):
        simulate_surveys(tmp_path / "two", [config, other], 4, image_size=32)
    assert [*(tmp_path / "two").iterdir()] == []


def test_surveys_are_simulated_apart_and_neither_noise_nor_hosts_are_shared(tmp_path: Path) -> None:
    configs = [load_config(name) for name in ("des", "hsc")]
    configs = [one.model_copy(update={"sources": "sersic"}) for one in configs]
    out = tmp_path / "out"
    catalogue = simulate_surveys(out, configs, 21, seed=3, image_size=32)
    table = pd.read_parquet(catalogue)
    assert table["survey"].value_counts().to_dict() == {"des": 11, "hsc": 10}
    assert table["id"].is_unique
    images = {name: np.load(out / name / "images-00000.npy")[:10] for name in ("des", "hsc")}
    files = {path.partition("#")[0] for path in table["path"]}
    assert files == {f"{name}/images-00000.npy" for name in images}
    edges = [stack[:, :, :4].reshape(10, -1) for stack in images.values()]  # of sky, mostly
    alike = [abs(np.corrcoef(one, other)[0, 1]) for one, other in zip(*edges, strict=True)]
    assert np.median(alike) < 0.2
    truths = [table[table["survey"] == name]["z_lens"].head(10).to_numpy() for name in images]
    assert not np.isclose(*truths).any()
