"""Removing published versions, beside uploads of the same ones."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import fsspec
import pytest

from lens_pipeline.catalogue.dataset import Dataset
from lens_pipeline.errors import InputError
from lens_pipeline.shards import (
    patience,
    prune,
    prune_versions,
    publish_shards,
    read_manifest,
    verify_shards,
    write_shards,
)
from lens_pipeline.shards.patience import StoreError
from lens_pipeline.shards.store import Store
from lens_pipeline.shards.versions import newest_version
from lens_pipeline_tests.object_stores import S3Server, sign_in
from lens_pipeline_tests.shards.published import (
    Proxies,
    names,
    publish_versions,
    publisher,
    versions_at,
    wait_for_an_object,
    wait_until,
)


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
    begun = time.monotonic()
    Store(published.url, options).remove("manifest.json")
    Store(url, options).remove("latest.json")
    time.sleep(4)
    monkeypatch.setattr(prune, "YOUNG", timedelta(seconds=2))
    (stopped,) = prune_versions(url, 1, referred={}, dry_run=True, storage_options=options)
    assert stopped.reason == "an upload that was stopped"
    proxy = faulty_proxy(s3_server)
    proxy.delay(1, only=r"\.tar")
    with publisher(shards_folder, url, s3_server.storage_options(proxy.url)) as process:
        wait_for_an_object(published.url, options, ".publishing")
        # What it finds is older than that by as much as this machine has been slow.
        monkeypatch.setattr(prune, "YOUNG", timedelta(seconds=time.monotonic() - begun) / 2)
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
    assert found[going].kept
    # Another thread may look when the manifest lies there already, and `latest.json` does not.
    assert found[going].reason in ("latest.json names it", "is being published again")
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
    monkeypatch.setattr(patience, "PATIENCE", 0.5)
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
