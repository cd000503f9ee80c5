"""What an ensemble is worth: scores of every cutout, metrics on the test split, a report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lens_pipeline.catalogue.table import Catalogue
from lens_pipeline.ensemble.predictor import ScoredDataset, score_dataset
from lens_pipeline.ensemble.system import load_ensemble
from lens_pipeline.errors import InputError
from lens_pipeline.evaluation.metrics import lens_metrics
from lens_pipeline.evaluation.plots import (
    contact_sheet,
    png_bytes,
    reliability_figure,
    roc_figure,
    score_histogram_figure,
)
from lens_pipeline.evaluation.report import kinds_table, write_report
from lens_pipeline.evaluation.result import ENSEMBLE, KINDS, METRICS, REPORT, SCORES, Evaluation

GALLERY = 16


def evaluate_ensemble(
    ensemble_folder: Path,
    dataset: ScoredDataset,
    catalogue: Catalogue,
    out: Path,
    *,
    gate: Mapping[str, Any],
) -> Evaluation:
    """Score all of a dataset and write metrics.json, scores.parquet, report.html and pictures.

    gate: the thresholds of `first_model_gate`, whose verdict stands in the report. Raises
    InputError where the ensemble was trained on another dataset.
    """
    ensemble = load_ensemble(ensemble_folder)
    if ensemble.facts["dataset"] != dataset.facts["content"]:
        raise InputError(
            f"{dataset.folder}: is not the dataset that the ensemble in {ensemble_folder} was "
            "trained on; its test split may hold what the ensemble has seen. Make the shards, "
            "checkpoints and lens_ensemble again"
        )
    scores = score_dataset(ensemble, dataset, catalogue)
    scores.to_parquet(out / SCORES, index=False)
    test = scores[(scores["split"] == "test") & scores["probability"].notna()]
    label = test["label"].to_numpy(dtype=np.int8)
    columns = {name: f"probability_{name}" for name in ensemble.members}
    columns |= {ENSEMBLE: "probability"}
    probability = {name: test[column].to_numpy() for name, column in columns.items()}
    metrics = {name: lens_metrics(label, score) for name, score in probability.items()}
    kinds = _by_kind(test, label) if "kind" in test else {}
    for name, values in ((METRICS, metrics), (KINDS, kinds)):
        (out / name).write_text(json.dumps(values, indent=1))

    figures = {
        "roc": roc_figure({name: (label, score) for name, score in probability.items()}),
        "reliability": reliability_figure(label, probability[ENSEMBLE]),
        "histogram": score_histogram_figure(label, probability[ENSEMBLE]),
        "missed": _gallery(dataset, test[label == 1].sort_values("probability")),
        "mistaken": _gallery(dataset, test[label == 0].sort_values("probability", ascending=False)),
    }
    for name, figure in figures.items():
        (out / f"{name}.png").write_bytes(png_bytes(figure))
    captions = {
        "roc": "True against false positive rate on the test split",
        "reliability": "Predicted against observed fraction of lenses",
        "histogram": "Scores of lenses and non-lenses",
        "missed": "The lenses with the lowest scores",
        "mistaken": "The non-lenses with the highest scores",
    }
    evaluation = Evaluation(out, metrics, kinds)
    write_report(
        out / REPORT,
        title="Lens ensemble",
        facts=_facts(dataset, ensemble.facts["dataset_version"], scores),
        metrics=metrics,
        figures={captions[name]: figure for name, figure in figures.items()},
        gate=evaluation.gate(gate),
        tables={"Test split, by kind of non-lens": kinds_table(kinds)} if kinds else {},
    )
    return evaluation


def _facts(dataset: ScoredDataset, version: str, scores: pd.DataFrame) -> dict[str, str]:
    simulated = dataset.facts["origin"] == "simulation"
    form = dataset.format
    return {
        "Cutouts": "simulated: what a test on them says of the sky is limited"
        if simulated
        else f"real, from {dataset.facts['origin']}",
        "Format": f"{', '.join(form.bands)}; {form.image_size} px; {form.units}",
        "Scored": f"{int(scores['probability'].notna().sum())} of {len(scores)} cutouts",
        "Splits": ", ".join(f"{k} {v['n']}" for k, v in dataset.facts["splits"].items()),
        "Dataset version": version,
    }


def _gallery(dataset: ScoredDataset, rows: pd.DataFrame) -> Figure:
    first = rows.head(GALLERY)
    position = pd.Series(np.arange(len(dataset.table("test"))), index=dataset.table("test")["row"])
    images: NDArray[np.float32] = np.asarray(dataset.images("test")[position[first.index]])
    captions = [f"{row.probability:.3f}" for row in first.itertuples()]
    return contact_sheet(images, captions, dataset.format.units)


def _by_kind(test: pd.DataFrame, label: NDArray[np.int8]) -> dict[str, dict[str, Any]]:
    """Of each kind of non-lens: how many there are, and the AUROC against all lenses."""
    kinds = {}
    for kind, part in test[label == 0].groupby("kind"):
        against = pd.concat([test[label == 1], part])
        of_kind = lens_metrics(
            against["label"].to_numpy(dtype=np.int8), against["probability"].to_numpy(), bootstrap=0
        )
        kinds[str(kind)] = {"n": len(part), "auroc": of_kind["auroc"]["value"]}
    return kinds
