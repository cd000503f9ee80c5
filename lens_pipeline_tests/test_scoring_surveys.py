"""Scoring more than memory should hold: in parts, killed and gone on, never mixed."""

import errno
import fcntl
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import filelock
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lens_pipeline.catalogue.dataset import CutoutFormat
from lens_pipeline.catalogue.images import CutoutError
from lens_pipeline.catalogue.table import read_catalogue
from lens_pipeline.cli import main
from lens_pipeline.ensemble.claim import Share
from lens_pipeline.ensemble.cutouts import CatalogueCutouts
from lens_pipeline.ensemble.parts import ROWS, ScoredFile, score_to_file
from lens_pipeline.ensemble.predictor import score_catalogue
from lens_pipeline.ensemble.score_files import about_scores, written
from lens_pipeline.ensemble.system import BATCH, LensEnsemble, load_ensemble
from lens_pipeline.errors import InputError
from lens_pipeline.shards.cloud import publish_shards
from lens_pipeline.storage import FEW
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


class Counting(LensEnsemble):
    """The same scores; `scored` has the number of cutouts of each batch."""

    @cached_property
    def scored(self) -> list[int]:
        return []

    def predict(self, images: np.ndarray) -> pd.DataFrame:
        self.scored.append(len(images))
        return super().predict(images)


@pytest.fixture
def counting(ensemble: LensEnsemble) -> Counting:
    return Counting(**vars(ensemble))


@pytest.fixture
def own_images(simulated_catalogue: Path, tmp_path: Path) -> pd.DataFrame:
    """300 rows of three stacks that a test may change; `source` is what reads them."""
    cubes = np.load(simulated_catalogue.parent / "images-00000.npy")
    (tmp_path / "images").mkdir()
    for number in range(3):
        np.save(tmp_path / "images" / f"{number}.npy", cubes[50 * number : 50 * number + 50])
    rows = np.arange(300)
    table = pd.DataFrame({"id": [f"J{row:06d}" for row in rows], "flux_unit": "background_sigma"})
    table["path"] = [f"{tmp_path}/images/{row // 100}.npy#{row % 50}" for row in rows]
    return table.assign(bands="g,r,i", pixel_scale=0.263, label=1)


def scored(
    ensemble: LensEnsemble, table: pd.DataFrame, out: Path, **how: Any
) -> tuple[ScoredFile, int]:
    """(what `score_to_file` says, how many cutouts went through the ensemble)"""
    before = sum(ensemble.scored) if isinstance(ensemble, Counting) else 0
    catalogue = out.parent / "catalogue.parquet"
    table.to_parquet(catalogue)
    source = CatalogueCutouts(read_catalogue(catalogue), pad=how.pop("pad", False))
    found = score_to_file(ensemble, source, out, model="mine", **how)
    return found, sum(ensemble.scored) - before if isinstance(ensemble, Counting) else 0


def test_the_same_command_again_leaves_the_file_as_it_is(
    home: Path, survey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pd.read_parquet(survey)[:20].to_parquet(tmp_path / "few.parquet")
    for name in ("scores.parquet", "scores.csv"):
        out = tmp_path / name
        arguments = command(home, tmp_path / "few.parquet", out)
        capsys.readouterr()
        assert main(arguments) == 0
        assert "nothing has changed" not in capsys.readouterr().out
        before = out.stat()
        # The first row is missing, and still is.
        for more in ([], ["--top", "3"], ["--top", "2"]):
            assert main([*arguments, *more]) == 0
            assert f"{out}: nothing has changed since it was written" in capsys.readouterr().out
            assert os.path.samestat(out.stat(), before)
            assert out.stat().st_mtime_ns == before.st_mtime_ns
            assert not out.with_name(f"{name}.parts").exists()
            if more:
                assert len(pd.read_csv(tmp_path / "scores.top.csv")) == int(more[1])
        drawn = (tmp_path / "scores.top.jpg").stat()
        assert main([*arguments, "--top", "2"]) == 0
        assert os.path.samestat((tmp_path / "scores.top.jpg").stat(), drawn)
        (tmp_path / "scores.top.jpg").unlink()
        assert main([*arguments, "--top", "2"]) == 0
        assert (tmp_path / "scores.top.jpg").exists()


@pytest.mark.parametrize("name", ["scores.parquet", "scores.csv"])
def test_a_catalogue_that_has_grown_costs_its_own_rows(
    counting: Counting, own_images: pd.DataFrame, tmp_path: Path, name: str
) -> None:
    out = tmp_path / name
    read = pd.read_parquet if out.suffix == ".parquet" else pd.read_csv
    assert scored(counting, own_images[:250], out)[1] == 250
    # Rows are added at the end and the beginning, one goes, what is known of one is corrected, and
    # one is of another image.
    now = pd.concat([own_images[290:], own_images[:100], own_images[101:290]], ignore_index=True)
    now.loc[20, "label"], now["mag"] = 0, 20.5
    now.loc[30, "path"] = now.loc[200, "path"]
    assert scored(counting, now, out)[1] == 50 + 1
    found = read(out)
    assert found["id"].tolist() == now["id"].tolist()
    assert found["label"].tolist() == now["label"].tolist()
    assert found["mag"].eq(20.5).all()
    scored(counting, now, tmp_path / f"fresh{out.suffix}")
    fresh = read(tmp_path / f"fresh{out.suffix}")
    pd.testing.assert_frame_equal(found, fresh, rtol=0, atol=1e-5)
    assert about_scores(out) == about_scores(tmp_path / f"fresh{out.suffix}")
    # What is known of a row alone is new: the file is, and no score.
    assert scored(counting, now.assign(mag=21.5), out)[1] == 0
    assert read(out)["mag"].eq(21.5).all()
    np.testing.assert_array_equal(read(out)["logit"], found["logit"])


def test_of_images_that_have_changed_no_score_is_kept(
    counting: Counting, own_images: pd.DataFrame, tmp_path: Path
) -> None:
    out, stack = tmp_path / "scores.parquet", tmp_path / "images" / "1.npy"
    scored(counting, own_images, out)
    before = pd.read_parquet(out)
    other = np.load(stack)[::-1]
    times = (stack.stat().st_atime_ns, stack.stat().st_mtime_ns)
    np.save(tmp_path / "other.npy", other)
    os.utime(tmp_path / "other.npy", ns=times)  # what is moved keeps the time of its content
    (tmp_path / "other.npy").replace(stack)
    assert scored(counting, own_images, out)[1] == 100
    after = pd.read_parquet(out)
    same = before["logit"] == after["logit"]
    assert same[:100].all()
    assert same[200:].all()
    assert same[100:200].sum() < 10
    np.testing.assert_allclose(after["logit"][100:150], before["logit"][149:99:-1], atol=1e-5)


def test_another_model_or_way_of_reading_scores_all_again(
    counting: Counting, own_images: pd.DataFrame, tmp_path: Path
) -> None:
    few = own_images[:20]
    out = tmp_path / "scores.parquet"
    for change in (
        {},
        {"pad": True},
        {"table": few.assign(flux_unit=None)},
        {"table": few.assign(bands="i,r,g")},
    ):
        how = {"table": few, **change}
        assert scored(counting, how.pop("table"), out, **how)[1] == 20
    counting.facts["calibration"]["slope"] = 2.0
    assert scored(counting, few.assign(bands="i,r,g"), out)[1] == 20


def edit(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """As who works on a table does: pyarrow keeps what its metadata say."""
    if path.suffix == ".csv":
        change(pa.Table.from_pandas(pd.read_csv(path))).to_pandas().to_csv(path, index=False)
    else:
        pq.write_table(change(pq.read_table(path)), path)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (partial(pa.Table.set_column, i=2, field_="probability", column=[[0.5] * 20]), "s.csv"),
        (partial(pa.Table.set_column, i=2, field_="probability", column=[[0.5] * 20]), "s.parquet"),
        (partial(pa.Table.set_column, i=1, field_="label", column=[[0] * 20]), "s.parquet"),
        (partial(pa.Table.sort_by, sorting=[("logit", "descending")]), "s.parquet"),
        (partial(pa.Table.rename_columns, names={"mag": "magnitude"}), "s.parquet"),
    ],
)
def test_a_file_that_was_edited_is_not_taken_for_what_was_written(
    counting: Counting,
    own_images: pd.DataFrame,
    tmp_path: Path,
    change: Callable[[pa.Table], pa.Table],
    name: str,
) -> None:
    few, out = own_images[:20].assign(mag=20.5), tmp_path / name
    scored(counting, few, out)
    written = out.read_bytes()
    edit(out, change)
    assert out.read_bytes() != written
    assert scored(counting, few, out)[1] == 20
    assert out.read_bytes() == written


def test_a_csv_whose_command_is_killed_before_it_is_in_place_keeps_its_scores(
    counting: Counting,
    own_images: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "scores.csv"
    scored(counting, own_images[:20], out)
    before, about = out.read_bytes(), about_scores(out)
    replace_file = Path.replace

    def interrupt(path: Path, to: Path) -> Path:
        if Path(to) == out:
            raise KeyboardInterrupt
        return replace_file(path, to)

    for rows in (30, 40):
        with monkeypatch.context() as during:
            during.setattr(Path, "replace", interrupt)
            with pytest.raises(KeyboardInterrupt):
                scored(counting, own_images[:rows], out)
        assert out.read_bytes() == before
        assert about_scores(out) == about
    shutil.rmtree(tmp_path / "scores.csv.parts")
    assert scored(counting, own_images[:50], out)[1] == 30
    assert about_scores(out)["n_rows"] == 50
    assert scored(counting, own_images[:50], out)[0].written is False


def test_files_that_were_away_for_a_while_are_tried_again(
    counting: Counting, own_images: pd.DataFrame, tmp_path: Path
) -> None:
    """Away in the middle of the command, and back as they were."""
    disk, away = tmp_path / "disk", tmp_path / "away"
    disk.mkdir()
    (tmp_path / "images" / "1.npy").rename(disk / "1.npy")
    own_images.loc[100:199, "path"] = [f"{disk}/1.npy#{row % 50}" for row in range(100)]
    own_images.to_parquet(tmp_path / "catalogue.parquet")

    class GoAway(CatalogueCutouts):
        def read(self, form: CutoutFormat, rows: np.ndarray) -> Iterator[np.ndarray | CutoutError]:
            disk.rename(away)
            yield from super().read(form, rows)

    catalogue, out = read_catalogue(tmp_path / "catalogue.parquet"), tmp_path / "scores.parquet"
    assert score_to_file(counting, GoAway(catalogue), out, model="mine").n_scored == 200
    away.rename(disk)
    found = score_to_file(counting, CatalogueCutouts(catalogue), out, model="mine")
    assert (found.n_scored, found.written) == (300, True)
    assert sum(counting.scored) == 300


def test_a_row_that_fails_for_another_reason_says_so(
    counting: Counting,
    own_images: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    np.save(tmp_path / "images" / "small.npy", np.ones((3, 8, 8), np.float32))
    own_images.loc[7, "path"] = f"{tmp_path}/images/small.npy"
    own_images[:20].to_parquet(tmp_path / "catalogue.parquet")
    source = Stuttering(read_catalogue(tmp_path / "catalogue.parquet"))
    out = tmp_path / "scores.parquet"
    monkeypatch.setattr(Stuttering, "fails", (7,))
    score_to_file(counting, source, out, model="mine")
    assert "cannot be read" in pd.read_parquet(out)["reject_reason"][7]
    monkeypatch.setattr(Stuttering, "fails", ())
    assert score_to_file(counting, source, out, model="mine").written
    assert "8 x 8 pixels" in pd.read_parquet(out)["reject_reason"][7]
    assert not score_to_file(counting, source, out, model="mine").written
    assert sum(counting.scored) == 19


@pytest.mark.parametrize("fails", [(), tuple(range(20))])
def test_a_lock_that_outlives_its_file_is_no_failure(
    counting: Counting,
    own_images: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: tuple[int, ...],
) -> None:
    """NFS keeps a file that is removed while it is open, under another name, until it is closed."""
    own_images[:20].to_parquet(tmp_path / "catalogue.parquet")
    source = Stuttering(read_catalogue(tmp_path / "catalogue.parquet"))
    out = tmp_path / "scores.parquet"
    monkeypatch.setattr(Stuttering, "fails", fails)
    unlink = os.unlink

    def as_nfs_does(path: str | Path, *, dir_fd: int | None = None) -> None:
        if Path(path).name == ".lock":
            os.rename(path, Path(path).with_name(".nfs0001"), src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        elif Path(path).name == ".nfs0001":
            raise OSError(errno.EBUSY, "Device or resource busy")
        else:
            unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", as_nfs_does)
    refused = pytest.raises(InputError, match="none of its 20 cutouts can be used")
    with refused if fails else nullcontext():
        score_to_file(counting, source, out, model="mine")
    assert out.exists() == (not fails)
    left = [path.name for path in (tmp_path / "scores.parquet.parts").iterdir()]
    assert left == [".nfs0001"]


class Stuttering(CatalogueCutouts):
    """A disk that fails for some rows; `asked` has the rows that were read."""

    fails: tuple[int, ...] = ()

    @cached_property
    def asked(self) -> list[int]:
        return []

    def read(self, form: CutoutFormat, rows: np.ndarray) -> Iterator[np.ndarray | CutoutError]:
        self.asked.extend(rows.tolist())
        for row, cutout in zip(rows.tolist(), super().read(form, rows), strict=True):
            fails = row in type(self).fails
            yield CutoutError("the file cannot be read (Input/output error)") if fails else cutout


@pytest.mark.parametrize("stopped", [True, False])
def test_what_could_not_be_read_is_tried_again_alone(
    counting: Counting,
    own_images: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped: bool,
) -> None:
    """Not its part; and what is too small is so as long as its file is the same."""
    np.save(tmp_path / "images" / "small.npy", np.ones((3, 8, 8), np.float32))
    own_images.loc[[7, 8], "path"] = f"{tmp_path}/images/small.npy"
    own_images.to_parquet(tmp_path / "catalogue.parquet")
    catalogue = read_catalogue(tmp_path / "catalogue.parquet")
    out = tmp_path / "scores.parquet"
    monkeypatch.setattr(Stuttering, "fails", (5, 150, 299))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        if stopped:
            during.setattr("lens_pipeline.ensemble.parts.write_scores", interrupt)
        with pytest.raises(KeyboardInterrupt) if stopped else nullcontext():
            score_to_file(counting, Stuttering(catalogue), out, model="mine")
    assert sum(counting.scored) == 295
    monkeypatch.setattr(Stuttering, "fails", (299,))
    source = Stuttering(catalogue)
    assert score_to_file(counting, source, out, model="mine").n_scored == 297
    assert sum(counting.scored) == 297
    assert {*source.asked} == {5, 150, 299}
    found = pd.read_parquet(out)
    np.testing.assert_array_equal(np.flatnonzero(found["logit"].isna()), [7, 8, 299])
    assert "8 x 8 pixels" in found["reject_reason"][7]
    # Where the last still fails, the file is as it would be.
    assert not score_to_file(counting, Stuttering(catalogue), out, model="mine").written
    np.save(tmp_path / "images" / "small.npy", np.load(tmp_path / "images" / "0.npy")[0])
    assert score_to_file(counting, Stuttering(catalogue), out, model="mine").n_scored == 299
    assert sum(counting.scored) == 299


def test_a_kill_between_retry_and_file_keeps_the_new_scores(
    counting: Counting,
    own_images: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own_images.to_parquet(tmp_path / "catalogue.parquet")
    source = Stuttering(read_catalogue(tmp_path / "catalogue.parquet"))
    out = tmp_path / "scores.parquet"
    monkeypatch.setattr(Stuttering, "fails", (5,))
    score_to_file(counting, source, out, model="mine")
    monkeypatch.setattr(Stuttering, "fails", ())

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr("lens_pipeline.ensemble.parts.write_scores", interrupt)
        with pytest.raises(KeyboardInterrupt):
            score_to_file(counting, source, out, model="mine")
    found = score_to_file(counting, source, out, model="mine")
    assert (found.n_scored, found.written) == (300, True)
    assert pd.read_parquet(out)["logit"].notna().all()
    assert sum(counting.scored) == 300


def test_shares_of_several_machines_make_one_file(
    home: Path,
    survey: Path,
    undisturbed: Path,
    killed: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first of which was killed after its first part."""
    (killed / "part-000000.parquet").rename(killed / "part-1of2-000000.parquet")
    out = killed.with_name("scores.parquet")
    arguments = command(home, survey, out)
    with (killed / ".lock-2of2").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main([*arguments, "--share", "2/2"]) == 2
        assert "another process is scoring share 2/2; wait for it" in capsys.readouterr().err
        assert main([*arguments, "--share", "1/2"]) == 0
    said, told = capsys.readouterr()
    assert f"goes on, {ROWS} of {N - ROWS} rows are done" in told
    assert f"share 1/2 is done; {ROWS} of {N} rows are left" in said
    assert "the same command without --share writes the file" in said
    assert main([*arguments, "--share", "2/2"]) == 0
    assert "share 2/2 is done; so is all" in capsys.readouterr().out
    assert not out.exists()
    with (killed / ".lock").open("w") as held:  # as each share does, beside others
        fcntl.flock(held, fcntl.LOCK_SH)
        assert main([*arguments, "--share", "1/2"]) == 0
        assert main(arguments) == 2
        assert "another process is scoring into it; wait for it" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "goes on" not in capsys.readouterr().err  # all is done
    assert out.read_bytes() == undisturbed.read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["scores.parquet"]
    assert main([*arguments, "--share", "3/2"]) == 2
    assert "error: --share 3/2: must be i/n, as 2/4" in capsys.readouterr().err
    assert main([*arguments, "--share", "1/2", "--top", "9"]) == 2
    assert "error: --top: goes with the command without --share" in capsys.readouterr().err


def test_a_path_or_catalogue_is_scored_with_its_own_index(
    ensemble: LensEnsemble, own_images: pd.DataFrame, tmp_path: Path
) -> None:
    path = tmp_path / "catalogue.parquet"
    own_images[:40].to_parquet(path)
    of_path = score_catalogue(ensemble, path)
    assert of_path["logit"].notna().all()
    pd.testing.assert_frame_equal(of_path, score_catalogue(ensemble, str(path)))
    whole = read_catalogue(path)
    some = score_catalogue(ensemble, replace(whole, table=whole.table[::2]))
    assert some.index.tolist() == list(range(0, 40, 2))
    assert some["id"].tolist() == whole.table["id"][::2].tolist()
    np.testing.assert_allclose(some["logit"], of_path["logit"][::2], atol=1e-5)
    none = replace(whole, table=whole.table[:0])
    with pytest.raises(InputError, match=r"catalogue.parquet: has no rows"):
        score_catalogue(ensemble, none)
    with pytest.raises(InputError, match=r"catalogue.parquet: has no rows"):
        score_to_file(ensemble, CatalogueCutouts(none), tmp_path / "s.csv", model="a")


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
    """A disk that is not mounted, in the middle of a survey: what there was stays, and is all that
    is wanted when the disk is back."""
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
    assert f"{out}: nothing has changed since it was written" in capsys.readouterr().out
    assert out.read_bytes() == before
    assert not out.with_name("scores.parquet.parts").exists()


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
        during.setattr("lens_pipeline.ensemble.parts.write_scores", interrupt)
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


def test_a_share_of_another_model_is_told_where_there_are_no_parts(
    counting: Counting, own_images: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scores.parquet"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(Counting, "predict", interrupt)
        with pytest.raises(KeyboardInterrupt):
            scored(counting, own_images[:20], out, share=Share(1, 2))
    counting.facts["calibration"]["slope"] = 2.0
    message = r"parts: was begun by a share, and has no parts yet, of another model \(.*; go on"
    with pytest.raises(InputError, match=message):
        scored(counting, own_images[:20], out, share=Share(1, 2))
    assert scored(counting, own_images[:20], out)[1] == 20


def test_parts_of_another_catalogue_are_refused(
    home: Path, survey: Path, killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    another = survey.with_name("another.parquet")
    shutil.copyfile(survey, another)
    out = killed.with_name("scores.parquet")
    assert main(command(home, another, out)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{killed}: has parts of another catalogue ({survey}; now {another}); go on" in error
    (killed / "parts.json").unlink()
    assert main(command(home, survey, out)) == 2
    assert "no parts.json to say of what" in capsys.readouterr().err


def test_parts_of_a_catalogue_that_has_grown_meanwhile_are_gone_on_from(
    counting: Counting,
    own_images: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "scores.parquet"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr("lens_pipeline.ensemble.parts.write_scores", interrupt)
        with pytest.raises(KeyboardInterrupt):
            scored(counting, own_images[:250], out)
    with caplog.at_level("INFO"):
        assert scored(counting, own_images[10:], out)[1] == 50
    assert "10 scores are of cutouts that have changed or gone, or of other copies" in caplog.text
    assert pd.read_parquet(out)["logit"].notna().all()


def test_the_last_batch_is_as_it_would_be_where_others_are_not_whole(
    counting: Counting,
    own_images: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is tried again is scored beside others than at first; what is left is not."""
    table = pd.concat([own_images] * 6, ignore_index=True)
    table["id"] = [f"J{row:06d}" for row in range(len(table))]
    assert len(table) % BATCH
    table.to_parquet(tmp_path / "catalogue.parquet")
    source, out = Stuttering(read_catalogue(tmp_path / "catalogue.parquet")), tmp_path / "s.parquet"
    monkeypatch.setattr(Stuttering, "fails", (5, 6, 7))

    def full(_: Path) -> NoReturn:
        raise InputError("the disk is full")

    def stop_after_one(path: Path) -> Any:
        during.setattr("lens_pipeline.ensemble.parts.written", full)
        return written(path)

    with monkeypatch.context() as during:
        during.setattr("lens_pipeline.ensemble.parts.written", stop_after_one)
        with pytest.raises(InputError, match="full"):
            score_to_file(counting, source, out, model="mine")
    counting.scored.clear()
    monkeypatch.setattr(Stuttering, "fails", ())
    assert score_to_file(counting, source, out, model="mine").n_scored == len(table)
    left = len(table) - ROWS
    assert counting.scored == [*[BATCH] * (left // BATCH), left % BATCH, 3]


def test_an_own_column_that_is_replaced_is_told(
    counting: Counting,
    own_images: pd.DataFrame,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out, few = tmp_path / "scores.parquet", own_images[:4]
    scored(counting, few.assign(fingerprint="mine", std=1.0), out)
    assert "columns of their own named std, fingerprint, and those of the catalogue" in caplog.text
    caplog.clear()
    scored(counting, few, out)
    of_scores = few.merge(pd.read_parquet(out).drop(columns=few.columns[1:], errors="ignore"))
    scored(counting, of_scores, tmp_path / "again.parquet")
    assert "carried along" not in caplog.text


def test_what_no_store_tells_of_is_scored_again_and_said(
    counting: Counting,
    own_images: pd.DataFrame,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Files of a web server, too many to ask for each."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "images"))
    for row in range(FEW + 1):
        cube = np.load(tmp_path / "images" / "0.npy")[row % 50]
        np.save(tmp_path / "images" / f"alone-{row}.npy", cube)
    out = tmp_path / "scores.parquet"
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, caplog.at_level("INFO"):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        table = own_images[: FEW + 2].reset_index(drop=True)
        url = f"http://127.0.0.1:{server.server_port}"
        table.loc[:FEW, "path"] = [f"{url}/alone-{row}.npy" for row in range(FEW + 1)]
        assert scored(counting, table, out)[1] == FEW + 2
        assert "it is not known" not in caplog.text
        assert scored(counting, table, out)[1] == FEW + 1
        server.shutdown()
    assert f"of {FEW + 1} of {FEW + 2} rows it is not known whether their images" in caplog.text


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


@pytest.mark.parametrize("out", ["", "."])
def test_an_out_that_names_nothing_is_told(
    out: str, home: Path, survey: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "--home", str(home), "--catalogue", str(survey), "--out", out]) == 2
    assert "error: --out .: must end in .parquet or .csv" in capsys.readouterr().err


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
