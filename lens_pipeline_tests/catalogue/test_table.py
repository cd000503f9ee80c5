"""Tables of cutouts: columns by every name, values, and what is wrong with them."""

from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
from astropy.table import Table

from lens_pipeline.catalogue import read_catalogue
from lens_pipeline.catalogue.columns import column_name
from lens_pipeline.errors import InputError
from lens_pipeline.evaluation.selection import QUANTITIES
from lens_pipeline.simulation.pool import KNOWN


def test_a_file_for_each_band(tmp_path: Path) -> None:
    table = pd.DataFrame({"id": ["x"], "path_g": ["g.fits"], "path_r": ["r.fits"]})
    table.to_csv(tmp_path / "t.csv", index=False)
    catalogue = read_catalogue(tmp_path / "t.csv")
    assert catalogue.bands == ["g", "r"]
    assert catalogue.references == [f"{tmp_path}/g.fits", f"{tmp_path}/r.fits"]
    assert catalogue.table["label"].isna().all()


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


@pytest.mark.parametrize(("scale", "unit"), [(0.25 / 3600, "degrees"), (250, "milliarcsec")])
def test_a_pixel_scale_in_another_unit_is_refused(tmp_path: Path, scale: float, unit: str) -> None:
    (tmp_path / "t.csv").write_text(f"id,path,pixel_scale\na,a.npy,{scale}\n")
    with pytest.raises(InputError, match=f"row 1, column pixel_scale: .* in arcsec, not {unit}"):
        read_catalogue(tmp_path / "t.csv")


def test_columns_that_mean_something_elsewhere_are_known_in_any_case_of_letters() -> None:
    """In the selection function, and of galaxies that arcs are painted on; but `X` and `Y`, which
    in a survey's table are places on a detector."""
    meant = {"kind", "redshift", *QUANTITIES, *KNOWN} - {"flux_ratio", "x", "y"}
    assert {column_name(name.upper()) for name in meant} == meant
    assert column_name("X") == "X"


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
        (
            "id,path\na,a.npy\nb,b.npy\na,c.npy\n",
            "row 3, column id: 'a' is there twice, first in row 1; ids",
        ),
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


def test_real_candidates(shared_data: Path) -> None:
    table = read_catalogue(shared_data / "cfhtls_graded" / "catalogue.csv").table
    assert len(table) == 218
    assert (table["label"] == 1).sum() == 46
    assert (table["label"] == 0).sum() == 130
    assert table["label"].isna().sum() == 42


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


def test_rows_of_one_image_are_in_one_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = pd.DataFrame({"id": [f"c{n}" for n in range(40)], "label": [1, 0] * 20})
    table["path"] = [f"{n // 2}.npy" if n < 20 else f"{n}.npy" for n in range(40)]
    catalogue = read_catalogue(table, folder=tmp_path)
    of_image = catalogue.table[:20].groupby("path")["group"]
    assert (of_image.nunique() == 1).all()
    assert catalogue.table["group"].nunique() == 30
    said = "the DataFrame: rows 1, 2 are of one image, and differ in column label"
    assert f"{said}, as 18 rows of other images do; " in caplog.text
    caplog.clear()
    read_catalogue(table.drop(index=range(2, 20)), folder=tmp_path)
    assert f"{said}; " in caplog.text
    caplog.clear()
    read_catalogue(table[20:], folder=tmp_path)
    assert not caplog.text


def test_text_that_is_none_is_named_where_text_is_needed() -> None:
    """FITS tables hold bytes, of any encoding."""
    table = pd.DataFrame({"id": [b"a", b"b"], "path": ["a.npy", "b.npy"]})
    assert read_catalogue(table.assign(note=[b"\xe5", b"b"])).table["id"].tolist() == ["a", "b"]
    for name in ("id", "group"):
        bad = table.assign(**{name: [b"a", b"\xe5sa"]})
        with pytest.raises(InputError, match=f"row 2, column {name}: .* is not text in UTF-8"):
            read_catalogue(bad)


def test_a_group_that_is_called_like_another_row_is_not_its(tmp_path: Path) -> None:
    rows = "id,path,label,group,split\n1,a.npy,1,2,train\n2,b.npy,0,,test\n"
    (tmp_path / "table.csv").write_text(rows)
    table = read_catalogue(tmp_path / "table.csv").table
    assert table["group"].nunique() == 2
    assert table["split"].tolist() == ["train", "test"]


def test_groups_are_called_as_before_whatever_is_added(tmp_path: Path) -> None:
    """So that they keep their splits."""
    table = pd.DataFrame({"id": ["a", "b", "c"], "path": ["a.npy", "b.npy", "c.npy"]})
    before = read_catalogue(table.assign(group=[1.0, 2.0, 3.0])).table["group"].tolist()
    after = read_catalogue(table.assign(group=[1.0, 2.0, 4.5])).table["group"].tolist()
    assert before == ["1", "2", "3"]
    assert after == ["1", "2", "4.5"]
    # pandas writes whole numbers with decimals where one is missing.
    table.assign(group=[1, 2, None]).to_csv(tmp_path / "table.csv", index=False)
    assert read_catalogue(tmp_path / "table.csv").table["group"].tolist() == ["1", "2", "c"]


def test_a_row_without_a_group_is_of_that_of_its_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Listed again by somebody else: one galaxy would be in two splits."""
    names = [f"{n}.npy" for n in range(40)]
    once = pd.DataFrame({"id": names, "path": names, "group": [f"galaxy {n}" for n in range(40)]})
    again = once.assign(id="again " + once["id"], group=None)
    table = read_catalogue(pd.concat([again, once]), folder=tmp_path).table
    assert table["group"].tolist() == once["group"].tolist() * 2
    # Its split may be stated, by the same row or by the other.
    again["split"], once["split"] = ["train", None] * 20, [None, "val"] * 20
    table = read_catalogue(pd.concat([again, once]), folder=tmp_path).table
    assert table["group"].tolist() == once["group"].tolist() * 2
    table.to_parquet(tmp_path / "again.parquet")  # as a run does
    pd.testing.assert_frame_equal(read_catalogue(tmp_path / "again.parquet").table, table)
    both = again.drop(columns="group").assign(split="train")
    pd.concat([both, both.assign(id=names)]).to_csv(tmp_path / "both.csv")
    read_catalogue(tmp_path / "both.csv").table.to_parquet(tmp_path / "again.parquet")
    read_catalogue(tmp_path / "again.parquet")
    assert not caplog.text
    other = again.assign(group="another")
    read_catalogue(pd.concat([once, other[:1]]), folder=tmp_path)
    assert "rows 1, 41 are of one image, and differ in column group; " in caplog.text


@pytest.mark.parametrize(
    ("written", "meant"), [("./a/x.npy", "cat/a/x.npy"), ("../img/x.npy", "img/x.npy")]
)
def test_paths_beside_a_catalogue_in_a_store_are_relative_to_it(written: str, meant: str) -> None:
    """Stores know no `.` and no `..`."""
    with fsspec.open("memory://bucket/cat/table.csv", "w") as file:
        file.write(f"id,path,label\na,{written},1\n")
    table = read_catalogue("memory://bucket/cat/table.csv").table
    assert table["path"].tolist() == [f"memory://bucket/{meant}"]


def test_what_other_surveys_rows_hold_changes_nothing_of_a_surveys(tmp_path: Path) -> None:
    """Whose dataset would be made anew, and its networks."""
    des = pd.DataFrame({"id": ["a", "b"], "survey": "des", "run": [1, 2], "good": [True, False]})
    of_des = []
    for run, good in ((5, True), (None, None), (2.5, None)):
        hsc = pd.DataFrame({"id": ["c"], "survey": "hsc", "run": [run], "good": [good]})
        table = pd.concat([des, hsc], ignore_index=True)
        table["path"] = table["id"] + ".npy"
        catalogue = read_catalogue(table, folder=tmp_path).of_surveys(["des"], split_seed=0)
        of_des.append(catalogue.table.to_parquet())
    assert of_des[0] == of_des[1] == of_des[2]
