"""The shards of several surveys, put together as those of one."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import webdataset as wds

from lens_pipeline.catalogue.build import build_dataset
from lens_pipeline.catalogue.dataset import open_dataset
from lens_pipeline.catalogue.joined import JoinedDataset
from lens_pipeline.catalogue.splits import PARTS
from lens_pipeline.catalogue.table import read_catalogue
from lens_pipeline.errors import InputError
from lens_pipeline.shards import open_shards, verify_shards, write_shards
from lens_pipeline.shards.as_dataset import shards_as_dataset
from lens_pipeline.shards.manifest import Manifest
from lens_pipeline.shards.merge import merge_shards
from lens_pipeline_tests.conftest import as_in


def written(catalogue: Path, folder: Path, seed: int = 0, encoding: str = "float16") -> Path:
    """The datasets of both surveys and their shards, in folders of their names."""
    for name in ("des", "hsc"):
        (folder / name / "dataset").mkdir(parents=True)
        (folder / name / "shards").mkdir()
        rows = read_catalogue(catalogue).of_surveys([name], seed)
        build_dataset(rows, folder / name / "dataset", image_size=32, split_seed=seed, whole=False)
        write_shards(
            folder / name / "dataset", folder / name / "shards", shard_size=40, encoding=encoding
        )
    return folder


def merged(folder: Path, out: Path) -> Manifest:
    out.mkdir()
    return merge_shards({name: folder / name / "shards" for name in ("des", "hsc")}, out)


def test_a_merged_version_holds_every_cutout_once_and_is_whole(
    two_surveys: Path, tmp_path: Path
) -> None:
    parts = written(two_surveys, tmp_path / "parts")
    out = tmp_path / "merged"
    manifest = merged(parts, out)
    assert verify_shards(out) == []
    joined = JoinedDataset(
        {name: open_dataset(parts / name / "dataset") for name in ("des", "hsc")}
    )
    opened = open_shards(out)
    assert manifest.dataset == joined.facts["content"]
    assert opened.format == joined.format
    seen = shards_as_dataset(str(out), cache=tmp_path / "cache")
    for part in PARTS:
        split = opened.split(part)
        images, rows = as_in(split, joined, part)
        np.testing.assert_array_equal(
            split.gather(np.arange(len(split))), images.astype(np.float16)
        )
        urls = sorted(str(path) for path in out.glob(f"{part}-*.tar"))
        samples = list(wds.WebDataset(urls, shardshuffle=False).decode()) if urls else []
        assert [s["json"]["id"] for s in samples] == split.ids.tolist()
        assert seen.table(part)["survey"].tolist() == rows["survey"].tolist()
        assert rows["survey"].is_monotonic_increasing  # the one after the other
    assert sum(shard.samples for shard in manifest.shards) == len(pd.read_parquet(two_surveys))


def test_tars_are_linked_and_left_as_they_were(two_surveys: Path, tmp_path: Path) -> None:
    parts = written(two_surveys, tmp_path / "parts")
    before = {path: path.read_bytes() for path in parts.rglob("*") if path.is_file()}
    merged(parts, tmp_path / "merged")
    assert {path: path.read_bytes() for path in parts.rglob("*") if path.is_file()} == before
    inodes = {path.stat().st_ino for path in parts.glob("*/shards/*.tar")}
    assert {path.stat().st_ino for path in (tmp_path / "merged").glob("*.tar")} == inodes


def test_what_does_not_fit_together_is_refused(two_surveys: Path, tmp_path: Path) -> None:
    parts = written(two_surveys, tmp_path / "parts")

    other = written(two_surveys, tmp_path / "float32", encoding="float32")
    shutil.copytree(parts / "des", tmp_path / "encodings" / "des")
    shutil.copytree(other / "hsc", tmp_path / "encodings" / "hsc")
    with pytest.raises(InputError, match="hsc: its shards are float32, those of des float16"):
        merged(tmp_path / "encodings", tmp_path / "a")

    shutil.copytree(parts / "des", tmp_path / "twice" / "des")
    shutil.copytree(parts / "des", tmp_path / "twice" / "hsc")
    with pytest.raises(InputError, match=r"des, hsc: id 'des-\S+' is there twice"):
        merged(tmp_path / "twice", tmp_path / "b")

    seed = written(two_surveys, tmp_path / "seed", seed=1)
    shutil.copytree(parts / "des", tmp_path / "torn" / "des")
    shutil.copytree(seed / "hsc", tmp_path / "torn" / "hsc")
    with pytest.raises(InputError, match=r"group '\S+' is in two splits"):
        merged(tmp_path / "torn", tmp_path / "c")

    table = pd.read_parquet(two_surveys)
    stated = table.assign(split="train", group=table["id"])
    stated.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match="des, hsc: split val has no lenses"):
        merged(written(tmp_path / "train.parquet", tmp_path / "lacking"), tmp_path / "d")
