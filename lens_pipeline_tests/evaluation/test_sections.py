"""The report's sections and their figures."""

from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy.special import expit
from scipy.stats import spearmanr

from lens_pipeline.evaluation.forecast import forecast
from lens_pipeline.evaluation.fractions import fraction
from lens_pipeline.evaluation.gates import GateDecision
from lens_pipeline.evaluation.metrics import lens_metrics
from lens_pipeline.evaluation.origins import basis, by_origin
from lens_pipeline.evaluation.report import Section, write_report
from lens_pipeline.evaluation.score_plots import (
    PUBLISHED,
    one_in,
    precision_recall_figure,
    purity_figure,
    roc_figure,
)
from lens_pipeline.evaluation.sections import (
    fusion_section,
    reject_sections,
    score_sections,
    selection_sections,
)
from lens_pipeline.evaluation.selection import false_positives_by_kind, selection_function
from lens_pipeline.evaluation.selection_plots import completeness_figure, completeness_map_figure
from lens_pipeline.evaluation.tables import completeness_table, forecast_table, kinds_table
from lens_pipeline_tests.evaluation.pages import Elements
from lens_pipeline_tests.evaluation.test_selection import sample


def sections_of(table: pd.DataFrame, name: str = "resnet18") -> list[Section]:
    table = table.assign(**{f"probability_{name}": table["probability"] ** 2})
    parts = by_origin(table, simulation=False)
    origin, shown = basis(parts)
    expected = forecast(shown["label"], shown["probability"]) | {"rests_on": origin}
    selection = selection_function(table)
    return [
        *score_sections(
            shown,
            {name: f"probability_{name}", "ensemble": "probability"},
            expected,
            shown["probability"].to_numpy(),
        ),
        *selection_sections(
            selection, false_positives_by_kind(table, selection["threshold"]), parts
        ),
    ]


@cache
def ordinary() -> list[Section]:
    """Only to look at."""
    return sections_of(sample())


def text_of(sections: list[Section]) -> str:
    return " ".join(section.text for section in sections)


def test_the_pictures_of_a_catalogue_with_truths() -> None:
    sections = ordinary()
    assert [picture.name for section in sections for picture in section.pictures] == [
        *("roc", "precision_recall", "reliability", "histogram", "purity"),
        *("completeness", "completeness_map"),
    ]
    assert "real cutouts: 400 lenses, 600 non-lenses" in sections[0].text


def test_without_truths_and_kinds_the_report_says_so() -> None:
    sections = sections_of(sample()[["label", "probability"]])
    assert [section.title for section in sections][-1] == "Selection function"
    assert "knows nothing of its lenses" in sections[-1].text
    assert sections[-1].tables == {}


def test_where_no_threshold_finds_a_lens_a_sentence_says_so() -> None:
    """In the place of a table without rows."""
    few = sample().groupby("label").head(8)
    worst = few.assign(probability=np.where(few["label"] == 0, 0.9, 0.1))
    for sections, told in ((sections_of(worst), True), (ordinary(), False)):
        (expected,) = [s for s in sections if s.title == "What a survey may expect"]
        assert bool(expected.tables) is not told
        assert ("No threshold finds a lens" in expected.text) is told


def test_figures_on_simulated_cutouts_come_with_a_warning() -> None:
    assert "promise too much" not in text_of(ordinary())
    assert "promise too much" in text_of(sections_of(sample().assign(simulated=True)))


def test_nothing_that_a_catalogue_holds_becomes_markup(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>'
    table = sample().assign(id=evil, **{evil: 1.0})
    table["kind"] = table["kind"].replace("ring", evil)
    write_report(
        tmp_path / "report.html",
        title=evil,
        facts={"Source": evil},
        metrics={evil: {evil: lens_metrics(table["label"], table["probability"], 5)}},
        gate=GateDecision(False, (evil,), {}),
        sections=sections_of(table, evil),
    )
    assert evil not in (tmp_path / "report.html").read_text()
    elements = Elements(tmp_path / "report.html")
    assert "script" not in elements.tags
    assert elements.tags.count("img") == 7
    assert all(source.startswith("data:image/png;base64,") for source in elements.sources)
    assert elements.text.count(evil) >= 6  # title twice, fact, metrics' heading, gate, kind


class TestTables:
    def test_a_bound_is_never_shown_as_a_value(self) -> None:
        label = np.r_[np.ones(100), np.zeros(1000)]
        score = np.r_[np.full(80, 0.9), np.full(20, 0.1), np.full(10, 0.3), np.full(990, 0.05)]
        table = forecast_table(forecast(label, score)).set_index("chosen for")
        pure = table.loc["no false positive"]
        assert pure["purity"] == "above 0.21"
        assert pure["false positive rate"] == "below 0.003"
        assert pure["candidates"] == "714 to 3,857"
        # All lenses are found where ten of the thousand non-lenses are chosen.
        assert table.index.tolist() == ["FPR 0.01", "no false positive"]
        assert table.loc["FPR 0.01", "purity"].startswith("0.083 [")

    def test_kinds_are_sorted_by_how_hard_they_are(self) -> None:
        kinds = {
            name: {
                "n": 5,
                "false_positives": 1,
                "false_positive_rate": {"value": 0.2, "low": 0.0, "high": 0.6},
                "auroc": auroc,
            }
            for name, auroc in (("star", 0.9), ("ring", 0.6), ("odd", None))
        }
        assert kinds_table(kinds)["kind"].tolist() == ["ring", "star", "odd"]

    def test_a_rate_of_a_few_in_many_is_not_0(self) -> None:
        rate = fraction(3, 20_000)
        star = {"n": 20_000, "false_positives": 3, "false_positive_rate": rate, "auroc": 0.9}
        assert kinds_table({"star": star})["rate"][0] == "0.00015 [4.2e-05, 0.0004]"

    def test_completeness_has_a_row_a_bin(self) -> None:
        selection = selection_function(sample())
        table = completeness_table(selection)
        assert len(table) == 56
        assert table.loc[0, "quantity"] == "Einstein radius (arcsec)"
        assert table["lenses"].sum() == 7 * 400


class TestFigures:
    def curves(self) -> dict[str, tuple[pd.Series, pd.Series]]:
        table = sample()
        names = [f"member_{number}" for number in range(6)]
        return dict.fromkeys((*names, "ensemble"), (table["label"], table["probability"]))

    def fonts(self, figure: Figure) -> set[float]:
        figure.draw_without_rendering()
        return {
            text.get_fontsize()
            for text in figure.findobj(lambda artist: hasattr(artist, "get_fontsize"))
            if text.get_text() and text.get_visible()
        }

    def test_they_are_legible_at_the_width_of_a_column(self) -> None:
        table = sample()
        selection = selection_function(table)
        figures = [
            roc_figure(self.curves()),
            precision_recall_figure(self.curves(), 1e-3),
            purity_figure(table["label"], table["probability"], 1e-3),
            completeness_figure(selection),
            completeness_map_figure(selection["map"]),
        ]
        for figure in figures:
            assert figure.get_figwidth() <= 3.5
            assert min(self.fonts(figure)) >= 8

    def test_each_quantity_has_a_panel_and_no_panel_is_empty(self) -> None:
        selection = selection_function(sample())
        assert len(selection["quantities"]) % 2 == 1
        shown = [axes for axes in completeness_figure(selection).axes if axes.get_visible()]
        assert len(shown) == len(selection["quantities"])
        assert all(axes.has_data() for axes in shown)

    def test_curves_differ_by_more_than_colour(self) -> None:
        for figure in (roc_figure(self.curves()), precision_recall_figure(self.curves(), 1e-3)):
            lines = figure.axes[0].lines[:7]
            assert len({line.get_color() for line in lines}) == 7
            assert all(a._dash_pattern != b._dash_pattern for a, b in pairwise(lines))

    def test_published_points_are_named_as_from_other_data(self) -> None:
        figure = roc_figure(self.curves())
        theirs = next(legend for legend in figure.legends if legend.get_title().get_text())
        assert "other data" in theirs.get_title().get_text()
        assert [text.get_text() for text in theirs.get_texts()] == [
            name for name, _, _ in PUBLISHED
        ]
        drawn = {tuple(np.ravel(line.get_data())) for line in figure.axes[0].lines}
        assert {(fpr, tpr) for _, fpr, tpr in PUBLISHED} <= drawn

    def test_every_published_point_is_cited_under_the_figure(self) -> None:
        pictures = {p.name: p for section in ordinary() for p in section.pictures}
        cited = " ".join(pictures["roc"].references)
        for name, _, _ in PUBLISHED:
            author = name.removeprefix("its best member").removesuffix(" 2024")
            assert author in cited
        assert all(a.startswith("https://") for a in pictures["roc"].references.values())

    @pytest.mark.parametrize("sharp", [0.3, 1.0, 3.0, 10.0])
    def test_thresholds_of_purity_are_decimals_apart(self, sharp: float) -> None:
        random = np.random.default_rng(0)
        label = np.arange(4000) % 4 == 0
        score = expit(sharp * (random.normal(size=4000) + 3 * label - 1.5))
        figure = purity_figure(label.astype(int), score, 1e-3)
        figure.draw_without_rendering()
        axes = figure.axes[-1]
        low, high = axes.get_xlim()
        ticks = [text for text in axes.get_xticklabels() if text.get_text()]
        assert len(ticks) >= 3
        for tick in ticks:
            assert low <= float(tick.get_text()) <= high
            assert tick.get_position()[0] == pytest.approx(float(tick.get_text()), rel=1e-9)
        boxes = sorted((text.get_window_extent() for text in ticks), key=lambda box: box.x0)
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
        assert not any(text.get_text() for text in axes.get_xticklabels(minor=True))

    def test_the_purity_of_the_sky_has_decades_and_its_limit_a_name(self) -> None:
        table = sample()
        figure = purity_figure(table["label"], table["probability"], 1e-3)
        figure.draw_without_rendering()
        sky = figure.axes[-1]
        assert sky.get_yscale() == "log"
        assert sky.get_ylim()[0] < 1e-3
        (legend,) = figure.legends
        named = {" ".join(text.get_text().split()) for text in legend.get_texts()}
        assert "95 % lower limit where no false positive was seen" in named
        box = legend.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1

    def test_an_empty_cell_of_the_map_is_empty_and_one_that_finds_nothing_is_not(self) -> None:
        grid = {
            "x": "einstein_radius", "y": "source_magnitude", "x_edges": [0, 1, 2],
            "y_edges": [20, 22, 24], "n": [[4, 0], [2, 2]], "found": [[1, 0], [0, 2]],
        }  # fmt: skip
        axes = completeness_map_figure(grid).axes[0]
        shown = axes.collections[0].get_array()
        assert np.ma.getmaskarray(shown).tolist() == [[False, True], [False, False]]
        assert shown[~shown.mask].tolist() == [0.25, 0, 1]
        assert [text.get_text() for text in axes.texts] == ["4", "2", "2"]

    @pytest.mark.parametrize("score", [[0.0, 0.0, 1.0, 1.0], [0.5] * 4, [1.0] * 4, [1, 0, 0.2, 0]])
    def test_scores_at_the_ends_and_ties_are_drawn(self, score: list[float]) -> None:
        label = [0, 1, 0, 1]
        for figure in (
            purity_figure(label, score, 1e-3),
            roc_figure({"ensemble": (label, score)}),
            precision_recall_figure({"ensemble": (label, score)}, 1e-3),
        ):
            figure.draw_without_rendering()

    def test_a_prevalence_in_words(self) -> None:
        assert one_in(1e-3) == "1 lens in 1,000"
        assert one_in(1 / 2000) == "1 lens in 2,000"


def test_the_fusion_is_shown_beside_all_that_it_was_compared_with() -> None:
    row = {"strategy": "uncertainty_weighted", "metric": "tpr_at_fpr_1e-3", "better": 0.95}
    figures = ("mean", "low", "high", "gain", "gain_low", "gain_high", "auroc", "ece")
    row |= {name: number / 10 for number, name in enumerate(figures)}
    auroc = {"value": 0.6, "low": 0.4, "high": 0.7}
    facts = {
        "asked_for": "best",
        "fusion": {"strategy": "uncertainty_weighted"},
        "members": {"a": {"slope": 1.5}, "b": {"slope": 0.001}},
        "standing": {"a": {"auroc": auroc, "share": 0.99}, "b": {"auroc": auroc, "share": 0.01}},
        "validation": {"n_lens": 1200, "n_nonlens": 3400},
        "comparison": [row],
    }
    random = np.random.default_rng(0)
    table = pd.DataFrame({"label": np.arange(200) % 2, "probability_a": random.uniform(size=200)})
    table["probability_b"] = table["probability_a"] ** 2 + 0.3 * random.uniform(size=200)
    metrics = {
        name: {key: {"value": value} for key in ("auroc", "average_precision", "ece")}
        | {"tpr_at_fpr_1e-2": {"value": None}}
        for name, value in (("a", 0.7), ("b", 0.8))
    }
    section = fusion_section(facts, table, {"a": "resnet18", "b": "resnet18"}, "real", metrics)
    assert section.text.startswith("Fusion: uncertainty weighted, the one with the highest mean")
    assert "single member is taken only where it beats the best of the others in 95 %" in (
        section.text
    )
    assert "b cannot be told from chance on the validation split" in section.text
    assert section.tables["Members"]["share in the score"].tolist() == ["99%", "1%"]
    assert "(1,200 lenses, 3,400 non-lenses)" in section.text
    assert section.tables["Fusions"].to_dict("records") == [
        {
            "fusion": "uncertainty weighted",
            "TPR at FPR 1e-3": "0.000 [0.100, 0.200]",
            "gain": "0.300 [0.400, 0.500]",
            "better in": "95%",
            "AUROC": 0.6,
            "calibration error": 0.7,
        }
    ]
    (seeds,) = section.tables["By seed alone: mean (lowest to highest)"].to_dict("records")
    assert (seeds["architecture"], seeds["seeds"]) == ("resnet18", 2)
    assert (seeds["AUROC"], seeds["TPR at FPR 1e-2"]) == ("0.750 (0.700 to 0.800)", "–")
    (picture,) = section.pictures
    (axes,) = picture.figure.axes
    shown = {(text.get_position()): text.get_text() for text in axes.texts}
    for place, label in (((1, 0), 1), ((0, 1), 0)):  # (column, row)
        of = table[table["label"] == label]
        expected = spearmanr(of["probability_a"], of["probability_b"]).statistic
        assert shown[place] == f"{expected:.2f}"
    asked = fusion_section(facts | {"asked_for": "stacking"}, table, {}, "real", metrics)
    assert asked.text.startswith("Fusion: uncertainty weighted, as was asked for.")
    alone = fusion_section(facts | {"comparison": []}, table, {"a": "resnet18"}, "real", metrics)
    assert "too small to compare" in alone.text
    assert "No two members share an architecture" in alone.text
    assert (list(alone.tables), alone.pictures) == (["Members"], [])


def test_rejected_cutouts_are_counted_by_reason() -> None:
    reasons = [f"reason {number:02d}" for number in range(12) for _ in range(12 - number)]
    (section,) = reject_sections(pd.Series([None, *reasons, None]))
    assert section.text.startswith("78 of 80 cutouts")
    assert "for 12 reasons, of which these are the 10 most frequent" in section.text
    table = section.tables["By reason"]
    assert list(table) == ["cutouts", "reason"]  # what is long goes last
    assert table["reason"].tolist() == [f"reason {number:02d}" for number in range(10)]
    assert table["cutouts"].tolist() == list(range(12, 2, -1))
    assert reject_sections(pd.Series([None, None], dtype=object)) == []
