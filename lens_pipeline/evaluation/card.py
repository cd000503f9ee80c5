"""The model card: what a registered version is, for whoever finds it in the registry."""

from collections.abc import Mapping
from typing import Any

from lens_pipeline.evaluation.fractions import lens_fraction
from lens_pipeline.evaluation.result import FUSED, Evaluation
from lens_pipeline.evaluation.standing import OF_SIMULATIONS, idle_members, of_turns
from lens_pipeline.evaluation.tables import MORE_COLUMNS, format_text, metric_text

LONGEST = 5000  # characters that the registry keeps
FEWEST = 10  # cutouts of a kind that is named among the hardest


def model_card(facts: Mapping[str, Any], evaluation: Evaluation) -> str:
    """Markdown for the description of a version, at most LONGEST characters.

    facts: `ensemble.json`; evaluation: on the test split of the same dataset. Sections: what it is
    and for what, data, test figures with intervals, how scores are made, limits.
    """
    validation, metrics = facts["validation"], evaluation.metrics[FUSED]
    lines = [
        "# Strong gravitational lens finder",
        f"An ensemble of {', '.join(facts['members'])}. It ranks cutouts of galaxies for visual "
        f"inspection: {format_text(facts['format'])}. Of other cutouts its scores mean nothing.",
        "## Data",
        f"Trained and validated on {facts['learnt_from']}; dataset version "
        f"`{facts['dataset_version']}`. Fusion and calibration: {validation['n_lens']} lenses and "
        f"{validation['n_nonlens']} non-lenses of the validation split. Figures below: "
        f"{metrics['n_lens']} lenses and {metrics['n_nonlens']} non-lenses of the test split, with "
        "95 % intervals by bootstrap.",
        "## Test figures",
        "| | ensemble |",
        "|---|---|",
        *(f"| {title} | {metric_text(metrics[key])} |" for key, title in MORE_COLUMNS.items()),
        *_parts("survey", evaluation.surveys),
        *_parts("origin", evaluation.origins),
        "## Scores",
        f"{of_turns(facts)}Fusion: {facts['fusion']['strategy'].replace('_', ' ')}. "
        f"`probability` holds where {lens_fraction(facts):.2g} of the cutouts are lenses, as in "
        f"the validation split; `sky_probability` where {facts['prevalence']:g} are. `std`: what "
        "members and dropout draws differ by; `entropy`: how undecided they are each.",
        "## Limits",
        *_limits(facts, evaluation),
    ]
    return "\n\n".join(lines).replace("|\n\n|", "|\n|")[:LONGEST]


def _parts(by: str, parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of several: how it does on each."""
    if not parts:
        return []
    auroc = {name: of[FUSED]["auroc"] for name, of in parts.items()}
    return [f"AUROC by {by}: " + ", ".join(f"{n} {metric_text(m)}" for n, m in auroc.items())]


def _limits(facts: Mapping[str, Any], evaluation: Evaluation) -> list[str]:
    limits = [
        "- `sky_probability` presumes that the lenses and the non-lenses of the sky look like "
        "those of the validation split."
    ]
    limits += [f"- {sentence}." for sentence in idle_members(facts)]
    if facts["simulated"]:
        limits.append(
            "- It has learnt from simulations. On real images expect less than on them: "
            f"{OF_SIMULATIONS}."
        )
    unresolved = [
        title
        for key, title in MORE_COLUMNS.items()
        if evaluation.metrics[FUSED][key]["value"] is None
    ]
    if unresolved:
        limits.append(f"- The test split is too small to tell: {', '.join(unresolved)}.")
    told = {
        kind: of["auroc"]
        for kind, of in evaluation.kinds.items()
        if of["auroc"] is not None and of["n"] >= FEWEST
    }
    if told:
        worst = sorted(told, key=told.__getitem__)[:3]
        named = ", ".join(f"{kind} (AUROC {told[kind]:.3f})" for kind in worst)
        limits.append(f"- Hardest to tell from lenses: {named}.")
    return limits
