"""The page on which candidates are graded, in a real browser."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import Browser, Page

from lens_pipeline.evaluation.inspection import inspection_page
from lens_pipeline.evaluation.sheets import COMPOSITE, colour_composite
from lens_pipeline.simulation import simulate
from lens_pipeline_tests.browser import chromium, photographed

pytestmark = pytest.mark.browser

IDS = ["007", 'a "quoted", id', "</script><b>bold", "line\nbreak", " blank ", "galaxy é", "7", "8"]
SIZE = 32


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page in a profile of its own, which keeps no grades of another test."""
    with photographed(browser, request.node.name) as page:
        yield page


def candidates(ids: list[str]) -> pd.DataFrame:
    n = len(ids)
    table = pd.DataFrame({"rank": range(1, n + 1), "id": ids})
    table = table.assign(ra=np.linspace(10, 350, n), dec=np.linspace(-60, 60, n))
    table.loc[1, ["ra", "dec"]] = np.nan
    return table.assign(probability=np.linspace(0.9, 0.1, n), sky_probability=0.01)


@cache
def images(n: int) -> np.ndarray:
    return simulate("des", n, seed=4, image_size=SIZE).images[:n]


def written_page(folder: Path, ids: list[str] = IDS) -> str:
    path = folder / "scores.top.html"
    page = inspection_page(
        "scores", "by a model", candidates(ids), images(len(ids)), "background_sigma", list("gri")
    )
    path.write_text(page, "utf-8")
    return path.as_uri()


def saved(page: Page, path: Path) -> pd.DataFrame:
    with page.expect_download() as download:
        page.get_by_text("Save grades").click()
    assert download.value.suggested_filename == "scores.graded.csv"
    download.value.save_as(path)
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def opened(page: Page, path: Path) -> str:
    page.locator("#said").evaluate("element => element.textContent = ''")
    page.locator("#file").set_input_files(path)
    page.locator("#said:not(:empty)").wait_for()
    return page.locator("#said").inner_text()


def marked(page: Page) -> dict[str, str]:
    """The grade that the page shows of each candidate, by its rank, which has one."""
    shown = page.locator(".candidate:has([aria-pressed=true])").all()
    return {
        one.locator(".facts b").inner_text().strip(): one.locator(
            "[aria-pressed=true]"
        ).inner_text()
        for one in shown
    }


def test_grades_are_given_by_keys_and_by_clicks_and_saved_as_a_table(
    page: Page, tmp_path: Path
) -> None:
    page.goto(written_page(tmp_path))
    for key in ("a", "b", "x", "C"):
        page.keyboard.press(key)
    page.locator(".candidate").nth(6).get_by_text("A", exact=True).click()
    page.keyboard.press("X")  # of the last one, to which it has gone on
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Backspace")
    assert page.locator("#count").inner_text() == "5 of 8 graded; by a model"
    table = saved(page, tmp_path / "graded.csv")
    assert table.to_dict("list") == {
        "id": [*IDS[:4], IDS[7]],
        "label": ["1", "1", "0", "", "0"],
        "grade": ["A", "B", "X", "C", "X"],
    }


def test_grades_stay_on_the_page_and_go_to_another_in_their_file(
    page: Page, tmp_path: Path
) -> None:
    """Where the table has grown the file has the grades of both."""
    here = written_page(tmp_path)
    page.goto(here)
    page.keyboard.press("A")
    page.keyboard.press("B")
    page.reload()
    assert marked(page) == {"#1": "A", "#2": "B"}
    saved(page, tmp_path / "former.csv")
    (tmp_path / "other").mkdir()
    page.goto(written_page(tmp_path / "other", ["new", *IDS[1:3]]))
    assert marked(page) == {}
    assert opened(page, tmp_path / "former.csv") == "former.csv: 2 grades opened"
    assert marked(page) == {"#2": "B"}
    page.keyboard.press("X")
    table = saved(page, tmp_path / "both.csv")
    assert dict(zip(table["id"], table["grade"], strict=True)) == {
        **{IDS[0]: "A", IDS[1]: "B"},
        "new": "X",
    }


def test_a_file_of_no_grades_is_told(page: Page, tmp_path: Path) -> None:
    page.goto(written_page(tmp_path))
    for number, (content, said) in enumerate(
        (
            ("id;grade\na;A\n", "has no columns id and grade, as this page saves them."),
            ("", "has no columns id and grade, as this page saves them."),
            ("id,grade\n7,A\n8,D\n", "row 2: grade D: must be A, B, C, X or empty."),
        )
    ):
        wrong = tmp_path / f"wrong{number}.csv"
        wrong.write_text(content)
        assert opened(page, wrong) == f"{wrong.name}: {said}"
        assert marked(page) == {}


def test_a_table_of_grades_as_other_programs_write_it(page: Page, tmp_path: Path) -> None:
    page.goto(written_page(tmp_path))
    rows = '\ufeffgrade,note,id\r\nA,"said, she",007\r\n,,7\r\nX,,"a ""quoted"", id"\r\n'
    (tmp_path / "excel.csv").write_text(rows, "utf-8", newline="")
    assert opened(page, tmp_path / "excel.csv") == "excel.csv: 2 grades opened"
    assert marked(page) == {"#1": "A", "#2": "X"}


def test_what_is_graded_is_hidden_when_asked(page: Page, tmp_path: Path) -> None:
    page.goto(written_page(tmp_path))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("A")
    page.get_by_text("hide what is graded").click()
    assert page.locator(".candidate:visible").count() == len(IDS) - 1
    page.locator(".candidate").first.click()
    page.keyboard.press("ArrowRight")
    assert page.locator("[aria-current] b").inner_text().strip() == "#3"


def test_a_slider_has_its_arrows_and_no_other_key(page: Page, tmp_path: Path) -> None:
    page.goto(written_page(tmp_path))
    page.locator("#stretch").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#stretch").input_value() == "0.25"
    assert page.locator("[aria-current] b").inner_text().strip() == "#1"
    page.keyboard.press("X")
    assert marked(page) == {"#1": "X"}


def drawn(page: Page, canvas: str) -> np.ndarray:
    """The picture on a canvas, (height, width, 3) from 0 to 255."""
    page.wait_for_function(
        "canvas => document.querySelector(canvas).getContext('2d')"
        ".getImageData(0, 0, 1, 1).data[3] === 255",
        arg=canvas,
    )
    rgba = page.evaluate(
        "canvas => { const it = document.querySelector(canvas);"
        "return Array.from(it.getContext('2d').getImageData(0, 0, it.width, it.height).data) }",
        canvas,
    )
    return np.array(rgba, dtype=float).reshape(SIZE, SIZE, 4)[..., :3]


def test_pixels_are_drawn_as_in_all_pictures_at_any_stretch(page: Page, tmp_path: Path) -> None:
    """And flux upwards, as in FITS files."""
    page.goto(written_page(tmp_path))
    first = images(len(IDS))[:1]
    step = 8  # of 255: bytes hold a sixth of a sigma
    for presses, scale in ((0, 1), (6, 8)):
        for _ in range(presses):
            page.keyboard.press("+")
        page.keyboard.press("Enter")
        expected = 255 * colour_composite(first / scale, "background_sigma")[0, ::-1]
        for canvas in (".candidate canvas", "#whole"):
            difference = drawn(page, canvas) - expected
            assert np.abs(difference).max() < step
            assert abs(difference.mean()) < 1
        bands = page.locator("#bands figure")
        assert bands.all_inner_texts() == ["g", "r", "i"]
        grey = 255 * colour_composite(first[:, [0]] / scale, "background_sigma")[0, ::-1]
        assert np.abs(drawn(page, "#bands canvas") - grey).max() < step
        page.keyboard.press("Enter")
        assert not page.locator("dialog").is_visible()


def test_a_picture_is_shown_as_it_is(page: Page, tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).uniform(size=(1, 3, SIZE, SIZE)).astype(np.float32)
    text = inspection_page("a", "", candidates(["a", "b"])[:1], rgb, COMPOSITE, ["r", "g", "b"])
    (tmp_path / "a.html").write_text(text, "utf-8")
    page.goto((tmp_path / "a.html").as_uri())
    difference = drawn(page, ".candidate canvas") - 255 * np.moveaxis(rgb[0], 0, -1)
    assert np.abs(difference).max() <= 0.51
    page.keyboard.press("Enter")
    assert page.locator("#bands figure").count() == 0


def test_an_enlarged_candidate_is_graded_and_leads_to_its_place_on_the_sky(
    page: Page, tmp_path: Path
) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    here = written_page(tmp_path)
    page.goto(here)
    page.locator(".candidate canvas").first.click()
    dialog = page.locator("dialog")
    assert "10.00000 -60.00000" in dialog.inner_text()
    links = [link.get_attribute("href") or "" for link in dialog.locator("a").all()]
    assert len(links) == 3
    assert all("10.00000" in link and "-60.00000" in link for link in links)
    dialog.get_by_text("A", exact=True).click()
    assert "#2 " in dialog.inner_text()
    assert dialog.locator("a").count() == 0  # its place is not known
    page.keyboard.press("Enter")  # closes, and does not press the button again
    assert not dialog.is_visible()
    assert marked(page) == {"#1": "A"}
    assert asked == [here]


def test_an_enlarged_candidate_has_all_that_is_known_of_it(page: Page, tmp_path: Path) -> None:
    table = candidates(IDS[:2]).assign(
        known=[None, "Cosmic <b>Horseshoe"],
        std=[0.12345678912, np.nan],
        bytes=[3, 4],
        magnitude=np.inf,
    )
    table["corner"] = [[1, 2], None]
    table["gaia"] = [2719282938293829384, 7]
    text = inspection_page("a", "", table, images(2), "background_sigma", list("gri"))
    (tmp_path / "a.html").write_text(text, "utf-8")
    page.goto((tmp_path / "a.html").as_uri())
    cards = page.locator(".candidate .facts").all_inner_texts()
    assert "known" not in cards[0]
    assert cards[1].splitlines()[2] == "known: Cosmic <b>Horseshoe"
    page.keyboard.press("Enter")
    rows = page.locator("dialog dl div")
    found = {tuple(row.inner_text().split()) for row in rows.all()}
    assert found == {
        *(
            ("std", "0.12345679"),
            ("gaia", "2719282938293829384"),
            ("bytes", "3"),
            ("magnitude", "inf"),
            ("corner", "[1,", "2]"),
        )
    }
    page.keyboard.press("ArrowRight")
    found = {tuple(row.inner_text().split()) for row in rows.all()}
    assert found == {("bytes", "4"), ("magnitude", "inf"), ("gaia", "7")}


def test_an_id_is_text(page: Page, tmp_path: Path) -> None:
    page.goto(written_page(tmp_path))
    assert page.locator("b", has_text="bold").count() == 0
    text = page.locator(".candidate .facts").nth(2).inner_text()
    assert text.splitlines()[1:] == ["sky 0.010", IDS[2]]
    held = page.locator("#data").text_content()
    assert [one["id"] for one in json.loads(held or "")["candidates"]] == IDS
