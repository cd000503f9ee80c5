"""What an evaluation leaves in its folder. Reading it needs no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens_pipeline.evaluation.gates import GateDecision, first_model_gate

METRICS = "metrics.json"
SCORES = "scores.parquet"
REPORT = "report.html"
ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class Evaluation:
    """metrics.json, scores.parquet, report.html and pictures.

    metrics: what `lens_metrics` gives on the test split, for each member and for `ensemble`.
    """

    folder: Path
    metrics: dict[str, dict[str, Any]]

    def gate(self, thresholds: Mapping[str, Any]) -> GateDecision:
        """Whether this ensemble may become the first champion."""
        return first_model_gate(self.metrics[ENSEMBLE], **thresholds)


def read_evaluation(folder: Path) -> Evaluation:
    return Evaluation(folder, json.loads((folder / METRICS).read_text()))
