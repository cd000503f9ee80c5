"""What an evaluation leaves in its folder. Reading it needs no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens_pipeline.evaluation.gates import GateDecision, first_model_gate

METRICS = "metrics.json"
KINDS = "kinds.json"
SCORES = "scores.parquet"
REPORT = "report.html"
ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class Evaluation:
    """metrics.json, kinds.json, scores.parquet, report.html and pictures.

    metrics: what `lens_metrics` gives on the test split, for each member and for `ensemble`.
    kinds: {kind of non-lens: its `n` in the test split, the ensemble's `auroc` against all lenses};
    empty where the catalogue has no column `kind`.
    """

    folder: Path
    metrics: dict[str, dict[str, Any]]
    kinds: dict[str, dict[str, Any]]

    def gate(self, thresholds: Mapping[str, Any]) -> GateDecision:
        """Whether this ensemble may become the first champion."""
        return first_model_gate(self.metrics[ENSEMBLE], **thresholds)


def read_evaluation(folder: Path) -> Evaluation:
    metrics, kinds = (json.loads((folder / name).read_text()) for name in (METRICS, KINDS))
    return Evaluation(folder, metrics, kinds)
