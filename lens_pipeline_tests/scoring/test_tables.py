"""The table of scores, what it says of itself, and what is refused or told before it is made."""

import copy
import importlib.metadata
import json
import math
import posixpath
import re
import shutil
import threading
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from lens_pipeline.catalogue.cutout import CutoutError
from lens_pipeline.catalogue.dataset import Dataset
from lens_pipeline.catalogue.table import read_catalogue
from lens_pipeline.cli import main
from lens_pipeline.ensemble.system import LensEnsemble
from lens_pipeline.errors import InputError
from lens_pipeline.scoring import open_cutout_source
from lens_pipeline.scoring.parts import score_to_file
from lens_pipeline.scoring.predictor import score_catalogue
from lens_pipeline.scoring.score_files import about_scores
from lens_pipeline.scoring.sources import CatalogueCutouts
from lens_pipeline.shards import publish_shards, write_shards
from lens_pipeline_tests.object_stores import S3Server
from lens_pipeline_tests.scoring.scorers import Counting, command, scored
from lens_pipeline_tests.shards.published import Proxies, gets


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
    other = shutil.copy(undisturbed, undisturbed.with_name("of.csv.parquet"))
    assert about_scores(other) == about
    notes = undisturbed.with_name("notes.txt")
    notes.write_text("no scores")
    for other in (survey, notes):
        with pytest.raises(InputError, match="does not say of what its scores are"):
            about_scores(other)
    with pytest.raises(InputError, match=r"nowhere\.parquet: there is no such file"):
        about_scores("nowhere.parquet")


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
    score_catalogue(counting, few.assign(fingerprint="mine", std=1.0))
    assert "the scores have columns of their own named std, and" in caplog.text
    caplog.clear()
    scored(counting, few, out)
    of_scores = few.merge(pd.read_parquet(out).drop(columns=few.columns[1:], errors="ignore"))
    scored(counting, of_scores, tmp_path / "again.parquet")
    assert "carried along" not in caplog.text


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


def test_where_the_model_has_no_pixel_scale_it_is_told_that_none_is_compared(
    ensemble: LensEnsemble, survey: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = CatalogueCutouts(read_catalogue(str(survey)))
    source.check(ensemble.format)
    assert "pixel_scale" not in caplog.text
    source.check(replace(ensemble.format, pixel_scale=None))  # of several surveys
    assert "column pixel_scale: 0.263 to 0.263 arcsec; the model has no scale of" in caplog.text


def test_a_catalogue_that_lacks_a_band_is_refused_before_anything_is_read(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "two.csv"
    path.write_text("id,path_g,path_r\na,a_g.fits,a_r.fits\n")
    assert main(command(home, path, tmp_path / "scores.parquet")) == 2
    assert "has the bands g, r; the model takes g, r, i" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_table_of_ones_own_is_not_replaced(
    kind: str, home: Path, survey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = pd.read_parquet(survey)[1:10], tmp_path / f"mine.{kind}"
    table.to_parquet(tmp_path / "few.parquet")
    for own in (table.assign(probability=0.5).to_csv(index=False).encode(), b"notes", b"PAR1"):
        out.write_bytes(own)
        assert main(command(home, tmp_path / "few.parquet", out)) == 2
        assert f"--out {out}: is there, and holds no scores" in capsys.readouterr().err
        assert out.read_bytes() == own
    out.write_bytes(b"")  # as `mktemp` leaves it
    assert main(command(home, tmp_path / "few.parquet", out)) == 0


def test_an_out_may_have_any_name_but_the_catalogues(
    home: Path, survey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_parquet(survey)[1:10]
    catalogue = tmp_path / "few.parquet"
    table.to_parquet(catalogue)
    assert main(command(home, catalogue, tmp_path / "part-000000.parquet")) == 0
    assert pd.read_parquet(tmp_path / "part-000000.parquet")["probability"].notna().all()
    assert main(command(home, catalogue, catalogue)) == 2
    assert f"--out {catalogue}: {catalogue} is the catalogue" in capsys.readouterr().err
    pd.testing.assert_frame_equal(pd.read_parquet(catalogue), table)
    assert main(command(home, catalogue, Path("s3://bucket/scores.parquet"))) == 2
    assert "scores.parquet is a URL; name a place on this machine" in capsys.readouterr().err
    assert not Path("s3:").exists()


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("", "error: argument --out: is given, and empty"),
        (".", f"error: --out {Path.cwd()}: must end in .parquet or .csv"),
    ],
)
def test_an_out_that_names_nothing_is_told(
    out: str, said: str, home: Path, survey: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "--home", str(home), "--catalogue", str(survey), "--out", out]) == 2
    assert said in capsys.readouterr().err


def test_what_somebody_has_added_to_scores_is_kept(
    home: Path,
    survey: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Grades, before they have gone into a catalogue; and the scores of another field."""
    fields = []
    for number, rows in enumerate((slice(0, 20), slice(20, 30))):
        fields.append(tmp_path / f"field_{number}.parquet")
        pd.read_parquet(survey)[rows].to_parquet(fields[-1])
    out, best = tmp_path / "scores.csv", tmp_path / "scores.top.csv"
    predict = [*command(home, fields[0], out), "--top", "3"]
    assert main(predict) == 0
    for path in (out, best):
        pd.read_csv(path).assign(grade="A").to_csv(path, index=False)
    graded = {path: path.read_bytes() for path in (out, best)}
    for _ in range(2):  # there is nothing more to keep then
        assert main(predict) == 0
        for path, content in graded.items():
            assert path.with_name(f"{path.name}.before").read_bytes() == content
            assert "grade" not in pd.read_csv(path)
    assert f"{out} holds other values: as it was it is kept as {out}.before" in caplog.text
    assert f"{best} has columns that it will not have (grade): as it was it is kept" in caplog.text
    first, of_first = out.read_bytes(), about_scores(out)
    best.write_bytes("rang;id;Güte\n1;a;gut\n".encode("latin-1"))  # as a spreadsheet may leave it
    assert main(predict) == 0
    assert best.with_name(f"{best.name}.before-2").read_bytes().startswith(b"rang;")
    assert main(command(home, fields[1], out)) == 0
    assert f"{out} holds 20 scores of other rows: as it was it is kept as" in caplog.text
    assert out.with_name(f"{out.name}.before-2").read_bytes() == first
    assert about_scores(out.with_name(f"{out.name}.before-2")) == of_first != about_scores(out)
    assert not out.with_name(f"{out.name}.before-3").exists()


@pytest.mark.parametrize("out", ["file/scores.parquet", "folder.parquet", "scores.txt"])
def test_an_out_that_cannot_be_written_is_told_at_once(
    out: str, home: Path, survey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.parquet").mkdir()
    assert main(command(home, survey, tmp_path / out)) == 2
    assert re.search(f"error: (argument )?--out:? {tmp_path / out}: ", capsys.readouterr().err)


def test_a_plain_folder_of_cutouts_is_scored(
    home: Path, simulated_catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    # What is written there is no cutout next time.
    inside = command(home, tmp_path / "field", tmp_path / "field" / "scores.parquet")
    for _ in range(2):
        assert main([*inside, "--top", "1"]) == 0
        assert "2 of 2 cutouts scored" in capsys.readouterr().out


def test_shards_in_a_bucket_are_scored_as_those_in_a_folder(
    home: Path,
    s3_server: S3Server,
    s3_bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    faulty_proxy: Proxies,
) -> None:
    """None is fetched again for each batch, though the cache holds two of them."""
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shards(next((home / "dataset").glob("[!.]*/dataset.json")).parent, shards, shard_size=40)
    publish_shards(shards, s3_bucket, storage_options=s3_server.storage_options())
    proxy = faulty_proxy(s3_server)
    options = s3_server.storage_options(proxy.url)
    monkeypatch.setenv("LENS_STORAGE_OPTIONS", json.dumps(options))
    n_bytes = [path.stat().st_size for path in shards.glob("*.tar")]
    monkeypatch.setenv("LENS_CACHE_GB", str(2 * max(n_bytes) / 1e9))
    found = []
    for name, place in (("folder", str(shards)), ("bucket", s3_bucket)):
        out = tmp_path / f"{name}.parquet"  # else the scores would be those that are there
        assert main(["predict", "--home", str(home), "--catalogue", place, "--out", str(out)]) == 0
        found.append(pd.read_parquet(out))
    pd.testing.assert_frame_equal(*found)
    assert found[0]["probability"].notna().all()
    assert len(n_bytes) > 4
    # Some were compared with the training's before, and batches end within shards.
    assert len(gets(proxy)) <= 3 * len(n_bytes)


def test_a_field_in_the_place_of_another_does_not_take_its_scores_away(
    counting: Counting, own_images: pd.DataFrame, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "scores.parquet"
    scored(counting, own_images[:100], out)
    first = out.read_bytes()
    scored(counting, own_images[60:200], out)  # of the same name
    assert f"{out} holds 60 scores of other rows: as it was it is kept as" in caplog.text
    kept = out.with_name("scores.parquet.before")
    assert kept.read_bytes() == first
    assert about_scores(kept)["n_rows"] == len(pd.read_parquet(kept))
    scored(counting, own_images[80:200], out)
    assert "20 of its rows are no more in the catalogue, and go" in caplog.text
    assert not out.with_name("scores.parquet.before-2").exists()


def test_of_a_link_what_it_leads_to_is_written(
    counting: Counting, own_images: pd.DataFrame, tmp_path: Path
) -> None:
    (tmp_path / "large").mkdir()
    out, real = tmp_path / "scores.parquet", tmp_path / "large" / "scores.parquet"
    scored(counting, own_images[:10], real)
    out.symlink_to(real)
    scored(counting, own_images[:20], out)
    assert out.is_symlink()
    assert len(pd.read_parquet(real)) == 20


def of_other_members(ensemble: LensEnsemble) -> LensEnsemble:
    members = {f"new_{name}": system for name, system in ensemble.members.items()}
    return replace(ensemble, members=members)


def test_scores_of_another_field_are_kept_whatever_members_gave_them(
    ensemble: LensEnsemble, own_images: pd.DataFrame, tmp_path: Path
) -> None:
    """As of a model before, with other members: its file has other columns."""
    other = of_other_members(ensemble)
    for suffix in ("parquet", "csv"):
        out = tmp_path / f"scores.{suffix}"
        scored(ensemble, own_images[:20], out)
        first = out.read_bytes()
        scored(other, own_images[:20], out)  # the same rows: they are scored again
        assert not out.with_name(f"{out.name}.before").exists()
        scored(ensemble, own_images[:20], out)
        scored(other, own_images[20:40], out)
        assert out.with_name(f"{out.name}.before").read_bytes() == first


def test_columns_of_another_models_members_are_told(
    ensemble: LensEnsemble,
    own_images: pd.DataFrame,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scored(of_other_members(ensemble), own_images[:8], tmp_path / "field.parquet")
    own = sorted(f"probability_{name}" for name in ensemble.members)
    theirs = [f"probability_new_{name}" for name in sorted(ensemble.members)]
    caplog.clear()
    found, _ = scored(ensemble, pd.read_parquet(tmp_path / "field.parquet"), tmp_path / "s.csv")
    assert {*own, *theirs} <= {*pd.read_csv(found.path)}
    (said,) = [line for line in caplog.messages if "another model" in line]
    assert f"whose columns {', '.join(theirs)} are carried along" in said


def test_a_url_to_write_to_is_no_folder_of_that_name(
    ensemble: LensEnsemble,
    own_images: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    own_images[:8].to_parquet("catalogue.parquet")
    source = CatalogueCutouts(read_catalogue("catalogue.parquet"))
    for out in ("s3://bucket/scores.parquet", Path("s3://bucket/scores.parquet")):
        with pytest.raises(InputError, match="must be a file on this machine"):
            score_to_file(ensemble, source, out, model="a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["catalogue.parquet", "images"]


def test_a_model_without_a_number_is_refused(
    ensemble: LensEnsemble, own_images: pd.DataFrame, tmp_path: Path
) -> None:
    """It would be a score that is missing for no reason."""
    name, system = next(iter(ensemble.members.items()))
    spoilt = copy.deepcopy(system)
    torch.nn.init.constant_(spoilt.head.bias, math.nan)
    broken = replace(ensemble, members={**ensemble.members, name: spoilt})
    first = own_images["id"].iloc[0]
    with pytest.raises(InputError, match=f"no number for 8 of 8 cutouts, the first is {first}"):
        scored(broken, own_images[:8], tmp_path / "scores.csv")
    assert not (tmp_path / "scores.csv").exists()


def test_a_signature_is_not_in_the_reason_against_a_cutout(
    ensemble: LensEnsemble, own_images: pd.DataFrame, tmp_path: Path
) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(403)

        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    table = own_images[:6].reset_index(drop=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        signed = [f"{url}/{row}.npy?X-Amz-Signature=5ec7e7{row}" for row in range(3)]
        table.loc[:2, "path"] = signed
        found, _ = scored(ensemble, table, tmp_path / "scores.csv", max_reject_fraction=0.5)
        server.shutdown()
    ((reason, n),) = found.rejects.items()  # one for all: they are counted
    assert (n, "403" in reason, "5ec7e7" in reason) == (3, True, False)
    told = CutoutError(f"{signed[0]}: as a library may tell of it")
    assert "5ec7e7" not in str(told)


def test_remote_shards_that_the_cache_does_not_hold_are_hardly_fetched_twice(
    ensemble: LensEnsemble, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is fetched for one split leaves that of another where it is about to be read."""
    manifest = write_shards(dataset.folder, tmp_path / "shards", shard_size=8)
    published = publish_shards(tmp_path / "shards", "memory://once/lenses")
    room = 9 * max(shard.bytes for shard in manifest.shards)
    monkeypatch.setenv("LENS_CACHE_GB", str(room / 1e9))
    source = open_cutout_source(published.url, cache=tmp_path / "cache")
    asked, cat_file = Counter[str](), MemoryFileSystem.cat_file

    def counted(self: MemoryFileSystem, path: str, *args: Any, **how: Any) -> bytes:
        asked[posixpath.basename(path)] += 1
        return cat_file(self, path, *args, **how)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    rows = source.order
    read = list(source.read(ensemble.format, rows))
    tars = {shard.name: asked[shard.name] for shard in manifest.shards}
    assert len(read) == len(rows) == sum(shard.samples for shard in manifest.shards)
    assert min(tars.values()) == 1
    assert sum(tars.values()) <= len(tars) + 2  # the index takes room, too
