"""What an evaluation leaves in its folder. Reading it needs no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lens_pipeline.evaluation.gates import GateDecision, first_model_gate
from lens_pipeline.evaluation.origins import REAL
from lens_pipeline.evaluation.surveys import OTHERS

METRICS = "metrics.json"
KINDS = "kinds.json"
ORIGINS = "origins.json"
SURVEYS = "surveys.json"
REAL_SURVEYS = "real_surveys.json"
SELECTION = "selection.json"
FORECAST = "forecast.json"
SCORES = "scores.parquet"
REPORT = "report.html"
FUSED = "ensemble"  # the name of all members together, beside theirs
CLASSES = ("lens", "nonlens")
# As `Evaluation` has them.
FILES = (METRICS, KINDS, ORIGINS, SURVEYS, REAL_SURVEYS, SELECTION, FORECAST)


@dataclass(frozen=True)
class Evaluation:
    """The files of an evaluation's folder: JSON as below, scores.parquet, report.html, pictures.

    metrics: what `lens_metrics` gives on the test split, for each member and for `ensemble`.
    kinds: what `false_positives_by_kind` gives; empty where the catalogue has no column `kind`.
    origins: {`real` and `simulated`: their metrics}; empty where the test split holds but one.
    surveys: {survey: its metrics}, likewise; real_surveys: of the real cutouts alone, where there
    are simulated ones beside.
    selection: of `selection_function`; forecast: of `forecast`, with what it rests on,
    `rests_on`. `kinds`, `selection` and `forecast` are of the ensemble on the test split.
    """

    folder: Path
    metrics: dict[str, dict[str, Any]]
    kinds: dict[str, dict[str, Any]]
    origins: dict[str, dict[str, Any]]
    surveys: dict[str, dict[str, Any]]
    real_surveys: dict[str, dict[str, Any]]
    selection: dict[str, Any]
    forecast: dict[str, Any]

    @property
    def shown(self) -> tuple[Path, ...]:
        """The report, and the pictures and figures in it."""
        pictures = sorted(self.folder.glob("*.png"))
        return (self.folder / REPORT, *pictures, *(self.folder / name for name in FILES))

    def on_real_ones(self, thresholds: Mapping[str, Any]) -> bool:
        """Whether gates judge by the real cutouts alone: where they hold what a gate needs beside
        simulated ones, from which real non-lenses may be told by the noise."""
        return REAL in self.origins and _hold_enough(self.origins[REAL], thresholds)

    def gate(self, thresholds: Mapping[str, Any]) -> GateDecision:
        """Whether this ensemble may become the first champion."""
        metrics = self.judged(thresholds)[FUSED]
        return self.in_each_part(first_model_gate(metrics, **thresholds), thresholds)

    def judged(self, thresholds: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The metrics that gates judge by, as `metrics`."""
        return self.origins[REAL] if self.on_real_ones(thresholds) else self.metrics

    def in_each_part(self, decision: GateDecision, thresholds: Mapping[str, Any]) -> GateDecision:
        """The decision, where no survey that holds what a gate needs may fail by itself, and of
        several surveys, or of real and simulated cutouts, one must hold it: who tells them apart
        may seem to tell lenses. Of surveys, too, the real cutouts alone count where gates judge by
        these; small ones that are told together are no survey."""
        surveys = self.real_surveys if self.on_real_ones(thresholds) else self.surveys
        alone = {
            name: first_model_gate(of[FUSED], **thresholds)
            for name, of in surveys.items()
            if name != OTHERS and _hold_enough(of, thresholds)
        }
        reasons = [f"{name}: {reason}" for name, own in alone.items() for reason in own.reasons]
        needed = [thresholds[f"min_{name}"] for name in CLASSES]
        for parts, what in ((surveys, "survey"), (self.origins, "origin (real, simulated)")):
            enough = not any(needed) or any(
                _hold_enough(of, thresholds) for name, of in parts.items() if name != OTHERS
            )
            if parts and not enough:
                reasons.append(
                    f"no {what} alone has {needed[0]} lenses and {needed[1]} non-lenses in the "
                    "test set, and over several their images may be told apart instead of lenses"
                )
        return replace(
            decision,
            passed=decision.passed and not reasons,
            reasons=(*decision.reasons, *reasons),
        )


def _hold_enough(metrics: Mapping[str, Mapping[str, Any]], thresholds: Mapping[str, Any]) -> bool:
    """Whether cutouts, by the metrics of models on them, are as many as a gate needs, and of both
    classes."""
    counts = metrics[FUSED]
    return all(counts[f"n_{name}"] >= max(1, thresholds[f"min_{name}"]) for name in CLASSES)


def read_evaluation(folder: Path) -> Evaluation:
    return Evaluation(folder, *(json.loads((folder / name).read_text()) for name in FILES))
