"""Remote shards: fetched ahead of need, once for all who read them."""

import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from lens_pipeline import LensDataModule, LensWebDatasetDataModule
from lens_pipeline.shards.transfers import ahead_of
from lens_pipeline_tests.object_stores import S3Server
from lens_pipeline_tests.shards.published import SHARDS, N, Proxies, gets, numbers


def test_what_is_ahead_comes_in_order_and_errors_in_their_place() -> None:
    begun: list[int] = []

    def get(item: int) -> int:
        begun.append(item)
        time.sleep(0.01 * (3 - item % 3))
        return 10 // (item - 6)

    found = ahead_of(range(9), get, 3)
    assert [next(found) for _ in range(6)] == [10 // (item - 6) for item in range(6)]
    assert sorted(begun) == list(range(len(begun)))
    assert 6 <= len(begun) <= 9
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_cloud_is_fetched_once_by_processes_that_fill_one_cache(
    published: str, s3_server: S3Server, faulty_proxy: Proxies, tmp_path: Path
) -> None:
    proxy = faulty_proxy(s3_server)
    proxy.delay(0.1, only=r"\.tar")
    options = s3_server.storage_options(proxy.url)

    def epoch(said: Connection) -> None:
        data = LensDataModule(published, batch_size=20, cache_dir=tmp_path, storage_options=options)
        said.send(numbers(data.train_dataloader()))

    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(2)]
    both = [fork.Process(target=epoch, args=(said,)) for _, said in pipes]
    for process in both:
        process.start()
    for heard, _ in pipes:
        assert heard.poll(120)
        assert sorted(heard.recv()) == list(range(N))
    for process in both:
        process.join()
    assert len(gets(proxy)) == len(set(gets(proxy))) == SHARDS
    wanted = {f"train-{number:06d}.tar" for number in range(SHARDS)}
    assert {path.name for path in tmp_path.rglob("*") if path.suffix == ".tar"} == wanted


def test_cloud_workers_of_a_loader_share_the_cache(
    published: str, s3_server: S3Server, faulty_proxy: Proxies, tmp_path: Path
) -> None:
    proxy = faulty_proxy(s3_server)
    proxy.delay(0.05, only=r"\.tar")
    data = LensDataModule(
        published, batch_size=20, num_workers=2, persistent_workers=False, cache_dir=tmp_path,
        storage_options=s3_server.storage_options(proxy.url),
    )  # fmt: skip
    loader = data.train_dataloader()
    for number in range(2):
        loader.sampler.set_epoch(number)
        assert set(numbers(loader)) == set(range(N))
    assert len(gets(proxy)) == SHARDS


def test_cloud_first_batch_waits_for_few_shards(
    published: str, s3_server: S3Server, faulty_proxy: Proxies, tmp_path: Path
) -> None:
    proxy = faulty_proxy(s3_server)
    proxy.delay(0.3, only=r"\.tar")
    for cache in (tmp_path, None):
        before = len(gets(proxy))
        data = LensWebDatasetDataModule(
            f"{published}/train-{{000000..{SHARDS - 1:06d}}}.tar", batch_size=20, cache_dir=cache,
            storage_options=s3_server.storage_options(proxy.url),
        )  # fmt: skip
        assert data.class_counts("train") == (N // 2, N // 2)
        assert len(gets(proxy)) == before  # the index knows
        begun, batches = time.monotonic(), iter(data.train_dataloader())
        first = next(batches)
        assert len(gets(proxy)) - before <= SHARDS / 2
        assert len(set((first["index"] // (N // SHARDS)).tolist())) > 1
        assert sum(1 for _ in batches) == N // 20 - 1
        assert time.monotonic() - begun < 0.3 * SHARDS  # one at a time takes longer


def test_cloud_options_are_those_of_the_settings_unless_others_are_given(
    published: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LENS_STORAGE_OPTIONS", json.dumps(s3_server.storage_options()))
    tars = f"{published}/train-{{000000..{SHARDS - 1:06d}}}.tar"
    for data in (
        LensWebDatasetDataModule(tars, cache_dir=tmp_path),
        LensDataModule(published, cache_dir=tmp_path),
    ):
        assert data.class_counts("train") == (N // 2, N // 2)


def test_cloud_order_depends_on_seed_and_epoch_alone(
    small_cutouts: Path, published: str, s3_server: S3Server, tmp_path: Path
) -> None:
    def epoch(number: int, cache: Path, start: int = 0) -> tuple[list[int], list[int]]:
        """The cutouts, and their places."""
        data = LensDataModule(
            published, batch_size=20, cache_dir=cache, storage_options=s3_server.storage_options()
        )
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        loader.load_state_dict({"given": start})
        batches = list(loader)
        return numbers(batches), torch.cat([batch["index"] for batch in batches]).tolist()

    cold, places = epoch(0, tmp_path / "one")
    assert epoch(0, tmp_path / "one")[0] == cold
    assert epoch(0, tmp_path / "two", start=60)[0] == cold[1200:]
    assert len(list((tmp_path / "two").rglob("*.tar"))) < SHARDS  # the others were not needed
    later, _ = epoch(1, tmp_path / "two")
    assert later == epoch(1, tmp_path / "one")[0]
    whole = LensDataModule(small_cutouts, batch_size=20).train_dataloader()
    whole.sampler.set_epoch(1)
    assert later == numbers(whole)
    assert len({place // (N // SHARDS) for place in places[:20]}) <= 8
