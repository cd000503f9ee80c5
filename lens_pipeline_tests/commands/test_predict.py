"""Scoring a catalogue with the registered ensemble, and the aliases."""

import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lens_pipeline.cli import main
from lens_pipeline.errors import InputError
from lens_pipeline.registered import member_checkpoint
from lens_pipeline.registry import Registry
from lens_pipeline.settings import Settings
from lens_pipeline_tests.conftest import LENS_PIPELINE, client_of


def test_each_row_is_scored_in_its_order_from_any_directory(
    home: Path, simulated_catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pd.read_parquet(simulated_catalogue).sample(30, random_state=1)
    table["path"] = [str(simulated_catalogue.parent / path) for path in table["path"]]
    table.loc[table.index[4], "label"] = None
    table.loc[table.index[7], "path"] = "missing.npy#0"
    table.to_parquet(tmp_path / "some.parquet", index=False)
    monkeypatch.chdir(tmp_path)
    arguments = ["predict", "--home", str(home), "--catalogue", "some.parquet", "--out"]
    assert main([*arguments, "scores.parquet"]) == 0
    scores = pd.read_parquet("scores.parquet")
    assert scores["id"].tolist() == table["id"].tolist()
    good = np.arange(30) != 7
    assert scores.loc[good, "probability"].between(0, 1).all()
    assert scores.loc[~good, "probability"].isna().all()
    assert "missing" in scores.loc[7, "reject_reason"]
    assert {"logit", "std", "entropy", "probability_lastro", "z_lens"} <= set(scores)
    # A score depends on its cutout alone: in another order, alone, as a CSV, it is the same.
    table.iloc[::-1][:5].to_parquet(tmp_path / "some.parquet", index=False)
    assert main([*arguments, "scores.csv"]) == 0
    again = pd.read_csv("scores.csv")
    # Of batches of other sizes other kernels take care.
    np.testing.assert_allclose(
        again["logit"], scores["logit"].to_numpy()[::-1][:5], rtol=0, atol=1e-4
    )


def test_the_scores_of_the_run_are_those_of_predict(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = next((home / "catalogue").glob("*/catalogue.parquet"))
    out = tmp_path / "scores.parquet"
    arguments = ["--home", str(home), "--catalogue", str(source), "--out", str(out)]
    assert main(["predict", *arguments]) == 0
    report = pd.read_parquet(next((home / "reports").glob("*/scores.parquet")))
    scores = pd.read_parquet(out)
    np.testing.assert_allclose(scores["logit"], report["logit"], rtol=0, atol=1e-4)
    learnt = report["split"].isin(["train", "val"])
    pd.testing.assert_series_equal(scores["learnt_from"], learnt, check_names=False)
    said = f"the model was trained or validated on {learnt.sum()} of the rows"
    assert said in capsys.readouterr().out


def test_where_no_cutout_fits_the_model_the_reason_is_told(
    home: Path, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shared_data / "cfhtls_graded"
    table = pd.read_csv(folder / "catalogue.csv").drop(columns="pixel_scale")
    table["path"] = [str(folder / path) for path in table["path"]]
    real, out = tmp_path / "real.csv", tmp_path / "scores.csv"
    table.to_csv(real, index=False)
    assert main(["predict", "--home", str(home), "--catalogue", str(real), "--out", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "composite" in error
    assert "linear flux (FITS, NPY, a TIFF of floats) is needed" in error
    assert "none of its 218 cutouts can be used: 218 times: " in error
    assert list(tmp_path.iterdir()) == [real]


def test_cutouts_that_are_too_small_are_padded_where_that_is_set(
    home: Path, simulated_catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where some were scored before the command was refused."""
    table = pd.read_parquet(simulated_catalogue)[:40]
    images = np.load(simulated_catalogue.parent / "images-00000.npy")
    np.save(tmp_path / "small.npy", images[:2, :, 4:28, 4:28])
    table["path"] = [
        f"{tmp_path}/small.npy#{n}" if n < 2 else f"{simulated_catalogue.parent}/{path}"
        for n, path in enumerate(table["path"])
    ]
    table.to_parquet(tmp_path / "few.parquet")
    monkeypatch.setenv("LENS_MAX_REJECT_FRACTION", "0.01")
    arguments = ["--home", str(home), "--catalogue", str(tmp_path / "few.parquet"), "--out"]
    assert main(["predict", *arguments, str(tmp_path / "s.csv")]) == 2
    monkeypatch.setenv("LENS_PAD", "true")
    assert main(["predict", *arguments, str(tmp_path / "s.csv")]) == 0
    assert pd.read_csv(tmp_path / "s.csv")["probability"].notna().all()


def test_the_champion_is_used_else_the_challenger_and_any_version_by_name(
    own_home: Path, simulated_catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = client_of(own_home)
    out = str(tmp_path / "scores.csv")
    arguments = ["--home", str(own_home), "--catalogue", str(simulated_catalogue), "--out", out]
    # 40 test cutouts pass no gate.
    assert "champion" not in client.get_registered_model("lens_ensemble").aliases
    assert main(["predict", *arguments]) == 0
    captured = capsys.readouterr()
    gate = client.get_model_version("lens_ensemble", "1").tags["lens.gate"]
    refused = f"no champion: using the challenger, version 1, which the gate has refused: {gate}"
    assert refused in captured.err
    assert main(["promote", "1", "--home", str(own_home)]) == 0
    assert main(["predict", *arguments]) == 0
    assert "no champion" not in capsys.readouterr().err
    assert main(["predict", *arguments, "--model", "models:/lens_ensemble/1"]) == 0
    assert "models:/lens_ensemble/1" in capsys.readouterr().out
    for uri, named in [
        (
            "models:/lens_ensemble/7",
            "lens_ensemble/7: there is no such version; lens_ensemble has 1",
        ),
        ("models:/lens_ensemble@best", "no such alias; lens_ensemble has challenger, champion"),
        ("models:/lens/1", "models:/lens/1: no model of this name is registered"),
        ("/tmp/a/model", "is no model of this registry"),
    ]:
        assert main(["predict", *arguments, "--model", uri]) == 2
        assert named in capsys.readouterr().err
    missing = ["--home", str(own_home), "--catalogue", "missing.csv", "--out", out]
    assert main(["predict", *missing]) == 2
    assert "missing.csv: there is no such file or folder" in capsys.readouterr().err
    assert main(["promote", "7", "--home", str(own_home)]) == 2
    assert "give the number of a version; lens_ensemble has 1" in capsys.readouterr().err


def test_a_registered_member_is_trained_further(own_home: Path, tmp_path: Path) -> None:
    """Its weights are where the training begins: with a rate of almost nothing they stay."""
    begin = ["train", "--home", str(own_home), "--pretrained", "models:/lens_ensemble@challenger"]
    flags = ["--epochs", "1", "--learning-rate", "1e-12", "--weight-decay", "0"]
    out = tmp_path / "out"
    assert main([*begin, *flags, "--arch", "lastro", "--checkpoint-dir", str(out)]) == 0
    (before,) = (own_home / "checkpoints" / "lastro").glob("[!.]*/best.ckpt")
    old, new = (
        torch.load(path, weights_only=True)["state_dict"] for path in (before, out / "best.ckpt")
    )
    # Where it began is of no use to who loads it.
    assert "pretrained" not in torch.load(out / "best.ckpt", weights_only=True)["hyper_parameters"]
    weights = [name for name in old if name.startswith("backbone.") and name.endswith("weight")]
    assert weights
    for name in weights:
        torch.testing.assert_close(new[name], old[name], rtol=0, atol=1e-6)


def test_a_version_to_start_from_is_named_in_full(own_home: Path) -> None:
    registry = Registry(Settings.load(home=str(own_home)))
    with pytest.raises(InputError, match="says no version; name one, as models:/lens_ensemble@ch"):
        member_checkpoint(registry, "models:/lens_ensemble", "lastro")
    newest, first = (
        member_checkpoint(registry, f"models:/lens_ensemble/{version}", "lastro")
        for version in ("latest", "1")
    )
    assert newest == first
    assert newest.is_file()


def test_a_member_that_a_version_has_not_is_told(own_home: Path, tmp_path: Path) -> None:
    """In a process of its own, where nothing else has asked MLflow before."""
    which = ["--pretrained", "models:/lens_ensemble/1", "--arch", "resnet18"]
    command = [LENS_PIPELINE, "train", "--home", str(own_home), *which]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert "models:/lens_ensemble/1 has no resnet18; it has" in told.stderr


def test_shards_are_scored_as_their_catalogue_is(
    home: Path, simulated_catalogue: Path, tmp_path: Path
) -> None:
    shards = next((home / "shards").glob("[!.]*/manifest.json")).parent
    of_run = pd.read_parquet(next((home / "reports").glob("*/scores.parquet")))
    out = tmp_path / "scores.parquet"
    arguments = ["predict", "--home", str(home), "--out", str(out), "--catalogue"]
    assert main([*arguments, str(shards)]) == 0
    scores = pd.read_parquet(out)
    assert scores["id"].tolist() == of_run["id"].tolist()
    # Shards hold float16.
    np.testing.assert_allclose(scores["logit"], of_run["logit"], rtol=0, atol=2e-2)
