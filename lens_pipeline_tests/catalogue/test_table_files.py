"""Files of tables, as others write them (CSV, Parquet, FITS, VOTable), and tables in memory."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import Column, MaskedColumn, Table

from lens_pipeline.catalogue import read_catalogue
from lens_pipeline.catalogue.table import Catalogue
from lens_pipeline.errors import InputError

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


@pytest.mark.parametrize("suffix", ["fits", "vot"])
def test_whole_numbers_of_another_unit_keep_what_is_left_of_a_degree(
    tmp_path: Path, suffix: str
) -> None:
    table = Table({"id": ["a", "b"], "path": ["a.npy", "b.npy"]})
    table["ra"] = Column([1_234_567_890, 3_600_000], unit="mas")
    table["dec"] = Column([-20_000, 7_200_000], unit="mas")
    table.write(tmp_path / f"t.{suffix}", format={"vot": "votable"}.get(suffix, suffix))
    found = read_catalogue(tmp_path / f"t.{suffix}").table[["ra", "dec"]].to_numpy()
    np.testing.assert_allclose(found, [[1_234_567_890 / 3.6e6, -20_000 / 3.6e6], [1, 2]])


@pytest.mark.parametrize("unit", ["degree", "Degrees", "DEG", "degs", "parsnip"])
def test_degrees_may_be_spelt_as_people_do(tmp_path: Path, unit: str) -> None:
    """astropy knows `deg` alone."""
    columns = [fits.Column(name, "D", unit=unit, array=[1.5, 2.5]) for name in ("ra", "dec")]
    columns += [fits.Column(name, "5A", array=["a.npy", "b.npy"]) for name in ("id", "path")]
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / "t.fits")
    if unit == "parsnip":
        with pytest.raises(InputError, match="column ra: its unit is parsnip; degrees are needed"):
            read_catalogue(tmp_path / "t.fits")
    else:
        assert read_catalogue(tmp_path / "t.fits").table["ra"].tolist() == [1.5, 2.5]


@pytest.mark.filterwarnings("ignore:.*complex")
def test_what_no_parquet_file_holds_is_told_before_any_image_is_read(tmp_path: Path) -> None:
    table = Table({"id": ["a"], "path": ["a.npy"], "shear": [0.1 + 0.2j]})
    table.write(tmp_path / "t.fits")
    with pytest.raises(InputError, match=r"t\.fits: a column holds what Parquet does not, as comp"):
        read_catalogue(tmp_path / "t.fits")


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
    assert table["group"].tolist() == ["7", "b", "c"]
    assert table["ra"].tolist()[1:] == [10.5, 11]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.csv", None, "no such file"),
        ("table.xlsx", b"PK", "a table must end in .csv, .parquet,"),
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


@pytest.mark.filterwarnings("error::pandas.errors.ParserWarning")
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


def test_what_a_fits_table_leaves_unknown_is_no_false(tmp_path: Path) -> None:
    """A logical value of a zero byte is one that is not known."""
    columns = [
        fits.Column("id", "2A", array=["a", "b", "c"]),
        fits.Column("path", "5A", array=["a.npy", "b.npy", "c.npy"]),
        fits.Column("label", "L", array=[True, False, False]),
        fits.Column("simulated", "L", array=[True, False, True]),
    ]
    path = tmp_path / "table.fits"
    fits.BinTableHDU.from_columns(columns).writeto(path)
    content = bytearray(path.read_bytes())
    row = content.index(b"cc.npy".replace(b"cc", b"c\0c")) + 7
    assert content[row : row + 2] == b"FT"
    content[row] = 0
    path.write_bytes(content)
    table = read_catalogue(path).table
    assert table["label"].tolist() == [1, 0, pd.NA]
    assert table["simulated"].tolist() == [True, False, True]


def test_ids_beside_missing_ones_keep_their_digits_in_parquet_of_others(tmp_path: Path) -> None:
    big = 2**60
    columns = {
        "id": [1, 2, 3],
        "path": ["a.npy", "b.npy", "c.npy"],
        "group": [big + 1, None, big + 3],
        "object": [big + 1, None, big + 3],
    }
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table(columns), path)  # of no pandas
    table = read_catalogue(path).table
    assert table["group"].tolist() == [str(big + 1), "2", str(big + 3)]
    assert table["object"].tolist() == [big + 1, pd.NA, big + 3]


@pytest.mark.parametrize(
    ("unit", "stated", "scale"),
    [("arcmin", 0.2 / 60, 0.2), ("mas", 200.0, 0.2), ("arcsec / pix", 0.2, 0.2), ("", 0.2, 0.2)],
)
def test_pixel_scales_are_taken_in_their_unit(
    tmp_path: Path, unit: str, stated: float, scale: float
) -> None:
    table = Table({"id": ["a"], "path": ["a.npy"], "pixel_scale": [stated]})
    table["pixel_scale"].unit = unit
    table.write(tmp_path / "table.fits")
    found = read_catalogue(tmp_path / "table.fits").table["pixel_scale"]
    assert found.tolist() == pytest.approx([scale])


def test_a_pixel_scale_in_no_angle_is_refused(tmp_path: Path) -> None:
    table = Table({"id": ["a"], "path": ["a.npy"], "pixel_scale": [0.2]})
    table["pixel_scale"].unit = "mag"
    table.write(tmp_path / "table.fits")
    with pytest.raises(InputError, match="column pixel_scale: its unit is mag; arcsec is needed"):
        read_catalogue(tmp_path / "table.fits")


def test_text_of_any_length_in_a_fits_table_is_text(tmp_path: Path) -> None:
    names = np.array(["J0012", "K1"], dtype=object)
    columns = [
        fits.Column("id", "PA()", array=names),
        fits.Column("path", "5A", array=["a.npy", "b.npy"]),
    ]
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / "table.fits")
    assert read_catalogue(tmp_path / "table.fits").table["id"].tolist() == ["J0012", "K1"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("a,a.npy,1,good\nb,b.npy\n", "row 2 has 2 fields, the header 4"),  # cut
        ("a,a.npy,1,good,\nb,b.npy,0,blue, faint\n", "row 2 has 5 fields, the header 4"),
        ("a,a.npy,1,good\nb,b.npy,0,blue, faint\n", "row 2 has 5 fields, the header 4"),
    ],
)
def test_no_field_of_a_row_is_lost_or_made_up(tmp_path: Path, rows: str, said: str) -> None:
    (tmp_path / "table.csv").write_text(f"id,path,label,note\n{rows}")
    with pytest.raises(InputError, match=said):
        read_catalogue(tmp_path / "table.csv")


def test_zeros_at_the_front_are_kept_wherever_they_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lens_pipeline.catalogue.table_files.LOOKED_AT", 10)
    table = pd.DataFrame({"id": range(50), "tile": range(1000, 1050), "n": range(50)})
    table["path"] = table["id"].map("{}.npy".format)
    table = table.astype({"tile": str})
    table.loc[43, "tile"] = "0012"
    table.to_csv(tmp_path / "table.csv", index=False)
    found = read_catalogue(tmp_path / "table.csv").table
    assert found["tile"].tolist() == table["tile"].tolist()
    assert found["n"].tolist() == list(range(50))


def test_two_tables_of_one_name_in_a_fits_file_are_two(tmp_path: Path) -> None:
    table = fits.BinTableHDU(Table({"id": ["a"], "path": ["a.npy"]}), name="CAT")
    fits.HDUList([fits.PrimaryHDU(), table, table.copy()]).writeto(tmp_path / "table.fits")
    with pytest.raises(InputError, match="holds 2 tables, CAT, CAT; write the one"):
        read_catalogue(tmp_path / "table.fits")
