"""Scoring more than memory should hold: in parts, killed and gone on, shared, never mixed."""

import errno
import fcntl
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import filelock
import pandas as pd
import pytest

from lens_pipeline.catalogue.table import read_catalogue
from lens_pipeline.cli import main
from lens_pipeline.ensemble.system import LensEnsemble
from lens_pipeline.errors import InputError
from lens_pipeline.scoring.claim import Share
from lens_pipeline.scoring.parts import score_to_file
from lens_pipeline.scoring.score_files import written
from lens_pipeline.scoring.sources import CatalogueCutouts
from lens_pipeline_tests.scoring.scorers import (
    BATCH,
    EACH,
    ROWS,
    Counting,
    N,
    Stuttering,
    command,
    interrupt,
    scored,
)


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
    assert "error: --top: is for the command without --share" in capsys.readouterr().err


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

    with monkeypatch.context() as during:
        during.setattr("lens_pipeline.scoring.parts.write_scores", interrupt)
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
    assert len(own_images) % BATCH
    own_images.to_parquet(tmp_path / "catalogue.parquet")
    source, out = Stuttering(read_catalogue(tmp_path / "catalogue.parquet")), tmp_path / "s.parquet"
    monkeypatch.setattr(Stuttering, "fails", (5, 6, 7))

    def full(_: Path) -> NoReturn:
        raise InputError("the disk is full")

    def stop_after_one(path: Path) -> Any:
        during.setattr("lens_pipeline.scoring.parts.written", full)
        return written(path)

    with monkeypatch.context() as during:
        during.setattr("lens_pipeline.scoring.parts.written", stop_after_one)
        with pytest.raises(InputError, match="full"):
            score_to_file(counting, source, out, model="mine")
    counting.scored.clear()
    monkeypatch.setattr(Stuttering, "fails", ())
    assert score_to_file(counting, source, out, model="mine").n_scored == len(own_images)
    left = len(own_images) - ROWS
    assert counting.scored == [*[BATCH] * (left // BATCH), left % BATCH, 3]


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
    said = f"LENS_MAX_REJECT_FRACTION=0.005 allows 1: {1 + ROWS // EACH} times: the file"
    assert said in capsys.readouterr().err
    monkeypatch.delenv("LENS_MAX_REJECT_FRACTION")
    assert main(command(home, survey, out)) == 0
    assert f"goes on, {ROWS} of {N} rows are done" in capsys.readouterr().err
    assert out.read_bytes() == undisturbed.read_bytes()


def test_a_limit_holds_for_what_was_done_before(
    ensemble: LensEnsemble, survey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = CatalogueCutouts(read_catalogue(survey)), tmp_path / "scores.parquet"

    with monkeypatch.context() as during:
        during.setattr("lens_pipeline.scoring.parts.write_scores", interrupt)
        with pytest.raises(KeyboardInterrupt):
            score_to_file(ensemble, source, out, model="mine")
    n = 1 + N // EACH
    with pytest.raises(
        InputError, match=rf"at least {n} of {N} cutouts cannot be used, and LENS_MAX"
    ):
        score_to_file(ensemble, source, out, model="mine", max_reject_fraction=0.01)
    assert score_to_file(ensemble, source, out, model="mine").n_scored == N - n


def test_two_commands_do_not_write_one_file(
    home: Path, survey: Path, killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with filelock.FileLock(killed / ".lock"):
        assert main(command(home, survey, killed.with_name("scores.parquet"))) == 2
    assert "another process is scoring into it" in capsys.readouterr().err


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
    assert f"at least {ROWS} of {3 * ROWS} cutouts cannot be used, and " in error
    assert f"=0.1 allows {3 * ROWS // 10}: {ROWS} times: the file is" in error
    assert f"the first is row {ROWS + 1}, id J{ROWS:06d}. With" in error
    assert out.read_bytes() == before
    (tmp_path / "away").rename(images)
    assert main(command(home, catalogue, out)) == 0
    assert f"{out}: nothing has changed since it was written" in capsys.readouterr().out
    assert out.read_bytes() == before
    assert not out.with_name("scores.parquet.parts").exists()
