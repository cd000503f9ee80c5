"""What the description of an ensemble, its `ensemble.json`, says of its members and scores."""

from collections.abc import Mapping
from typing import Any, cast

import pandas as pd

from lens_pipeline.evaluation.tables import metric_text

LITTLE = 0.05  # of the score: who has less hardly counts
CHANCE = 0.5  # AUROC
OF_SIMULATIONS = (
    "networks that were trained on simulations alone fell from 92 % to 24 % purity on real images "
    "of Euclid (Euclid Q1)"
)


def members_table(facts: Mapping[str, Any]) -> pd.DataFrame:
    """A row a member: the slope of its calibration, how it ranks the validation split, and how far
    it decides."""
    rows = [
        {
            "member": name,
            "calibration slope": f"{facts['members'][name]['slope']:.3g}",
            "AUROC, validation split": metric_text(of["auroc"]),
            "share in the score": f"{of['share']:.0%}",
        }
        for name, of in _standing(facts).items()
    ]
    return pd.DataFrame(rows)


def idle_members(facts: Mapping[str, Any]) -> list[str]:
    """A sentence on each member that hardly counts, though the fusion is of all of them."""
    if facts["fusion"]["strategy"] == "single":
        return []
    return [
        f"{name} {_why(of['auroc'])}hardly counts: its share in the score is {of['share']:.0%}"
        for name, of in _standing(facts).items()
        if of["share"] < LITTLE
    ]


def of_turns(facts: Mapping[str, Any]) -> str:
    """A sentence, where networks score more than the cutout as it is; else nothing."""
    if not facts.get("test_time_augmentation"):
        return ""
    return (
        "A network's logit is the mean of those of a cutout's eight turns and flips (test-time "
        "augmentation). "
    )


def _standing(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Nothing of what a former version has assembled."""
    return cast("Mapping[str, Any]", facts.get("standing", {}))


def _why(auroc: Mapping[str, float]) -> str:
    if auroc["low"] > CHANCE:
        return ""
    return f"cannot be told from chance on the validation split (AUROC {metric_text(auroc)}) and "
