"""How fast shards go to a bucket and come back: against the same bytes moved by s3fs alone.

A real S3 server (SeaweedFS) on this machine shares its cores with the client. Cutouts of 64 pixels
and three bands in float16. Cold: nothing in the cache yet; the rate counts from the opening of the
dataset to the last batch of the epoch. The same once more over a link that is slower than a machine
is to itself, as networks are.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import webdataset as wds
from torch.utils.data import DataLoader

from benchmarks._cutouts import make_dataset
from benchmarks._harness import SCRATCH, Row, Target, options, report
from benchmarks._link import Link
from lens_pipeline.catalogue.dataset import open_dataset
from lens_pipeline.shards import read_manifest, write_shards
from lens_pipeline.shards.cloud import publish_shards
from lens_pipeline.shards.datamodule import LensDataModule, LensWebDatasetDataModule
from lens_pipeline_tests.object_stores import S3Server, sign_in

BATCH = 128
SMALL = 50  # cutouts of a small shard
AT_A_TIME = 8
BUCKET = "bench"
LINK = 100  # MB/s, most of what a network of 1 Gbit/s carries
OVER = f", over {LINK} MB/s"


def measure(arguments: argparse.Namespace) -> tuple[list[Row], list[Target]]:
    with (
        tempfile.TemporaryDirectory(dir=SCRATCH) as scratch,
        S3Server(Path(scratch) / "server") as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        sign_in(patch, server.environment())
        server.make_bucket(BUCKET)
        with Link(server.url, LINK) as link:
            over = server.storage_options(link.url)
            return _measured(arguments, Path(scratch), server.storage_options(), over)


def _measured(
    arguments: argparse.Namespace, scratch: Path, storage: dict[str, Any], over: dict[str, Any]
) -> tuple[list[Row], list[Target]]:
    n = arguments.n
    dataset = open_dataset(make_dataset(scratch / "dataset", n))
    large, small = scratch / "large", scratch / "small"
    for folder, size in ((large, 1000), (small, SMALL)):
        folder.mkdir()
        write_shards(dataset.folder, folder, shard_size=size)
    manifest = read_manifest(large)
    mb = sum(listed.bytes for listed in manifest.files) / 1e6
    one = scratch / "one"
    one.write_bytes(b"".join((large / listed.name).read_bytes() for listed in manifest.files))
    filesystem = fsspec.filesystem("s3", **storage)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, action: Callable[[], object]) -> None:
        begun = time.perf_counter()
        action()
        seconds.setdefault(name, []).append(time.perf_counter() - begun)

    for turn in range(arguments.repeats):
        here = f"s3://{BUCKET}/{turn}"
        cache = scratch / f"cache{turn}"
        timed("fs.put of one file", lambda: filesystem.put(str(one), f"{here}/one"))  # noqa: B023
        timed("publish_shards", lambda: publish_shards(large, here, storage_options=storage))  # noqa: B023
        timed(
            "publish_shards, small shards",
            lambda: publish_shards(small, f"{here}-small", storage_options=storage),  # noqa: B023
        )
        place = f"{here}/{manifest.dataset_version}"
        names = [shard.name for shard in manifest.shards if shard.split == "train"]
        timed("raw parallel download", lambda: _download(filesystem, place, names))  # noqa: B023

        def cached(place: str = place, cache: Path = cache) -> LensDataModule:
            return LensDataModule(place, BATCH, cache_dir=cache, storage_options=storage)

        kept = cached()
        timed("cold epoch, with a cache", lambda: _epoch(kept.train_dataloader(), n))  # noqa: B023
        # Another process's second epoch: what is there is checked once more, outside the clock.
        data, local = cached(), LensDataModule(large, BATCH)
        for module in (data, local):
            _epoch(module.train_dataloader(), n)
        for epoch in range(1, 4):
            timed("epoch from the cache", lambda: _epoch(data.train_dataloader(), n, epoch))  # noqa: B023
            timed("epoch from local shards", lambda: _epoch(local.train_dataloader(), n, epoch))  # noqa: B023
        urls = manifest.patterns(place)["train"]
        streamed = LensWebDatasetDataModule(urls, batch_size=BATCH, storage_options=storage)
        timed("cold epoch, streamed", lambda: _epoch(streamed.train_dataloader(), n))  # noqa: B023
        timed("cold epoch, stock WebDataset", lambda: _stock(place, names, storage, n))  # noqa: B023
        shutil.rmtree(cache)

        link = fsspec.filesystem("s3", **over)
        timed(f"fs.put of one file{OVER}", lambda: link.put(str(one), f"{here}-link/one"))  # noqa: B023
        timed(
            f"publish_shards{OVER}",
            lambda: publish_shards(large, f"{here}-link", storage_options=over),  # noqa: B023
        )
        timed(f"raw parallel download{OVER}", lambda: _download(link, place, names))  # noqa: B023
        kept = LensDataModule(place, BATCH, cache_dir=cache, storage_options=over)
        timed(f"cold epoch, with a cache{OVER}", lambda: _epoch(kept.train_dataloader(), n))  # noqa: B023
        streamed = LensWebDatasetDataModule(urls, batch_size=BATCH, storage_options=over)
        timed(f"cold epoch, streamed{OVER}", lambda: _epoch(streamed.train_dataloader(), n))  # noqa: B023
        shutil.rmtree(cache)

    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        {
            "what": name,
            "seconds": median[name],
            "MB/s": mb / median[name],
            "cutouts/s": n / median[name],
            "spread": (max(values) - min(values)) / median[name],
        }
        for name, values in seconds.items()
    ]

    def ratio(of: str, to: str) -> float:
        return median[to] / median[of]

    put, raw, stock = "fs.put of one file", "raw parallel download", "cold epoch, stock WebDataset"
    over_link = [
        Target(f"{name}{OVER}", ratio(f"{of}{OVER}", f"{to}{OVER}"), at_least=0.8)
        for name, of, to in (
            ("upload / fs.put", "publish_shards", put),
            ("cold epoch / raw download", "cold epoch, with a cache", raw),
            ("streamed epoch / raw download", "cold epoch, streamed", raw),
        )
    ]
    targets = [
        Target("upload / fs.put", ratio("publish_shards", put), at_least=0.8),
        Target("small shards / fs.put", ratio("publish_shards, small shards", put), at_least=0.5),
        Target("cold epoch / raw download", ratio("cold epoch, with a cache", raw), at_least=0.8),
        Target("streamed epoch / raw download", ratio("cold epoch, streamed", raw), at_least=0.8),
        Target("cold epoch / WebDataset", ratio("cold epoch, with a cache", stock), at_least=3),
        Target("streamed epoch / WebDataset", ratio("cold epoch, streamed", stock), at_least=3),
        Target(
            "second epoch / local",
            ratio("epoch from the cache", "epoch from local shards"),
            at_least=0.9,
        ),
        *over_link,
    ]
    return rows, targets


def _download(filesystem: Any, place: str, names: Iterable[str]) -> None:
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        list(pool.map(lambda name: len(filesystem.cat_file(f"{place}/{name}")), names))


def _epoch(loader: DataLoader[Any], n: int, number: int = 0) -> None:
    loader.sampler.set_epoch(number)  # type: ignore[attr-defined]  # as Lightning does
    seen = 0
    for batch in loader:
        seen += len(batch["image"])
    if n - seen >= BATCH:  # what is left waits for another epoch
        raise RuntimeError(f"{seen} cutouts of {n} in an epoch")


def _stock(place: str, names: Iterable[str], storage: dict[str, Any], n: int) -> None:
    """As its documentation does it, with an opener for `s3://`, in this process: workers would
    first need seconds to start."""
    wds.gopen_schemes["s3"] = lambda url, *_, **__: fsspec.open(url, **storage).open()
    urls = [f"{place}/{name}" for name in names]
    data = (
        wds.WebDataset(urls, shardshuffle=100, nodesplitter=wds.split_by_node, empty_check=False)
        .shuffle(1000)
        .decode()
        .to_tuple("npy", "cls")
        .batched(BATCH)
    )
    if sum(len(batch[0]) for batch in data) != n:
        raise RuntimeError("WebDataset has lost cutouts")


if __name__ == "__main__":
    arguments = options(__doc__, n=8000)
    report(arguments, lambda: measure(arguments))
