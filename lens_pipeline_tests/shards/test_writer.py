"""Shards as any WebDataset client and any auditor would see them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from lens_pipeline.catalogue.dataset import PARTS, Dataset
from lens_pipeline.errors import InputError
from lens_pipeline.shards import write_shards


def test_same_dataset_gives_same_bytes(dataset: Dataset, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_shards(dataset.folder, tmp_path / name, shard_size=50)
    first = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    second = {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()}
    assert first == second


def test_a_plain_webdataset_client_reads_every_sample(
    dataset: Dataset, shards_folder: Path
) -> None:
    for part in PARTS:
        urls = sorted(str(path) for path in shards_folder.glob(f"{part}-*.tar"))
        samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
        table = dataset.table(part)
        assert [s["__key__"] for s in samples] == [f"{i:08d}" for i in range(len(table))]
        assert [s["json"]["id"] for s in samples] == table["id"].tolist()
        np.testing.assert_array_equal(
            np.stack([s["npy"] for s in samples]), dataset.images(part).astype(np.float16)
        )
        if part == "unlabelled":
            assert not any("cls" in s for s in samples)
        else:
            assert [s["cls"] for s in samples] == table["label"].tolist()


def test_manifest_lists_what_lies_there(dataset: Dataset, shards_folder: Path) -> None:
    content = (shards_folder / "manifest.json").read_bytes()
    manifest = json.loads(content)
    listed = [*manifest["shards"], manifest["index"]]
    assert {f["name"] for f in listed} | {"manifest.json"} == {
        p.name for p in shards_folder.iterdir()
    }
    for entry in listed:
        found = (shards_folder / entry["name"]).read_bytes()
        assert len(found) == entry["bytes"]
        assert hashlib.sha256(found).hexdigest() == entry["sha256"]
    train = [shard for shard in manifest["shards"] if shard["split"] == "train"]
    assert max(shard["samples"] for shard in train) == 50
    assert sum(shard["n_lens"] for shard in train) == (dataset.table("train")["label"] == 1).sum()
    assert manifest["format"]["bands"] == ["g", "r", "i"]


def test_float32_keeps_every_bit(dataset: Dataset, tmp_path: Path) -> None:
    from lens_pipeline.shards import open_shards

    write_shards(dataset.folder, tmp_path, dtype="float32")
    val = open_shards(tmp_path).split("val")
    np.testing.assert_array_equal(val.gather(np.arange(len(val))), dataset.images("val"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"shard_size": 0}, "shard_size 0"), ({"dtype": "int8"}, "dtype 'int8'")],
)
def test_settings_out_of_range(
    dataset: Dataset, tmp_path: Path, settings: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write_shards(dataset.folder, tmp_path, **settings)
