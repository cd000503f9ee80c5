"""Publishing to real object stores, and what happens to it there."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest

from lens_pipeline import LensDataModule, LensWebDatasetDataModule, storage
from lens_pipeline.catalogue.dataset import Dataset
from lens_pipeline.errors import InputError
from lens_pipeline.shards import (
    cloud,
    open_shards,
    prune,
    prune_versions,
    publish_shards,
    read_manifest,
    store,
    verify_shards,
    write_shards,
)
from lens_pipeline.shards.checked import RECORD
from lens_pipeline.shards.cloud import newest_version, published_problems
from lens_pipeline.shards.manifest import Manifest, Shard, write_manifest
from lens_pipeline.shards.store import RefusedError, Store, StoreError
from lens_pipeline.steps import file_sha256
from lens_pipeline_tests.faulty_proxy import FaultyProxy
from lens_pipeline_tests.object_stores import GCSServer, S3Server, sign_in

Proxies = Callable[[S3Server | GCSServer], FaultyProxy]


@pytest.fixture(params=["s3", "gs", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict]:
    """(the URL of an empty place, its storage options)"""
    if request.param == "folder":
        return str(tmp_path / "cloud"), {}
    kind = {"s3": "s3", "gs": "gcs"}[request.param]
    bucket = request.getfixturevalue(f"{kind}_bucket")
    return f"{bucket}/lenses", request.getfixturevalue(f"{kind}_server").storage_options()


def names(url: str, options: dict) -> set[str]:
    filesystem, root = fsspec.url_to_fs(url, **options)
    filesystem.invalidate_cache()
    found = {path.rpartition("/")[2] for path in filesystem.find(root)}
    return {name for name in found if not name.endswith(".lock") and name != RECORD}


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


def test_cloud_is_read_by_who_may_not_list(
    shards_folder: Path, s3_bucket: str, s3_server: S3Server, faulty_proxy: Proxies, tmp_path: Path
) -> None:
    """S3 tells them of what is absent that they may not read it."""
    url = f"{s3_bucket}/lenses"
    version = publish_shards(
        shards_folder, url, storage_options=s3_server.storage_options()
    ).dataset_version
    proxy = faulty_proxy(s3_server)
    proxy.every(1, status=403, code="AccessDenied", only="list-type|lenses/(manifest|val-)")
    options = s3_server.storage_options(proxy.url)
    data = LensDataModule(url, 16, cache_dir=tmp_path, storage_options=options)
    assert data.content == version
    tars = LensWebDatasetDataModule(val_urls=f"{url}/val-000000.tar", storage_options=options)
    assert len(tars.split("val")) == len(open_shards(shards_folder).split("val"))
    proxy.every(1, status=403, code="AccessDenied", only="lenses/(manifest|latest)")
    with pytest.raises(RefusedError, match=r"lenses/manifest\.json: may not be read"):
        LensDataModule(url, storage_options=options).format  # noqa: B018


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


def test_cloud_places_that_cannot_be_written_are_told_apart_at_once(
    shards_folder: Path, s3_bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = s3_server.storage_options()

    def refused(url: str) -> str:
        begun = time.monotonic()
        with pytest.raises(InputError) as caught:
            publish_shards(shards_folder, url, storage_options=options)
        assert time.monotonic() - begun < 5
        assert url in str(caught.value)
        return str(caught.value)

    assert "there is no bucket nowhere" in refused("s3://nowhere/lenses")
    sign_in(monkeypatch, s3_server.environment(wrong=True))
    wrong = refused(s3_bucket)
    assert "credentials are refused" in wrong
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in wrong
    sign_in(monkeypatch, {"AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nonexistent"})
    assert "there are no credentials for it" in refused(s3_bucket)
    sign_in(monkeypatch, s3_server.environment(read_only=True))
    assert "no writing (Access Denied.)" in refused(s3_bucket)


@pytest.mark.parametrize(
    ("kind", "status", "code", "only", "said"),
    [
        ("s3", 400, "InvalidToken", "", "lenses: no writing, for credentials are refused"),
        ("s3", 400, "InvalidBucketName", "", r"lenses: no writing \("),
        ("gcs", 401, "", "", "lenses: no writing, for credentials are refused"),
        ("gcs", 403, "", "POST", r"lenses: no writing \(Forbidden: "),
        ("s3", 403, "", r"HEAD .*\.writable-\w+ ", r"lenses: no reading \("),
        ("s3", 403, "", r"HEAD .*\.none", r"lenses: no listing \("),
        (
            *("s3", 400, "ExpiredToken", r"PUT .*train-000001\.tar"),
            r"lenses/\w{64}/train-000001\.tar: may not be put, for credentials are refused",
        ),
        (
            *("s3", 403, "AccessDenied", r"PUT .*latest\.json"),
            r"lenses/latest\.json: may not be put \(Forbidden\)",
        ),
    ],
)
def test_cloud_that_refuses_is_not_asked_again(
    kind: str,
    status: int,
    code: str,
    only: str,
    said: str,
    shards_folder: Path,
    request: pytest.FixtureRequest,
    faulty_proxy: Proxies,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And it is told what it has refused."""
    server, bucket = (request.getfixturevalue(f"{kind}_{what}") for what in ("server", "bucket"))
    monkeypatch.setattr(store, "PATIENCE", 5.0)
    proxy = faulty_proxy(server)
    proxy.every(1, status=status, code=code, only=only)
    with pytest.raises(RefusedError, match=said):
        publish_shards(
            shards_folder, f"{bucket}/lenses", storage_options=server.storage_options(proxy.url)
        )


def test_cloud_without_conditional_puts_is_published_to(
    own_shards: Path,
    s3_bucket: str,
    s3_server: S3Server,
    faulty_proxy: Proxies,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = f"{s3_bucket}/lenses"
    monkeypatch.setattr(store, "PATIENCE", 5.0)
    proxy = faulty_proxy(s3_server)
    proxy.every(1, status=501, code="NotImplemented", only="(?i)\nif-(none-)?match:")
    options = s3_server.storage_options(proxy.url)
    versions = publish_versions(own_shards, url, options, 2)
    assert newest_version(url, options) == f"{url}/{versions[-1]}"
    assert proxy.faults == 2
    assert "no conditional put" in caplog.text


def test_cloud_is_verified_though_some_requests_fail_and_an_object_that_cannot_be_is_named(
    shards_folder: Path,
    s3_bucket: str,
    s3_server: S3Server,
    faulty_proxy: Proxies,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = s3_server.storage_options()
    url = publish_shards(shards_folder, f"{s3_bucket}/lenses", storage_options=options).url
    proxy = faulty_proxy(s3_server)
    monkeypatch.setenv("LENS_STORAGE_OPTIONS", json.dumps(s3_server.storage_options(proxy.url)))
    proxy.reset_after(1000, times=7, only=r"GET .*train-000001\.tar")
    assert verify_shards(url) == []
    assert proxy.faults == 7  # s3fs by itself gives up at the fifth
    monkeypatch.setattr(store, "PATIENCE", 0.0)
    for status, kind in ((403, RefusedError), (500, StoreError)):
        proxy.every(1, status=status, only=r"train-000001\.tar")
        with pytest.raises(kind, match=rf"{url}/train-000001\.tar: "):
            verify_shards(url)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        *(("s3", "503"), ("s3", "reset"), ("gcs", "500"), ("gcs", "reset")),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("s3", "slow"), ("gcs", "503"))),
    ],
)
def test_cloud_uploads_survive_faults(
    shards_folder: Path,
    kind: str,
    fault: str,
    request: pytest.FixtureRequest,
    faulty_proxy: Proxies,
) -> None:
    server, bucket = (request.getfixturevalue(f"{kind}_{what}") for what in ("server", "bucket"))
    proxy = faulty_proxy(server)
    options = server.storage_options(proxy.url)
    if fault == "reset":
        proxy.reset_after(100_000, times=3)
    elif fault == "slow":
        proxy.delay(0.5)
    else:
        proxy.every(5, status=int(fault))
    published = publish_shards(shards_folder, f"{bucket}/lenses", storage_options=options)
    assert proxy.faults > 0
    proxy.pass_through()
    assert verify_shards(published.url, server.storage_options()) == []
    assert newest_version(f"{bucket}/lenses", server.storage_options()) == published.url


@pytest.mark.slow
def test_cloud_that_stalls_or_is_gone_is_an_error_that_names_the_object(
    shards_folder: Path,
    s3_bucket: str,
    s3_server: S3Server,
    faulty_proxy: Proxies,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"{s3_bucket}/lenses"
    before = publish_shards(shards_folder, url, storage_options=s3_server.storage_options())
    monkeypatch.setattr(store, "PATIENCE", 3.0)
    monkeypatch.setattr(storage, "CONNECT_LIMIT", 1)
    monkeypatch.setattr(storage, "READ_LIMIT", 0.5)
    proxy = faulty_proxy(s3_server)
    options = s3_server.storage_options(proxy.url)
    proxy.stall()
    with pytest.raises(StoreError, match=s3_bucket):
        publish_shards(shards_folder, url, storage_options=options)
    proxy.pass_through()
    s3_server.kill()
    with pytest.raises(StoreError, match=s3_bucket):
        publish_shards(shards_folder, url, storage_options=s3_server.storage_options())
    s3_server.restart()
    assert newest_version(url, s3_server.storage_options()) == before.url
    again = publish_shards(shards_folder, url, storage_options=s3_server.storage_options())
    assert again.uploaded == ()


@pytest.mark.slow
def test_cloud_that_stalls_is_given_up_on_gcs_too(
    shards_folder: Path,
    gcs_bucket: str,
    gcs_server: GCSServer,
    faulty_proxy: Proxies,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "PATIENCE", 1.0)
    monkeypatch.setattr(storage, "READ_LIMIT", 0.5)
    proxy = faulty_proxy(gcs_server)
    proxy.stall()
    with pytest.raises(StoreError, match=gcs_bucket):
        publish_shards(
            shards_folder, gcs_bucket, storage_options=gcs_server.storage_options(proxy.url)
        )


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


PUBLISH = """
import json, sys
from pathlib import Path
from lens_pipeline.shards import publish_shards
published = publish_shards(Path(sys.argv[1]), sys.argv[2], storage_options=json.loads(sys.argv[3]))
print(len(published.uploaded))
"""


def publisher(shards: Path, url: str, options: dict) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PUBLISH, str(shards), url, json.dumps(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_an_object(url: str, options: dict, like: str = ".tar") -> None:
    wait_until(lambda: any(like in name for name in names(url, options)))


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.02)


def test_cloud_upload_that_was_killed_goes_on(
    shards_folder: Path, s3_bucket: str, s3_server: S3Server, faulty_proxy: Proxies
) -> None:
    url, options = f"{s3_bucket}/lenses", s3_server.storage_options()
    version = read_manifest(shards_folder).dataset_version
    proxy = faulty_proxy(s3_server)
    proxy.delay(0.3)
    with publisher(shards_folder, url, s3_server.storage_options(proxy.url)) as process:
        wait_for_an_object(f"{url}/{version}", options)
        process.send_signal(signal.SIGKILL)
    there = names(f"{url}/{version}", options) - {".publishing"}
    assert there
    assert "manifest.json" not in there
    assert newest_version(url, options) is None
    published = publish_shards(shards_folder, url, storage_options=options)
    assert there <= set(published.skipped)  # and what was still under way
    assert verify_shards(published.url, options) == []
    assert ".publishing" not in names(published.url, options)


def test_cloud_server_restarted_during_an_upload(
    shards_folder: Path, s3_bucket: str, s3_server: S3Server, faulty_proxy: Proxies
) -> None:
    url, options = f"{s3_bucket}/lenses", s3_server.storage_options()
    version = read_manifest(shards_folder).dataset_version
    proxy = faulty_proxy(s3_server)
    proxy.delay(0.3)
    with publisher(shards_folder, url, s3_server.storage_options(proxy.url)) as process:
        wait_for_an_object(f"{url}/{version}", options)
        s3_server.kill()
        time.sleep(2)
        s3_server.restart()
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert verify_shards(f"{url}/{version}", options) == []
    assert newest_version(url, options) == f"{url}/{version}"


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


def test_cloud_epoch_of_which_every_tenth_request_fails(
    shards_folder: Path, s3_bucket: str, s3_server: S3Server, faulty_proxy: Proxies, tmp_path: Path
) -> None:
    published = publish_shards(
        shards_folder, f"{s3_bucket}/lenses", storage_options=s3_server.storage_options()
    )
    proxy = faulty_proxy(s3_server)
    proxy.every(10, status=500)
    options = s3_server.storage_options(proxy.url)
    data = LensDataModule(published.url, cache_dir=tmp_path, storage_options=options)
    seen = [place for batch in data.train_dataloader() for place in batch["index"].tolist()]
    assert sorted(seen) == list(range(len(open_shards(shards_folder).split("train"))))


def publish_versions(shards: Path, url: str, options: dict, count: int) -> list[str]:
    """The same shards under other names, the oldest first; a store may count whole seconds only."""
    versions = []
    for number in range(count):
        manifest = replace(read_manifest(shards), dataset=f"dataset {number}")
        (shards / "manifest.json").write_text(manifest.text)
        time.sleep(1.1)
        versions.append(publish_shards(shards, url, storage_options=options).dataset_version)
    return versions


def versions_at(url: str, options: dict) -> set[str]:
    filesystem, root = fsspec.url_to_fs(url, **options)
    return {path[len(root) + 1 :].partition("/")[0] for path in filesystem.find(root)}


def test_cloud_versions_that_nobody_needs_are_pruned(
    own_shards: Path, place: tuple[str, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, options = place
    referred, latest, old, newest = publish_versions(own_shards, url, options, 4)
    filesystem, root = fsspec.url_to_fs(url, **options)
    stopped = "0" * 64
    for name in (f"{stopped}/train-000000.tar", "notes/of_mine.txt"):
        filesystem.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(f"{root}/{name}", b"content")
    pointer = json.loads(Store(url, options).read("latest.json") or b"")
    content = json.dumps(pointer | {"version": latest})
    Store(url, options).put_text("latest.json", content)

    def pruned(**more: bool) -> dict[str, tuple[bool, str]]:
        known = {referred: "lens_ensemble version 1"}
        found = prune_versions(url, 1, referred=known, storage_options=options, **more)
        assert all(one.bytes > 0 for one in found)
        return {one.version: (one.kept, one.reason) for one in found}

    before = versions_at(url, options)
    young = pruned()
    assert all(kept for kept, _ in young.values())
    assert young[old] == young[stopped] == (True, "younger than a day")
    assert versions_at(url, options) == before
    monkeypatch.setattr(prune, "YOUNG", timedelta(0))
    expected = {
        newest: (True, "of the newest 1"),
        latest: (True, "latest.json names it"),
        referred: (True, "lens_ensemble version 1 refers to it"),
        old: (False, "is older"),
        stopped: (False, "an upload that was stopped"),
    }
    assert pruned(dry_run=True) == expected
    assert versions_at(url, options) == before
    assert pruned() == expected
    assert versions_at(url, options) == before - {old, stopped}
    assert all(verify_shards(f"{url}/{v}", options) == [] for v in (newest, latest, referred))
    # Published again, it is the newest again, though none of its shards was sent.
    again = publish_versions(own_shards, url, options, 1)
    assert again == [referred]
    assert pruned()[referred][1] == (
        "latest.json names it; of the newest 1; lens_ensemble version 1 refers to it"
    )


def test_cloud_upload_that_only_finds_what_is_there_is_under_way(
    shards_folder: Path,
    s3_bucket: str,
    s3_server: S3Server,
    faulty_proxy: Proxies,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It puts nothing for as long as it looks, and is not taken for one that was stopped."""
    url, options = f"{s3_bucket}/lenses", s3_server.storage_options()
    published = publish_shards(shards_folder, url, storage_options=options)
    Store(published.url, options).remove("manifest.json")
    Store(url, options).remove("latest.json")
    time.sleep(4)
    monkeypatch.setattr(prune, "YOUNG", timedelta(seconds=3))
    (stopped,) = prune_versions(url, 1, referred={}, dry_run=True, storage_options=options)
    assert stopped.reason == "an upload that was stopped"
    proxy = faulty_proxy(s3_server)
    proxy.delay(1, only=r"\.tar")
    with publisher(shards_folder, url, s3_server.storage_options(proxy.url)) as process:
        wait_for_an_object(published.url, options, ".publishing")
        (found,) = prune_versions(url, 1, referred={}, storage_options=options)
        assert found.reason == "younger than a day"
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert verify_shards(published.url, options) == []
    assert newest_version(url, options) == published.url


def test_cloud_version_that_is_published_again_while_others_are_removed_stays(
    own_shards: Path,
    s3_bucket: str,
    s3_server: S3Server,
    faulty_proxy: Proxies,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, options = f"{s3_bucket}/lenses", s3_server.storage_options()
    first = read_manifest(own_shards)
    again, going, newest = publish_versions(own_shards, url, options, 3)
    monkeypatch.setattr(prune, "YOUNG", timedelta(0))
    proxy = faulty_proxy(s3_server)
    proxy.delay(1, only="DELETE")
    through = s3_server.storage_options(proxy.url)
    with ThreadPoolExecutor(1) as pool:
        pruned = pool.submit(prune_versions, url, 1, referred={}, storage_options=through)
        wait_until(lambda: any(f"{going}/" in line for line in proxy.seen if "DELETE" in line))
        manifest = replace(first, dataset="dataset 0")
        (own_shards / "manifest.json").write_text(manifest.text)
        assert publish_shards(own_shards, url, storage_options=options).uploaded == ()
        found = {one.version: one for one in pruned.result()}
    assert (found[again].kept, found[again].reason) == (True, "latest.json names it")
    assert not found[going].kept
    assert versions_at(url, options) == {"latest.json", newest, again}
    assert verify_shards(f"{url}/{again}", options) == []


def test_prune_stops_where_a_version_is_published_again_and_tells_what_it_lacks(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    shards, url = tmp_path / "shards", str(tmp_path / "cloud")
    shards.mkdir()
    write_shards(dataset.folder, shards, shard_size=5)
    first = read_manifest(shards)
    going = publish_shards(shards, url).dataset_version
    (shards / "manifest.json").write_text(replace(first, dataset="another").text)
    newest = publish_shards(shards, url).dataset_version
    monkeypatch.setattr(prune, "YOUNG", timedelta(0))
    remove, one_at_a_time = Store.remove, threading.RLock()
    published: list[str] = []

    def remove_late(place: Store, name: str) -> None:
        """Once it was seen that a tar may go, its version is published again."""
        with one_at_a_time:
            if name.startswith(f"{going}/train-") and not published:
                (shards / "manifest.json").write_text(first.text)
                published.append(publish_shards(shards, url).dataset_version)
        remove(place, name)

    monkeypatch.setattr(Store, "remove", remove_late)
    found = {one.version: one for one in prune_versions(url, 1, referred={})}
    assert published == [going]
    assert (found[going].kept, found[going].reason) == (True, "latest.json names it")
    listed = {listed.name for listed in read_manifest(shards).files}
    lost = listed - names(f"{url}/{going}", {})
    assert 0 < len(lost) <= 8 < len(listed)
    assert f"{url}/{going}: was published again while it was removed" in caplog.text
    assert any(f"it lacks {name}" in caplog.text for name in lost)
    assert versions_at(url, {}) >= {newest, going}


def test_cloud_upload_whose_shards_are_removed_meanwhile_is_not_the_newest(
    shards_folder: Path, s3_bucket: str, s3_server: S3Server, faulty_proxy: Proxies
) -> None:
    url, options = f"{s3_bucket}/lenses", s3_server.storage_options()
    place = publish_shards(shards_folder, url, storage_options=options).url
    Store(place, options).remove("manifest.json")
    Store(url, options).remove("latest.json")
    proxy = faulty_proxy(s3_server)
    proxy.delay(1.5, only=r"manifest\.json")
    with publisher(shards_folder, url, s3_server.storage_options(proxy.url)) as process:
        wait_until(lambda: any("manifest.json" in line for line in proxy.seen))
        Store(place, options).remove("train-000001.tar")  # it has just been seen
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"StoreError: {place}: train-000001.tar: removed by somebody" in errors
    assert newest_version(url, options) is None
    assert "manifest.json" not in names(place, options)
    assert publish_shards(shards_folder, url, storage_options=options).uploaded == (
        "train-000001.tar",
        "manifest.json",
    )


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


def test_cloud_prune_that_is_stopped_leaves_nothing_that_looks_whole(
    own_shards: Path,
    s3_bucket: str,
    s3_server: S3Server,
    faulty_proxy: Proxies,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, options = f"{s3_bucket}/lenses", s3_server.storage_options()
    old, newest = publish_versions(own_shards, url, options, 2)
    monkeypatch.setattr(prune, "YOUNG", timedelta(0))
    monkeypatch.setattr(store, "PATIENCE", 0.5)
    proxy = faulty_proxy(s3_server)
    proxy.every(1, status=503, only=r"DELETE .*\.tar")
    through = s3_server.storage_options(proxy.url)
    with pytest.raises(StoreError, match=rf"{s3_bucket}/lenses/{old}/.*\.tar"):
        prune_versions(url, 1, referred={}, storage_options=through)
    left = names(f"{url}/{old}", options)
    assert "train-000000.tar" in left
    assert "manifest.json" not in left
    proxy.pass_through()
    reasons = {
        one.version: one.reason
        for one in prune_versions(url, 1, referred={}, storage_options=through)
    }
    assert reasons[old] == "an upload that was stopped"
    assert versions_at(url, options) == {"latest.json", newest}


def test_cloud_prune_says_at_once_where_it_cannot_be(
    own_shards: Path, s3_bucket: str, s3_server: S3Server, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options = s3_server.storage_options()
    publish_shards(own_shards, f"{s3_bucket}/lenses", storage_options=options)

    def refused(url: str, keep: int = 1) -> str:
        with pytest.raises(InputError) as caught:
            prune_versions(url, keep, referred={}, storage_options=options)
        return str(caught.value)

    assert "keep 0: at least 1" in refused(f"{s3_bucket}/lenses", 0)
    assert "no shards are published" in refused(f"{s3_bucket}/elsewhere")
    assert "there is no bucket nowhere" in refused("s3://nowhere/lenses")
    options = {}
    assert "there is no such folder" in refused(str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
    options = s3_server.storage_options()
    sign_in(monkeypatch, s3_server.environment(read_only=True))
    assert "no writing" in refused(f"{s3_bucket}/lenses")
    (found,) = prune_versions(
        f"{s3_bucket}/lenses", 1, referred={}, dry_run=True, storage_options=options
    )
    assert found.kept


@pytest.mark.parametrize("options", [{"endpoint_url": "localhost:9000"}, {"nosuch": 1}])
def test_cloud_options_that_no_client_takes_are_named(
    options: dict[str, Any], own_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_in(monkeypatch, {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"})
    with pytest.raises(InputError, match=r"s3://bucket/lenses: .*LENS_STORAGE_OPTIONS"):
        publish_shards(own_shards, "s3://bucket/lenses", storage_options=options)


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


def written(shards: Path, dataset: str) -> Manifest:
    """A manifest of the tars in a folder, as of a dataset of that content."""
    tars = [
        Shard(path.name, file_sha256(path), path.stat().st_size, "train", 1, 1, 0)
        for path in sorted(shards.glob("*.tar"))
    ]
    rows = pd.DataFrame({"id": [dataset]})
    about = {"format": {}, "encoding": {}, "dataset": dataset, "simulated": False}
    return write_manifest(shards, index=rows, catalogue=rows, shards=tuple(tars), **about)
