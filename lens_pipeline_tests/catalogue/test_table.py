"""Catalogues in every form, and what is wrong with them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from astropy.table import Column, MaskedColumn, Table

from lens_pipeline.catalogue import read_catalogue
from lens_pipeline.catalogue.columns import column_name
from lens_pipeline.catalogue.table import Catalogue, source_fingerprint
from lens_pipeline.errors import InputError
from lens_pipeline.evaluation.selection import QUANTITIES
from lens_pipeline.simulation.pool import KNOWN

ROWS = pd.DataFrame(
    {
        "id": ["a", "b", "NA", "7"],
        "path": ["a.npy", "b.npy", "/data/c.npy", "s3://bucket/d.npy"],
        "label": [1, 0, None, 1],
        "grade": [2.5, 0.3, 1.1, 3.0],
    }
)


def _write(table: pd.DataFrame, path: Path) -> None:
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        form = "fits" if path.suffix == ".fits" else "votable"
        written = table.assign(label=table["label"].fillna(-1).astype(int))
        astro = Table.from_pandas(written)
        astro["label"] = astro["label"].astype("int64")
        if form == "votable":
            astro["label"] = [str(v) if v >= 0 else "" for v in written["label"]]
        else:
            astro["label"] = Table.from_pandas(
                written[["label"]].astype("Int64").replace(-1, pd.NA)
            )["label"]
        astro.write(path, format=form)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".fits", ".vot"])
def test_every_format_gives_the_same_catalogue(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"table{suffix}"
    _write(ROWS, path)
    table = read_catalogue(path).table
    assert table["id"].tolist() == ["a", "b", "NA", "7"]
    assert table["label"].tolist() == [1, 0, pd.NA, 1]
    assert table["path"].tolist() == [
        f"{tmp_path}/a.npy",
        f"{tmp_path}/b.npy",
        "/data/c.npy",
        "s3://bucket/d.npy",
    ]
    assert table["group"].tolist() == table["id"].tolist()
    assert table["grade"].tolist() == [2.5, 0.3, 1.1, 3.0]


@pytest.mark.parametrize("kind", ["plain", "filtered", "indexed", "astropy"])
def test_a_table_in_memory_is_one_as_a_file_is(tmp_path: Path, kind: str) -> None:
    ROWS.to_parquet(tmp_path / "table.parquet", index=False)
    of_file = read_catalogue(tmp_path / "table.parquet").table
    more = pd.concat([ROWS, ROWS.assign(id=["x", "y", "z", ""])], keys=["these", "others"])
    table = {
        "plain": lambda: ROWS.copy(),
        "filtered": lambda: more[more["id"].isin(ROWS["id"])],
        "indexed": lambda: ROWS.set_index("id"),
        "astropy": lambda: Table.from_pandas(ROWS).to_pandas(),
    }[kind]()
    before = table.copy()
    found = read_catalogue(table, folder=tmp_path)
    pd.testing.assert_frame_equal(found.table[list(of_file)], of_file)
    pd.testing.assert_frame_equal(table, before)
    assert read_catalogue(table, folder="s3://b/c").table["path"][0] == "s3://b/c/a.npy"


def test_a_column_of_numbers_and_text_is_text(tmp_path: Path) -> None:
    """As pandas reads a spreadsheet."""
    table = ROWS.assign(notes=[1, "maybe", None, *[2.5] * (len(ROWS) - 3)])
    found = read_catalogue(table, folder=tmp_path).table
    found.to_parquet(tmp_path / "t.parquet")
    kept = pd.read_parquet(tmp_path / "t.parquet")["notes"]
    assert kept[:2].tolist() == ["1", "maybe"]
    assert kept.isna().tolist() == [row == 2 for row in range(len(ROWS))]


def test_a_table_in_memory_is_checked_as_a_file_is() -> None:
    for spoilt, message in (
        (ROWS.assign(label=[1, 0, 2, 1]), "the DataFrame: row 3, column label: '2' must be 1, 0"),
        (ROWS.set_axis(["Id", "ID", "label", "path"], axis=1), "'Id' and 'ID' are both id"),
        (ROWS.drop(columns="path"), "the DataFrame: column path .* is missing"),
        (ROWS.head(0), "the DataFrame: the table has no rows"),
        (Table.from_pandas(ROWS), r"not a Table; an astropy Table gives one: table\.to_pandas"),
        ({"id": ["a"]}, "not a dict"),
    ):
        with pytest.raises(InputError, match=message):
            read_catalogue(spoilt)
    with pytest.raises(InputError, match="folder images: is of a DataFrame; images are relative"):
        read_catalogue("table.csv", folder="images")


def test_a_file_for_each_band(tmp_path: Path) -> None:
    table = pd.DataFrame({"id": ["x"], "path_g": ["g.fits"], "path_r": ["r.fits"]})
    table.to_csv(tmp_path / "t.csv", index=False)
    catalogue = read_catalogue(tmp_path / "t.csv")
    assert catalogue.bands == ["g", "r"]
    assert catalogue.references == [f"{tmp_path}/g.fits", f"{tmp_path}/r.fits"]
    assert catalogue.table["label"].isna().all()


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
    with pytest.raises(InputError, match="holds images, and folders lens or nonlens with others"):
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
    with pytest.raises(InputError, match="row 3, column split: 'test' differs from that of"):
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


def test_ids_of_other_surveys_keep_their_digits_and_zeros(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "id,path,gaia_id,tile,flux,chi2\n"
        "a,a.npy,4295806720123456789,0012,1.5,inf\n"
        "b,b.npy,,0400,2e17,1\n"
        "c,c.npy,4295806720123456791,1000,,2\n"
    )
    table = read_catalogue(tmp_path / "t.csv").table
    assert table["chi2"].tolist() == [np.inf, 1, 2]
    assert table["gaia_id"].tolist()[0] == 4295806720123456789
    assert table["gaia_id"].tolist()[2] == 4295806720123456791
    assert table["gaia_id"].isna().tolist() == [False, True, False]
    assert table["tile"].tolist() == ["0012", "0400", "1000"]
    assert table["flux"].tolist()[:2] == [1.5, 2e17]


def test_columns_are_known_in_any_case_of_letters(tmp_path: Path) -> None:
    """As FITS tables write them, and with a blank after the comma: else groups are torn."""
    (tmp_path / "t.csv").write_text(
        "ID, Path_g,PATH_R, LABEL,Group, SPLIT ,RA,Dec,Grade\n"
        "a, a.npy,b.npy,1, 0012, train,10.5,-1,A\n"
        "b,c.npy,d.npy, 0,0012 ,train ,, ,B\n"
    )
    table = read_catalogue(tmp_path / "t.csv").table
    assert [*table][:8] == ["id", "path_g", "path_R", "label", "group", "split", "ra", "dec"]
    assert table["path_g"].tolist() == [f"{tmp_path}/a.npy", f"{tmp_path}/c.npy"]
    assert table["group"].tolist() == ["0012", "0012"]
    assert table["split"].tolist() == ["train", "train"]
    assert table["ra"].tolist()[0] == 10.5
    assert table[["ra", "dec"]].isna().to_numpy().tolist() == [[False, False], [True, True]]
    assert table["Grade"].tolist() == ["A", "B"]
    capitals = Table({"ID": ["a", "b"], "PATH": ["a.npy", "b.npy"], "GROUP": ["one", "one "]})
    capitals.write(tmp_path / "t.fits")
    assert read_catalogue(tmp_path / "t.fits").table["group"].tolist() == ["one", "one"]
    (tmp_path / "t.csv").write_text("id,path,GROUP,Group\na,a.npy,1,2\n")
    with pytest.raises(InputError, match="columns 'GROUP' and 'Group' are both group; drop or"):
        read_catalogue(tmp_path / "t.csv")
    # Of a survey's own beside ours.
    (tmp_path / "t.csv").write_text("ID,id,path,PATH_hst,RA\n7,a,a.npy,b.npy,1e20\n")
    table = read_catalogue(tmp_path / "t.csv").table
    assert [*table][:4] == ["ID", "id", "path", "PATH_hst"]
    assert (table["id"].tolist(), table["ra"].tolist()) == (["a"], [1e20])


def test_no_band_is_lost_where_columns_of_paths_are_not_written_alike(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,PATH_g,path_r\na,a.npy,b.npy\n")
    with pytest.raises(InputError, match=r"t\.csv: columns path_r and PATH_g: write path_ alike"):
        read_catalogue(tmp_path / "t.csv")


def test_a_pixel_scale_in_degrees_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"id,path,pixel_scale\na,a.npy,{0.25 / 3600}\n")
    with pytest.raises(InputError, match="row 1, column pixel_scale: .* in arcsec, not degrees"):
        read_catalogue(tmp_path / "t.csv")


def test_columns_that_mean_something_elsewhere_are_known_in_any_case_of_letters() -> None:
    """In the selection function, and of galaxies that arcs are painted on; but `X` and `Y`, which
    in a survey's table are places on a detector."""
    meant = {"kind", "redshift", *QUANTITIES, *KNOWN} - {"flux_ratio", "x", "y"}
    assert {column_name(name.upper()) for name in meant} == meant
    assert column_name("X") == "X"


def test_what_astropy_masks_in_parquet_is_missing(tmp_path: Path) -> None:
    """It writes the values all the same, and beside them what is masked; and bytes as they are."""
    table = Table(
        {
            "id": Column([36407048611234567, 36407048611234568, 36407048611234569]),
            "path": np.array([b"a.npy", b"b.npy", b"c.npy"]),
            "label": MaskedColumn([1, 1, 0], mask=[False, True, False]),
            "survey_id": MaskedColumn([2**60 + 1, 2**60 + 3, 7], mask=[False, False, True]),
            "field": MaskedColumn([b"XMM", b"COSMOS", b"?"], mask=[False, False, True]),
            "spectrum.mask": [True, False, False],
        }
    )
    table.write(tmp_path / "t.parquet", format="parquet")
    found = read_catalogue(tmp_path / "t.parquet").table
    assert found["label"].tolist() == [1, pd.NA, 0]
    assert found["id"].tolist()[0] == "36407048611234567"
    assert found["survey_id"].tolist() == [2**60 + 1, 2**60 + 3, pd.NA]
    assert found["field"].tolist()[:2] == ["XMM", "COSMOS"]
    assert found["field"].isna().tolist() == [False, False, True]
    assert [name for name in found if name.endswith(".mask")] == ["spectrum.mask"]


@pytest.mark.parametrize("format", ["fits", "votable"])
def test_positions_come_in_the_unit_that_a_table_states(tmp_path: Path, format: str) -> None:
    def written(unit: str | None, ra: float, dec: float) -> Catalogue:
        table = Table({"ID": ["a", "b"], "PATH": ["a.npy", "b.npy"]})
        masked = [False, True]
        table["RA"] = MaskedColumn([ra, 0.0], mask=masked, unit=unit)
        table["DEC"] = MaskedColumn([dec, 0.0], mask=masked, unit=unit)
        path = tmp_path / f"t.{'fits' if format == 'fits' else 'vot'}"
        table.write(path, format=format, overwrite=True)
        return read_catalogue(path)

    for unit, ra, dec in (("rad", np.pi / 2, -0.1), ("deg", 90.0, -5.7296), (None, 90, -5.7296)):
        table = written(unit, ra, dec).table
        np.testing.assert_allclose(table[["ra", "dec"]].to_numpy()[0], [90, -5.7296], rtol=1e-5)
        assert table["ra"].isna().tolist() == [False, True]
    with pytest.raises(InputError, match="column RA: its unit is pix; degrees are needed"):
        written("pix", 1.0, 1.0)


def test_columns_of_a_votable_are_called_by_their_names(tmp_path: Path) -> None:
    Table({"ID": ["a"], "PATH": ["a.npy"]}).write(tmp_path / "t.vot", format="votable")
    text = (tmp_path / "t.vot").read_text()
    changed = text.replace('<FIELD ID="', '<FIELD ID="col_')
    assert changed != text
    (tmp_path / "t.vot").write_text(changed)
    assert read_catalogue(tmp_path / "t.vot").table["id"].tolist() == ["a"]


def test_a_file_of_several_tables_is_refused(tmp_path: Path) -> None:
    rows = {"id": ["a"], "path": ["a.npy"]}
    tables = [fits.BinTableHDU(Table(rows), name=name) for name in ("TRAIN", "TEST")]
    fits.HDUList([fits.PrimaryHDU(), *tables]).writeto(tmp_path / "t.fits")
    with pytest.raises(InputError, match="holds 2 tables, TRAIN, TEST; write the one"):
        read_catalogue(tmp_path / "t.fits")


def test_a_folder_of_parquet_files_is_told(tmp_path: Path) -> None:
    pd.DataFrame({"id": ["a"], "path": ["a.npy"]}).to_parquet(tmp_path / "part0.parquet")
    with pytest.raises(InputError, match="is a folder of Parquet files; write them as one file"):
        read_catalogue(tmp_path)


def test_a_parquet_index_is_a_column(tmp_path: Path) -> None:
    for index in ("id", "group"):
        table = pd.DataFrame({"id": ["a", "b"], "path": ["a.npy", "b.npy"], "group": ["x", "x"]})
        for drop in (True, False):
            table.set_index(index, drop=drop).to_parquet(tmp_path / "t.parquet")
            found = read_catalogue(tmp_path / "t.parquet").table
            assert found[["id", "group"]].to_numpy().tolist() == [["a", "x"], ["b", "x"]]


def test_bytes_and_lists_of_parquet_are_text(tmp_path: Path) -> None:
    table = pd.DataFrame({"id": [b"a"], "path": [b"a.npy"], "bands": [["g", "r"]]})
    table.to_parquet(tmp_path / "t.parquet")
    catalogue = read_catalogue(tmp_path / "t.parquet")
    assert catalogue.table["id"].tolist() == ["a"]
    assert catalogue.references == [f"{tmp_path}/a.npy"]
    assert catalogue.bands == ["g", "r"]


def test_nan_is_what_other_libraries_write_for_nothing(tmp_path: Path) -> None:
    written = Table({"id": ["nan", "b", "c"], "path": ["nan", "b.npy", "c.npy"]})
    written["label"] = [1, np.nan, 0]
    written["group"] = [7, np.nan, np.nan]
    written["ra"] = [np.nan, 10.5, 11]
    written.write(tmp_path / "t.csv")
    table = read_catalogue(tmp_path / "t.csv").table
    assert table["id"].tolist() == ["nan", "b", "c"]
    assert table["path"].tolist()[0] == f"{tmp_path}/nan"
    assert table["label"].isna().tolist() == [False, True, False]
    assert table["group"].tolist() == ["7.0", "b", "c"]
    assert table["ra"].tolist()[1:] == [10.5, 11]


def test_a_signed_url_ends_before_its_query(tmp_path: Path) -> None:
    import functools
    import http.server
    import threading

    (tmp_path / "t.csv").write_text("id,path\na,a.npy\n")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        catalogue = read_catalogue(f"{address}/t.csv?signed=a/b")
        server.shutdown()
    assert catalogue.references == [f"{address}/a.npy"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("id,path,label\n", "no rows"),
        ("path,label\na.npy,1\n", "column id is missing"),
        ("id,label\na,1\n", "column path .* is missing"),
        ("id,path\na,a.npy\nb,b.npy\na,c.npy\n", "row 3, column id: 'a' is there twice"),
        ("id,path\na,a.npy\n,b.npy\n", "row 2, column id: is empty"),
        ("id,path\na,a.npy\nb,\n", "row 2, column path: is empty"),
        ("id,path,label\na,a.npy,1\nb,b.npy,2\n", "row 2, column label: '2' must be 1, 0 or empty"),
        ("id,path,label\na,a.npy,lens\n", "row 1, column label: 'lens' must be"),
        ("id,path,label\na,a.npy,0.5\n", "row 1, column label: '0.5' must be"),
        ("id,path,simulated\na,a.npy,0\nb,b.npy,no\n", "row 2, column simulated: 'no' must be"),
        ("id,path,split\na,a.npy,dev\n", "row 1, column split: 'dev' must be train"),
        (
            'id,path,pixel_scale\na,a.npy,0.2"\n',
            "row 1, column pixel_scale: '0.2\"' must be arcsec",
        ),
        (
            "id,path,pixel_scale\na,a.npy,\nb,b.npy,0\n",
            "row 2, column pixel_scale: '0.0' must be above",
        ),
        (
            "id,path,ra\na,a.npy,12:00:00\n",
            "row 1, column ra: '12:00:00' must be degrees, or empty",
        ),
        ("id,path,Dec\na,a.npy,inf\n", "row 1, column dec: 'inf' must be degrees, or empty"),
        (
            "id,path,label,group,split\na,a,1,g,train\nb,b,0,g,test\n",
            "row 2, column split: 'test' differs",
        ),
    ],
)
def test_bad_tables_name_row_and_column(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as problem:
        read_catalogue(path)
    assert str(path) in str(problem.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.csv", None, "no such file"),
        ("table.xlsx", b"PK", "a catalogue is a folder or one of"),
        ("table.parquet", b"not parquet", "cannot be read as a catalogue"),
        ("table.fits", b"SIMPLE  =", "cannot be read as a catalogue"),
        ("table.csv", b"\xff\xfe\x00broken", "is not text in UTF-8"),
    ],
)
def test_unreadable_sources(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_catalogue(tmp_path / name)


def test_an_empty_folder_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lens|nonlens"):
        read_catalogue(tmp_path)


def test_real_candidates(shared_data: Path) -> None:
    table = read_catalogue(shared_data / "cfhtls_graded" / "catalogue.csv").table
    assert len(table) == 218
    assert (table["label"] == 1).sum() == 46
    assert (table["label"] == 0).sum() == 130
    assert table["label"].isna().sum() == 42


def test_a_comma_at_the_end_of_every_row_shifts_nothing(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,path,label\na,a.png,1,\nb,b.png,0,\n")
    table = read_catalogue(tmp_path / "t.csv").table
    assert table["id"].tolist() == ["a", "b"]
    assert table["label"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,path,label,ra\na,a.png,1,17.5,150.1\nb,b.png,0,17.5,150.2\n", "row 1 has 5 fields"),
        ("id,path,label\na,a.png,1,\n\nb,b.png,0,0.9\n", "row 2 has 4 fields, the header 3"),
        ("\ufeffid,path,label, label\na,a.png,1,0\n", "'label' and 'label' are both label"),
        ("id,path,label,ra,RA\na,a.png,1,150.1,2.2\n", None),
        ("id,path,label,mag,mag\na,a.png,1,20.1,20.3\n", None),
        ('id,path,label,ra\na,a.png,1,"150.1"\n', None),
    ],
)
def test_no_field_is_shifted_and_no_column_renamed_unseen(
    tmp_path: Path, content: str, message: str | None
) -> None:
    (tmp_path / "t.csv").write_text(content)
    if message is None:
        read_catalogue(tmp_path / "t.csv")
    else:
        with pytest.raises(InputError, match=message):
            read_catalogue(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id;path;label\na;a.png;1\n", "its header is one field, 'id;path;label'; separate"),
        (b"id\tpath\na\ta.png\n", "its header is one field"),
        (b"# made by a survey\nid,path\na,a.png\n", "begins with '# made by a survey'"),
        (b"# id,path\na,a.png\n", "begins with '# id'"),
        ("id,path,note\na,a.png,étoile\n".encode("latin-1"), "is not text in UTF-8"),
        ("id,path,étoile\na,a.png,1\n".encode("latin-1"), "is not text in UTF-8"),
        (b"id,path,note\n" + 60_000 * b"a,a.png,x\n" + b"b,b.png,\xe9\n", "is not text in UTF-8"),
    ],
)
def test_what_others_call_csv_is_told_in_a_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match=rf"t\.csv: {message}"):
        read_catalogue(tmp_path / "t.csv")


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


def test_the_rows_of_a_survey_keep_their_numbers_and_the_splits_of_all(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        {
            "id": list("abcdef"),
            "path": "x.npy",
            "label": [1, 0, None, 1, 0, 1],
            "survey": ["des", "hsc", "hsc", "hsc", None, "des"],
            "group": ["one", "one", "two", "two", "three", "one"],
            "split": ["test", None, None, None, None, None],
        }
    )
    rows.to_csv(tmp_path / "rows.csv", index=False)
    catalogue = read_catalogue(tmp_path / "rows.csv")
    hsc = catalogue.of_surveys(["hsc"], split_seed=0).table
    assert hsc.index.tolist() == [1, 2, 3]
    assert hsc["id"].tolist() == ["b", "c", "d"]
    assert hsc["split"].iloc[0] == "test"  # which only a row of des says of its group
    assert pd.isna(hsc["split"].iloc[1])  # unlabelled
    both = catalogue.of_surveys(["des", "hsc"], split_seed=0).table
    assert both["id"].tolist() == ["a", "b", "c", "d", "f"]
    with pytest.raises(InputError, match="rows.csv: column survey: no row is of 'HSC'; it names"):
        catalogue.of_surveys(["des", "HSC"], split_seed=0)
    rows.drop(columns="survey").to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(InputError, match="rows.csv: column survey is missing"):
        read_catalogue(tmp_path / "rows.csv").of_surveys(["des"], split_seed=0)


def test_blanks_round_the_name_of_a_survey_are_none_of_it(tmp_path: Path) -> None:
    rows = "id,path,survey\na,a.npy,des \nb,b.npy, des\nc,c.npy, \nd,d.npy,\n"
    (tmp_path / "rows.csv").write_text(rows)
    table = read_catalogue(tmp_path / "rows.csv").table
    assert table["survey"].fillna("none").tolist() == ["des", "des", "none", "none"]
