"""What an ensemble is worth: scores of every cutout, metrics on the test split, a report."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lens_pipeline.catalogue.splits import PARTS
from lens_pipeline.catalogue.table import Catalogue
from lens_pipeline.ensemble.calibration import at_mixture
from lens_pipeline.ensemble.system import LensEnsemble, load_ensemble
from lens_pipeline.errors import InputError
from lens_pipeline.evaluation.forecast import PREVALENCE, forecast
from lens_pipeline.evaluation.fractions import lens_fraction
from lens_pipeline.evaluation.metrics import lens_metrics
from lens_pipeline.evaluation.origins import (
    REAL,
    SIMULATED,
    basis,
    by_origin,
    described,
    lens_fraction_among,
)
from lens_pipeline.evaluation.report import Picture, Section, write_report
from lens_pipeline.evaluation.result import FILES, FUSED, REPORT, SCORES, Evaluation
from lens_pipeline.evaluation.sections import (
    fusion_section,
    reject_sections,
    score_sections,
    selection_sections,
    survey_sections,
)
from lens_pipeline.evaluation.selection import false_positives_by_kind, selection_function
from lens_pipeline.evaluation.sheets import contact_sheet
from lens_pipeline.evaluation.surveys import by_survey, of_same_surveys
from lens_pipeline.evaluation.tables import cutouts_table, format_text
from lens_pipeline.models.saliency import smooth_grad
from lens_pipeline.models.system import LitLensSystem
from lens_pipeline.scoring.predictor import score_dataset
from lens_pipeline.scoring.score_files import with_about
from lens_pipeline.scoring.score_tables import LEARNT_FROM
from lens_pipeline.scoring.scored_rows import made_by, model_hash
from lens_pipeline.scoring.sources import ScoredDataset

GALLERY = 16


def evaluate_ensemble(
    ensemble_folder: Path,
    dataset: ScoredDataset,
    catalogue: Catalogue,
    out: Path,
    *,
    gate: Mapping[str, Any],
    prevalence: float = PREVALENCE,
    made: str | None = None,
) -> Evaluation:
    """Score all of a dataset and write the files of `Evaluation` into `out`.

    gate: the thresholds of `first_model_gate`, whose verdict stands in the report; prevalence: the
    share of lenses among a survey's objects, for the forecast; made: when and by which code, in
    words, which the report begins with. Of the test split that counts which
    no member has seen, nor weights that it started from. Where the test split holds real and
    simulated cutouts, each has metrics of its own, and what ranks, calibrates and forecasts rests
    on the real ones if there are both lenses and non-lenses among them. Raises InputError where the
    ensemble was trained on another dataset, and for a prevalence that is not between 0 and 1.
    """
    ensemble = load_ensemble(ensemble_folder)
    scores = _scores(ensemble, ensemble_folder, dataset, catalogue)
    about = {
        "model": {"uri": str(ensemble_folder), "content": model_hash(ensemble)},
        "catalogue": {"source": str(dataset.folder), "content": dataset.facts["content"]},
        **made_by(ensemble),
    }
    table = pa.Table.from_pandas(scores, preserve_index=False)
    pq.write_table(table.cast(with_about(table.schema, about)), out / SCORES)
    test, n_seen = _unseen_test(ensemble, ensemble_folder, scores)
    columns = {name: f"probability_{name}" for name in ensemble.members}
    columns |= {FUSED: "probability"}
    simulation = dataset.facts["origin"] == "simulation"
    parts = by_origin(test, simulation)
    rests_on, shown = basis(parts)
    validated = scores[(scores["split"] == "val") & scores["probability"].notna()]
    of_origins = by_origin(validated, simulation)
    surveys = by_survey(test)
    real_surveys = by_survey(parts[REAL]) if len(parts) > 1 else {}
    expected = forecast(
        shown["label"], shown["probability"], prevalence=prevalence, group=shown["group"]
    )
    fitted_at = lens_fraction(ensemble.facts)

    def metrics(
        table: pd.DataFrame, alike: pd.DataFrame | None = None
    ) -> dict[str, dict[str, Any]]:
        # A network sees whose image it is, or that it is simulated, and has learnt how frequent
        # lenses are there.
        return _metrics(table, columns, lens_fraction_among(alike, fitted_at))

    def of_each(surveys: dict[str, pd.DataFrame], validated: pd.DataFrame) -> dict[str, Any]:
        alike = of_same_surveys(validated, surveys)
        return {name: metrics(part, alike[name]) for name, part in surveys.items()}

    selection = selection_function(test)
    evaluation = Evaluation(
        out,
        metrics=metrics(test),
        kinds=false_positives_by_kind(test, selection["threshold"]),
        origins={o: metrics(part, of_origins.get(o)) for o, part in parts.items()}
        if len(parts) > 1
        else {},
        surveys=of_each(surveys, validated),
        real_surveys=of_each(real_surveys, of_origins.get(REAL, validated)),
        selection=selection,
        forecast={"rests_on": rests_on, **expected},
    )
    for name in FILES:
        content = getattr(evaluation, name.removesuffix(".json"))
        (out / name).write_text(json.dumps(content, indent=1))
    best = _best_member(evaluation.metrics)
    architectures = {name: one.hparams["arch"] for name, one in ensemble.members.items()}
    sections = [
        *score_sections(
            shown,
            columns,
            evaluation.forecast,
            at_mixture(
                shown["probability"],
                shown["label"],
                lens_fraction_among(of_origins.get(rests_on), fitted_at),
            ),
        ),
        *survey_sections(
            surveys,
            {name: of[FUSED] for name, of in evaluation.surveys.items()},
            columns[FUSED],
        ),
        *selection_sections(selection, evaluation.kinds, parts),
        fusion_section(ensemble.facts, shown, architectures, rests_on, evaluation.metrics),
        _galleries(dataset, test, best, ensemble.members[best]),
        *reject_sections(scores["reject_reason"]),
    ]
    for picture in (picture for section in sections for picture in section.pictures):
        (out / f"{picture.name}.png").write_bytes(picture.png)
    by_part = {described(parts[origin], origin): of for origin, of in evaluation.origins.items()}
    write_report(
        out / REPORT,
        title="Lens ensemble",
        facts=({} if made is None else {"Made": made})
        | _facts(dataset, ensemble.facts["dataset_version"], scores, parts, n_seen),
        metrics={**by_part, "all of the test split": evaluation.metrics},
        gate=evaluation.gate(gate),
        sections=sections,
    )
    return evaluation


def _metrics(
    table: pd.DataFrame, columns: Mapping[str, str], fitted_at: float
) -> dict[str, dict[str, Any]]:
    """What `lens_metrics` gives, by the names of the columns; groups are drawn
    whole, and probabilities are those at the mixture of the table, which moves no rank."""
    label, group = table["label"], table["group"]
    found = {}
    for name, column in columns.items():
        score = at_mixture(table[column], label, fitted_at)
        found[name] = lens_metrics(label, score, group=group)
    return found


def _scores(
    ensemble: LensEnsemble, folder: Path, dataset: ScoredDataset, catalogue: Catalogue
) -> pd.DataFrame:
    """See `score_dataset`; of the dataset that it has learnt from, and a number for each cutout."""
    if ensemble.facts["dataset"] != dataset.facts["content"]:
        raise InputError(
            f"{dataset.folder}: is not the dataset that the ensemble in {folder} was trained on; "
            "its test split may hold what the ensemble has seen. Make the shards, checkpoints and "
            "lens_ensemble again"
        )
    scores = score_dataset(ensemble, dataset, catalogue)
    without = scores["probability"].isna() & scores["reject_reason"].isna()
    if without.any():
        raise InputError(
            f"{folder}: gives no number for {int(without.sum())} cutouts, the first is "
            f"{scores.loc[without, 'id'].iloc[0]}; train its members again"
        )
    return scores


def _unseen_test(
    ensemble: LensEnsemble, folder: Path, scores: pd.DataFrame
) -> tuple[pd.DataFrame, int]:
    """(the test split's scores; of how many more cutouts, which weights that a member started from
    have learnt, as they were trained on another split)."""
    test = scores[(scores["split"] == "test") & scores["probability"].notna()]
    seen = test[LEARNT_FROM]
    n_seen, test = int(seen.sum()), test[~seen].astype({"label": np.int8})
    if n_seen and test["label"].nunique() < 2:
        raise InputError(
            f"{folder}: members start from weights that have seen {n_seen} of the test split's "
            "cutouts, and those that are left are no test; split as then (LENS_SEED), or start "
            "from other weights"
        )
    return test, n_seen


def _facts(
    dataset: ScoredDataset,
    version: str,
    scores: pd.DataFrame,
    parts: Mapping[str, pd.DataFrame],
    n_seen: int,
) -> dict[str, str]:
    tested = "; ".join(described(part, origin) for origin, part in parts.items())
    lost = scores[scores["reject_reason"].notna()]
    lenses, others = (int((lost["label"] == value).sum()) for value in (1, 0))
    if lenses or others:
        tested += (
            f"; {lenses:,} lenses and {others:,} non-lenses of all splits could not be used, and "
            "completeness is of those that could"
        )
    if n_seen:
        tested += f"; {n_seen:,} more were seen by weights that members started from"
    if SIMULATED in parts:
        tested += ". What a test on simulated cutouts says of the sky is limited"
    n_of = dataset.facts["splits"]
    surveys = sorted(scores["survey"].dropna().astype(str).unique()) if "survey" in scores else []
    return {
        "Tested on": tested,
        "Source": dataset.facts["origin"],
        **({"Survey": ", ".join(surveys)} if surveys else {}),
        "Cutouts": format_text(asdict(dataset.format)),
        "Scored": f"{int(scores['probability'].notna().sum())} of {len(scores)} cutouts",
        "Splits": ", ".join(f"{part} {n_of[part]['n']}" for part in PARTS if part in n_of),
        "Dataset version": version,
    }


def _best_member(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """By AUROC: at small rates of false positives members differ by chance on a small split."""
    members = (name for name in metrics if name != FUSED)
    return max(members, key=lambda name: metrics[name]["auroc"]["value"])


def _galleries(
    dataset: ScoredDataset, test: pd.DataFrame, member: str, system: LitLensSystem
) -> Section:
    rows = dataset.table("test")["row"]
    position = pd.Series(np.arange(len(rows)), index=rows)

    def gallery(rows: pd.DataFrame, name: str, caption: str) -> Picture:
        first = rows.head(GALLERY)
        images = dataset.split("test").gather(position[first.index].to_numpy()).astype(np.float32)
        captions = [f"#{n}  {p:.3f}" for n, p in enumerate(first["probability"], 1)]
        sheet = contact_sheet(
            images, captions, dataset.format.units, maps=smooth_grad(system, images)
        )
        return Picture(name, caption, sheet, table=cutouts_table(first))

    ranked = test.sort_values("probability")
    return Section(
        "Where it is wrong",
        "Above each cutout its place in the list under the picture, and its probability; below, "
        f"how much the logit of {member}, the member with the highest AUROC, changes with the "
        "stretched flux in each pixel (SmoothGrad, Smilkov et al. 2017), yellow at the map's "
        "own maximum. It shows where the network is sensitive, not why.",
        pictures=[
            gallery(ranked[ranked["label"] == 1], "missed", "The lenses with the lowest scores"),
            gallery(
                ranked[ranked["label"] == 0][::-1],
                "mistaken",
                "The non-lenses with the highest scores",
            ),
        ],
    )
