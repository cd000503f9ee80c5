"""Stores that fail, stall or go away, and uploads that are killed."""

import json
import signal
import time
from pathlib import Path

import pytest

from lens_pipeline import LensDataModule, storage
from lens_pipeline.shards import open_shards, patience, publish_shards, read_manifest, verify_shards
from lens_pipeline.shards.patience import RefusedError, StoreError
from lens_pipeline.shards.versions import newest_version
from lens_pipeline_tests.object_stores import GCSServer, S3Server
from lens_pipeline_tests.shards.published import Proxies, names, publisher, wait_for_an_object


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
    monkeypatch.setattr(patience, "PATIENCE", 3.0)
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
    monkeypatch.setattr(patience, "PATIENCE", 1.0)
    monkeypatch.setattr(storage, "READ_LIMIT", 0.5)
    proxy = faulty_proxy(gcs_server)
    proxy.stall()
    with pytest.raises(StoreError, match=gcs_bucket):
        publish_shards(
            shards_folder, gcs_bucket, storage_options=gcs_server.storage_options(proxy.url)
        )


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
    monkeypatch.setattr(patience, "PATIENCE", 0.0)
    for status, kind in ((403, RefusedError), (500, StoreError)):
        proxy.every(1, status=status, only=r"train-000001\.tar")
        with pytest.raises(kind, match=rf"{url}/train-000001\.tar: "):
            verify_shards(url)


def test_cloud_epoch_of_which_every_third_request_fails(
    shards_folder: Path, s3_bucket: str, s3_server: S3Server, faulty_proxy: Proxies, tmp_path: Path
) -> None:
    published = publish_shards(
        shards_folder, f"{s3_bucket}/lenses", storage_options=s3_server.storage_options()
    )
    proxy = faulty_proxy(s3_server)
    proxy.every(3, status=500)
    options = s3_server.storage_options(proxy.url)
    data = LensDataModule(published.url, cache_dir=tmp_path, storage_options=options)
    seen = [place for batch in data.train_dataloader() for place in batch["index"].tolist()]
    assert sorted(seen) == list(range(len(open_shards(shards_folder).split("train"))))
    assert proxy.faults >= 2


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
