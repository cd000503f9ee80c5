"""The table for the terminal and the file for the browser."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from lens_pipeline.evaluation.gates import GateDecision
from lens_pipeline.evaluation.metrics import lens_metrics
from lens_pipeline.evaluation.plots import learning_curves_figure
from lens_pipeline.evaluation.report import Picture, Section, write_report
from lens_pipeline.evaluation.score_plots import (
    agreement_figure,
    precision_recall_figure,
    reliability_figure,
    roc_figure,
    score_histogram_figure,
)
from lens_pipeline.evaluation.sheets import contact_sheet, kinds_sheet
from lens_pipeline.evaluation.tables import cutouts_table, format_metrics_table, metric_text
from lens_pipeline_tests.evaluation.pages import Elements

LABEL = np.repeat([1, 0], 40)
SCORE = np.linspace(1, 0, 80) ** 2


def page(path: Path, name: str, *, passed: bool) -> Elements:
    decision = GateDecision(passed, () if passed else (f"{name} is too low",), {})
    write_report(
        path,
        title=name,
        facts={name: name},
        metrics={name: {name: lens_metrics(LABEL, SCORE, 10)}},
        gate=decision,
        sections=[
            Section(
                name,
                name,
                {name: pd.DataFrame({name: [name], "AUROC": [0.5]})},
                [Picture("roc", name, roc_figure({name: (LABEL, SCORE)}))],
            )
        ],
    )
    return Elements(path)


def test_names_of_users_are_text_in_the_report_and_never_markup(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    elements = page(tmp_path / "report.html", name, passed=False)
    assert "script" not in elements.tags
    # title, heading, fact twice, metrics' heading and column, gate, section's heading and text,
    # table's caption, column and cell, picture's caption
    assert elements.text.count(name) == 13


def test_the_report_needs_no_other_file(tmp_path: Path) -> None:
    elements = page(tmp_path / "report.html", "ensemble", passed=True)
    assert elements.sources
    assert all(source.startswith("data:image/png;base64,") for source in elements.sources)
    assert "Passed" in elements.text


def test_the_report_says_what_its_dashes_and_its_k_are(tmp_path: Path) -> None:
    """300 non-lenses tell all that the terminal shows, but not TPR at FPR 1e-3."""
    label = np.repeat([1, 0], [40, 300])
    metrics = {"ensemble": lens_metrics(label, np.linspace(1, 0, 340) ** 2, 10)}
    assert "too few cutouts to tell" not in format_metrics_table(metrics)
    write_report(
        tmp_path / "report.html",
        title="Lens ensemble",
        facts={},
        metrics={"test": metrics},
        gate=GateDecision(True, (), {}),
        sections=[],
    )
    elements = Elements(tmp_path / "report.html")
    said = "95 % intervals by bootstrap. k: the 40 highest-scored. –: too few cutouts to tell."
    assert said in elements.text


def test_an_interval_of_no_width_is_left_out() -> None:
    flat = {"value": 0.1694, "low": 0.1694, "high": 0.1694}
    assert metric_text(flat) == "0.169"
    assert metric_text(flat | {"high": 0.1701}) == "0.169 [0.169, 0.170]"


def test_a_cutout_of_a_gallery_can_be_traced(tmp_path: Path) -> None:
    """By a row of the table under it, in which nothing is cut off and nothing is made up."""
    long = "SDSS" + "J" * 80
    rows = pd.DataFrame({"id": ["b", long], "probability": [0.98765, 0.5], "label": 1})
    assert list(cutouts_table(rows)) == ["order", "id", "probability"]
    places = {"ra": [150.123456, None], "dec": [-2.0, None], "kind": [None, "ring"]}
    table = cutouts_table(rows.assign(**places).set_index(pd.Index([7, 3])))
    sheet = contact_sheet(np.zeros((2, 3, 8, 8), np.float32), ["#1", "#2"], "composite")
    papers = {"Holloway & al.": "https://doi.org/10.1093/mnras/stae875"}
    write_report(
        tmp_path / "report.html",
        title="Lens ensemble",
        facts={},
        metrics={},
        gate=GateDecision(True, (), {}),
        sections=[Section("", "", pictures=[Picture("missed", "", sheet, papers, table)])],
    )
    elements = Elements(tmp_path / "report.html")
    assert elements.text.split()[-18:] == [
        *("order", "id", "kind", "probability", "ra", "dec"),
        *("1", "b", "–", "0.9877", "150.12346", "-2.00000"),
        *("2", long, "ring", "0.5000", "–", "–"),
    ]
    assert elements.links == [*papers.values()]
    assert "Holloway & al." in elements.text
    assert all(source.startswith("data:image/png;base64,") for source in elements.sources)


def test_the_table_gives_each_figure_with_its_interval_and_the_counts() -> None:
    metrics = lens_metrics(LABEL, SCORE, 10)
    text = format_metrics_table({"resnet18": metrics, "ensemble": metrics})
    ece = metrics["ece"]
    row = next(line for line in text.splitlines() if line.startswith("resnet18"))
    assert f"{ece['value']:.3f} [{ece['low']:.3f}, {ece['high']:.3f}]" in row
    assert "–" in row  # 40 non-lenses cannot tell a false positive rate of 1e-2
    assert "40 lenses, 40 non-lenses" in text
    assert "too few cutouts to tell" in text


def test_the_roc_curve_is_drawn_from_realised_thresholds() -> None:
    axes = roc_figure({"ensemble": (LABEL, SCORE)}).axes[0]
    x, y = axes.lines[0].get_data()
    assert len(x) == 81
    assert axes.get_xscale() == "log"
    assert y[-1] == 1
    # As far as the published points, which 40 non-lenses do not reach.
    assert axes.get_xlim()[0] == 0.5e-4
    assert x.min() == 0.5 / 40


def test_the_reliability_diagram_shows_what_was_observed() -> None:
    random = np.random.default_rng(0)
    probability = random.uniform(size=5000)
    label = (random.uniform(size=5000) < probability**2).astype(int)  # overconfident
    points = reliability_figure(label, probability).axes[0].containers[0].lines[0]
    predicted, observed = map(np.array, points.get_data())
    share = label.mean()

    def weighing_the_same(fraction: np.ndarray) -> np.ndarray:
        odds = fraction / (1 - fraction) * (1 - share) / share
        return odds / (1 + odds)

    squares = np.linspace(0.05, 0.95, 10)
    claimed, true = weighing_the_same(squares), weighing_the_same(squares**2)
    assert np.allclose(observed, np.interp(predicted, claimed, true), atol=0.08)


def test_the_reliability_diagram_of_few_lenses_shows_all_probabilities() -> None:
    random = np.random.default_rng(1)
    label = np.repeat([1, 0], [500, 50_000])
    evidence = 2 * random.normal(np.where(label == 1, 2, 0)) - 2  # which lenses have e^x as often
    points = reliability_figure(label, expit(evidence + np.log(0.01))).axes[0].containers[0]
    predicted, observed = map(np.array, points.lines[0].get_data())
    assert predicted.min() < 0.1
    assert predicted.max() > 0.9
    assert np.allclose(observed, predicted, atol=0.1)


def test_cutouts_that_tie_are_shared_in_the_reliability_diagram() -> None:
    label = np.repeat([0, 1], 50)
    points = reliability_figure(label, np.full(100, 0.5)).axes[0].containers[0].lines[0]
    np.testing.assert_allclose(points.get_data()[1], 0.5)
    random = np.random.default_rng(0)
    score, order = random.integers(0, 5, 100) / 5, random.permutation(100)
    one, other = (
        reliability_figure(label[rows], score[rows]).axes[0].containers[0].lines[0].get_data()[1]
        for rows in (np.arange(100), order)
    )
    np.testing.assert_allclose(one, other)


@pytest.mark.parametrize("name", [r"DES $\deep$", "a$b_$", "_hidden", "$", r"x\$y"])
def test_names_of_users_are_drawn_letter_by_letter(name: str) -> None:
    for figure in (
        roc_figure({name: (LABEL, SCORE), "other": (LABEL, SCORE)}),
        precision_recall_figure({"other": (LABEL, SCORE), name: (LABEL, SCORE)}, 0.1),
    ):
        figure.draw_without_rendering()
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert name in [shown.strip().replace(r"\$", "$") for shown in names]
    agreement = agreement_figure(LABEL, {name: SCORE, "other": SCORE})
    sheet = kinds_sheet(np.zeros((2, 3, 8, 8), np.float32), ["lens", name], "composite")
    agreement.draw_without_rendering()
    sheet.draw_without_rendering()


def test_every_cutout_is_counted_in_the_histogram() -> None:
    axes = score_histogram_figure(LABEL, SCORE).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "non-lenses (40)",
        "lenses (40)",
    ]


def test_no_words_lie_on_bars_or_points() -> None:
    """Those may be anywhere."""
    histogram, reliability = score_histogram_figure(LABEL, SCORE), reliability_figure(LABEL, SCORE)
    for figure in (histogram, reliability):
        figure.draw_without_rendering()
        (axes,) = figure.axes
        legend = axes.get_legend()
        words = [*axes.texts, axes.title, axes._right_title, *([legend] if legend else [])]
        said = [word for word in words if not hasattr(word, "get_text") or word.get_text()]
        assert said
        assert all(word.get_window_extent().y0 >= axes.bbox.y1 for word in said)


def test_learning_curves_show_each_epoch() -> None:
    curves = pd.DataFrame(
        {
            "epoch": [0, 1, 2],
            "train/loss": [0.7, 0.5, 0.4],
            "val/loss": [0.7, 0.6, 0.6],
            "val/auroc": [0.5, 0.7, 0.8],
            "val/average_precision": [0.5, 0.7, 0.8],
            "val/tpr_at_fpr_1e-2": [0.0, 0.1, 0.2],
        }
    )
    left, right = learning_curves_figure(curves).axes
    assert [list(line.get_data()[1]) for line in left.lines] == [[0.7, 0.5, 0.4], [0.7, 0.6, 0.6]]
    assert len(right.lines) == 3


def test_a_long_table_is_folded_up_and_a_short_one_is_not(tmp_path: Path) -> None:
    short, long = (pd.DataFrame({"bin": range(n)}) for n in (20, 21))
    write_report(
        tmp_path / "report.html",
        title="Lens ensemble",
        facts={},
        metrics={"all": {"ensemble": lens_metrics(LABEL, SCORE, 10)}},
        gate=GateDecision(True, (), {}),
        sections=[Section("Selection", "", {"short": short, "long": long}, [])],
    )
    elements = Elements(tmp_path / "report.html")
    assert elements.tags.count("details") == 1
    assert "21 rows" in elements.text
