"""Scoring more than memory should hold: in parts, killed and gone on, never mixed."""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lens_pipeline.catalogue.table import read_catalogue
from lens_pipeline.cli import main
from lens_pipeline.ensemble.cutouts import CatalogueCutouts
from lens_pipeline.ensemble.parts import ROWS, about_scores, score_to_file
from lens_pipeline.ensemble.system import LensEnsemble, load_ensemble
from lens_pipeline.errors import InputError
from lens_pipeline.shards.cloud import publish_shards
from lens_pipeline_tests.conftest import LENS_PIPELINE
from lens_pipeline_tests.object_stores import S3Server

N = 2 * ROWS + 100


@pytest.fixture(scope="module")
def survey(simulated_catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue of N rows, some of which are no cutouts; their images come again and again."""
    table = pd.read_parquet(simulated_catalogue)
    table["path"] = [str(simulated_catalogue.parent / path) for path in table["path"]]
    table = pd.concat([table] * (1 + N // len(table)), ignore_index=True)[:N]
    table["id"] = [f"J{number:06d}" for number in range(N)]
    table.loc[::97, "path"] = "missing.fits"
    # In the first part this column is empty.
    table["note"] = [None] * (N - 1) + ["the last"]
    table["corner"] = [[number, 2 * number] for number in range(N)]
    path = tmp_path_factory.mktemp("survey") / "survey.parquet"
    table.to_parquet(path, index=False)
    return path


def command(home: Path, survey: Path, out: Path) -> list[str]:
    return ["predict", "--home", str(home), "--catalogue", str(survey), "--out", str(out)]


@pytest.fixture(scope="module")
def undisturbed(home: Path, survey: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scores of a command that nobody stopped."""
    out = tmp_path_factory.mktemp("undisturbed") / "scores.parquet"
    assert main(command(home, survey, out)) == 0
    return out


@pytest.fixture(scope="module")
def of_killed(home: Path, survey: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a command leaves that was killed after its first part."""
    out = tmp_path_factory.mktemp("killed") / "scores.parquet"
    parts = out.with_name("scores.parquet.parts")
    process = subprocess.Popen([LENS_PIPELINE, *command(home, survey, out)], start_new_session=True)
    begun = time.monotonic()
    while not (parts / "part-000000.parquet").exists():
        assert process.poll() is None
        assert time.monotonic() - begun < 120
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    assert not (parts / "part-000002.parquet").exists()
    return parts


@pytest.fixture
def killed(of_killed: Path, tmp_path: Path) -> Path:
    """A copy of `of_killed`."""
    return Path(shutil.copytree(of_killed, tmp_path / of_killed.name))


@pytest.fixture
def ensemble(home: Path) -> LensEnsemble:
    return load_ensemble(next((home / "ensemble").glob("[!.]*/ensemble.json")).parent)


def test_a_killed_command_goes_on_and_ends_with_what_it_would_have(
    home: Path,
    survey: Path,
    undisturbed: Path,
    killed: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (killed / "part-000001.parquet").write_bytes(b"PAR1")  # damaged: is scored again
    out = killed.with_name("scores.parquet")
    assert main(command(home, survey, out)) == 0
    assert f"goes on, {ROWS} of {N} rows are done" in capsys.readouterr().err
    assert out.read_bytes() == undisturbed.read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["scores.parquet"]
    scores, table = pd.read_parquet(out), pd.read_parquet(survey)
    assert scores["id"].tolist() == table["id"].tolist()
    unusable = table["path"] == "missing.fits"
    assert scores.loc[unusable, "probability"].isna().all()
    assert scores.loc[unusable, "reject_reason"].eq("the file is missing").all()
    assert scores.loc[~unusable, "probability"].notna().all()
    assert scores["note"].iloc[-1] == "the last"
    assert scores["label"].dtype == "Int8"


def test_an_image_that_has_changed_since_is_not_scored_as_it_was(
    home: Path, survey: Path, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_parquet(survey)
    stack = Path(table["path"][1].partition("#")[0])
    another = tmp_path / "another.npy"
    shutil.copy2(stack, another)
    stack.rename(kept := tmp_path / "kept.npy")
    try:
        another.rename(stack)  # which keeps the time of its content
        assert main(command(home, survey, killed.with_name("scores.parquet"))) == 2
        assert f"has scores of {stack} as it was before it changed" in capsys.readouterr().err
    finally:
        kept.rename(stack)


def test_scores_say_of_what_they_are(home: Path, undisturbed: Path, survey: Path) -> None:
    about = about_scores(undisturbed)
    ensemble = next((home / "ensemble").glob("[!.]*/ensemble.json"))
    facts = json.loads(ensemble.read_text())
    assert about["model"]["uri"] == "models:/lens_ensemble/1"
    assert about["dataset_version"] == facts["dataset_version"]
    assert about["catalogue"]["source"] == str(survey)
    assert about["code_version"] == importlib.metadata.version("lens-pipeline")
    with pytest.raises(InputError, match="does not say of what its scores are"):
        about_scores(survey)


def test_scores_are_not_replaced_by_none(
    home: Path, simulated_catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that is not mounted, in the middle of a survey: what there was stays, and what was
    scored is not scored again."""
    table = pd.read_parquet(simulated_catalogue)
    images = tmp_path / "images"
    shutil.copytree(simulated_catalogue.parent, images)
    table["path"] = [str(images / path) for path in table["path"]]
    table = pd.concat([table] * (1 + 3 * ROWS // len(table)), ignore_index=True)[: 3 * ROWS]
    table["id"] = [f"J{number:06d}" for number in range(len(table))]
    # The first part is of files that stay.
    for row in range(ROWS):
        table.loc[row, "path"] = str(simulated_catalogue.parent / Path(table["path"][row]).name)
    catalogue, out = tmp_path / "survey.parquet", tmp_path / "scores.parquet"
    table.to_parquet(catalogue)
    assert main(command(home, catalogue, out)) == 0
    before = out.read_bytes()
    images.rename(tmp_path / "away")
    assert main(command(home, catalogue, out)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{ROWS} of {3 * ROWS} cutouts cannot be used, or more; " in error
    assert f"LENS_MAX_REJECT_FRACTION allows {3 * ROWS // 10}: {ROWS} times: the file is" in error
    assert out.read_bytes() == before
    (tmp_path / "away").rename(images)
    assert main(command(home, catalogue, out)) == 0
    assert f"goes on, {ROWS} of {3 * ROWS} rows are done" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_a_limit_that_is_raised_costs_nothing_that_was_done(
    home: Path,
    survey: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "scores.parquet"
    monkeypatch.setenv("LENS_MAX_REJECT_FRACTION", "0.005")
    assert main(command(home, survey, out)) == 2
    assert "LENS_MAX_REJECT_FRACTION allows 10: 11 times: the file is m" in capsys.readouterr().err
    monkeypatch.delenv("LENS_MAX_REJECT_FRACTION")
    assert main(command(home, survey, out)) == 0
    assert f"goes on, {ROWS} of {N} rows are done" in capsys.readouterr().err
    assert out.read_bytes() == undisturbed.read_bytes()


def test_a_limit_holds_for_what_was_done_before(
    ensemble: LensEnsemble, survey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = CatalogueCutouts(read_catalogue(survey)), tmp_path / "scores.parquet"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr("lens_pipeline.ensemble.parts._put_together", interrupt)
        with pytest.raises(KeyboardInterrupt):
            score_to_file(ensemble, source, out, model="mine")
    with pytest.raises(InputError, match=rf"23 of {N} cutouts cannot be used, or more; LENS_MAX"):
        score_to_file(ensemble, source, out, model="mine", max_reject_fraction=0.01)
    assert score_to_file(ensemble, source, out, model="mine").n_scored == N - 23


def test_images_without_names_of_bands_are_told(
    home: Path, simulated_catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_parquet(simulated_catalogue)[:4]
    table["path"] = [str(simulated_catalogue.parent / path) for path in table["path"]]
    for name, rows in (("named", table), ("unnamed", table.drop(columns="bands"))):
        rows.to_parquet(tmp_path / f"{name}.parquet")
        assert main(command(home, tmp_path / f"{name}.parquet", tmp_path / "s.csv")) == 0
        told = "they are taken to be g, r, i, in this order" in capsys.readouterr().err
        assert told == (name == "unnamed")


def test_row_groups_are_larger_than_parts(undisturbed: Path) -> None:
    assert pq.read_metadata(undisturbed).num_row_groups == 1


def test_rows_without_a_pixel_scale_are_told(
    home: Path, simulated_catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_parquet(simulated_catalogue)[:8].drop(columns="pixel_scale")
    table["path"] = [str(simulated_catalogue.parent / path) for path in table["path"]]
    table.to_parquet(tmp_path / "few.parquet", index=False)
    assert main(command(home, tmp_path / "few.parquet", tmp_path / "scores.csv")) == 0
    assert "8 of 8 rows state no pixel_scale; the model takes 0.263" in capsys.readouterr().err


def test_parts_of_another_model_are_refused(
    ensemble: LensEnsemble, survey: Path, killed: Path
) -> None:
    out = killed.with_name("scores.parquet")
    before = {path.name: path.stat().st_mtime_ns for path in killed.glob("part*")}
    source = CatalogueCutouts(read_catalogue(survey))
    ensemble.facts["calibration"]["slope"] = 2.0
    with pytest.raises(InputError, match=r"parts of another model \(.*; now models:/mine/2, "):
        score_to_file(ensemble, source, out, model="models:/mine/2")
    assert {path.name: path.stat().st_mtime_ns for path in killed.glob("part*")} == before


def test_parts_of_another_catalogue_are_refused(
    home: Path, survey: Path, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_parquet(survey)
    table.loc[N - 1, "path"] = table.loc[5, "path"]
    changed = survey.with_name("changed.parquet")
    table.to_parquet(changed, index=False)
    out = killed.with_name("scores.parquet")
    assert main(command(home, changed, out)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{killed}: has parts of another catalogue" in error
    (killed / "parts.json").unlink()
    assert main(command(home, survey, out)) == 2
    assert "no parts.json to say of what" in capsys.readouterr().err


def test_two_commands_do_not_write_one_file(
    home: Path, survey: Path, killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with filelock.FileLock(killed / ".lock"):
        assert main(command(home, survey, killed.with_name("scores.parquet"))) == 2
    assert "another process is scoring into it" in capsys.readouterr().err


def test_a_csv_is_the_same_table(
    home: Path, survey: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores.csv"
    assert main(command(home, survey, out)) == 0
    csv, parquet = pd.read_csv(out), pd.read_parquet(undisturbed)
    assert list(csv) == list(parquet)
    assert csv["id"].tolist() == parquet["id"].tolist()
    np.testing.assert_allclose(csv["logit"], parquet["logit"], rtol=1e-15)
    assert about_scores(out) == about_scores(undisturbed)


def test_the_top_is_listed_and_drawn(
    home: Path, survey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_parquet(survey)[:40].assign(RA=np.linspace(0, 359, 40), dec=-1.5)
    table.to_parquet(tmp_path / "few.parquet")
    out = tmp_path / "scores.parquet"
    assert main([*command(home, tmp_path / "few.parquet", out), "--top", "10"]) == 0
    picture, listed = tmp_path / "scores.top.jpg", tmp_path / "scores.top.csv"
    said = f"{listed}: the highest-scored, the best first; {picture}: their picture"
    assert capsys.readouterr().out.splitlines()[-1] == said
    with Image.open(picture) as image:
        assert image.width > 500
    best = pd.read_parquet(out).nlargest(10, "logit")
    top = pd.read_csv(listed)
    assert list(top) == ["rank", "id", "ra", "dec", "probability", "logit"]
    assert top["rank"].tolist() == list(range(1, 11))
    for column in ("id", "ra", "dec"):
        assert top[column].tolist() == best[column].tolist()
    np.testing.assert_allclose(top["logit"], best["logit"], rtol=1e-12)
    np.testing.assert_allclose(top["probability"], best["probability"], rtol=1e-12)


def test_without_positions_the_top_is_listed_by_ids_alone(
    ensemble: LensEnsemble, survey: Path, tmp_path: Path
) -> None:
    table = pd.read_parquet(survey)[1:4].drop(columns=["ra", "dec"], errors="ignore")
    table.to_parquet(tmp_path / "few.parquet")
    source = CatalogueCutouts(read_catalogue(str(tmp_path / "few.parquet")))
    scored = score_to_file(ensemble, source, tmp_path / "scores.csv", model="a", top=2)
    assert scored.top == tmp_path / "scores.top.csv"
    assert list(pd.read_csv(scored.top)) == ["rank", "id", "probability", "logit"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_scale": 0.3}, r"row 4, column pixel_scale: 0.3 arcsec; .* 0.263 arcsec"),
        ({"id": "J000000"}, r"row 4, column id: 'J000000' is there twice"),
        ({"id": None}, r"row 4, column id: is empty"),
    ],
)
def test_what_a_table_may_not_say(
    home: Path,
    survey: Path,
    tmp_path: Path,
    change: dict[str, object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = pd.read_parquet(survey)[:10]
    for column, value in change.items():
        table.loc[3, column] = value
    path = tmp_path / "table.parquet"
    table.to_parquet(path)
    assert main(command(home, path, tmp_path / "scores.parquet")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {path}: ")
    assert re.search(message, error), error
    assert not (tmp_path / "scores.parquet").exists()


def test_a_pixel_scale_that_is_nearly_the_models_is_warned_of(
    home: Path, survey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_parquet(survey)[:10]
    path, out = tmp_path / "table.parquet", tmp_path / "scores.parquet"
    for factor, warnings in ((1.004, 1), (1 + 1e-7, 0)):
        table.assign(pixel_scale=table["pixel_scale"] * factor).to_parquet(path)
        assert main(command(home, path, out)) == 0
        assert capsys.readouterr().err.count("column pixel_scale: up to") == warnings


def test_a_catalogue_that_lacks_a_band_is_refused_before_anything_is_read(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "two.csv"
    path.write_text("id,path_g,path_r\na,a_g.fits,a_r.fits\n")
    assert main(command(home, path, tmp_path / "scores.parquet")) == 2
    assert "has the bands g, r; the model takes g, r, i" in capsys.readouterr().err


def test_an_out_may_have_any_name_but_the_catalogues(
    home: Path, survey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_parquet(survey)[1:10]
    table.to_parquet(tmp_path / "part-000000.parquet")
    catalogue = tmp_path / "few.parquet"
    table.to_parquet(catalogue)
    assert main(command(home, catalogue, tmp_path / "part-000000.parquet")) == 0
    assert pd.read_parquet(tmp_path / "part-000000.parquet")["probability"].notna().all()
    assert main(command(home, catalogue, catalogue)) == 2
    assert f"--out {catalogue}: is the catalogue" in capsys.readouterr().err
    pd.testing.assert_frame_equal(pd.read_parquet(catalogue), table)
    assert main(command(home, catalogue, Path("s3://bucket/scores.parquet"))) == 2
    assert "must be a file on this machine" in capsys.readouterr().err
    assert not Path("s3:").exists()


@pytest.mark.parametrize("out", ["file/scores.parquet", "folder.parquet", "scores.txt"])
def test_an_out_that_cannot_be_written_is_told_at_once(
    out: str, home: Path, survey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.parquet").mkdir()
    assert main(command(home, survey, tmp_path / out)) == 2
    assert f"error: --out {tmp_path / out}: " in capsys.readouterr().err


def test_a_plain_folder_of_cutouts_is_scored(
    home: Path, simulated_catalogue: Path, tmp_path: Path
) -> None:
    cube = np.load(simulated_catalogue.parent / "images-00000.npy")
    (tmp_path / "field").mkdir()
    for name, number in (("b", 0), ("a", 1)):
        np.save(tmp_path / "field" / f"{name}.npy", cube[number])
    out = tmp_path / "scores.parquet"
    assert main(command(home, tmp_path / "field", out)) == 0
    scores = pd.read_parquet(out)
    assert scores["id"].tolist() == ["a.npy", "b.npy"]
    assert scores["probability"].notna().all()


def test_shards_in_a_bucket_are_scored_as_those_in_a_folder(
    home: Path,
    s3_server: S3Server,
    s3_bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards = next((home / "shards").glob("[!.]*/manifest.json")).parent
    options = s3_server.storage_options()
    publish_shards(shards, s3_bucket, storage_options=options)
    monkeypatch.setenv("LENS_STORAGE_OPTIONS", json.dumps(options))
    found = []
    for place in (str(shards), s3_bucket):
        out = tmp_path / "scores.parquet"
        assert main(["predict", "--home", str(home), "--catalogue", place, "--out", str(out)]) == 0
        found.append(pd.read_parquet(out))
    pd.testing.assert_frame_equal(*found)
    assert found[0]["probability"].notna().all()
