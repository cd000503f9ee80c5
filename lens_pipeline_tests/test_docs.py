"""The README and docs/: their code for notebooks, their table of metrics, and their links."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lens_pipeline.catalogue import build_dataset, read_catalogue
from lens_pipeline.evaluation.tables import MORE_COLUMNS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))


def test_the_code_for_notebooks_runs(
    home: Path,
    simulated_catalogue: Path,
    shards_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    section = README.read_text().partition("## From a notebook")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_survey").mkdir()
    pd.read_parquet(simulated_catalogue).to_csv("my_survey/catalogue.csv", index=False)
    (scores,) = home.glob("reports/*/scores.parquet")
    shutil.copyfile(scores, "scores.parquet")
    shutil.copytree(shards_folder, "shards")
    found: dict[str, Any] = {}
    exec(code[1], found)
    assert found["simulated"].images.shape == (100, 3, 64, 64)
    assert found["simulated"].images.dtype == np.float32
    assert len(found["catalogue"].table) == len(pd.read_parquet(simulated_catalogue))
    of_lenses = found["of_lenses"].table
    assert (of_lenses["label"] == 1).all()
    assert len(of_lenses) == 100
    assert of_lenses["path"].str.startswith("my_survey/images-").all()
    assert found["lenses"].shape == ((found["train"].labels == 1).sum(), 3, 32, 32)
    assert found["lenses"].dtype == np.float16
    assert set(found["metrics"]["auroc"]) == {"value", "low", "high"}


def test_the_code_that_trains_runs(
    shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = (ROOT / "docs" / "training.md").read_text().partition("## One network")[2]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shards_folder, "shards")
    found: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(code, found)
    assert len(found["trained"].curves) == 2
    assert found["system"].trainer.current_epoch == 1


def test_the_code_that_averages_grades_runs(tmp_path: Path) -> None:
    section = (ROOT / "docs" / "scoring.md").read_text().partition("Several people can each")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    (tmp_path / "grades").mkdir()
    for name, rows in {
        "anna": "007,1,A\nJ1,0,X\nJ2,,C\nJ3,1,B\n",
        "ben": "007,1,B\nJ1,,C\nJ2,1,B\n",
    }.items():
        (tmp_path / "grades" / f"{name}.csv").write_text(f"id,label,grade\n{rows}")
    exec(code[1].replace("/survey", str(tmp_path)), {})
    graded = pd.read_csv(tmp_path / "scores.graded.csv", dtype={"id": str}).set_index("id")
    assert graded["points"].to_dict() == {"007": 2.5, "J1": 0.5, "J2": 1.5, "J3": 2}
    assert graded["label"].dropna().to_dict() == {"007": 1, "J1": 0, "J3": 1}
    assert graded["n"].to_dict() == {"007": 2, "J1": 2, "J2": 2, "J3": 1}


def test_the_code_that_adds_what_was_graded_runs(simulated_catalogue: Path, tmp_path: Path) -> None:
    section = (ROOT / "docs" / "scoring.md").read_text().partition("## Train on what was graded")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    table = pd.read_parquet(simulated_catalogue).astype({"id": str})
    table["path"] = [f"{simulated_catalogue.parent}/{path}" for path in table["path"]]
    table[:150].to_parquet(tmp_path / "training.parquet")
    (tmp_path / "field").symlink_to(simulated_catalogue.parent)
    field = table[150:].drop(columns="label")
    field["path"] = [
        f"field/{Path(path).relative_to(simulated_catalogue.parent)}" for path in field["path"]
    ]
    field.to_parquet(tmp_path / "field.parquet")
    torn = field["group"].isin(table["group"][:150])  # which would take known rows to another split
    graded = pd.DataFrame({"id": field["id"][~torn][:9], "label": [1, 0, None] * 3})
    more = pd.DataFrame({"id": field["id"][torn][:1], "label": [1]})
    pd.concat([graded, more]).to_csv(tmp_path / "scores.graded.csv", index=False)
    exec(code[1].replace("/survey", str(tmp_path)), {})
    catalogue = read_catalogue(tmp_path / "training_2.parquet")
    dataset = build_dataset(catalogue, tmp_path / "dataset", image_size=32)
    known = read_catalogue(tmp_path / "training.parquet")
    before = build_dataset(known, tmp_path / "before", image_size=32)
    assert dataset.rejects().empty
    trained = dataset.table("train").set_index("id")["label"]
    added = graded.dropna().set_index("id")["label"]
    assert trained[added.index].tolist() == [1, 0] * 3
    assert len(trained) == len(before.table("train")) + len(added)
    for part in ("val", "test"):
        assert dataset.table(part)["id"].tolist() == before.table(part)["id"].tolist()


def _anchors(page: Path) -> set[str]:
    """What links into a page may name: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("https://"):
            place, _, anchor = link.partition("#")
            target = page.parent / place if place else page
            assert target.exists(), link
            assert not anchor or anchor in _anchors(target), link


def test_every_page_is_linked_from_the_readme() -> None:
    linked = re.findall(r"\]\((docs/\w+\.md)\)", README.read_text())
    assert {ROOT / link for link in linked} == set(PAGES[1:])


def test_the_report_lists_its_figures_in_the_order_of_its_page() -> None:
    listed = re.findall(r"^\| (.+?) \|", (ROOT / "docs" / "report.md").read_text(), re.M)
    listed = [title.removesuffix(", 1e-3, 1e-4") for title in listed if title[0] not in "-–|"]
    titles = [t for t in MORE_COLUMNS.values() if t not in ("TPR at FPR 1e-3", "TPR at FPR 1e-4")]
    assert ", ".join(titles) == ", ".join(listed)
