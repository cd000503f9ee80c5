"""Lists of known lenses."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.table import Table

from lens_pipeline.catalogue.known import FIELD, read_known_lenses, rows_of_known_lenses
from lens_pipeline.errors import InputError


def test_a_list_is_read_as_others_write_it(tmp_path: Path) -> None:
    """In degrees or radians, in capitals, with names that are numbers or that lack."""
    expected = {"name": ["Cosmic Horseshoe", "row 2"], "ra": [177.1381, 0.0], "dec": [19.5008, -1]}
    ra, dec = expected["ra"], expected["dec"]
    csv = tmp_path / "list.csv"
    csv.write_text("Name,RA,DEC,zlens\nCosmic Horseshoe,177.1381,19.5008,0.444\n,0,-1,\n")
    fits = tmp_path / "list.fits"
    radians = Table({"NAME": ["Cosmic Horseshoe", ""], "RA": np.deg2rad(ra), "DEC": dec})
    radians["RA"].unit, radians["DEC"].unit = "rad", "deg"
    radians.write(fits)
    for path in (csv, fits):
        found = read_known_lenses(str(path))
        assert list(found)[:3] == ["name", "ra", "dec"]
        assert found["name"].tolist() == expected["name"]
        np.testing.assert_allclose(found[["ra", "dec"]], np.transpose([ra, dec]))
    assert read_known_lenses(str(csv))["zlens"].tolist() == [
        0.444,
        pytest.approx(np.nan, nan_ok=True),
    ]
    (tmp_path / "ids.csv").write_text("id,ra,dec,Name\n007,1,2,\n008,1,2,J1\n")
    assert read_known_lenses(str(tmp_path / "ids.csv"))["name"].tolist() == ["007", "J1"]
    some = pd.DataFrame({"name": ["a", None], "ra": [1, 2], "dec": [3, 4]}, index=[7, 9])
    some.to_parquet(tmp_path / "some.parquet")  # of a table that was filtered
    assert read_known_lenses(str(tmp_path / "some.parquet"))["name"].tolist() == ["a", "row 2"]
    (tmp_path / "bare.csv").write_text("ra,dec\n1,2\n")
    assert read_known_lenses(str(tmp_path / "bare.csv"))["name"].tolist() == ["row 1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,ra\na,1\n", r"column dec \(degrees\) is missing: known lenses are found by it"),
        ("name,RAJ2000,DEJ2000\na,1,2\n", "column ra .* RAJ2000, DEJ2000 seem to be meant; rename"),
        ("ra,dec\n1,2\n3,\n", "row 2, column dec: is empty; a lens needs a place on the sky"),
        ("ra,dec\n11:48:33,+19:30:03\n", "row 1, column ra: '11:48:33' must be decimal degrees"),
        ("ra,dec\n-999,1\n", "row 1, column ra: '-999.0' must be from -180 to 360 degrees"),
        ("ra,dec\n1,91\n", "row 1, column dec: '91.0' must be from -90 to 90 degrees"),
        ("NAME,name,ra,dec\na,b,1,2\n", "columns NAME and name: which has the lenses' names"),
        ("ra,dec\n", "the table has no rows"),
        (None, "there is no such file or folder"),
    ],
)
def test_a_list_that_names_no_places_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "list.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=f"^{path}: {message}"):
        read_known_lenses(str(path))


def test_rows_are_near_a_lens_on_the_sky() -> None:
    """Across the meridian and near the pole, by the law of cosines."""
    arcsec = 1 / 3600
    known = pd.DataFrame(
        {"name": list("abc"), "ra": [0.0, 90.0, 200.0], "dec": [0.0, 89.999, -30.0]}
    )
    table = pd.DataFrame(
        {
            "ra": [360 - 0.9 * FIELD * arcsec, 1.1 * FIELD * arcsec, 130.0, np.nan, 270.0],
            "dec": [0.0, 0.0, 89.999, 0.0, 89.99],
        }
    )
    found = rows_of_known_lenses(table, known).sort_values(["lens", "row"])
    one, other = (np.deg2rad(of[["ra", "dec"]].to_numpy()) for of in (known, table))
    cosine = np.sin(one[:, None, 1]) * np.sin(other[:, 1]) + np.cos(one[:, None, 1]) * np.cos(
        other[:, 1]
    ) * np.cos(one[:, None, 0] - other[:, 0])
    apart = np.rad2deg(np.arccos(np.minimum(cosine, 1))) * 3600
    near = np.argwhere(apart <= FIELD)
    assert found[["lens", "row"]].to_numpy().tolist() == near.tolist() == [[0, 0], [1, 2], [1, 4]]
    np.testing.assert_allclose(found["known_separation"], apart[tuple(near.T)], atol=1e-2)
    assert rows_of_known_lenses(table[:0], known).empty
