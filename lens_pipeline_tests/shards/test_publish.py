"""Shards published to real object stores and to folders, and read from there."""

import json
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from lens_pipeline import LensDataModule, LensWebDatasetDataModule
from lens_pipeline.errors import InputError
from lens_pipeline.shards import (
    cloud,
    open_shards,
    publish_shards,
    read_manifest,
    store,
    verify_shards,
)
from lens_pipeline.shards.checked import RECORD
from lens_pipeline.shards.cloud import published_problems
from lens_pipeline.shards.store import Store
from lens_pipeline.shards.versions import newest_version
from lens_pipeline_tests.object_stores import S3Server
from lens_pipeline_tests.shards.published import Proxies, names, publisher, written


def test_cloud_holds_what_the_manifest_lists_and_is_read_back(
    shards_folder: Path, place: tuple[str, dict], tmp_path: Path
) -> None:
    url, options = place
    manifest = read_manifest(shards_folder)
    published = publish_shards(shards_folder, url, storage_options=options)
    files = {*(listed.name for listed in manifest.files), "manifest.json"}
    assert set(published.uploaded) == files
    assert published.url == f"{url}/{manifest.dataset_version}"
    assert names(published.url, options) == files
    assert names(url, options) == {*files, "latest.json"}
    assert verify_shards(published.url, options) == []
    assert published_problems(shards_folder, published.url, options) == []
    assert newest_version(url, options) == published.url

    again = publish_shards(shards_folder, url, storage_options=options)
    assert again.uploaded == ()
    assert again.bytes == 0

    data = LensDataModule(url, cache_dir=tmp_path / "cache", storage_options=options)
    whole = open_shards(shards_folder).split("val")
    read = data.split("val").gather(list(range(len(whole))))
    np.testing.assert_array_equal(read, whole.gather(list(range(len(whole)))))


def test_cloud_tars_are_found_through_the_newest_version(
    shards_folder: Path, place: tuple[str, dict], tmp_path: Path
) -> None:
    url, options = place
    published = publish_shards(shards_folder, url, storage_options=options)
    streams = {
        where: LensWebDatasetDataModule(
            val_urls=f"{where}/val-000000.tar", batch_size=16, storage_options=options
        )
        for where in (url, published.url)
    }
    batches = [[batch["image"] for batch in d.val_dataloader()] for d in streams.values()]
    assert all((a == b).all() for a, b in zip(*batches, strict=True))
    assert sum(map(len, batches[0])) == len(open_shards(shards_folder).split("val"))
    wrong = LensWebDatasetDataModule(f"{url}/train-{{0..7}}.tar", storage_options=options)
    with pytest.raises(InputError, match=r"those are .*train-\{000000\.\.000002\}\.tar"):
        wrong.train_dataloader()


def test_one_training_reads_one_version(own_shards: Path, tmp_path: Path) -> None:
    """Though another is published between its splits."""
    url = str(tmp_path / "cloud")
    first = publish_shards(own_shards, url).dataset_version
    data = LensWebDatasetDataModule(
        f"{url}/train-{{000000..000002}}.tar", f"{url}/val-000000.tar", batch_size=16
    )
    data.split("train")
    (own_shards / "manifest.json").write_text(
        replace(read_manifest(own_shards), dataset="another").text
    )
    assert publish_shards(own_shards, url).dataset_version != first
    data.split("val")
    folders = {Path(tars.urls[0]).parent.name for tars in data.opened.values()}
    assert folders == {first}


def test_where_shards_are_published_is_what_is_read(
    shards_folder: Path, s3_bucket: str, s3_server: S3Server
) -> None:
    url, options = f"{s3_bucket}/lenses", s3_server.storage_options()
    published = publish_shards(shards_folder, f"{url}//", storage_options=options)
    assert published.url == newest_version(f"{url}//", options)
    assert verify_shards(published.url, options) == []
    for wrong, said in (("s3://", "names no bucket"), (f"{s3_bucket}/x{{1,2}}y", "hold braces")):
        with pytest.raises(InputError, match=said):
            publish_shards(shards_folder, wrong, storage_options=options)


def test_cloud_objects_that_were_spoilt_are_put_again(
    own_shards: Path, place: tuple[str, dict]
) -> None:
    url, options = place
    published = publish_shards(own_shards, url, storage_options=options)
    filesystem, root = fsspec.url_to_fs(published.url, **options)
    content = bytearray(filesystem.cat_file(f"{root}/train-000001.tar"))
    content[len(content) // 2] ^= 1
    filesystem.pipe_file(f"{root}/train-000001.tar", bytes(content))
    filesystem.pipe_file(f"{root}/val-000000.tar", content[:500])
    filesystem.rm_file(f"{root}/index.parquet")
    problems = published_problems(own_shards, published.url, options)
    assert sorted(problem.split(":")[-2].rpartition("/")[2] for problem in problems) == [
        "index.parquet",
        "train-000001.tar",
        "val-000000.tar",
    ]
    again = publish_shards(own_shards, url, storage_options=options)
    assert set(again.uploaded) == {"index.parquet", "train-000001.tar", "val-000000.tar"}
    assert verify_shards(published.url, options) == []


def test_cloud_never_gets_a_shard_that_is_damaged_here(
    own_shards: Path, place: tuple[str, dict]
) -> None:
    url, options = place
    content = bytearray((own_shards / "train-000001.tar").read_bytes())
    content[1000] ^= 1
    (own_shards / "train-000001.tar").write_bytes(content)
    with pytest.raises(InputError, match=r"train-000001\.tar: has sha256 .*write the shards again"):
        publish_shards(own_shards, url, storage_options=options)
    assert newest_version(url, options) is None


@pytest.mark.parametrize(("kind", "mib"), [("s3", 101), ("gcs", 6)])
def test_cloud_shards_that_are_sent_in_parts_are_not_read_back(
    kind: str, mib: int, request: pytest.FixtureRequest, faulty_proxy: Proxies, tmp_path: Path
) -> None:
    server, bucket = (request.getfixturevalue(f"{kind}_{what}") for what in ("server", "bucket"))
    shards, block = tmp_path / "shards", np.random.default_rng(0).bytes(2**20)
    shards.mkdir()
    with (shards / "train-000000.tar").open("wb") as file:
        for number in range(mib):
            file.write(number.to_bytes() + block[1:])
    written(shards, "whole")
    proxy = faulty_proxy(server)
    options = server.storage_options(proxy.url)
    for uploaded in (3, 0):
        found = publish_shards(shards, f"{bucket}/lenses", storage_options=options)
        assert len(found.uploaded) == uploaded + (uploaded > 0)
        assert published_problems(shards, found.url, options) == []
    read_back = re.compile(r"GET (?!/storage)[^?]*train-000000\.tar(\?|$)|.*\.tar.*alt=media")
    assert not list(filter(read_back.match, proxy.seen))
    with (shards / "train-000000.tar").open("r+b") as file:
        file.write(b"another")
    written(shards, "whole")
    problems = published_problems(shards, found.url, server.storage_options())
    assert [problem.rpartition("/")[2].partition(":")[0] for problem in problems] == [
        "train-000000.tar",
        "manifest.json",
    ]


def test_cloud_pointer_is_never_moved_back(
    shards_folder: Path, place: tuple[str, dict], caplog: pytest.LogCaptureFixture
) -> None:
    """An older upload that ends late leaves the newer version the newest."""
    url, options = place
    newer = publish_shards(shards_folder, url, storage_options=options)
    begun = json.loads(Store(url, options).read("latest.json") or b"")
    Store(url, options).put_text("latest.json", json.dumps(begun | {"created": "2020-01-01"}))
    assert publish_shards(shards_folder, url, storage_options=options).uploaded == ()
    late = json.loads(Store(url, options).read("latest.json") or b"")
    assert (late["version"], late["sequence"]) == (newer.dataset_version, 1)
    assert late["created"] >= begun["created"]  # it was published again
    late |= {"version": "of-an-upload-that-begins-next-year", "created": "2999-01-01"}
    Store(url, options).put_text("latest.json", json.dumps(late))
    publish_shards(shards_folder, url, storage_options=options)
    assert json.loads(Store(url, options).read("latest.json") or b"") == late
    (told,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert f"still names version {late['version']}" in told
    assert newer.dataset_version in told


def test_a_latest_json_that_is_damaged_is_told_before_anything_is_sent(
    shards_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "latest.json").write_text("{}")
    said = r"latest\.json: does not name a version .*; remove it, and publish again"
    with pytest.raises(InputError, match=said):
        publish_shards(shards_folder, str(tmp_path))
    assert not list(tmp_path.glob("*/"))
    with pytest.raises(InputError, match=said):
        newest_version(str(tmp_path))


def test_an_upload_from_a_machine_whose_clock_is_ahead_is_not_the_newest_for_years(
    own_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ahead(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Ahead":
            return cls(2099, 1, 1, tzinfo=UTC)

    url = str(tmp_path / "cloud")
    with monkeypatch.context() as patched:
        for module in (cloud, store):
            patched.setattr(module, "datetime", Ahead, raising=False)
        publish_shards(own_shards, url)
    (own_shards / "manifest.json").write_text(
        replace(read_manifest(own_shards), dataset="another").text
    )
    assert newest_version(url) != publish_shards(own_shards, url).url == newest_version(url)


def test_cloud_swaps_by_many_at_once_are_all_seen(place: tuple[str, dict]) -> None:
    url, options = place
    Store(url, options).check_writable()

    def add() -> None:
        for _ in range(5):
            Store(url, options).swap("count", lambda found: b"%d" % (int(found or b"0") + 1))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Store(url, options).read("count") == b"20"


def test_cloud_uploads_of_the_same_at_once(
    shards_folder: Path, s3_bucket: str, s3_server: S3Server
) -> None:
    url, options = f"{s3_bucket}/lenses", s3_server.storage_options()
    both = [publisher(shards_folder, url, options) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    newest = newest_version(url, options)
    assert newest is not None
    assert verify_shards(newest, options) == []
    assert json.loads(Store(url, options).read("latest.json") or b"")["sequence"] == 1


def test_two_containers_that_publish_to_one_folder_do_not_disturb_each_other(
    shards_folder: Path, tmp_path: Path
) -> None:
    """Their processes may have one number. What a killed one has left goes after a day."""
    version = read_manifest(shards_folder).dataset_version
    place = Store(f"{tmp_path}/{version}")
    Path(place.root).mkdir()
    source = tmp_path / "train-000000.tar"
    source.write_bytes(bytes(20_000_000))
    with ThreadPoolExecutor(4) as pool:  # threads have one process number, too
        for done in [pool.submit(place.put_file, source, source.name) for _ in range(8)]:
            done.result()
    assert (tmp_path / version / source.name).stat().st_size == 20_000_000
    old, young = (tmp_path / version / f".val-000000.tar.{name}" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half a ta")
    os.utime(old, (time.time() - 90_000,) * 2)
    publish_shards(shards_folder, str(tmp_path))
    left = {path.name for path in (tmp_path / version).iterdir()}
    files = {listed.name for listed in read_manifest(shards_folder).files}
    assert left == {young.name, *files, "manifest.json", RECORD}
