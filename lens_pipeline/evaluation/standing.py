"""What each member of an ensemble contributes, from its `ensemble.json`."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from lens_pipeline.evaluation.report import metric_text

LITTLE = 0.05  # of the score: who has less hardly counts
CHANCE = 0.5  # AUROC


def members_table(facts: Mapping[str, Any]) -> pd.DataFrame:
    """A row a member: the slope of its calibration, how it ranks the validation split, and how far
    it decides."""
    rows = [
        {
            "member": name,
            "calibration slope": f"{calibration['slope']:.3g}",
            "AUROC, validation split": metric_text(facts["standing"][name]["auroc"]),
            "share in the score": f"{facts['standing'][name]['share']:.0%}",
        }
        for name, calibration in facts["members"].items()
    ]
    return pd.DataFrame(rows)


def idle_members(facts: Mapping[str, Any]) -> list[str]:
    """A sentence on each member that hardly counts, though the fusion is of all of them."""
    if facts["fusion"]["strategy"] == "single":
        return []
    return [
        f"{name} {_why(of['auroc'])}hardly counts: its share in the score is {of['share']:.0%}"
        for name, of in facts["standing"].items()
        if of["share"] < LITTLE
    ]


def _why(auroc: Mapping[str, float]) -> str:
    if auroc["low"] > CHANCE:
        return ""
    return f"ranks the validation split no better than chance (AUROC {metric_text(auroc)}) and "
