"""The model card."""

from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from lens_pipeline.evaluation.card import LONGEST, model_card
from lens_pipeline.evaluation.metrics import lens_metrics
from lens_pipeline.evaluation.result import Evaluation

FACTS: dict[str, Any] = {
    "members": {"resnet18": {}, "lastro": {}},
    "standing": {
        name: {"share": 0.5, "auroc": {"value": 0.9, "low": 0.8, "high": 0.95}}
        for name in ("resnet18", "lastro")
    },
    "format": {
        "bands": ["g", "r", "i"],
        "image_size": 64,
        "units": "background_sigma",
        "pixel_scale": 0.263,
    },
    "validation": {"n_lens": 100, "n_nonlens": 300},
    "dataset_version": "abc123",
    "simulated": True,
    "learnt_from": "simulated cutouts: 900 lenses, 950 non-lenses",
    "fusion": {"strategy": "uncertainty_weighted"},
    "prevalence": 1e-3,
}


def evaluated(n: int = 600, kinds: int = 3, **surveys: float) -> Evaluation:
    random = np.random.default_rng(0)
    label = np.arange(n) % 2
    metrics = lens_metrics(label, expit(random.normal(label)), 50)
    of_kind = {f"kind{k}": {"n": 10, "auroc": 0.5 + k / 1000} for k in range(kinds)}
    of_survey = {name: {"ensemble": {"auroc": about(v)}} for name, v in surveys.items()}
    return Evaluation(
        Path(),
        metrics={"ensemble": metrics},
        kinds=of_kind,
        origins={},
        surveys=of_survey,
        real_surveys={},
        selection={},
        forecast={},
    )


def about(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def test_the_card_says_what_the_scores_are_of_and_what_they_are_worth() -> None:
    evaluation = evaluated()
    card = model_card(FACTS, evaluation)
    auroc = evaluation.metrics["ensemble"]["auroc"]
    shown = f"{auroc['value']:.3f} [{auroc['low']:.3f}, {auroc['high']:.3f}]"
    assert f"| AUROC | {shown} |" in card
    for part in (
        "resnet18, lastro",
        "64 x 64 pixels of 0.263 arcsec, bands g, r, i, in units of background sigma",
        "Trained and validated on simulated cutouts: 900 lenses, 950 non-lenses; dataset version "
        "`abc123`",
        "100 lenses and 300 non-lenses of the validation split",
        "300 lenses and 300 non-lenses of the test split",
        "where 0.25 of the cutouts are lenses",
        "`sky_probability` where 0.001 are",
        "too small to tell: TPR at FPR 1e-3",
        "kind0 (AUROC 0.500), kind1 (AUROC 0.501), kind2 (AUROC 0.502).",
        "purity on real images of Euclid",
    ):
        assert part in card, part


def test_a_card_of_real_cutouts_says_nothing_of_simulations() -> None:
    real = {"simulated": False, "learnt_from": "real cutouts: 900 lenses, 950 non-lenses"}
    card = model_card(FACTS | real, evaluated())
    assert "validated on real cutouts" in card
    assert "simulat" not in card


def test_a_member_that_hardly_counts_is_among_the_limits() -> None:
    assert "hardly counts" not in model_card(FACTS, evaluated())
    idle = {"share": 0.0, "auroc": {"value": 0.5, "low": 0.4, "high": 0.6}}
    card = model_card(FACTS | {"standing": FACTS["standing"] | {"lastro": idle}}, evaluated())
    assert "- lastro cannot be told from chance on the validation split" in card


def test_a_kind_of_few_cutouts_is_not_called_the_hardest() -> None:
    evaluation = evaluated()
    evaluation.kinds["kind0"]["n"] = 9
    card = model_card(FACTS, evaluation)
    assert "kind0" not in card
    assert "Hardest to tell from lenses: kind1" in card


def test_the_registry_can_keep_the_card() -> None:
    many = {"members": {f"member{k}": {} for k in range(900)}}
    assert len(model_card(FACTS, evaluated())) < LONGEST
    assert len(model_card(FACTS | many, evaluated())) == LONGEST


def test_several_surveys_are_told_apart() -> None:
    card = model_card(FACTS, evaluated(des=0.93, hsc=0.95))
    assert "AUROC by survey: des 0.930 [0.920, 0.940], hsc 0.950 [0.940, 0.960]" in card
    assert "by survey" not in model_card(FACTS, evaluated())
