"""The processed dataset: every row accounted for, splits that never leak."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lens_pipeline.catalogue import build_dataset, read_catalogue
from lens_pipeline.catalogue.cutout import Cutout, CutoutError
from lens_pipeline.catalogue.dataset import CutoutFormat, Dataset, open_dataset
from lens_pipeline.catalogue.splits import PARTS, assign_splits
from lens_pipeline.errors import InputError

RNG = np.random.default_rng(1)


def _catalogue(folder: Path, n: int = 120, **columns: object) -> Path:
    """n cutouts of noise, every third a lens, four to a group."""
    np.save(folder / "stack.npy", RNG.normal(size=(n, 2, 20, 20)).astype(np.float32))
    table = pd.DataFrame(
        {
            "id": [f"c{i}" for i in range(n)],
            "path": [f"stack.npy#{i}" for i in range(n)],
            "label": [int(i % 3 == 0) for i in range(n)],
            "group": [f"g{i // 4}" for i in range(n)],
        }
    ).assign(**columns)
    table.to_csv(folder / "table.csv", index=False)
    return folder / "table.csv"


def _build(table: Path, out: Path, **settings: object) -> Dataset:
    out.mkdir()
    return build_dataset(read_catalogue(table), out, image_size=20, **settings)


def test_no_row_is_lost_and_no_group_torn(tmp_path: Path) -> None:
    dataset = _build(_catalogue(tmp_path), tmp_path / "out")
    tables = {part: dataset.table(part) for part in PARTS}
    rows = sorted(row for table in tables.values() for row in table["row"])
    assert rows == list(range(120))
    groups = [set(table["group"]) for table in tables.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 30
    assert dataset.groups_in_two_splits() == []
    for part, table in tables.items():
        assert dataset.images(part).shape == (len(table), 2, 20, 20)


def test_images_follow_their_table(tmp_path: Path) -> None:
    path = _catalogue(tmp_path, flux_unit="background_sigma")
    dataset = _build(path, tmp_path / "out")
    stack = np.load(tmp_path / "stack.npy")
    for part in ("train", "test"):
        np.testing.assert_array_equal(dataset.images(part), stack[dataset.table(part)["row"]])


def test_columns_that_give_way_to_what_is_measured_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = _build(_catalogue(tmp_path, row=7, nan_fraction=0.5, note="a"), tmp_path / "out")
    assert set(dataset.table("train")["nan_fraction"]) == {0.0}
    assert set(dataset.table("train")["note"]) == {"a"}
    (told,) = caplog.messages
    assert "table.csv: a dataset has columns of its own named row, nan_fraction, and" in told


def test_positions_by_other_names_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = _build(_catalogue(tmp_path, RAJ2000=150.1, DEJ2000=2.2), tmp_path / "out")
    assert set(dataset.table("train")["RAJ2000"]) == {150.1}
    (told,) = caplog.messages
    assert "table.csv: no column ra or dec" in told
    assert "if RAJ2000, DEJ2000 do, in degrees, call them so" in told
    caplog.clear()
    _build(_catalogue(tmp_path, RAJ2000=150.1, ra=150.1, dec=2.2), tmp_path / "more")
    assert not caplog.messages


def test_columns_that_are_misspelt_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = _catalogue(tmp_path, pixelscale=0.2, Bands_=None, note="a", survey="x", surveys="y")
    _build(table, tmp_path / "out")
    told = [message.partition(": ")[2] for message in caplog.messages]
    assert told == [
        f"column {given} means nothing here; if it is what {meant} should be, call it so"
        for given, meant in (("pixelscale", "pixel_scale"), ("Bands_", "bands"))
    ]


def test_a_group_keeps_its_split_as_the_catalogue_grows(tmp_path: Path) -> None:
    small = read_catalogue(_catalogue(tmp_path, 60)).table
    large = read_catalogue(_catalogue(tmp_path, 400)).table
    before, after = assign_splits(small, seed=3), assign_splits(large, seed=3)
    assert before.tolist() == after[:60].tolist()
    assert assign_splits(large, seed=4).tolist() != after.tolist()
    shares = after.value_counts(normalize=True)
    assert shares["train"] == pytest.approx(0.65, abs=0.15)


def test_stated_splits_hold_and_unlabelled_are_never_trained_on(tmp_path: Path) -> None:
    n = 120
    split = ["train", "val", "test"] * (n // 3)
    label = [[1, 0, ""][(i // 3) % 3] for i in range(n)]
    path = _catalogue(tmp_path, split=split, label=label, group=[f"g{i}" for i in range(n)])
    dataset = _build(path, tmp_path / "out")
    assert len(dataset.table("unlabelled")) == 39
    for part in ("train", "val", "test"):
        table = dataset.table(part)
        assert table["label"].notna().all()
        assert [split[row] for row in table["row"]] == [part] * len(table)


def test_rejects_are_listed_with_their_reasons(tmp_path: Path) -> None:
    path = _catalogue(tmp_path)
    stack = np.load(tmp_path / "stack.npy")
    stack[5] = np.nan
    np.save(tmp_path / "stack.npy", stack)
    table = pd.read_csv(path)
    table.loc[7, "path"] = "absent.fits"
    np.save(tmp_path / "mono.npy", RNG.normal(size=(1, 20, 20)))
    table.loc[9, "path"] = "mono.npy"
    table.to_csv(path, index=False)
    rejects = _build(path, tmp_path / "out").rejects()
    assert rejects["row"].tolist() == [5, 7, 9]
    assert rejects["id"].tolist() == ["c5", "c7", "c9"]
    assert rejects["column"].tolist() == ["path"] * 3
    assert rejects["file"].tolist() == [
        f"{tmp_path}/{name}" for name in ("stack.npy", "absent.fits", "mono.npy")
    ]
    for reason, wanted in zip(rejects["reason"], ("finite", "missing", "1 bands"), strict=True):
        assert wanted in reason


def test_too_many_rejects_stop_it(tmp_path: Path) -> None:
    path = _catalogue(tmp_path)
    table = pd.read_csv(path)
    table.loc[3:10, "path"] = "absent.fits"
    table.to_csv(path, index=False)
    with pytest.raises(InputError, match=r"8 of 120 .* row 4, column path, .*absent\.fits"):
        _build(path, tmp_path / "out", max_reject_fraction=0.05)
    table["path"] = "absent.fits"
    table.to_csv(path, index=False)
    with pytest.raises(InputError, match="none of the first"):
        _build(path, tmp_path / "out2")


def test_a_lost_tile_at_the_top_of_a_table_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bands and units are those of the first that can be read."""
    monkeypatch.setattr("lens_pipeline.catalogue.build.SAMPLE", 5)
    path = _catalogue(tmp_path)
    table = pd.read_csv(path)
    table.loc[:7, "path"] = "absent.fits"
    table.to_csv(path, index=False)
    dataset = _build(path, tmp_path / "out", max_reject_fraction=0.1)
    assert dataset.rejects()["row"].tolist() == list(range(8))
    with pytest.raises(InputError, match="none of the first 7 cutouts"):
        _build(path, tmp_path / "out2", max_reject_fraction=0.05)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": 1}, "no non-lenses .label 0.; training needs"),
        ({"label": ""}, "no row has a label"),
        ({"group": "one"}, "split .* has no lenses"),
    ],
)
def test_classes_that_training_needs(tmp_path: Path, columns: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _build(_catalogue(tmp_path, **columns), tmp_path / "out")


def test_a_class_of_which_no_image_can_be_used_is_told_with_the_reason(tmp_path: Path) -> None:
    sides = [40, 20] * 30
    for row, side in enumerate(sides):
        np.save(tmp_path / f"{row}.npy", np.random.default_rng(row).normal(size=(1, side, side)))
    table = pd.DataFrame({"path": [f"{row}.npy" for row in range(60)], "label": [1, 0] * 30})
    table["id"] = table["path"]
    catalogue = read_catalogue(table, folder=tmp_path)
    said = r"no non-lenses \(label 0\); .*; 30 cannot be used: 30 times: 20 x 20 pixels"
    with pytest.raises(InputError, match=said):
        build_dataset(catalogue, tmp_path / "out", image_size=32, max_reject_fraction=1.0)


def test_band_names_must_fit_the_images(tmp_path: Path) -> None:
    assert _build(_catalogue(tmp_path, bands="g,r"), tmp_path / "a").format.bands == ("g", "r")
    with pytest.raises(
        InputError, match=r"row 1, .* named g, r, i; the image has 2 \(columns bands"
    ):
        _build(_catalogue(tmp_path, bands="g,r,i"), tmp_path / "b")


@pytest.mark.parametrize(("spread", "told"), [(0.005, False), (0.02, True)])
def test_pixel_scales_are_one_up_to_a_hundredth(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spread: float, told: bool
) -> None:
    """As the astrometry of each image tells a scale; of several a warning says what comes of it."""
    scale = np.linspace(0.2, 0.2 * (1 + spread), 120)
    dataset = _build(_catalogue(tmp_path, pixel_scale=scale), tmp_path / "out")
    assert dataset.format.pixel_scale == (None if told else pytest.approx(np.median(scale)))
    said = f"pixel scales from 0.2 to {0.2 * (1 + spread):g} arcsec: galaxies of one size differ"
    assert (said in caplog.text) == told


def test_not_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset\.json"):
        open_dataset(tmp_path)


def test_real_stacks(shared_data: Path, tmp_path: Path) -> None:
    """Pan-STARRS: NaNs, counts per second, 40 and 64 pixels, five bands."""
    catalogue = read_catalogue(shared_data / "ps1_grizy" / "catalogue.csv")
    catalogue = replace(catalogue, table=catalogue.table[::2].reset_index(drop=True))
    dataset = build_dataset(catalogue, tmp_path, image_size=40)
    assert dataset.format.bands == ("G", "R", "I", "Z", "Y")
    assert dataset.format.pixel_scale == 0.25
    assert dataset.facts["n_rows"] == 102
    images = np.concatenate([dataset.images(part) for part in ("train", "val", "test")])
    assert np.isfinite(images).all()
    assert len(images) + dataset.facts["n_rejects"] == 102


def test_with_a_file_for_each_band_the_right_one_is_blamed(tmp_path: Path) -> None:
    table = pd.read_csv(_catalogue(tmp_path))
    for band in "gr":
        np.save(tmp_path / f"{band}.npy", RNG.normal(size=(120, 1, 20, 20)).astype(np.float32))
        table[f"path_{band}"] = [f"{band}.npy#{i}" for i in range(120)]
    table = table.drop(columns="path")
    table.loc[5, "path_r"] = "absent.npy"
    table.to_csv(tmp_path / "table.csv", index=False)
    rejects = _build(tmp_path / "table.csv", tmp_path / "out").rejects()
    assert rejects["column"].tolist() == ["path_r"]
    assert Path(rejects["file"].iloc[0]).name == "absent.npy"
    with pytest.raises(InputError, match=r"row 6, column path_r, .*absent\.npy"):
        _build(tmp_path / "table.csv", tmp_path / "none", max_reject_fraction=0)


def test_bands_are_put_in_the_formats_order_or_refused_by_name() -> None:
    form = CutoutFormat(("g", "r", "i"), 2, "background_sigma", None)
    pixels = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    swapped = Cutout(pixels, "background_sigma", ("I", "R", "G"))
    np.testing.assert_array_equal(form.fitted(swapped).pixels, pixels[::-1])
    np.testing.assert_array_equal(form.fitted(Cutout(pixels, "background_sigma")).pixels, pixels)
    with pytest.raises(CutoutError, match=r"there is no band i; there are g, r, z"):
        form.fitted(Cutout(pixels, "background_sigma", ("g", "r", "z")))


def test_a_folder_that_holds_anything_is_not_written_into(tmp_path: Path) -> None:
    """What is mapped of a file that is written again kills the process that has mapped it."""
    catalogue = read_catalogue(_catalogue(tmp_path))
    images = build_dataset(catalogue, str(tmp_path / "new/out"), image_size=20).images("train")
    before = images.copy()
    for out in (tmp_path, tmp_path / "new/out"):
        with pytest.raises(InputError, match=f"{out}: exists and is not empty; name another"):
            build_dataset(catalogue, out, image_size=10)
    with pytest.raises(InputError, match=r"table\.csv: cannot be written to"):
        build_dataset(catalogue, tmp_path / "table.csv", image_size=20)
    np.testing.assert_array_equal(images, before)


def test_what_fails_leaves_room_for_the_next_attempt(tmp_path: Path) -> None:
    path = _catalogue(tmp_path)
    table = pd.read_csv(path)
    table.loc[100:, "path"] = "absent.fits"  # not among the first, by which the format is told
    table.to_csv(path, index=False)
    out = tmp_path / "out"
    with pytest.raises(InputError, match="20 of 120"):
        build_dataset(read_catalogue(path), out, image_size=20)
    with pytest.raises(InputError, match="image_size 0: at least 1"):
        build_dataset(read_catalogue(path), out, image_size=0)
    assert list(out.iterdir()) == []
    build_dataset(read_catalogue(path), out, image_size=20, max_reject_fraction=0.5)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset.json", b"{"),
        ("dataset.json", b"{}"),
        ("dataset.json", b"[]"),
        ("train.parquet", b"PAR1"),
        ("train.parquet", None),
        ("train.npy", b"\x93NUMPY"),
        ("train.npy", None),
        ("rejects.parquet", None),
    ],
)
def test_a_damaged_dataset_names_the_file(
    dataset: Dataset, tmp_path: Path, name: str, content: bytes | None
) -> None:
    folder = Path(shutil.copytree(dataset.folder, tmp_path / "dataset"))
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)

    def read() -> None:
        damaged = open_dataset(folder)
        with damaged.open_images("train"):
            damaged.split("train")
        damaged.rejects()

    with pytest.raises(InputError, match=f"{folder / name}: is "):
        read()


def test_a_dataset_that_was_cut_is_named(dataset: Dataset, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(dataset.folder, tmp_path / "dataset"))
    images = folder / "train.npy"
    images.write_bytes(images.read_bytes()[:-5000])
    with pytest.raises(InputError, match=r"train\.npy: is not whole"):
        open_dataset(folder).split("train")
    shutil.copyfile(folder / "val.npy", images)
    with pytest.raises(InputError, match=r"train\.npy has \d+ cutouts, train\.parquet \d+"):
        open_dataset(folder).split("train")


def test_places_from_the_end_and_places_that_there_are_not(dataset: Dataset) -> None:
    split = dataset.split("val")
    n = len(split)
    np.testing.assert_array_equal(split.gather([-1, 0, -n]), split.gather([n - 1, 0, 0]))
    for place in (n, -n - 1):
        with pytest.raises(IndexError, match=f"there are {n}"):
            split.gather([0, place])
