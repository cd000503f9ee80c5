"""The gates: of the first model, and of a challenger against a champion."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, logit

from lens_pipeline.evaluation.gates import champion_gate, first_model_gate
from lens_pipeline.evaluation.metrics import lens_metrics
from lens_pipeline.evaluation.result import Evaluation

LIMITS = {"min_lens": 50, "min_nonlens": 50, "min_auroc_low": 0.5}


def metrics(low: float | None, n_lens: int, n_nonlens: int) -> dict[str, object]:
    return {"auroc": {"low": low}, "n_lens": n_lens, "n_nonlens": n_nonlens}


def test_enough_cutouts_and_a_bound_above_chance_pass() -> None:
    decision = first_model_gate(metrics(0.501, 50, 50), **LIMITS)
    assert decision.passed
    assert decision.reasons == ()
    assert decision.figures == {"auroc_low": 0.501, "n_lens": 50, "n_nonlens": 50}


@pytest.mark.parametrize(
    ("low", "n_lens", "n_nonlens", "reasons"),
    [
        (0.5, 50, 50, ["AUROC is 0.500"]),
        (0.9, 49, 50, ["49 lenses"]),
        (0.9, 50, 49, ["49 non-lenses"]),
        (None, 50, 50, ["no interval"]),
        (0.4, 0, 3, ["0 lenses", "3 non-lenses", "AUROC is 0.400"]),
    ],
)
def test_each_shortfall_is_named(
    low: float | None, n_lens: int, n_nonlens: int, reasons: list[str]
) -> None:
    decision = first_model_gate(metrics(low, n_lens, n_nonlens), **LIMITS)
    assert not decision.passed
    assert len(decision.reasons) == len(reasons)
    for reason, part in zip(decision.reasons, reasons, strict=True):
        assert part in reason


AGAINST = LIMITS | {"tolerance": 0.05, "max_ece": 0.1}


def cutouts(
    n: int = 1200, seed: int = 0, gain: float = 0.0, noise: float = 0.2
) -> dict[str, np.ndarray]:
    """Two calibrated models of the same skill but for `gain`; a group is a lens and its pair."""
    random = np.random.default_rng(seed)
    label = np.arange(n) % 2
    signal = random.normal(2.0 * label - 1, 1.0)

    def calibrated(skill: float) -> np.ndarray:
        seen = signal + noise * random.normal(size=n)
        separation = (1 + skill) / (1 + noise**2)
        return expit(2 * separation * (seen + skill * (2 * label - 1)))

    return {
        "label": label,
        "champion": calibrated(0.0),
        "challenger": calibrated(gain),
        "group": np.arange(n) // 2,
        "seen": np.zeros(n, dtype=bool),
        "survey": np.repeat("des", n),
    }


def test_a_better_challenger_passes_and_a_worse_one_does_not() -> None:
    better = champion_gate(**cutouts(gain=0.3), **AGAINST)
    assert better.passed, better.reasons
    assert better.figures["metric"] == "tpr_at_fpr_1e-2"
    assert better.figures["gain_low"] > 0
    worse = champion_gate(**cutouts(gain=-0.3), **AGAINST)
    assert not worse.passed
    assert any("a loss of" in reason for reason in worse.reasons)


def test_the_same_model_again_passes_and_little_evidence_does_not() -> None:
    same = cutouts()
    same["challenger"] = same["champion"]
    assert champion_gate(**same, **AGAINST).passed
    # Of the same skill, but the test set is too small to rule a loss out.
    decision = champion_gate(**cutouts(n=220), **AGAINST)
    assert not decision.passed
    (reason,) = decision.reasons
    assert "cannot be ruled out at 95 %, 0.05 is tolerated" in reason
    assert champion_gate(**cutouts(n=220), **AGAINST | {"tolerance": 0.9}).passed


def test_a_small_loss_that_is_certain_is_refused() -> None:
    """Within the tolerance: from version to version such losses would add up."""
    test = cutouts(n=2000)
    odds = np.log(test["champion"] / (1 - test["champion"]))
    test["challenger"] = expit(odds - 0.1 * test["label"])
    decision = champion_gate(**test, **AGAINST)
    assert -AGAINST["tolerance"] < decision.figures["gain_low"]
    assert decision.figures["gain_high"] < 0
    (reason,) = decision.reasons
    assert re.search(
        r"is 0\.\d+, the champion's 0\.\d+; it is worse, by 0\.0\d+ or more at 95", reason
    )


def of_surveys(**parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Cutouts of several surveys, whose groups are their own."""
    together = {
        name: np.concatenate([part[name] for part in parts.values()])
        for name in next(iter(parts.values()))
    }
    n = len(together["label"])
    names = np.repeat(list(parts), [len(part["label"]) for part in parts.values()])
    return together | {"group": np.arange(n) // 2, "survey": names}


def test_what_one_survey_gains_hides_no_loss_of_another() -> None:
    """The larger one gains more than the smaller one loses; of a third there is too little."""
    test = of_surveys(
        des=cutouts(n=1500, gain=0.3),
        hsc=cutouts(n=400, seed=1, gain=-0.3),
        lsst=cutouts(n=80, seed=2, gain=-0.5),
    )
    assert champion_gate(**test | {"survey": np.repeat("des", 1980)}, **AGAINST).passed
    decision = champion_gate(**test, **AGAINST)
    (reason,) = decision.reasons
    assert re.match(r"hsc: tpr_at_fpr_1e-2 is 0\.\d+, the champion's 0\.\d+; it is worse", reason)
    assert decision.figures["gain_low"] > 0  # of all together
    assert decision.figures["gain of des"] > 0 > decision.figures["gain of hsc"]
    assert "gain of lsst" not in decision.figures
    # What neither model has seen is what counts, in each.
    assert champion_gate(**test | {"seen": test["survey"] == "hsc"}, **AGAINST).passed


def test_what_is_certain_of_one_survey_alone_may_be_chance_among_five() -> None:
    limits = AGAINST | {"tolerance": 0.9}
    loss = cutouts(n=200, gain=-0.03)
    (reason,) = champion_gate(**loss, **limits).reasons
    assert "it is worse, by 0.010 or more at 95 %" in reason
    others = {f"other {n}": cutouts(n=200, seed=n, gain=0.1) for n in range(10, 14)}
    assert champion_gate(**of_surveys(loss=loss, **others), **limits).passed


def test_only_groups_that_neither_model_has_seen_count() -> None:
    """On what it has seen the challenger is perfect; on the rest it is chance."""
    test = cutouts()
    test["seen"] = test["group"] < 400  # 800 cutouts
    random = np.random.default_rng(1)
    chance = random.uniform(0.4, 0.6, len(test["label"]))
    test["challenger"] = np.where(test["seen"], 0.01 + 0.98 * test["label"], chance)
    decision = champion_gate(**test, **AGAINST)
    assert not decision.passed
    assert decision.figures["n_seen"] == 800
    assert (decision.figures["n_lens"], decision.figures["n_nonlens"]) == (200, 200)
    test["seen"] = test["group"] >= 40  # 40 lenses and 40 non-lenses are left
    few = champion_gate(**test, **AGAINST)
    assert [reason.split(",")[0][-9:] for reason in few.reasons] == ["40 lenses", "on-lenses"]
    assert "neither model has seen (1120 cutouts of the test split" in few.reasons[0]


def test_a_challenger_out_of_calibration_does_not_pass() -> None:
    test = cutouts(n=400, gain=0.3)
    test["challenger"] = test["challenger"] ** 5  # the ranking stays
    decision = champion_gate(**test, **AGAINST)
    (reason,) = decision.reasons
    assert reason.startswith("the calibration error is 0.")
    assert champion_gate(**test, **AGAINST | {"max_ece": 0.9}).passed


def test_copies_of_a_cutout_are_no_evidence() -> None:
    """Eight copies of 220 cutouts in their groups: no more sure than once."""
    once = cutouts(n=220)
    copies = {name: np.tile(values, 8) for name, values in once.items()}
    few, many = champion_gate(**once, **AGAINST), champion_gate(**copies, **AGAINST)
    assert not few.passed
    assert not many.passed
    alone = copies | {"group": np.arange(len(copies["label"]))}
    spread = [
        gate.figures["gain"] - gate.figures["gain_low"]
        for gate in (many, champion_gate(**alone, **AGAINST))
    ]
    assert spread[0] > 2 * spread[1]


def test_the_order_of_the_cutouts_decides_nothing() -> None:
    test = cutouts(n=400)
    order = np.random.default_rng(5).permutation(len(test["label"]))
    shuffled = {name: values[order] for name, values in test.items()}
    one, other = champion_gate(**test, **AGAINST), champion_gate(**shuffled, **AGAINST)
    assert one.passed == other.passed
    for name in ("challenger", "champion", "ece_balanced", "n_lens"):
        assert one.figures[name] == pytest.approx(other.figures[name], abs=1e-12)


def test_where_resamplings_do_not_resolve_the_rate_the_auroc_decides() -> None:
    """110 non-lenses in groups of uneven size: of some resamplings there are fewer than 100."""
    random = np.random.default_rng(0)
    n, label = 230, np.repeat([1, 0], [120, 110])
    champion = np.where(label == 1, 0.9, 0.1) + random.uniform(-0.05, 0.05, n)
    found = (label == 1) & (random.uniform(size=n) < 0.4)
    worse = np.where(found, 0.9, 0.3) + random.uniform(0, 0.05, n)
    test = {
        "label": label,
        "champion": champion,
        "group": random.integers(60, size=n),
        "seen": np.zeros(n, dtype=bool),
        "survey": np.repeat("des", n),
    }
    same, refused = (
        champion_gate(**test, challenger=challenger, **AGAINST | {"max_ece": 1.0})
        for challenger in (champion, worse)
    )
    assert same.passed
    assert same.figures["gain"] == 0
    assert any(reason.startswith("auroc is 0.") for reason in refused.reasons)
    for decision in (same, refused):
        assert decision.figures["metric"] == "auroc"
        assert all(np.isfinite(v) for v in decision.figures.values() if not isinstance(v, str))


def test_what_chance_makes_of_the_calibration_error_does_not_count() -> None:
    """With 130 cutouts a model that is exactly right has an error of some 0.1."""
    random = np.random.default_rng(0)
    n = 130
    p = random.uniform(0.02, 0.98, n)
    test = {
        "label": (random.uniform(size=n) < p).astype(int),
        "champion": p,
        "group": np.arange(n),
        "seen": np.zeros(n, dtype=bool),
        "survey": np.repeat("des", n),
    }
    right = champion_gate(**test, challenger=p, **AGAINST | {"max_ece": 0.06})
    assert right.figures["ece_balanced"] > 0.06
    assert right.passed
    wrong = champion_gate(**test, challenger=p**3, **AGAINST | {"max_ece": 0.06})
    assert any("of which chance makes" in reason for reason in wrong.reasons)


def test_one_region_of_the_sky_is_no_sample() -> None:
    """Without several groups there is nothing to resample, and any loss looks certain."""
    test = cutouts(gain=0.3) | {"group": np.zeros(1200, dtype=int)}
    decision = champion_gate(**test, **AGAINST)
    assert [reason.partition("there are ")[2] for reason in decision.reasons] == [
        "1 groups with lenses, and at least 20 are needed",
        "1 groups with non-lenses, and at least 20 are needed",
    ]


def test_who_tells_cameras_apart_is_no_lens_finder() -> None:
    """Nine in ten are lenses in one survey, one in ten in the other; the score knows no more."""
    random = np.random.default_rng(0)
    survey = np.repeat(["a", "b"], 1000)
    label = np.r_[np.repeat([1, 0], [900, 100]), np.repeat([1, 0], [100, 900])]
    score = np.clip(np.where(survey == "a", 0.7, 0.2) + random.uniform(0, 0.2, 2000), 0, 1)
    thresholds = {"min_lens": 50, "min_nonlens": 50, "min_auroc_low": 0.55}
    parts = {name: lens_metrics(label[survey == name], score[survey == name], 200) for name in "ab"}
    rest = {"kinds": {}, "origins": {}, "selection": {}, "forecast": {}, "folder": Path()}
    rest |= {"real_surveys": {}}
    together = {"ensemble": lens_metrics(label, score, 200)}
    pooled = Evaluation(**rest, metrics=together, surveys={})
    assert pooled.gate(thresholds).passed
    # Where nothing is needed, there need be no real cutouts to judge by.
    nothing = thresholds | {"min_lens": 0, "min_nonlens": 0}
    assert pooled.gate(nothing).passed
    of_one_class = lens_metrics(np.zeros(1000, int), score[survey == "b"], 200)
    assert replace(pooled, surveys={"b": {"ensemble": of_one_class}}).gate(nothing).passed
    apart = Evaluation(
        **rest, metrics=together, surveys={name: {"ensemble": of} for name, of in parts.items()}
    )
    decision = apart.gate(thresholds)
    assert not decision.passed
    assert [reason.partition(":")[0] for reason in decision.reasons] == ["a", "b"]
    # Nor where no survey holds enough of both to see it there.
    (reason,) = apart.gate(thresholds | {"min_lens": 101, "min_nonlens": 101}).reasons
    assert reason.startswith("no survey alone has 101 lenses and 101 non-lenses in the test set")
    origins = Evaluation(
        **rest | {"origins": {"real": apart.surveys["a"], "simulated": apart.surveys["b"]}},
        metrics=together,
        surveys={},
    )
    (reason,) = origins.gate(thresholds | {"min_lens": 101, "min_nonlens": 101}).reasons
    assert reason.startswith("no origin (real, simulated) alone has 101 lenses")


def test_real_cutouts_that_decide_are_told_from_those_of_other_surveys() -> None:
    """Real lenses of one survey, real non-lenses of the other, simulations of both in each."""
    random = np.random.default_rng(0)
    thresholds = {"min_lens": 50, "min_nonlens": 50, "min_auroc_low": 0.5}

    def of(n_lens: int, n_nonlens: int) -> dict[str, Any]:
        label = np.repeat([1, 0], [n_lens, n_nonlens])
        return {"ensemble": lens_metrics(label, expit(random.normal(3 * label)), 200)}

    mixed = Evaluation(
        Path(),
        metrics=of(560, 1000),
        kinds={},
        origins={"real": of(60, 500), "simulated": of(500, 500)},
        surveys={"a": of(310, 250), "b": of(250, 750)},
        real_surveys={"a": of(60, 0), "b": of(0, 500)},
        selection={},
        forecast={},
    )
    (reason,) = mixed.gate(thresholds).reasons
    assert reason.startswith("no survey alone has 50 lenses and 50 non-lenses")
    whole = replace(mixed, real_surveys={"a": of(50, 50), "b": of(0, 500)})
    assert whole.gate(thresholds).passed
    # Small ones that are told together are not one.
    others = replace(mixed, real_surveys={"a": of(40, 300), "others": of(60, 200)})
    assert not others.gate(thresholds).passed
    label = np.repeat([1, 0], 200)
    by_chance = {"ensemble": lens_metrics(label, random.uniform(size=400), 200)}
    whole = replace(mixed, real_surveys={"a": of(50, 50), "others": by_chance})
    assert whole.gate(thresholds).passed
    assert (
        not replace(whole, real_surveys={"a": of(50, 50), "b": by_chance}).gate(thresholds).passed
    )
    # Where simulations decide with them, so they do of each survey.
    few = replace(mixed, origins=mixed.origins | {"real": of(10, 500)})
    assert few.gate(thresholds).passed


@pytest.mark.parametrize("times", [1 / 20, 1 / 7, 20])
def test_where_lenses_are_few_probabilities_that_promise_others_are_no_calibrated_ones(
    times: float,
) -> None:
    """The error over all cutouts is below what is allowed."""
    random = np.random.default_rng(1)
    label = np.repeat([1, 0], [100, 8_000])
    evidence = random.normal(np.where(label == 1, 2, 0))
    right = 2 * evidence - 2 + logit(100 / 8_100)
    test = {
        "label": label,
        "champion": expit(right),
        "group": np.arange(len(label)),
        "seen": np.zeros(len(label), dtype=bool),
        "survey": np.repeat("des", len(label)),
    }
    wrong = expit(right + np.log(times))
    assert lens_metrics(label, wrong, bootstrap=0)["ece"]["value"] < AGAINST["max_ece"]
    (reason,) = champion_gate(**test, challenger=wrong, **AGAINST).reasons
    assert reason.startswith("the calibration error is ")
    assert champion_gate(**test, challenger=expit(right), **AGAINST).passed
