"""Stores that fail, stall or go away while shards are read: nothing is lost."""

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from lens_pipeline import LensDataModule, LensWebDatasetDataModule, storage
from lens_pipeline.errors import InputError
from lens_pipeline.files import file_sha256
from lens_pipeline.shards import open_shards, patience, publish_shards, read_manifest
from lens_pipeline.shards.patience import StoreError
from lens_pipeline_tests.object_stores import S3Server, sign_in
from lens_pipeline_tests.shards.published import (
    SHARDS,
    N,
    Proxies,
    flipped,
    gets,
    numbers,
    spoil,
    wait_until,
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3", "gcs"])
@pytest.mark.parametrize("where", ["cache", "memory", "without a manifest"])
def test_cloud_epoch_of_ten_thousand_of_which_every_tenth_request_fails(
    ten_thousand: Path,
    kind: str,
    where: str,
    request: pytest.FixtureRequest,
    faulty_proxy: Proxies,
    tmp_path: Path,
) -> None:
    server, bucket = (request.getfixturevalue(f"{kind}_{what}") for what in ("server", "bucket"))
    options = server.storage_options()
    url = publish_shards(ten_thousand, f"{bucket}/lenses", storage_options=options).url
    if where == "without a manifest":
        filesystem, root = fsspec.url_to_fs(url, **options)
        filesystem.rm_file(f"{root}/manifest.json")
        fsspec.url_to_fs(bucket, **options)[0].rm_file(f"{bucket}/lenses/latest.json")
    proxy = faulty_proxy(server)
    proxy.every(10, status=500 if kind == "s3" else 503)
    data = LensWebDatasetDataModule(
        f"{url}/train-{{000000..{SHARDS - 1:06d}}}.tar",
        batch_size=100,
        flux_unit="background_sigma",
        cache_dir=tmp_path if where == "cache" else None,
        storage_options=server.storage_options(proxy.url),
    )
    batches = list(data.train_dataloader())
    assert proxy.faults >= 4
    found = numbers(batches)
    assert len(found) == 10_000
    assert set(found) == set(range(10_000))
    if where != "without a manifest":
        ids = data.split("train").ids[torch.cat([batch["index"] for batch in batches])]
        assert ids.tolist() == [f"train {number}" for number in found]
    assert len(list(tmp_path.rglob("*.tar"))) == (SHARDS if where == "cache" else 0)


def test_cloud_connections_are_not_closed_by_a_forked_process(
    published: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its parent's in its memory; closed there, the parent's would wait for a timeout."""
    monkeypatch.setattr(storage, "READ_LIMIT", 300.0)
    shards = open_shards(published, storage_options=s3_server.storage_options())
    split, per_shard = shards.split("train"), N // SHARDS
    split.gather([0])
    child = multiprocessing.get_context("fork").Process(target=split.gather, args=([per_shard],))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    begun = time.monotonic()
    split.gather([2 * per_shard])
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("kept", ["cache", "memory"])
@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_cloud_objects_that_are_not_as_listed_are_named_and_never_kept(
    small_cutouts: Path,
    kind: str,
    kept: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    server, bucket = (request.getfixturevalue(f"{kind}_{what}") for what in ("server", "bucket"))
    options = server.storage_options()
    url = publish_shards(small_cutouts, f"{bucket}/lenses", storage_options=options).url
    whole = (small_cutouts / "train-000007.tar").read_bytes()

    def data() -> LensWebDatasetDataModule:
        return LensWebDatasetDataModule(
            f"{url}/train-{{000000..{SHARDS - 1:06d}}}.tar", batch_size=20,
            cache_dir=tmp_path if kept == "cache" else None, storage_options=options,
        )  # fmt: skip

    for content, cause in (
        (flipped(whole), "has sha256"),
        (whole[:-7], "bytes, not"),
        (whole + b"more", "has more bytes, not"),
        (b"", "has 0 bytes, not"),
    ):
        spoil(f"{url}/train-000007.tar", options, lambda _, content=content: content)
        begun, refused = time.monotonic(), data()
        with pytest.raises(InputError, match=f"^{url}/train-000007.tar: .*{cause}"):
            list(refused.train_dataloader())
        assert time.monotonic() - begun < 20
        assert not [path for path in tmp_path.rglob("train-000007.tar") if path.is_file()]
    manifest = read_manifest(small_cutouts)
    listed = {shard.name: shard.sha256 for shard in manifest.shards}
    for path in tmp_path.rglob("*.tar"):
        assert file_sha256(path) == listed[path.name]
    publish_shards(small_cutouts, f"{bucket}/lenses", storage_options=options)
    assert set(numbers(refused.train_dataloader())) == set(range(N))


@pytest.mark.parametrize("kept", ["cache", "memory"])
def test_cloud_server_killed_and_restarted_during_an_epoch(
    published: str, s3_server: S3Server, faulty_proxy: Proxies, tmp_path: Path, kept: str
) -> None:
    proxy = faulty_proxy(s3_server)
    proxy.delay(0.3, only=r"\.tar")
    data = LensWebDatasetDataModule(
        f"{published}/train-{{000000..{SHARDS - 1:06d}}}.tar", batch_size=20,
        cache_dir=tmp_path if kept == "cache" else None,
        storage_options=s3_server.storage_options(proxy.url),
    )  # fmt: skip
    batches = iter(data.train_dataloader())
    seen = [next(batches)]
    s3_server.kill()
    back = threading.Timer(2, s3_server.restart)
    back.start()
    seen += batches
    back.join()
    assert set(numbers(seen)) == set(range(N))


def test_cloud_that_stalls_is_an_error_that_names_the_object_and_the_next_epoch_goes_on(
    published: str,
    s3_server: S3Server,
    faulty_proxy: Proxies,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxy = faulty_proxy(s3_server)

    def loader() -> Any:
        options = s3_server.storage_options(proxy.url)
        data = LensDataModule(published, batch_size=20, cache_dir=tmp_path, storage_options=options)
        return data.train_dataloader()

    with monkeypatch.context() as soon:  # not where all is well, however slow
        soon.setattr(patience, "PATIENCE", 1.0)
        soon.setattr(storage, "READ_LIMIT", 0.5)
        batches = iter(loader())
        proxy.delay(0.2, only=r"\.tar")
        next(batches)
        proxy.stall(only=r"\.tar")
        with pytest.raises(StoreError, match=rf"^{published}/train-0000\d\d\.tar: .*imeout"):
            list(batches)
    kept = {path.name for path in tmp_path.rglob("*.tar")}
    assert 0 < len(kept) < SHARDS
    proxy.pass_through()
    before = len(gets(proxy))
    assert set(numbers(loader())) == set(range(N))
    assert not kept & {line.rpartition("/")[2].split("?")[0] for line in gets(proxy)[before:]}


def test_cloud_that_stalls_for_a_moment_loses_nothing(
    published: str,
    s3_server: S3Server,
    faulty_proxy: Proxies,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage, "READ_LIMIT", 0.5)
    proxy = faulty_proxy(s3_server)
    data = LensDataModule(
        published, batch_size=20, cache_dir=tmp_path,
        storage_options=s3_server.storage_options(proxy.url),
    )  # fmt: skip
    loader = data.train_dataloader()
    proxy.stall(only=r"\.tar")

    def passes_when_it_has_been_met() -> None:
        wait_until(lambda: proxy.faults >= 8)
        proxy.pass_through()

    with ThreadPoolExecutor(1) as beside:
        passing = beside.submit(passes_when_it_has_been_met)
        assert set(numbers(loader)) == set(range(N))
        passing.result()


def test_cloud_connections_reset_in_the_middle_lose_nothing(
    published: str, s3_server: S3Server, faulty_proxy: Proxies, tmp_path: Path
) -> None:
    proxy = faulty_proxy(s3_server)
    proxy.reset_after(100_000, times=12, only=r"\.tar")
    data = LensDataModule(
        published, batch_size=20, cache_dir=tmp_path,
        storage_options=s3_server.storage_options(proxy.url),
    )  # fmt: skip
    assert set(numbers(data.train_dataloader())) == set(range(N))
    assert proxy.faults == 12


def test_cloud_that_may_not_be_read_is_told_at_once(
    published: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_in(monkeypatch, s3_server.environment(wrong=True))
    options = s3_server.storage_options()
    begun = time.monotonic()
    with pytest.raises(InputError, match=f"{published}/manifest.json: may not be read"):
        LensDataModule(published, cache_dir=tmp_path, storage_options=options).train_dataloader()
    assert time.monotonic() - begun < 45  # of 60 in which others are tried again
