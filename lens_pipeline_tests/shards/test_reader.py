"""Random access, and shards that are not what their manifest says."""

import hashlib
import json
import os
import pickle
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
from braceexpand import braceexpand

from lens_pipeline import LensDataModule, LensWebDatasetDataModule
from lens_pipeline.catalogue.dataset import Dataset, Split
from lens_pipeline.errors import InputError, NoAnswerError
from lens_pipeline.shards import (
    open_shards,
    patience,
    publish_shards,
    read_manifest,
    reader,
    verify_shards,
)
from lens_pipeline.shards.as_dataset import shards_as_dataset
from lens_pipeline.shards.checked import RECORD
from lens_pipeline.shards.cloud import published_problems
from lens_pipeline.shards.foreign import index_tars
from lens_pipeline.shards.manifest import Listed
from lens_pipeline_tests.conftest import as_in


def test_gather_in_any_order(dataset: Dataset, shards_folder: Path) -> None:
    split = open_shards(shards_folder).split("train")
    order = np.random.default_rng(0).permutation(len(split))
    images, table = as_in(split, dataset, "train")
    np.testing.assert_array_equal(split.gather(order), images.astype(np.float16)[order])
    assert split.labels.tolist() == table["label"].tolist()


def test_a_split_that_has_been_read_goes_to_another_process(shards_folder: Path) -> None:
    """As a loader's workers, where they are not forked."""
    split = open_shards(shards_folder).split("train")
    images = split.gather([0, 1])
    copy = pickle.loads(pickle.dumps(split))
    np.testing.assert_array_equal(copy.gather([0, 1]), images)


@pytest.mark.parametrize("kind", ["shards", "dataset", "cropped", "tars"])
def test_a_mask_chooses_the_cutouts_for_which_it_is_true(
    dataset: Dataset, shards_folder: Path, kind: str
) -> None:
    urls = str(shards_folder / "train-{000000..000001}.tar")
    split: Split = {
        "shards": lambda: open_shards(shards_folder).split("train"),
        "dataset": lambda: dataset.split("train"),
        "cropped": lambda: LensDataModule(shards_folder, image_size=20).split("train"),
        "tars": lambda: index_tars([Path(url) for url in braceexpand(urls)]),
    }[kind]()
    is_lens = split.labels == 1
    wanted = split.gather([int(place) for place in np.flatnonzero(is_lens)])
    assert len({image.tobytes() for image in wanted}) == is_lens.sum() > 10
    for mask in (is_lens, is_lens.tolist(), pd.array(is_lens, dtype="boolean")):
        np.testing.assert_array_equal(split.gather(mask), wanted)
    assert split.gather(np.zeros(len(split), bool)).shape == (0, *wanted.shape[1:])
    for spoilt, message in (
        (is_lens[:-1], rf"the mask has the shape \({len(split) - 1},\); there are {len(split)}"),
        (is_lens.astype(float), "chosen by whole numbers"),
        (pd.array([None, *is_lens[1:]], dtype="boolean"), "chosen by whole numbers"),
        ([[0, 1]], "chosen by whole numbers"),
    ):
        with pytest.raises(InputError, match=message):
            split.gather(spoilt)


def test_a_split_that_there_is_not_is_told_from_an_empty_one(
    dataset: Dataset, shards_folder: Path, tmp_path: Path
) -> None:
    shards = open_shards(shards_folder)
    seen = shards_as_dataset(str(shards_folder), cache=tmp_path)
    module = LensDataModule(shards_folder)
    tars = LensWebDatasetDataModule(str(shards_folder / "train-{000000..000001}.tar"))
    for ask in (
        *(shards.split, seen.split, seen.table, module.split, tars.split),
        *(dataset.split, dataset.images, dataset.table, dataset.open_images),
    ):
        with pytest.raises(InputError, match="no split 'valid'; there are train, val, test, unl"):
            ask("valid")


def test_unlabelled_is_minus_one(shards_folder: Path) -> None:
    assert set(open_shards(shards_folder).split("unlabelled").labels) == {-1}


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # a new file: the old one may be mapped
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("name", ["train-000001.tar", "index.parquet"])
@pytest.mark.parametrize(
    ("spoil", "what"),
    [(_flip_a_byte, "sha256"), (_truncate, "bytes"), (Path.unlink, "missing")],
)
def test_a_spoilt_file_is_named(own_shards: Path, name: str, spoil, what: str) -> None:
    open_shards(own_shards)  # even where it was whole a moment ago
    spoil(own_shards / name)
    problems = verify_shards(own_shards)
    assert len(problems) == 1
    assert name in problems[0]
    assert what in problems[0]
    with pytest.raises(InputError, match=name):
        open_shards(own_shards)


def test_a_store_that_does_not_answer_is_no_damage_of_its_shards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.1)
    with pytest.raises(NoAnswerError, match=r"^http://127\.0\.0\.1:9/lenses/manifest\.json: "):
        verify_shards("http://127.0.0.1:9/lenses")


def test_no_manifest_no_dataset(own_shards: Path) -> None:
    (own_shards / "manifest.json").unlink()
    assert "manifest.json" in verify_shards(own_shards)[0]
    with pytest.raises(InputError, match="manifest.json"):
        open_shards(own_shards)
    tar = own_shards / "train-000000.tar"
    assert "there is no such file" in verify_shards(tar)[0]
    with pytest.raises(InputError, match="there is no such file"):
        open_shards(tar)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 2}'])
def test_damaged_manifest(own_shards: Path, content: str) -> None:
    (own_shards / "manifest.json").write_text(content)
    with pytest.raises(InputError, match="no manifest"):
        open_shards(own_shards)


def test_altered_manifest(own_shards: Path) -> None:
    """A manifest that was edited is another dataset under the old one's name."""
    path = own_shards / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="changed"):
        open_shards(own_shards)


@pytest.mark.parametrize(
    ("column", "value"), [("offset", 10**9), ("shape", [32, 3, 32]), ("dtype", "<f4")]
)
def test_an_index_that_does_not_fit_is_refused(
    own_shards: Path, column: str, value: object
) -> None:
    """One with its own, right checksum still must not point outside of a mapped file, nor say that
    the same bytes are something else."""
    index = pd.read_parquet(own_shards / "index.parquet")
    index.at[3, column] = value
    _written(own_shards, index)
    with pytest.raises(InputError, match=r"index\.parquet"):
        open_shards(own_shards).split("train")


def test_an_index_with_a_cutout_that_is_in_no_shard_is_refused(own_shards: Path) -> None:
    index = pd.read_parquet(own_shards / "index.parquet")
    _written(own_shards, pd.concat([index, index.iloc[[3]].assign(shard=None)]))
    with pytest.raises(InputError, match=r"index\.parquet"):
        open_shards(own_shards).split("train")


def _written(shards: Path, index: pd.DataFrame) -> None:
    """An index, and a manifest that lists it."""
    index.to_parquet(shards / "index.parquet", index=False)
    content = (shards / "index.parquet").read_bytes()
    listed = Listed("index.parquet", hashlib.sha256(content).hexdigest(), len(content))
    manifest = replace(read_manifest(shards), index=listed)
    (shards / "manifest.json").write_text(manifest.text)


def test_every_truncation_and_every_flipped_bit_is_found(own_shards: Path) -> None:
    """100 of each, by the name of the shard, and of the sample where its pixels are hit."""
    random = np.random.default_rng(0)
    paths = sorted(own_shards.glob("*.tar"))
    index = pd.read_parquet(own_shards / "index.parquet")
    named = 0
    for trial in range(200):
        path = paths[random.integers(len(paths))]
        whole = path.read_bytes()
        at = int(random.integers(len(whole)))
        hit = index[
            (index["shard"] == path.name)
            & (index["offset"] <= at)
            & (at < index["offset"] + index["bytes"])
        ]
        if trial % 2:
            path.write_bytes(whole[:at])
        else:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << trial % 8]) + whole[at + 1 :])
        (problem,) = verify_shards(own_shards)
        path.write_bytes(whole)
        assert path.name in problem
        if len(hit):
            assert f"damaged samples: {hit['id'].iloc[0]}" in problem
            named += 1
    assert named > 100
    assert verify_shards(own_shards) == []


@pytest.mark.parametrize("name", ["manifest.json", "index.parquet"])
def test_one_flipped_bit_of_the_manifest_or_the_index_is_found(own_shards: Path, name: str) -> None:
    path, random = own_shards / name, np.random.default_rng(1)
    whole = path.read_bytes()
    for at in random.choice(len(whole), 80, replace=False):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        assert name in verify_shards(own_shards)[0]


def test_a_shard_cut_behind_the_index_is_an_error_and_kills_no_process(own_shards: Path) -> None:
    split = open_shards(own_shards).split("train")
    os.truncate(own_shards / "train-000000.tar", 5000)
    with pytest.raises(InputError, match=r"train-000000\.tar"):
        split.gather([0])


def test_published_shards_are_the_same_and_sent_once(shards_folder: Path, tmp_path: Path) -> None:
    first = publish_shards(shards_folder, str(tmp_path))
    assert Path(first.url) == tmp_path / first.dataset_version
    assert verify_shards(first.url) == []
    assert set(first.uploaded) == {p.name for p in shards_folder.iterdir()} - {RECORD}
    assert first.uploaded[-1] == "manifest.json"
    (tmp_path / first.dataset_version / "val-000000.tar").write_bytes(b"altered")
    again = publish_shards(shards_folder, str(tmp_path))
    assert again.uploaded == ("val-000000.tar",)
    assert verify_shards(first.url) == []
    assert publish_shards(shards_folder, str(tmp_path)).uploaded == ()


@pytest.mark.parametrize("kept", ["folder", "memory"])
def test_remote_shards_are_fetched_when_they_are_needed(
    shards_folder: Path, tmp_path: Path, kept: str
) -> None:
    """memory:// is a remote store for fsspec; what was fetched is not fetched again."""
    published = publish_shards(shards_folder, "memory://bucket/lenses")
    wanted = open_shards(shards_folder).split("test").gather([2, 0])
    cache = tmp_path if kept == "folder" else None
    split = open_shards(published.url, cache=cache).split("test")
    assert not list(tmp_path.rglob("*.tar"))
    np.testing.assert_array_equal(split.gather([2, 0]), wanted)
    assert len(list(tmp_path.rglob("*.tar"))) == (kept == "folder")
    fsspec.filesystem("memory").rm(f"{published.url}/test-000000.tar".removeprefix("memory:/"))
    np.testing.assert_array_equal(split.gather([2, 0]), wanted)
    again = open_shards(published.url, cache=cache).split("test")
    if kept == "folder":
        np.testing.assert_array_equal(again.gather([2, 0]), wanted)
    else:
        with pytest.raises(InputError, match=f"{published.url}/test-000000.tar: is missing"):
            again.gather([2, 0])


def _read_by(do: Callable[[], object]) -> int:
    """Bytes that this process reads from files while it does something."""

    def so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = so_far()
    do()
    return so_far() - before


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="this system does not count reads")
def test_shards_that_have_not_changed_are_read_once(
    own_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run that changes nothing, and by each process that trains, not at all."""
    size = sum(listed.bytes for listed in read_manifest(own_shards).files)
    cloud = str(tmp_path / "cloud")

    def run(every_byte: bool = False) -> None:
        assert verify_shards(own_shards, every_byte=every_byte) == []
        published = publish_shards(own_shards, cloud, every_byte=every_byte)
        assert published_problems(own_shards, published.url, states=published.states) == []
        open_shards(published.url)

    first = _read_by(run)
    assert 3 * size < first < 3.5 * size  # checked, sent, and checked there
    assert _read_by(run) < size / 4
    monkeypatch.setenv("LENS_VERIFY", "true")
    assert 4 * size < _read_by(lambda: run(every_byte=True)) < 4.5 * size
    for path in (own_shards, Path(cloud)):
        for record in path.rglob(RECORD):
            record.write_text("{")
    monkeypatch.delenv("LENS_VERIFY")
    run()
    assert _read_by(run) < size / 4


def _with_the_old_time(path: Path) -> None:
    time = path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(time, time))


def _in_its_place(path: Path) -> None:
    """Another file of the same size and time, made before, as by a move or a backup."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    time = path.stat().st_mtime_ns
    os.utime(other, ns=(time, time))
    other.replace(path)


@pytest.mark.parametrize("change", [_with_the_old_time, _in_its_place, _truncate, Path.unlink])
def test_a_change_of_what_was_read_before_is_noticed(
    own_shards: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    name, cloud = "train-000001.tar", tmp_path / "cloud"
    published = publish_shards(own_shards, str(cloud))
    open_shards(published.url)
    change(Path(published.url) / name)
    with pytest.raises(InputError, match=name):
        open_shards(published.url)
    assert name in verify_shards(published.url, every_byte=False)[0]
    assert name in published_problems(own_shards, published.url)[0]
    assert publish_shards(own_shards, str(cloud)).uploaded == (name,)
    open_shards(published.url)
    change(own_shards / name)
    assert name in verify_shards(own_shards, every_byte=False)[0]
    with pytest.raises(InputError, match=f"{name}: .*write the shards again"):
        publish_shards(own_shards, str(cloud))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not list maps")
def test_no_more_shards_are_mapped_than_a_process_may(
    own_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which ends at some 65,000; a survey's shards are more."""
    monkeypatch.setattr(reader, "MAPS", 2)
    split = open_shards(own_shards).split("train")
    whole = split.gather(list(range(len(split))))

    def mapped() -> set[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {line.split()[-1] for line in lines if f"{own_shards}/train-" in line}

    assert len(list(own_shards.glob("train-*.tar"))) == 3
    order = np.random.default_rng(0).permutation(len(split))
    for places in np.array_split(order, 10):
        np.testing.assert_array_equal(split.gather(places), whole[places])
        assert len(mapped()) <= 2
    split.gather([0])
    assert str(own_shards / split.shards[1][0]) in mapped()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell")
def test_too_many_maps_are_told(own_shards: Path) -> None:
    """The system says it as it says that there is no more memory."""
    split = open_shards(own_shards).split("train")
    have = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (have, before[1]))
    try:
        with pytest.raises(InputError, match=r"train-.*\.tar: cannot be .*vm\.max_map_count"):
            split.gather([0])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
