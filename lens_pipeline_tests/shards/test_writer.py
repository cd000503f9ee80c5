"""Shards as any WebDataset client and any auditor would see them."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import webdataset as wds
from PIL import Image

from lens_pipeline.catalogue.build import build_dataset
from lens_pipeline.catalogue.dataset import Dataset, open_dataset
from lens_pipeline.catalogue.splits import PARTS
from lens_pipeline.catalogue.table import read_catalogue
from lens_pipeline.errors import InputError
from lens_pipeline.shards import open_shards, verify_shards, write_shards
from lens_pipeline.shards.as_dataset import shards_as_dataset
from lens_pipeline.shards.checked import RECORD
from lens_pipeline_tests.conftest import as_in


def test_same_dataset_gives_same_bytes(dataset: Dataset, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_shards(dataset.folder, tmp_path / name, shard_size=50)
    first = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    second = {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()}
    assert first == second


def test_a_dataset_is_written_by_itself_or_by_its_folder_into_a_new_one(
    dataset: Dataset, tmp_path: Path
) -> None:
    """Never over others: what is mapped of these would kill the process that has mapped it."""
    by_itself = write_shards(dataset, str(tmp_path / "new" / "one"), encoding="float32")
    by_name = write_shards(str(dataset.folder), tmp_path / "two", encoding="float32")
    assert by_itself.dataset_version == by_name.dataset_version
    split = open_shards(tmp_path / "new" / "one").split("train")
    before = split.gather([0, 1])
    with pytest.raises(InputError, match="one: exists and is not empty; name another folder"):
        write_shards(dataset, tmp_path / "new" / "one", shard_size=7)
    assert verify_shards(tmp_path / "new" / "one") == []
    np.testing.assert_array_equal(split.gather([0, 1]), before)


def test_shards_that_cannot_be_written_leave_nothing(dataset: Dataset, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dataset.folder, tmp_path / "dataset"))
    images = folder / "test.npy"
    images.write_bytes(images.read_bytes()[:-5000])
    with pytest.raises(InputError, match="test.npy"):
        write_shards(folder, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_every_shard_is_a_sample_of_its_split(tmp_path: Path) -> None:
    """Of a catalogue that is sorted by class, too: remote shards arrive a few at a time, and a
    batch of these must hold both classes. All that says where a cutout lies agrees."""
    n = 400
    pixels = np.random.default_rng(0).normal(size=(n, 1, 8, 8)).astype(np.float32)
    rows = []
    for number, image in enumerate(pixels):
        np.save(tmp_path / f"{number}.npy", image)
        split = "train" if number % 100 < 90 else ("val" if number % 2 else "test")
        rows.append({"id": f"cutout {number}", "path": f"{number}.npy", "split": split})
    table = pd.DataFrame(rows).assign(label=(np.arange(n) < n / 4).astype(int))
    table.to_csv(tmp_path / "catalogue.csv", index=False)
    for name in ("dataset", "shards"):
        (tmp_path / name).mkdir()
    catalogue = read_catalogue(tmp_path / "catalogue.csv")
    build_dataset(catalogue, tmp_path / "dataset", image_size=8)
    manifest = write_shards(
        tmp_path / "dataset", tmp_path / "shards", shard_size=30, encoding="float32"
    )
    lenses = [shard.n_lens for shard in manifest.shards if shard.split == "train"]
    assert len(lenses) == 12
    assert min(lenses) > 1
    assert max(lenses) < 16
    opened = shards_as_dataset(str(tmp_path / "shards"), cache=tmp_path)
    for part in ("train", "val", "test"):
        split, rows_of = opened.shards.split(part), opened.table(part)
        number = rows_of["row"].to_numpy()
        assert not (np.diff(number) > 0).all()
        assert rows_of["id"].tolist() == split.ids.tolist() == [f"cutout {k}" for k in number]
        assert rows_of["label"].tolist() == split.labels.tolist() == (number < n / 4).tolist()
        images, _ = as_in(split, open_dataset(tmp_path / "dataset"), part)
        np.testing.assert_array_equal(split.gather(np.arange(len(split))), images)
    assert opened.catalogue.table["id"].tolist() == table["id"].tolist()


def test_a_plain_webdataset_client_reads_every_sample(
    dataset: Dataset, shards_folder: Path
) -> None:
    for part in PARTS:
        urls = sorted(str(path) for path in shards_folder.glob(f"{part}-*.tar"))
        samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
        images, table = as_in(open_shards(shards_folder).split(part), dataset, part)
        assert [s["__key__"] for s in samples] == [f"{i:08d}" for i in range(len(table))]
        assert [s["json"]["id"] for s in samples] == table["id"].tolist()
        np.testing.assert_array_equal(
            np.stack([s["npy"] for s in samples]), images.astype(np.float16)
        )
        if part == "unlabelled":
            assert not any("cls" in s for s in samples)
        else:
            assert [s["cls"] for s in samples] == table["label"].tolist()


def test_ids_of_any_length(dataset: Dataset, tmp_path: Path) -> None:
    """Those that fill more than a block of the tar stand beside short ones."""
    (tmp_path / "dataset").mkdir()
    for path in dataset.folder.iterdir():
        (tmp_path / "dataset" / path.name).write_bytes(path.read_bytes())
    table = dataset.table("train")
    table["id"] = [f'"{n}\u00e9' + "x" * (n % 3 * 700) for n in range(len(table))]
    table.to_parquet(tmp_path / "dataset" / "train.parquet", index=False)
    out = tmp_path / "shards"
    out.mkdir()
    write_shards(tmp_path / "dataset", out, shard_size=50)
    assert verify_shards(out) == []
    urls = sorted(str(path) for path in out.glob("train-*.tar"))
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
    train = open_shards(out).split("train")
    images = as_in(train, open_dataset(tmp_path / "dataset"), "train")[0].astype(np.float16)
    assert [s["json"]["id"] for s in samples] == train.ids.tolist()
    np.testing.assert_array_equal(np.stack([s["npy"] for s in samples]), images)
    np.testing.assert_array_equal(train.gather(list(range(len(train)))), images)


def test_manifest_lists_what_lies_there(dataset: Dataset, shards_folder: Path) -> None:
    content = (shards_folder / "manifest.json").read_bytes()
    manifest = json.loads(content)
    listed = [*manifest["shards"], manifest["index"], manifest["catalogue"]]
    there = {p.name for p in shards_folder.iterdir()} - {RECORD}  # of who has read them since
    assert {f["name"] for f in listed} | {"manifest.json"} == there
    for entry in listed:
        found = (shards_folder / entry["name"]).read_bytes()
        assert len(found) == entry["bytes"]
        assert hashlib.sha256(found).hexdigest() == entry["sha256"]
    train = [shard for shard in manifest["shards"] if shard["split"] == "train"]
    assert max(shard["samples"] for shard in train) == 50
    assert sum(shard["n_lens"] for shard in train) == (dataset.table("train")["label"] == 1).sum()
    assert manifest["format"]["bands"] == ["g", "r", "i"]


def test_float32_keeps_every_bit(dataset: Dataset, tmp_path: Path) -> None:
    write_shards(dataset.folder, tmp_path, encoding="float32")
    val = open_shards(tmp_path).split("val")
    wanted, _ = as_in(val, dataset, "val")
    np.testing.assert_array_equal(val.gather(np.arange(len(val))), wanted)


def test_the_standard_library_reads_the_tars(shards_folder: Path) -> None:
    """Every checksum holds, nothing follows the end, and the times and owners say nothing."""
    with tarfile.open(shards_folder / "test-000000.tar", "r:", errorlevel=2) as tar:
        members = tar.getmembers()
        content = tar.extractfile(members[-1])
        assert content is not None
        assert content.read() == b"%d" % open_shards(shards_folder).split("test").labels[-1]
    assert [m.name.partition(".")[2] for m in members[:3]] == ["npy", "json", "cls"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert subprocess.run(
        ["tar", "--list", "--file", str(shards_folder / "test-000000.tar")],
        capture_output=True, text=True, check=True,
    ).stdout.split() == [m.name for m in members]  # fmt: skip


def test_png16_keeps_flux_within_the_step_it_states(dataset: Dataset, tmp_path: Path) -> None:
    write_shards(dataset.folder, tmp_path, encoding="png16", shard_size=40)
    split = open_shards(tmp_path).split("val")
    flux = as_in(split, dataset, "val")[0].astype(np.float64)
    stored = split.gather(np.arange(len(flux)))
    assert stored.dtype == np.float32
    assert (np.abs(stored - flux) <= 4e-4 * np.hypot(1, flux)).all()
    # Any client sees a grey 16-bit picture with the bands below each other.
    (sample,) = wds.WebDataset(str(tmp_path / "val-000000.tar"), shardshuffle=False).slice(1)
    picture = Image.open(io.BytesIO(sample["png"]))
    assert (picture.mode, picture.size) == ("I;16", (32, 96))


def test_composites_as_png16_and_jpeg(composites: Dataset, tmp_path: Path) -> None:
    worst = {}
    for name, settings in {
        "png16": {"encoding": "png16"},
        "good": {"encoding": "jpg", "quality": 95},
        "poor": {"encoding": "jpg", "quality": 20},
    }.items():
        (tmp_path / name).mkdir()
        write_shards(composites.folder, tmp_path / name, **settings)
        split = open_shards(tmp_path / name).split("test")
        values = as_in(split, composites, "test")[0].astype(np.float64)
        stored = split.gather(np.arange(len(values)))
        worst[name] = np.abs(stored - values).max()
    assert worst["png16"] < 1e-5
    assert worst["png16"] < worst["good"] < worst["poor"]
    assert worst["good"] < 0.1


@pytest.fixture
def composites(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Smooth three-band composites, without values that 8 bits would hold exactly."""
    folder = tmp_path_factory.mktemp("composites")
    y, x = np.mgrid[:32, :32]
    rows = []
    for number in range(60):
        sources = np.array([x * 131 + number * 997, y * 173 + x * 57, (x + y) * 211])
        pixels = (32767 + 30000 * np.sin(sources / 3000)).astype(np.uint16)
        for band, plane in zip("gri", pixels, strict=True):
            Image.fromarray(plane).save(folder / f"{number}{band}.png")
        paths = {f"path_{band}": f"{number}{band}.png" for band in "gri"}
        rows.append({"id": str(number), "label": number % 2, **paths})
    pd.DataFrame(rows).to_csv(folder / "catalogue.csv", index=False)
    (folder / "dataset").mkdir()
    return build_dataset(
        read_catalogue(folder / "catalogue.csv"), folder / "dataset", image_size=32
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard_size": 0}, "shard_size 0"),
        ({"encoding": "int8"}, "encoding 'int8'"),
        ({"encoding": "jpg", "quality": 0}, "quality 0"),
        ({"encoding": "jpg", "quality": 95}, "8 bits cannot hold linear flux"),
        ({"quality": 95}, "quality: goes with"),
    ],
)
def test_settings_out_of_range(
    dataset: Dataset, tmp_path: Path, settings: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write_shards(dataset.folder, tmp_path, **settings)
