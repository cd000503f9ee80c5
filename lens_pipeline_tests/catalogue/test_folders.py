"""Folders and listings of images as catalogues."""

from pathlib import Path

import pytest

from lens_pipeline.catalogue import read_catalogue
from lens_pipeline.catalogue.table import source_fingerprint
from lens_pipeline.errors import InputError


def test_folders_of_classes(tmp_path: Path) -> None:
    """The label is the folder's: a non-lens called lens.png stays one."""
    for path in ("train/lens/1.png", "train/nonlens/lens.png", "val/lens/2.png", "val/notes.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    table = read_catalogue(tmp_path).table.set_index("id")
    assert table["label"].to_dict() == {
        "train/lens/1.png": 1,
        "train/nonlens/lens.png": 0,
        "val/lens/2.png": 1,
    }
    assert table["split"].tolist() == ["train", "train", "val"]


def test_folders_of_classes_without_splits(tmp_path: Path) -> None:
    before = None
    for path in ("lens/1.png", "nonlens/lens.png", "other/3.png"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).touch()
        if path != "other/3.png":
            assert source_fingerprint(str(tmp_path)) != before
            before = source_fingerprint(str(tmp_path))
    table = read_catalogue(tmp_path).table.set_index("id")
    assert table["label"].to_dict() == {"lens/1.png": 1, "nonlens/lens.png": 0}
    assert table["split"].isna().all()


def test_listings_and_folders_of_classes_are_not_counted_twice(tmp_path: Path) -> None:
    (tmp_path / "lens").mkdir()
    (tmp_path / "lens" / "a.png").touch()
    (tmp_path / "loose.png").touch()
    with pytest.raises(InputError, match="holds lens/a.png, and beside such folders loose.png"):
        read_catalogue(tmp_path)
    (tmp_path / "train.csv").write_text("id,filepath,label\none,lens/a.png,1\n")
    table = read_catalogue(tmp_path).table
    assert table[["id", "split"]].to_numpy().tolist() == [["one", "train"]]


def test_a_folder_that_holds_a_catalogue_is_not_read_as_images(tmp_path: Path) -> None:
    """As the simulator leaves it: a stack, a picture and a table."""
    for name in ("images-00000.npy", "kinds.jpg", "catalogue.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"holds one: name {tmp_path}/catalogue.parquet"):
        read_catalogue(tmp_path)


def test_a_folder_of_images_alone_has_no_labels(tmp_path: Path) -> None:
    for name in ("b.fits", "a.png", "notes.txt"):
        (tmp_path / name).touch()
    table = read_catalogue(tmp_path).table
    assert table["id"].tolist() == ["a.png", "b.fits"]
    assert table["path"].tolist() == [str(tmp_path / "a.png"), str(tmp_path / "b.fits")]
    assert table["label"].isna().all()
    before = source_fingerprint(str(tmp_path))
    (tmp_path / "notes.txt").write_text("more")
    assert source_fingerprint(str(tmp_path)) == before
    (tmp_path / "c.npy").touch()
    assert source_fingerprint(str(tmp_path)) != before


def test_listings_of_splits(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("filepath,label\nimages/a.png,1\nimages/b.png,0\n")
    (tmp_path / "test.csv").write_text("filepath,label\nimages/c.png,1\n")
    table = read_catalogue(tmp_path).table
    assert table["split"].tolist() == ["train", "train", "test"]
    assert table["path"].tolist()[2] == f"{tmp_path}/images/c.png"


def test_listings_keep_their_other_columns(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(
        "id,filepath,label,group,ra\none,a.png,1,galaxy,10.5\ntwo,b.png,0,,\n"
    )
    (tmp_path / "test.csv").write_text("id,filepath,label,group\nother,c.png,1,galaxy\n")
    said = "row 3, column split: 'test' differs from that of another row of its group, galaxy"
    with pytest.raises(InputError, match=said):
        read_catalogue(tmp_path)  # one galaxy in two splits
    (tmp_path / "test.csv").write_text("id,filepath,label,group\nother,c.png,1,another\n")
    table = read_catalogue(tmp_path).table
    assert table["id"].tolist() == ["one", "two", "other"]
    assert table["group"].tolist() == ["galaxy", "two", "another"]
    assert table["ra"].tolist()[0] == 10.5
    # Each counts its own rows.
    (tmp_path / "train.csv").write_text("id,filepath,label\n0,a.png,1\n1,b.png,0\n")
    (tmp_path / "test.csv").write_text("id,filepath,label\n0,c.png,1\n")
    assert read_catalogue(tmp_path).table["id"].tolist() == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("b.png,1,north", "val.csv: row 1, column ra: 'north' must be degrees, or empty"),
        (
            "a.png,1,",
            ": a.png is there twice, in row 2 of train.csv and row 1 of val.csv;",
        ),
    ],
)
def test_a_row_of_a_listing_is_named_by_it(rows: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("filepath,label,ra\nz.png,0,10\na.png,1,10\n")
    (tmp_path / "val.csv").write_text(f"filepath,label,ra\n{rows}\n")
    with pytest.raises(InputError, match=said):
        read_catalogue(tmp_path)


def test_an_empty_folder_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a folder holds images, or lens\|nonlens/ with them"):
        read_catalogue(tmp_path)


def test_a_listing_says_what_of_a_splits_folders_belongs_to_it(tmp_path: Path) -> None:
    """The guide's layout has both."""
    for split in ("train", "val"):
        for kind in ("lens", "nonlens"):
            (tmp_path / split / kind).mkdir(parents=True)
            for number in range(2):
                (tmp_path / split / kind / f"{number}.png").touch()
    (tmp_path / "train.csv").write_text(
        "filepath,label\ntrain/lens/0.png,1\ntrain/nonlens/1.png,0\n"
    )
    table = read_catalogue(tmp_path).table
    assert table["id"].tolist() == [
        *("train/lens/0.png", "train/nonlens/1.png"),
        *("val/lens/0.png", "val/lens/1.png", "val/nonlens/0.png", "val/nonlens/1.png"),
    ]
    before = source_fingerprint(str(tmp_path))
    (tmp_path / "val" / "lens" / "2.png").touch()
    assert source_fingerprint(str(tmp_path)) != before
    (tmp_path / "val.csv").write_text("filepath,label\nval/lens/0.png,yes\n")
    with pytest.raises(InputError, match=r"val\.csv: row 1, column label: 'yes'"):
        read_catalogue(tmp_path)


def test_other_files_in_a_folder_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "train" / "lens").mkdir(parents=True)
    (tmp_path / "train" / "lens" / "a.png").touch()
    before = source_fingerprint(str(tmp_path))
    (tmp_path / ".lens").mkdir()
    (tmp_path / ".lens" / "new").touch()
    assert source_fingerprint(str(tmp_path)) == before
    (tmp_path / "train" / "lens" / "b.png").touch()
    assert source_fingerprint(str(tmp_path)) != before


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["lens/a.png", "nonlens/b.png", "lens/tile/c.png"], "lens/tile holds images; move them"),
        (["train/lens/a.png", "train/lens/tile/c.png"], "train/lens/tile holds images; move them"),
        (["train/lens/a.png", "lens/b.png"], "holds train/lens/a.png, and beside .* lens/b.png"),
        (["train/lens/a.png", "b.png"], "holds train/lens/a.png, and beside .* b.png"),
        (["train/lens/a.png", "validation/lens/b.png"], "beside .* validation/lens/b.png"),
    ],
)
def test_no_image_is_passed_over(tmp_path: Path, files: list[str], said: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(InputError, match=said):
        read_catalogue(tmp_path)


def test_numbers_of_objects_are_whole_where_a_listing_has_none(tmp_path: Path) -> None:
    big = 2**60
    (tmp_path / "train.csv").write_text(f"filepath,label,object\na.png,1,{big + 1}\n")
    (tmp_path / "test.csv").write_text("filepath,label\nb.png,0\n")
    table = read_catalogue(tmp_path).table
    assert str(table.set_index("id")["object"]["a.png"]) == str(big + 1)
