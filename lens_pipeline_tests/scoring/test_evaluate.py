"""An ensemble of two small untrained networks, tested on real and simulated cutouts."""

import importlib.metadata
import json
import shutil
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lens_pipeline.catalogue.dataset import CutoutFormat, DatasetSplit
from lens_pipeline.catalogue.splits import PARTS
from lens_pipeline.catalogue.table import Catalogue
from lens_pipeline.ensemble.assembly import assemble
from lens_pipeline.ensemble.description import groups_behind
from lens_pipeline.ensemble.system import load_ensemble
from lens_pipeline.errors import InputError
from lens_pipeline.evaluation.metrics import lens_metrics
from lens_pipeline.evaluation.result import Evaluation, read_evaluation
from lens_pipeline.models.system import LitLensSystem
from lens_pipeline.scoring.evaluate import evaluate_ensemble
from lens_pipeline.scoring.score_files import about_scores
from lens_pipeline_tests.evaluation.pages import Elements

SIZE = 16
FORM = CutoutFormat(("g", "r", "i"), SIZE, "background_sigma", 0.26)
GATE = {"min_lens": 50, "min_nonlens": 50, "min_auroc_low": 0.5}
EVIL = "<script>alert('cutout')</script>"
metrics_of = partial(lens_metrics, bootstrap=50)


@dataclass(frozen=True)
class Cutouts:
    """A dataset in memory, all of it the test split unless rows say theirs; lenses are rings."""

    rows: pd.DataFrame
    origin: str = "survey.csv"
    folder: Path = Path("dataset")
    format: CutoutFormat = FORM
    content: str = "pixels"

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "content": self.content,
            "origin": self.origin,
            "splits": {"test": {"n": len(self.rows)}},
        }

    def split(self, part: str) -> DatasetSplit:
        y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2 + 0.5
        ring = 8 * np.exp(-((np.hypot(x, y) - 5) ** 2))
        noise = np.random.default_rng(0).normal(size=(len(self.rows), 3, SIZE, SIZE))
        images = noise + self.rows["label"].to_numpy(float)[:, None, None, None] * ring
        table = self.table(part)
        return DatasetSplit(table, images.astype(np.float32)[table["row"]])

    def table(self, part: str) -> pd.DataFrame:
        table = {"split": "test", **self.rows, "row": np.arange(len(self.rows))}
        return pd.DataFrame(table).query("split == @part").drop(columns="split")

    def rejects(self) -> pd.DataFrame:
        return pd.DataFrame({"id": [], "row": [], "reason": []}).astype({"row": int})

    @property
    def catalogue(self) -> Catalogue:
        return Catalogue(self.rows, "survey.csv")


def rows(n: int = 120) -> pd.DataFrame:
    label = pd.array(np.arange(n) % 3 == 0, dtype="boolean").astype("Int8")
    return pd.DataFrame(
        {
            "id": [f"{EVIL}{number}" for number in range(n)],
            "group": [f"galaxy{number}" for number in range(n)],
            "label": label,
            "kind": np.where(np.arange(n) % 3 == 0, "lens", np.where(np.arange(n) % 2, EVIL, "b")),
            "einstein_radius": np.where(np.arange(n) % 3 == 0, np.linspace(0.5, 3, n), np.nan),
            EVIL: 1.0,
        }
    )


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ensemble")
    torch.manual_seed(0)
    label = np.arange(40) % 2
    logit = np.random.default_rng(0).normal(label)
    scores = pd.DataFrame(
        {
            **{"id": label.astype(str), "label": label, "group": label},
            **{"logit": logit, "logit_std": 0.3},
        }
    )
    members = {}
    for name in ("lastro", "trans_enc_s"):
        system = LitLensSystem(name, image_size=SIZE)
        path = folder / f"{name}-checkpoint.ckpt"
        torch.save(
            {"state_dict": system.state_dict(), "hyper_parameters": dict(system.hparams)}, path
        )
        members[name] = (path, scores)
    facts = {"dataset": "pixels", "dataset_version": "1"}
    assemble(members, FORM, folder, facts, [], fusion="mean")
    return folder


def evaluate(
    ensemble: Path, cutouts: Cutouts, out: Path, pictures: bool = False, **more: Any
) -> Evaluation:
    """With few resamplings; and pictures that nobody looks at are not drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lens_pipeline.scoring.evaluate.lens_metrics", metrics_of)
        if not pictures:
            patch.setattr("lens_pipeline.evaluation.report.png_bytes", lambda _: b"")
        return evaluate_ensemble(ensemble, cutouts, cutouts.catalogue, out, gate=GATE, **more)


@pytest.fixture(scope="module")
def mixed(ensemble: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Of 60 simulated and 60 real cutouts."""
    table = rows()
    table["simulated"] = pd.array([True] * 60 + [None] * 60, dtype="boolean")
    out = tmp_path_factory.mktemp("mixed")
    return evaluate(ensemble, Cutouts(table, origin=EVIL), out, pictures=True, prevalence=0.01)


def page_of(evaluation: Evaluation) -> Elements:
    return Elements(evaluation.folder / "report.html")


def test_real_cutouts_come_first_and_carry_the_forecast(mixed: Evaluation) -> None:
    scores = pd.read_parquet(mixed.folder / "scores.parquet")
    for origin, part in (("real", scores[60:]), ("simulated", scores[:60])):
        for column, name in (("probability", "ensemble"), ("probability_lastro", "lastro")):
            label = part["label"].astype(int)
            assert label.mean() == pytest.approx(1 / 3)  # calibrated where a half are lenses
            odds = part[column] / (1 - part[column]) * 0.5
            score = odds / (1 + odds)
            by_hand = metrics_of(label, score, group=part["group"])
            for metric, found in mixed.origins[origin][name].items():
                assert found == pytest.approx(by_hand[metric]), metric
    assert mixed.forecast["rests_on"] == "real"
    assert mixed.forecast["prevalence"] == 0.01
    assert [text for text in page_of(mixed).texts if text.startswith("Metrics: ")] == [
        "Metrics: real cutouts: 20 lenses, 40 non-lenses",
        "Metrics: simulated cutouts: 20 lenses, 40 non-lenses",
        "Metrics: all of the test split",
    ]


def ece_where_as_frequent(test: pd.DataFrame, val: pd.DataFrame) -> float:
    """The calibration error of what an ensemble of `ensemble` gives, at the share of lenses in
    `val`, where that of `test` is another."""
    label, share = test["label"].astype(int), val["label"].mean()
    odds = label.mean() / (1 - label.mean()) * (1 - share) / share
    odds *= test["probability"] / (1 - test["probability"])
    return float(lens_metrics(label, odds / (1 + odds), bootstrap=0)["ece"]["value"])


@pytest.mark.parametrize(
    ("column", "names", "values"),
    [("survey", ["wide", "deep"], ["wide", "deep"]), ("simulated", ["simulated", "real"], [1, 0])],
)
def test_each_part_is_calibrated_where_its_own_lenses_are_as_frequent_as_in_validation(
    column: str, names: list[str], values: list[object], ensemble: Path, tmp_path: Path
) -> None:
    """A network sees whose image it is, and that it is simulated."""
    table = rows(240)
    table[column], table["split"] = values * 120, ["val"] * 120 + ["test"] * 120
    if column == "simulated":
        table[column] = table[column].astype("boolean")
    rare = (table[column] == values[1]) & (table["split"] == "val") & (table["label"] == 1)
    table = table[~rare | (np.arange(240) % 4 == 1)].reset_index(drop=True)
    found = evaluate(ensemble, Cutouts(table), tmp_path)
    scores = pd.read_parquet(tmp_path / "scores.parquet")
    shares = {}
    for name, value in zip(names, values, strict=True):
        part = scores[scores[column] == value]
        test, val = part[part["split"] == "test"], part[part["split"] == "val"]
        by_hand = ece_where_as_frequent(test, val)
        of_part = (found.surveys if column == "survey" else found.origins)[name]
        assert of_part["ensemble"]["ece"]["value"] == pytest.approx(by_hand)
        shares[name] = val["label"].mean()
    assert shares[names[1]] < 0.8 * shares[names[0]]


def test_small_surveys_together_are_calibrated_by_the_same_ones(
    ensemble: Path, tmp_path: Path
) -> None:
    """Though others are small in the validation split."""
    of_test = [f"s{n:02d}" for n in range(12) for _ in range(20 - n)]
    of_val = [f"s{n:02d}" for n in range(12) for _ in range(9 + n)]
    table = rows(len(of_test + of_val))
    table["survey"] = of_test + of_val
    table["split"] = ["test"] * len(of_test) + ["val"] * len(of_val)
    small = table["survey"] >= "s09"
    rare = small & (table["split"] == "val") & (table["label"] == 1) & (table.index % 2 == 0)
    table = table[~rare].reset_index(drop=True)
    found = evaluate(ensemble, Cutouts(table), tmp_path)
    scores = pd.read_parquet(tmp_path / "scores.parquet")
    others = scores[scores["survey"] >= "s09"]
    test, val = others[others["split"] == "test"], others[others["split"] == "val"]
    of_others = found.surveys["others"]["ensemble"]
    assert of_others["n_lens"] == test["label"].sum()
    assert of_others["ece"]["value"] == pytest.approx(ece_where_as_frequent(test, val))


def test_of_each_survey_the_real_ones_are_told_by_themselves(
    ensemble: Path, mixed: Evaluation, tmp_path: Path
) -> None:
    table = rows()
    table["simulated"] = pd.array([True] * 60 + [False] * 60, dtype="boolean")
    table["survey"] = ["wide", "deep"] * 60
    found = evaluate(ensemble, Cutouts(table, origin=EVIL), tmp_path)
    real = table[60:]
    for name, of in found.real_surveys.items():
        label = real.loc[real["survey"] == name, "label"]
        assert of["ensemble"]["n_lens"] == label.sum() == 10
        assert of["ensemble"]["n_nonlens"] == (label == 0).sum()
    assert sorted(found.real_surveys) == ["deep", "wide"]
    assert mixed.real_surveys == {}  # where there is one


def test_the_rest_is_of_the_whole_test_split(mixed: Evaluation) -> None:
    whole = mixed.metrics["ensemble"]
    assert (whole["n_lens"], whole["n_nonlens"]) == (40, 80)
    assert mixed.selection["n_nonlens"] == 80
    assert sum(of["n"] for of in mixed.kinds.values()) == 80
    scores = pd.read_parquet(mixed.folder / "scores.parquet")
    chosen = scores[scores["probability"] >= mixed.selection["threshold"]]
    assert (chosen["label"] == 0).sum() == mixed.selection["false_positives"]
    assert set(scores["split"]) == {"test"} < set(PARTS)


def test_gates_judge_by_the_real_ones_where_there_are_enough(mixed: Evaluation) -> None:
    few = GATE | {"min_lens": 20, "min_nonlens": 40}
    assert mixed.gate(few).figures["n_lens"] == mixed.origins["real"]["ensemble"]["n_lens"] == 20
    enough_of_both_alone = GATE | {"min_lens": 21, "min_nonlens": 40}
    assert mixed.gate(enough_of_both_alone).figures["n_lens"] == 40


def test_what_weights_had_seen_before_is_no_test(ensemble: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ensemble, tmp_path / "ensemble"))
    table = rows()
    (folder / "groups.json").write_text(json.dumps(table["group"][:60].tolist()))
    (tmp_path / "out").mkdir()
    evaluation = evaluate(folder, Cutouts(table), tmp_path / "out")
    assert evaluation.metrics["ensemble"]["n_lens"] == 20
    assert "60 more were seen by weights" in page_of(evaluation).text
    assert len(pd.read_parquet(evaluation.folder / "scores.parquet")) == 120
    (folder / "groups.json").write_text(json.dumps(table["group"].tolist()))
    with pytest.raises(InputError, match="seen 120 of the test split's cutouts"):
        evaluate(folder, Cutouts(table), tmp_path)


def test_what_is_written_is_what_is_read(mixed: Evaluation) -> None:
    assert read_evaluation(mixed.folder) == mixed


def test_its_scores_say_of_what_they_are_wherever_they_lie(
    mixed: Evaluation, ensemble: Path, tmp_path: Path
) -> None:
    about = about_scores(shutil.copy(mixed.folder / "scores.parquet", tmp_path / "mine.parquet"))
    facts = json.loads((ensemble / "ensemble.json").read_text())
    assert about["dataset_version"] == facts["dataset_version"]
    assert about["catalogue"]["content"] == facts["dataset"]
    assert about["code_version"] == importlib.metadata.version("lens-pipeline")
    assert about["model"]["content"]


def test_nothing_that_a_catalogue_holds_becomes_markup(mixed: Evaluation) -> None:
    assert "<script" not in (mixed.folder / "report.html").read_text()
    page = page_of(mixed)
    assert "script" not in page.tags
    scores = pd.read_parquet(mixed.folder / "scores.parquet")
    mistaken = scores[scores["label"] == 0].nlargest(16, "probability")
    # The source, a kind, and that of each of these.
    assert page.texts.count(EVIL) == 2 + (mistaken["kind"] == EVIL).sum()


def test_each_cutout_of_the_galleries_is_named_in_their_order(mixed: Evaluation) -> None:
    scores = pd.read_parquet(mixed.folder / "scores.parquet")
    missed = scores[scores["label"] == 1].nsmallest(16, "probability")
    mistaken = scores[scores["label"] == 0].nlargest(16, "probability")
    ids = set(scores["id"])
    listed = [text for text in page_of(mixed).texts if text in ids]
    assert listed == [*missed["id"], *mistaken["id"]]


@dataclass(frozen=True)
class Spoilt(Cutouts):
    """The last two cutouts cannot be used."""

    def table(self, part: str) -> pd.DataFrame:
        return super().table(part).iloc[:-2]

    def rejects(self) -> pd.DataFrame:
        lost = super().table("test").iloc[-2:]
        return lost[["id", "row"]].assign(reason=EVIL)


MADE = "2026-01-02 03:04 UTC, lens-pipeline 1.0, commit 0123"


@pytest.fixture(scope="module")
def spoilt(ensemble: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Of cutouts of two surveys, two of which cannot be used."""
    table = rows().assign(survey=["hsc", "des"] * 60)
    return evaluate(ensemble, Spoilt(table), tmp_path_factory.mktemp("spoilt"), made=MADE)


def test_the_report_begins_with_what_it_is_of(spoilt: Evaluation) -> None:
    texts = page_of(spoilt).texts
    begins = texts[: texts.index("Metrics: all of the test split")]
    for name, fact in (
        ("Made", MADE),
        ("Source", "survey.csv"),
        ("Survey", "des, hsc"),
        ("Cutouts", "the central 16 x 16 pixels of 0.26 arcsec, bands g, r, i, in units of "
         "background sigma"),
        ("Dataset version", "1"),
    ):  # fmt: skip
        assert begins[begins.index(name) + 1] == fact


def test_why_cutouts_were_rejected_stands_in_the_report(
    spoilt: Evaluation, mixed: Evaluation
) -> None:
    page = page_of(spoilt)
    assert "Rejected cutouts" not in page_of(mixed).text
    said = page.texts[page.texts.index("Rejected cutouts") :]
    assert said[1].startswith("2 of 120 cutouts of all splits could not be used")
    assert said[said.index(EVIL) - 2] == "2"
    assert "script" not in page.tags


def test_one_origin_has_no_metrics_of_its_own(ensemble: Path, tmp_path: Path) -> None:
    cutouts = Cutouts(rows(), origin="simulation")
    evaluation = evaluate(ensemble, cutouts, tmp_path, pictures=True)
    assert evaluation.origins == {}
    assert evaluation.forecast["rests_on"] == "simulated"
    assert "promise too much" in (tmp_path / "report.html").read_text()
    for name in ("selection", "forecast", "metrics", "kinds", "origins"):
        json.loads((tmp_path / f"{name}.json").read_text(), parse_constant=pytest.fail)
    names = {path.stem for path in tmp_path.glob("*.png")}
    # One of the map's two quantities is not known.
    assert names == {
        *("roc", "precision_recall", "reliability", "histogram", "purity"),
        *("completeness", "agreement", "missed", "mistaken"),
    }


def test_pixels_that_are_masked_or_too_large_for_float32_are_named(ensemble: Path) -> None:
    model = load_ensemble(ensemble)
    images = np.random.default_rng(0).normal(size=(80, 3, SIZE, SIZE))
    plain = model.predict(images)
    pd.testing.assert_frame_equal(model.predict(np.ma.masked_array(images)), plain)
    pd.testing.assert_frame_equal(model.predict(torch.from_numpy(images)), plain)
    pd.testing.assert_frame_equal(model.predict(images[:2].tolist()), plain[:2])
    masked = np.ma.masked_array(images, mask=False)
    masked[70, 1, 4, 5] = np.ma.masked
    numbers = np.ma.masked_array(np.zeros(images.shape, int), mask=masked.mask)
    large = images.copy()
    large[70, 0, 0, 0] = 1e39
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for spoilt in (masked, numbers, large):
            with pytest.raises(InputError, match=r"cutout 70 .* are masked or not finite; fill"):
                model.predict(spoilt)
    with pytest.raises(InputError, match=r"shape \(3, 16, 16\); the model takes \(n, \*\(3, 1"):
        model.predict(images[0])


def test_an_ensemble_says_what_each_member_is_worth(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    label = np.arange(400) % 2
    logits = {"lastro": random.normal(size=400), "trans_enc_s": random.normal(3 * label)}
    ids = [str(number) for number in range(400)]
    members = {}
    for name, logit in logits.items():
        path = tmp_path / f"{name}-checkpoint.ckpt"
        system = LitLensSystem(name, image_size=SIZE)
        content = {"state_dict": system.state_dict(), "hyper_parameters": dict(system.hparams)}
        torch.save(content, path)
        scores = {"id": ids, "label": label, "group": ids, "logit": logit, "logit_std": 0.3}
        members[name] = (path, pd.DataFrame(scores))
    facts = {"dataset": "pixels", "dataset_version": "1"}
    found = assemble(members, FORM, tmp_path, facts, [], fusion="mean").facts
    assert found["asked_for"] == "mean"
    standing = found["standing"]
    for name, logit in logits.items():
        by_hand = lens_metrics(label, 1 / (1 + np.exp(-logit)), group=ids)["auroc"]
        assert standing[name]["auroc"] == pytest.approx(by_hand)
    assert standing["lastro"]["auroc"]["low"] < 0.5 < standing["trans_enc_s"]["auroc"]["low"]
    assert standing["lastro"]["share"] < 0.1
    assert standing["lastro"]["share"] + standing["trans_enc_s"]["share"] == pytest.approx(1)


def test_a_prevalence_that_is_none_is_refused(ensemble: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="prevalence"):
        evaluate(ensemble, Cutouts(rows()), tmp_path, prevalence=1.5)


def test_an_ensemble_that_gives_no_number_is_refused(ensemble: Path, tmp_path: Path) -> None:
    """Rather than judged on those cutouts for which it gives one."""
    spoilt = Path(shutil.copytree(ensemble, tmp_path / "spoilt"))
    member = spoilt / "members" / "lastro.ckpt"
    content = torch.load(member, weights_only=True)
    content["state_dict"]["head.bias"][:] = torch.nan
    torch.save(content, member)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match="spoilt: gives no number for 120 cutouts, the first is"):
        evaluate(spoilt, Cutouts(rows()), out)


def test_weights_that_a_training_started_from_bring_the_groups_they_have_seen(
    ensemble: Path, tmp_path: Path
) -> None:
    """Of a member of an ensemble; of any other file none are known."""
    folder = Path(shutil.copytree(ensemble, tmp_path / "older"))
    (folder / "groups.json").write_text('["host 1", "host 2"]')
    assert groups_behind(str(folder / "members" / "lastro.ckpt")) == {"host 1", "host 2"}
    assert groups_behind(str(tmp_path / "other.ckpt")) == frozenset()
    assert groups_behind("none") == frozenset()


def test_an_ensemble_that_is_damaged_or_of_another_version_is_named(
    ensemble: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(ensemble, tmp_path / "damaged"))
    whole = (folder / "ensemble.json").read_text()
    for text, said in (
        (whole[:100], "ensemble.json: is damaged"),
        ("{}", "ensemble.json: is damaged"),
        (json.dumps(json.loads(whole) | {"schema": 1}), "has schema 1, this version reads 2"),
    ):
        (folder / "ensemble.json").write_text(text)
        with pytest.raises(InputError, match=said):
            load_ensemble(folder)


def test_members_that_do_not_fit_together_are_both_named(ensemble: Path, tmp_path: Path) -> None:
    label = np.arange(40) % 2
    columns = {"id": label.astype(str), "label": label, "group": label}
    scores = pd.DataFrame(columns | {"logit": 1.0, "logit_std": 0.3})
    path = ensemble / "members" / "lastro.ckpt"
    for column, spoilt in (("id", scores["id"][::-1].to_numpy()), ("label", 1 - label)):
        members = {"a": (path, scores), "b": (path, scores.assign(**{column: spoilt}))}
        with pytest.raises(InputError, match=f"members a and b: the column {column} of their"):
            assemble(members, FORM, tmp_path, {}, [])
    facts = {"dataset": "pixels", "dataset_version": "1"}
    rising = scores.assign(logit=np.linspace(-1, 1, 40) + label)
    wider = replace(FORM, bands=("g", "r"))
    with pytest.raises(
        InputError, match=r"member a: takes cutouts of bands 3, the dataset's have 2"
    ):
        assemble({"a": (path, rising)}, wider, tmp_path, facts, [])
