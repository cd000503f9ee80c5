"""The highest-scored cutouts, and where known lenses rank."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

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
    table = pd.read_parquet(survey)[1:4].drop(columns=["ra", "dec"], errors="ignore")
    table.to_parquet(tmp_path / "few.parquet")
    source = CatalogueCutouts(read_catalogue(str(tmp_path / "few.parquet")))
    scored = score_to_file(ensemble, source, tmp_path / "scores.csv", model="a", top=2)
    assert scored.top == tmp_path / "scores.top.csv"
    assert list(pd.read_csv(scored.top))[:4] == ["rank", "id", "label", "probability"]


def test_known_lenses_are_ranked_marked_and_drawn(
    home: Path,
    ensemble: LensEnsemble,
    survey: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each by its best cutout; one has none, one an image that is missing, one was learnt from."""
    table = pd.read_parquet(survey)[:40].assign(ra=np.linspace(0, 39, 40), dec=-1.5)
    table.loc[7, ["ra", "dec"]] = [5.0, -1.5 + 2 / 3600]  # the same place as row 5
    table["group"] = table["id"]
    table.loc[11, "group"] = min(ensemble.groups)
    table.to_parquet(tmp_path / "field.parquet")
    lenses = pd.DataFrame(
        {"name": list("abcde"), "ra": [5, 3, 100, 0, 11], "dec": [-1.5 + 1 / 3600, *[-1.5] * 4]}
    )
    lenses.to_csv(tmp_path / "lenses.csv", index=False)
    out = tmp_path / "scores.parquet"
    arguments = command(home, tmp_path / "field.parquet", out)
    known = ["--known", str(tmp_path / "lenses.csv")]
    assert main([*arguments, *known, "--top", "40"]) == 0
    scores = pd.read_parquet(out)
    order = scores["logit"].dropna().sort_values(ascending=False, kind="stable").index
    rank = pd.Series(range(1, len(order) + 1), index=order)
    a = min(5, 7, key=rank.get)
    listed = pd.read_csv(tmp_path / "scores.known.csv", index_col="name")
    assert listed["rank"].sort_values().index.tolist() == listed.index.tolist()
    assert listed["id"].to_dict() == {
        name: scores["id"][row] for name, row in {"a": a, "b": 3, "d": 0, "e": 11}.items()
    }
    assert listed["rank"].dropna().to_dict() == {"a": rank[a], "b": rank[3], "e": rank[11]}
    assert listed["learnt_from"].to_dict() == {"a": False, "b": False, "d": False, "e": True}
    assert listed["reject_reason"]["d"] == "the file is missing"
    np.testing.assert_allclose(listed["separation"][["a", "b"]], [1, 0], atol=1e-4)
    np.testing.assert_allclose(listed["logit"]["b"], scores["logit"][3])
    half = sorted([rank[a], rank[3], 99])[1]
    said = capsys.readouterr().out
    assert (
        f"{tmp_path}/scores.known.csv: 4 of 5 known lenses have a cutout\n"
        f"of the 3 that the model has not learnt from half rank {half} or higher "
        f"(of {len(order)} scored), and 2 are among the first 40\n"
    ) in said
    top = pd.read_csv(tmp_path / "scores.top.csv", index_col="id")
    assert list(top)[:4] == ["rank", "ra", "dec", "known"]
    names = {scores["id"][row]: name for row, name in ((5, "a"), (7, "a"), (3, "b"), (11, "e"))}
    assert top["known"].dropna().to_dict() == names
    assert (
        shown_on(tmp_path / "scores.top.html").set_index("id")["known"].dropna().to_dict() == names
    )
    with Image.open(tmp_path / "scores.known.png") as picture:
        assert picture.width > 600
    # Without the list what it has left is of other scores.
    table[:30].to_parquet(tmp_path / "field.parquet")
    assert main(arguments) == 0
    assert f"{tmp_path}/scores.known.csv: is of former scores" in capsys.readouterr().out
    (tmp_path / "lenses.csv").write_text("name,ra,dec\nfar,200,50\n")
    assert main([*arguments, *known, "--top", "3"]) == 0
    assert "0 of 1 known lenses have a cutout" in capsys.readouterr().out
    assert not (tmp_path / "scores.known.png").exists()
    assert "known" not in pd.read_csv(tmp_path / "scores.top.csv")
    (tmp_path / "lenses.csv").write_text("name,ra,dec\nlearnt,11,-1.5\n")
    assert main([*arguments, *known]) == 0
    assert "the model has learnt from all of them" in capsys.readouterr().out
    (tmp_path / "lenses.csv").write_text("name,ra\nfar,200\n")
    assert main([*arguments, *known]) == 2
    assert "lenses.csv: column dec (degrees) is missing" in capsys.readouterr().err
