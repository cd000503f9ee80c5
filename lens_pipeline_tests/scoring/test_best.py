"""The highest-scored cutouts, and where known lenses rank."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lens_pipeline.catalogue.dataset import CutoutFormat
from lens_pipeline.catalogue.table import read_catalogue
from lens_pipeline.cli import main
from lens_pipeline.ensemble.system import LensEnsemble
from lens_pipeline.scoring import best
from lens_pipeline.scoring.parts import score_to_file
from lens_pipeline.scoring.score_files import FINGERPRINT
from lens_pipeline.scoring.sources import CatalogueCutouts
from lens_pipeline_tests.scoring.scorers import command


def shown_on(page: Path) -> pd.DataFrame:
    """The candidates of a page of the best."""
    data = page.read_text().partition("<script type=application/json id=data>")[2]
    return pd.DataFrame(json.JSONDecoder().raw_decode(data)[0]["candidates"])


def test_the_top_is_listed_and_shown(
    home: Path, survey: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_parquet(survey)[:40].assign(RA=np.linspace(0, 359, 40), dec=-1.5)
    table.to_parquet(tmp_path / "few.parquet")
    out = tmp_path / "scores.parquet"
    assert main([*command(home, tmp_path / "few.parquet", out), "--top", "10"]) == 0
    page, listed = tmp_path / "scores.top.html", tmp_path / "scores.top.csv"
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"{listed}: the highest-scored, the best first",
        f"{page}: open it in a browser to look at them and grade them",
    ]
    rows = pd.read_parquet(out).nlargest(10, "logit").dropna(axis=1, how="all")
    top = pd.read_csv(listed)
    assert list(top)[:5] == ["rank", "id", "ra", "dec", "label"]
    assert {*top} == {"rank", *rows} - {FINGERPRINT}
    assert top["rank"].tolist() == list(range(1, 11))
    columns = rows.columns.drop([FINGERPRINT, "corner"])
    expected = rows[columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(top[columns], expected, check_dtype=False)
    assert "arcsec across, if their pixels are of 0.263 arcsec" not in page.read_text()
    shown = shown_on(page).drop(columns="pixels")
    pd.testing.assert_frame_equal(shown, top[[*shown]], check_dtype=False)
    assert {*top} - {*shown} == {"path"}


def test_of_a_long_list_the_first_are_shown_and_the_scores_do_not_wait_for_it(
    home: Path,
    survey: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pd.read_parquet(survey)[:40].to_parquet(tmp_path / "few.parquet")
    out, listed = tmp_path / "scores.parquet", tmp_path / "scores.top.csv"
    arguments = [*command(home, tmp_path / "few.parquet", out), "--top", "30"]
    listed.mkdir()
    assert main(arguments) == 2
    assert f"error: {listed}: cannot be written" in capsys.readouterr().err
    assert len(pd.read_parquet(out)) == 40
    listed.rmdir()
    monkeypatch.setattr(best, "SHOWN", 8)
    assert main(arguments) == 0
    page = tmp_path / "scores.top.html"
    said = f"{page}: open it in a browser to look at the first 8 and grade them"
    assert capsys.readouterr().out.splitlines()[-1] == said
    assert len(pd.read_csv(listed)) == 30
    assert shown_on(page)["rank"].tolist() == list(range(1, 9))


def test_without_positions_the_top_is_listed_by_ids_alone(
    ensemble: LensEnsemble, survey: Path, tmp_path: Path
) -> None:
    nowhere = ["ra", "dec", "pixel_scale"]
    table = pd.read_parquet(survey)[1:4].drop(columns=nowhere, errors="ignore")
    table.to_parquet(tmp_path / "few.parquet")
    source = CatalogueCutouts(read_catalogue(str(tmp_path / "few.parquet")))
    scored = score_to_file(ensemble, source, tmp_path / "scores.csv", model="a", top=2)
    assert scored.top == tmp_path / "scores.top.csv"
    assert list(pd.read_csv(scored.top))[:4] == ["rank", "id", "label", "probability"]
    assert scored.page is not None
    assert "arcsec across, if their pixels are of 0.263 arcsec" in scored.page.read_text()


@pytest.fixture
def field(survey: Path, ensemble: LensEnsemble, tmp_path: Path) -> Path:
    """40 rows, a degree apart, but for 7, which is at the place of 5; the model has learnt from the
    group of 7 and 11."""
    table = pd.read_parquet(survey)[:40].assign(ra=np.linspace(0, 39, 40), dec=-1.5)
    table.loc[7, ["ra", "dec"]] = [5.0, -1.5 + 2 / 3600]
    table["group"] = table["id"]
    table.loc[[7, 11], "group"] = min(ensemble.groups)
    table.to_parquet(tmp_path / "field.parquet")
    return tmp_path / "field.parquet"


LENSES = pd.DataFrame(
    {
        # Two cutouts; one; listed twice; near a cutout; far away; an image that is missing; learnt
        # from, and from one of its cutouts.
        "name": ["two", "one", "one again", "near", "far", "missing", "learnt"],
        "ra": [5, 3, 3, 20, 100, 0, 11],
        "dec": [-1.5 + 1 / 3600, -1.5, -1.5 + 1 / 3600, -1.5 + 20 / 3600, -1.5, -1.5, -1.5],
        "z": [0.5, 0.4, 0.4, 0.3, 0.2, 0.1, 0.6],
        "separation": 1.7,  # of its images, say
    }
)


def test_known_lenses_are_ranked_marked_and_drawn(
    home: Path, field: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By their best cutouts, each once; one was learnt from if any of its cutouts was."""
    LENSES.to_csv(tmp_path / "lenses.csv", index=False)
    out = tmp_path / "scores.parquet"
    known = ["--known", str(tmp_path / "lenses.csv"), "--top", "40"]
    assert main([*command(home, field, out), *known]) == 0
    scores = pd.read_parquet(out)
    assert scores.index[scores["learnt_from"]].tolist() == [7, 11]
    logit = scores["logit"]
    rank = {row: int((logit >= logit[row]).sum()) for row in logit.dropna().index}
    listed = pd.read_csv(tmp_path / "scores.known.csv", index_col="known")
    best = max(5, 7, key=logit.get)
    shown = {"two": best, "one, one again": 3, "learnt": 11, "missing": 0}
    assert listed["id"].dropna().to_dict() == {n: scores["id"][row] for n, row in shown.items()}
    ranks = {name: rank[row] for name, row in shown.items() if row}
    assert listed["rank"].dropna().to_dict() == ranks
    assert listed["rank"].dropna().is_monotonic_increasing
    seen = ["two", "learnt"]
    assert listed["learnt_from"].to_dict() == {n: n in seen for n in (*shown, "near")}
    assert listed["reject_reason"]["missing"] == "the file is missing"
    assert listed["known_z"].to_dict() == {
        **{"two": 0.5, "one, one again": 0.4, "near": 0.3, "missing": 0.1, "learnt": 0.6}
    }
    np.testing.assert_allclose(listed["known_separation"][["two", "near"]], [1, 20], atol=1e-4)
    assert listed.loc["two", ["ra", "known_dec"]].tolist() == [5, LENSES["dec"][0]]
    np.testing.assert_allclose(listed["logit"]["learnt"], logit[11])
    assert (
        f"{tmp_path}/scores.known.csv: 4 of 7 known lenses have a cutout; 1 more lie within an "
        "arcminute of one\n"
        f"of the 2 that the model has not learnt from: half are among the first {rank[3]} of "
        f"{len(rank)} scored, 1 among the first 40, 1 could not be used\n"
    ) in capsys.readouterr().out
    top = pd.read_csv(tmp_path / "scores.top.csv", index_col="id")
    assert list(top)[:4] == ["rank", "known", "ra", "dec"]
    marks = {5: "two", 7: "two", 3: "one, one again", 11: "learnt"}
    expected = {scores["id"][row]: name for row, name in marks.items()}
    assert top["known"].dropna().to_dict() == expected
    shown_marks = shown_on(tmp_path / "scores.top.html").set_index("id")["known"]
    assert shown_marks.dropna().to_dict() == expected
    with Image.open(tmp_path / "scores.known.png") as picture:
        assert picture.width > 600


def test_what_known_lenses_do_not_tell_is_said(
    home: Path, field: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lenses, out = tmp_path / "lenses.csv", tmp_path / "scores.csv"
    arguments = command(home, field, out)
    known = [*arguments, "--known", str(lenses)]
    LENSES.to_csv(lenses, index=False)
    assert main(known) == 0
    picture = tmp_path / "scores.known.png"
    assert picture.exists()
    listed = pd.read_csv(tmp_path / "scores.known.csv").assign(checked="mine")
    listed.to_csv(tmp_path / "scores.known.csv", index=False)
    # Without the list what it has left is of other scores; what was added is kept.
    pd.read_parquet(field)[:30].to_parquet(field)
    assert main(arguments) == 0
    assert f"{tmp_path}/scores.known.csv: is of former scores" in capsys.readouterr().out
    LENSES[-1:].to_csv(lenses, index=False)
    assert main(known) == 0
    said = capsys.readouterr()
    assert "the model has learnt from all of them" in said.out
    assert "columns that it will not have (checked): as it was it is kept" in said.err
    assert pd.read_csv(tmp_path / "scores.known.csv.before")["checked"].tolist() == ["mine"] * 5
    assert not picture.exists()
    LENSES[4:5].to_csv(lenses, index=False)
    assert main([*known, "--top", "3"]) == 0
    assert "0 of 1 known lenses have a cutout; 0 more" in capsys.readouterr().out
    assert "known" not in pd.read_csv(tmp_path / "scores.top.csv")
    for name in ("scores.known.csv", "scores.top.csv"):
        assert main([*arguments, "--known", str(tmp_path / name)]) == 2
        assert f"{tmp_path / name} is the list of known lenses; name" in capsys.readouterr().err
    assert main([*command(home, tmp_path / "scores.top.csv", out), "--top", "1"]) == 2
    assert "scores.top.csv is the catalogue; name another file" in capsys.readouterr().err
    pd.read_parquet(field).rename(columns={"ra": "RAJ2000", "dec": "DEJ2000"}).to_parquet(field)
    assert main(known) == 2
    assert (
        "field.parquet: column ra (degrees) is missing: RAJ2000, DEJ2000" in capsys.readouterr().err
    )


def test_columns_of_ours_that_come_and_go_are_nobody_elses(
    home: Path, survey: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = pd.read_parquet(survey)[1:21].assign(ra=10.0, dec=np.linspace(0, 1, 20))
    table["z"] = [0.5] * 10 + [None] * 10
    table.to_parquet(tmp_path / "few.parquet")
    out = tmp_path / "scores.parquet"
    arguments = command(home, tmp_path / "few.parquet", out)
    assert main(arguments) == 0
    ranked = pd.read_parquet(out).sort_values("logit", ascending=False)["id"].tolist()
    known = table.set_index("id").loc[ranked[:1], ["ra", "dec"]].assign(name="Ring")
    known.to_csv(tmp_path / "known.csv")
    # The column z is empty among the first, and then is not; none is known, and then one is.
    table["z"] = table["id"].map({ranked[4]: 0.5})
    table.to_parquet(tmp_path / "few.parquet")
    listed = ["--known", str(tmp_path / "known.csv")]
    for more in (["5"], ["3", *listed], ["4"]):
        assert main([*arguments, "--top", *more]) == 0
    assert "has columns that it will not have" not in caplog.text
    assert not [*tmp_path.glob("*.before*")]


def test_of_large_cutouts_a_page_shows_fewer() -> None:
    bands = ("g", "r", "i")
    assert best.n_shown(CutoutFormat(bands, 64, "background_sigma", None)) == 1000
    assert best.n_shown(CutoutFormat(bands, 512, "background_sigma", None)) == 63
