"""The same command a month later: what is new is scored, nothing else, and nothing wrongly kept."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lens_pipeline.catalogue.cutout import CutoutError
from lens_pipeline.catalogue.dataset import CutoutFormat
from lens_pipeline.catalogue.table import read_catalogue
from lens_pipeline.cli import main
from lens_pipeline.scoring.parts import score_to_file
from lens_pipeline.scoring.score_files import about_scores, write_scores
from lens_pipeline.scoring.sources import CatalogueCutouts
from lens_pipeline.storage import FEW
from lens_pipeline_tests.scoring.scorers import Counting, Stuttering, command, interrupt, scored


def test_the_same_command_again_leaves_the_file_as_it_is(
    home: Path, survey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pd.read_parquet(survey)[:20].to_parquet(tmp_path / "few.parquet")
    for name in ("scores.csv", "scores.parquet"):
        out = tmp_path / name
        arguments = command(home, tmp_path / "few.parquet", out)
        capsys.readouterr()
        assert main(arguments) == 0
        assert "nothing has changed" not in capsys.readouterr().out
        before = out.stat()
        # The first row is missing, and still is.
        of_best = (["--top", "3"], ["--top", "2"]) if out.suffix == ".parquet" else ()
        for more in ([], *of_best):
            assert main([*arguments, *more]) == 0
            assert f"{out}: nothing has changed since it was written" in capsys.readouterr().out
            assert os.path.samestat(out.stat(), before)
            assert out.stat().st_mtime_ns == before.st_mtime_ns
            assert not out.with_name(f"{name}.parts").exists()
            if more:
                assert len(pd.read_csv(tmp_path / "scores.top.csv")) == int(more[1])
    drawn = (tmp_path / "scores.top.html").stat()
    assert main([*arguments, "--top", "2"]) == 0
    assert os.path.samestat((tmp_path / "scores.top.html").stat(), drawn)
    (tmp_path / "scores.top.html").unlink()
    assert main([*arguments, "--top", "2"]) == 0
    assert (tmp_path / "scores.top.html").exists()
    assert "former" not in capsys.readouterr().out
    pd.read_parquet(tmp_path / "few.parquet")[:-1].to_parquet(tmp_path / "few.parquet")
    assert main(arguments) == 0
    assert f"{tmp_path}/scores.top.csv: is of former scores" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["scores.parquet", "scores.csv"])
def test_a_column_that_is_new_is_written_and_nothing_scored_again(
    counting: Counting, own_images: pd.DataFrame, tmp_path: Path, name: str
) -> None:
    """A file of an earlier release says nothing of what was learnt from."""
    out = tmp_path / name
    read = pd.read_parquet if out.suffix == ".parquet" else pd.read_csv
    assert scored(counting, own_images[:40], out)[1] == 40
    now, about = read(out), about_scores(out)
    former = now.drop(columns="learnt_from")
    schema = pa.Schema.from_pandas(former, preserve_index=False)
    write_scores(out, tmp_path / f"aside{out.suffix}", [former], schema, about | {"schema": 2})
    assert scored(counting, own_images[:40], out)[1] == 0
    pd.testing.assert_frame_equal(read(out), now)
    assert about_scores(out) == about


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
    # Its rows are in batches of other sizes, which networks round in other ways.
    pd.testing.assert_frame_equal(found, fresh, rtol=0, atol=1e-4)
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


def test_scores_that_give_way_to_those_of_another_version_are_named(
    counting: Counting,
    own_images: pd.DataFrame,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "lens_pipeline")
    catalogue, out = read_catalogue(own_images[:20]), tmp_path / "scores.csv"
    said = f"{out}: scores of models:/finder/1 give way to those of models:/finder/2"
    told = []
    for number in "1122":
        score_to_file(counting, CatalogueCutouts(catalogue), out, model=f"models:/finder/{number}")
        told.append(said in caplog.messages)
        caplog.clear()
    assert told == [False, False, True, False]


def test_scores_that_give_way_to_those_of_another_model_of_that_name_are_told(
    counting: Counting, own_images: pd.DataFrame, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two homes, each of which counts the versions of its own model."""
    out = tmp_path / "scores.csv"
    scored(counting, own_images[:20], out)
    assert "another model" not in caplog.text
    counting.facts["calibration"]["slope"] = 2.0
    scored(counting, own_images[:20], out)
    assert f"{out}: scores of another model that is called mine, too, give way" in caplog.messages


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

    def stop_before(path: Path, to: Path) -> Path:
        if Path(to) == out:
            raise KeyboardInterrupt
        return replace_file(path, to)

    for rows in (30, 40):
        with monkeypatch.context() as during:
            during.setattr(Path, "replace", stop_before)
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
            if disk.exists():
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

    with monkeypatch.context() as during:
        if stopped:
            during.setattr("lens_pipeline.scoring.parts.write_scores", interrupt)
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

    with monkeypatch.context() as during:
        during.setattr("lens_pipeline.scoring.parts.write_scores", interrupt)
        with pytest.raises(KeyboardInterrupt):
            score_to_file(counting, source, out, model="mine")
    found = score_to_file(counting, source, out, model="mine")
    assert (found.n_scored, found.written) == (300, True)
    assert pd.read_parquet(out)["logit"].notna().all()
    assert sum(counting.scored) == 300


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
