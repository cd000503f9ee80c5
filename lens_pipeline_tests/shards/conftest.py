"""Places to publish shards to, and shards that lie there."""

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest

from lens_pipeline.shards import publish_shards, write_shards
from lens_pipeline_tests.object_stores import S3Server, sign_in
from lens_pipeline_tests.shards.published import SHARDS, N


@pytest.fixture(params=["s3", "gs", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict]:
    """(the URL of an empty place, its storage options)"""
    if request.param == "folder":
        return str(tmp_path / "cloud"), {}
    kind = {"s3": "s3", "gs": "gcs"}[request.param]
    bucket = request.getfixturevalue(f"{kind}_bucket")
    return f"{bucket}/lenses", request.getfixturevalue(f"{kind}_server").storage_options()


@pytest.fixture(scope="session")
def small_cutouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 cutouts of 16 pixels, in 40 shards; the first two pixels hold a cutout's number."""
    return _in_shards(N, tmp_path_factory)


@pytest.fixture(scope="session")
def ten_thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `small_cutouts`, but 10,000."""
    return _in_shards(10_000, tmp_path_factory)


def _in_shards(n_train: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    splits = {}
    for split, n in (("train", n_train), ("val", 40), ("test", 1), ("unlabelled", 1)):
        images = np.zeros((n, 1, 16, 16), np.float32)
        images[:, 0, 0, 0], images[:, 0, 0, 1] = np.divmod(np.arange(n), 1000)
        images[:, 0, 8, 8] = 50
        np.save(folder / f"{split}.npy", images)
        ids = [f"{split} {number}" for number in range(n)]
        label = pd.array(np.arange(n) % 2, dtype="Int8")
        table = pd.DataFrame({"id": ids, "label": label, "group": ids, "split": split})
        table.to_parquet(folder / f"{split}.parquet")
        splits[split] = {"n": n, "n_lens": n // 2, "n_nonlens": n - n // 2}
    form = {"bands": ["r"], "image_size": 16, "units": "background_sigma", "pixel_scale": None}
    facts = {"schema": 1, "origin": "test", **form, "splits": splits, "content": "test"}
    (folder / "dataset.json").write_text(json.dumps(facts))
    out = tmp_path_factory.mktemp("shards")
    write_shards(folder, out, shard_size=n_train // SHARDS)
    return out


@pytest.fixture(scope="session")
def published_once(small_cutouts: Path, s3_server: S3Server) -> str:
    with pytest.MonkeyPatch.context() as patch:
        sign_in(patch, s3_server.environment())
        s3_server.make_bucket("lens-published")
        options = s3_server.storage_options()
        return publish_shards(small_cutouts, "s3://lens-published", storage_options=options).url


@pytest.fixture
def published(s3_bucket: str, published_once: str) -> str:
    """The URL of `small_cutouts` in a bucket that all share. Only to read."""
    return published_once


@pytest.fixture
def remote() -> Iterator[str]:
    """A place that is no local folder."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield "memory://bucket"
    filesystem.store.clear()
