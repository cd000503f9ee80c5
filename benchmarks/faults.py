"""What becomes of uploads and epochs when the network, the store or a shard fails.

Real servers (SeaweedFS for S3, fake-gcs-server for GCS) behind a proxy that spoils requests. Each
row ends whole and verified, or with an error that names the object; `lost` counts cutouts that an
epoch or a published dataset lacks without an error, `undetected` cutouts whose pixels are others.
"""

import argparse
import hashlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
from tqdm import tqdm

from benchmarks._cutouts import make_dataset
from benchmarks._harness import Row, Target, options, report
from lens_pipeline.errors import InputError
from lens_pipeline.shards import read_manifest, verify_shards, write_shards
from lens_pipeline.shards.cloud import publish_shards
from lens_pipeline.shards.datamodule import CutoutModule, LensDataModule, LensWebDatasetDataModule
from lens_pipeline_tests.faulty_proxy import FaultyProxy
from lens_pipeline_tests.object_stores import GCSServer, S3Server, sign_in

BATCH = 10  # divides the cutouts: a training epoch holds them all
SHARD = 20

Fault = Callable[[FaultyProxy], None]


def _stalled_for_a_second(proxy: FaultyProxy) -> None:
    proxy.stall()
    threading.Timer(1, proxy.pass_through).start()


FAULTS: dict[str, Fault] = {
    "every tenth request: 503": lambda proxy: proxy.every(10, status=503),
    "every tenth request: 500": lambda proxy: proxy.every(10, status=500),
    "ten connections reset in mid-transfer": lambda p: p.reset_after(300_000, times=10),
    "half a second of latency": lambda proxy: proxy.delay(0.5),
    "connections stalled for good in one second": _stalled_for_a_second,
}
DAMAGE = ("truncated", "altered", "removed")


@dataclass
class Trial:
    """A bucket behind a proxy, and the shards that are meant to be there."""

    store: str
    server: S3Server | GCSServer
    proxy: FaultyProxy
    bucket: str
    shards: Path
    scratch: Path
    number: int = 0

    def __post_init__(self) -> None:
        self.whole = set(_hashes(LensDataModule(self.shards, BATCH)))
        self.direct = self.server.storage_options()
        self.spoilt = self.server.storage_options(self.proxy.url)

    def new_place(self) -> str:
        self.number += 1
        return f"{self.bucket}/{self.number}"

    def cached(self, url: str) -> CutoutModule:
        cache = self.scratch / f"{self.store}{self.number}"
        return LensDataModule(url, BATCH, cache_dir=cache, storage_options=self.spoilt)

    def streamed(self, url: str) -> CutoutModule:
        pattern = read_manifest(url, self.direct).patterns(url)["train"]
        return LensWebDatasetDataModule(pattern, batch_size=BATCH, storage_options=self.spoilt)

    def row(self, action: str, fault: str, run: Callable[[], set[str]]) -> Row:
        before, begun = self.proxy.faults, time.perf_counter()
        try:
            found = run()
            lost, undetected = len(self.whole - found), len(found - self.whole)
            outcome = "whole" if found == self.whole else "LOST"
        except InputError as problem:
            lost = undetected = 0
            outcome = f"error: {' '.join(str(problem).split())}"
        finally:
            self.proxy.pass_through()
        return {
            "store": self.store,
            "action": action,
            "fault": fault,
            "spoilt": self.proxy.faults - before,
            "seconds": round(time.perf_counter() - begun, 1),
            "lost": lost,
            "undetected": undetected,
            "outcome": outcome if len(outcome) < 110 else f"{outcome[:50]} ... {outcome[-55:]}",
        }


def _hashes(data: CutoutModule) -> Iterator[str]:
    for batch in data.train_dataloader():
        for image in batch["image"]:
            yield hashlib.sha256(image.half().numpy().tobytes()).hexdigest()


def _published(trial: Trial) -> set[str]:
    published = publish_shards(trial.shards, trial.new_place(), storage_options=trial.spoilt)
    trial.proxy.pass_through()
    problems = verify_shards(published.url, trial.direct)
    if problems:
        return set()
    return set(_hashes(LensDataModule(published.url, BATCH, storage_options=trial.direct)))


def _faulty_rows(trial: Trial) -> Iterator[Row]:
    url = publish_shards(trial.shards, trial.new_place(), storage_options=trial.direct).url
    for name, fault in FAULTS.items():
        fault(trial.proxy)
        yield trial.row("upload", name, lambda: _published(trial))
        for action, opened in (("cached epoch", trial.cached), ("streamed epoch", trial.streamed)):
            trial.number += 1
            fault(trial.proxy)
            yield trial.row(action, name, lambda: set(_hashes(opened(url))))  # noqa: B023


def _damaged_rows(trial: Trial) -> Iterator[Row]:
    filesystem = fsspec.filesystem(trial.bucket.partition(":")[0], **trial.direct)
    for damage in DAMAGE:
        for action, opened in (("cached epoch", trial.cached), ("streamed epoch", trial.streamed)):
            url = publish_shards(trial.shards, trial.new_place(), storage_options=trial.direct).url
            victim = f"{url}/{read_manifest(trial.shards).shards[1].name}"
            content = bytearray(filesystem.cat_file(victim))
            if damage == "removed":
                filesystem.rm_file(victim)
            else:
                content[len(content) // 2] ^= 1
                filesystem.pipe_file(
                    victim, bytes(content if damage == "altered" else content[:-9000])
                )
            yield trial.row(action, f"a shard {damage}", lambda: set(_hashes(opened(url))))  # noqa: B023


def _refused_rows(trial: Trial, patch: pytest.MonkeyPatch) -> Iterator[Row]:
    server = trial.server
    assert isinstance(server, S3Server)
    for fault, how in (("wrong credentials", {"wrong": True}), ("read only", {"read_only": True})):
        sign_in(patch, server.environment(**how))
        yield trial.row("upload", fault, lambda: _published(trial))
    sign_in(patch, server.environment())
    trial.bucket += "-of-nobody"
    yield trial.row("upload", "no such bucket", lambda: _published(trial))


@contextmanager
def _trial(server: S3Server | GCSServer, shards: Path, scratch: Path) -> Iterator[Trial]:
    name, scheme = ("S3", "s3") if isinstance(server, S3Server) else ("GCS", "gs")
    server.make_bucket("faults")
    with FaultyProxy(server.url) as proxy:
        yield Trial(name, server, proxy, f"{scheme}://faults", shards, scratch)


def measure(arguments: argparse.Namespace) -> tuple[list[Row], list[Target]]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        scratch = Path(folder)
        shards = scratch / "shards"
        shards.mkdir()
        write_shards(make_dataset(scratch / "dataset", arguments.n), shards, shard_size=SHARD)
        with S3Server(scratch / "s3") as s3, GCSServer(scratch / "gcs") as gcs:
            sign_in(patch, s3.environment())
            with _trial(gcs, shards, scratch) as trial:
                rows += _shown(_faulty_rows(trial))
                rows += _shown(_damaged_rows(trial))
            with _trial(s3, shards, scratch) as trial:
                rows += _shown(_faulty_rows(trial))
                rows += _shown(_damaged_rows(trial))
                rows += _shown(_refused_rows(trial, patch))
    unnamed = [
        row
        for row in rows
        if row["outcome"].startswith("error") and "://faults" not in row["outcome"]
    ]
    targets = [
        Target("rows", len(rows), at_least=20),
        Target("cutouts lost", sum(row["lost"] for row in rows), at_most=0),
        Target("cutouts undetected", sum(row["undetected"] for row in rows), at_most=0),
        Target("errors that name no object", len(unnamed), at_most=0),
    ]
    return rows, targets


def _shown(rows: Iterable[Row]) -> Iterator[Row]:
    yield from tqdm(rows, desc="trials", unit="row", disable=None)


if __name__ == "__main__":
    # Before gcsfs is imported, or it waits a minute for a service that the server has not.
    import os

    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    arguments = options(__doc__, n=400)
    report(arguments, lambda: measure(arguments))
