"""What the tests of published shards share: what lies at a place, and uploads under way."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import torch

from lens_pipeline.files import file_sha256
from lens_pipeline.shards import publish_shards, read_manifest
from lens_pipeline.shards.checked import RECORD
from lens_pipeline.shards.manifest import Manifest, Shard, write_manifest
from lens_pipeline_tests.faulty_proxy import FaultyProxy
from lens_pipeline_tests.object_stores import GCSServer, S3Server

N, SHARDS = 2_000, 40  # of `small_cutouts`
Proxies = Callable[[S3Server | GCSServer], FaultyProxy]


def names(url: str, options: dict) -> set[str]:
    filesystem, root = fsspec.url_to_fs(url, **options)
    filesystem.invalidate_cache()
    found = {path.rpartition("/")[2] for path in filesystem.find(root)}
    return {name for name in found if not name.endswith(".lock") and name != RECORD}


def versions_at(url: str, options: dict) -> set[str]:
    filesystem, root = fsspec.url_to_fs(url, **options)
    return {path[len(root) + 1 :].partition("/")[0] for path in filesystem.find(root)}


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


def publish_versions(shards: Path, url: str, options: dict, count: int) -> list[str]:
    """The same shards under other names, the oldest first; a store may count whole seconds only."""
    versions = []
    for number in range(count):
        manifest = replace(read_manifest(shards), dataset=f"dataset {number}")
        (shards / "manifest.json").write_text(manifest.text)
        if versions and "://" in url:
            time.sleep(1.1)
        versions.append(publish_shards(shards, url, storage_options=options).dataset_version)
    return versions


def wait_for_an_object(url: str, options: dict, like: str = ".tar") -> None:
    wait_until(lambda: any(like in name for name in names(url, options)))


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.02)


def written(shards: Path, dataset: str) -> Manifest:
    """A manifest of the tars in a folder, as of a dataset of that content."""
    tars = [
        Shard(path.name, file_sha256(path), path.stat().st_size, "train", 1, 1, 0)
        for path in sorted(shards.glob("*.tar"))
    ]
    rows = pd.DataFrame({"id": [dataset]})
    about = {"format": {}, "encoding": {}, "dataset": dataset, "simulated": False}
    return write_manifest(shards, index=rows, catalogue=rows, shards=tuple(tars), **about)


def numbers(batches: Any) -> list[int]:
    """The numbers of the cutouts, in their order."""
    images = torch.cat([batch["image"] for batch in batches])
    return (1000 * images[:, 0, 0, 0].int() + images[:, 0, 0, 1].int()).tolist()


def gets(proxy: FaultyProxy) -> list[str]:
    return [line for line in proxy.seen if line.startswith("GET") and ".tar" in line]


def spoil(url: str, options: dict, change: Callable[[bytes], bytes]) -> None:
    filesystem, path = fsspec.url_to_fs(url, **options)
    filesystem.pipe_file(path, change(filesystem.cat_file(path)))


def flipped(content: bytes) -> bytes:
    return content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]
