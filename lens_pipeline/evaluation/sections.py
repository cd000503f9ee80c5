"""The report's sections, from score tables and what was computed of them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.evaluation.origins import REAL, described
from lens_pipeline.evaluation.report import Picture, Section
from lens_pipeline.evaluation.score_plots import (
    REFERENCES,
    agreement_figure,
    one_in,
    precision_recall_figure,
    purity_figure,
    reliability_figure,
    roc_figure,
    score_histogram_figure,
)
from lens_pipeline.evaluation.selection_plots import completeness_figure, completeness_map_figure
from lens_pipeline.evaluation.standing import OF_SIMULATIONS, idle_members, members_table, of_turns
from lens_pipeline.evaluation.tables import (
    NOTHING_TO_EXPECT,
    completeness_table,
    forecast_table,
    fusions_table,
    kinds_table,
    seeds_table,
    surveys_table,
    threshold_text,
)

WARNING = (
    "Lenses are here those that the simulation makes, wide and bright enough to be seen, and the "
    f"prevalence is theirs. Simulated cutouts promise too much: {OF_SIMULATIONS}."
)
REASONS = 10  # against cutouts that are told
SHARE = (
    "A member's share in the score is how far the score's logit changes where the member's own is "
    "held at its mean, beside the same of the others, on the validation split."
)


def score_sections(
    table: pd.DataFrame,
    models: Mapping[str, str],
    forecast: Mapping[str, Any],
    calibrated: NDArray[np.floating],
) -> list[Section]:
    """Ranking, calibration, and what a survey may expect.

    table: cutouts with their `label`, scores and, if it is known, `group`; models: {name: column},
    the ensemble last; forecast: of `forecast`, with `rests_on`; calibrated: the ensemble's
    probabilities as they hold at the mixture of the table.
    """
    of = f"Of the {described(table, forecast['rests_on'])}."
    label = table["label"].to_numpy(dtype="int8")
    curves = {name: (label, table[column].to_numpy()) for name, column in models.items()}
    _, score = curves[list(models)[-1]]
    prevalence, n_objects = forecast["prevalence"], forecast["n_objects"]
    survey = (
        f"Of {n_objects:,} objects, {one_in(prevalence)}, if its lenses and its other objects are "
        f"like those of the sample. {of} In brackets, 95 % intervals; where the sample shows no "
        "false positive it does not resolve their rate, and the bounds follow from the rate's 95 % "
        "upper limit (about 3 / n, of n independent ones)."
    )
    if forecast["rests_on"] != REAL:
        survey += f" {WARNING}"
    expected = forecast_table(forecast)
    if expected.empty:
        survey += f" {NOTHING_TO_EXPECT}"
    return [
        Section(
            "Ranking",
            of,
            pictures=[
                Picture(
                    "roc",
                    "True against false positive rate. Hatched: rates that so few non-lenses do "
                    "not resolve. Open points are of other data, and no difference to them can be "
                    "read off; they were published in:",
                    roc_figure(curves),
                    REFERENCES,
                ),
                Picture(
                    "precision_recall",
                    "Purity against completeness, at the mixture of the sample and, dotted, "
                    f"of the ensemble at {one_in(prevalence)}, where the sample resolves it",
                    precision_recall_figure(curves, prevalence),
                ),
            ],
        ),
        Section(
            "Calibration",
            of,
            pictures=[
                Picture(
                    "reliability",
                    "Predicted against observed fraction of lenses, where both classes weigh the "
                    "same; bars are 68 % intervals",
                    reliability_figure(label, calibrated),
                ),
                Picture(
                    "histogram",
                    "Scores of lenses and non-lenses; above 10 cutouts the axis is logarithmic",
                    score_histogram_figure(label, score),
                ),
            ],
        ),
        Section(
            "What a survey may expect",
            survey,
            tables={"Expected numbers, by threshold": expected} if len(expected) else {},
            pictures=[
                Picture(
                    "purity",
                    "Completeness and purity of what lies above a threshold. Above, of the sample; "
                    f"below, where {one_in(prevalence)} is; grey: the 95 % interval of the false "
                    "positive rate",
                    purity_figure(label, score, prevalence, table.get("group")),
                )
            ],
        ),
    ]


def fusion_section(
    facts: Mapping[str, Any],
    table: pd.DataFrame,
    architectures: Mapping[str, str],
    rests_on: str,
    metrics: Mapping[str, Mapping[str, Any]],
) -> Section:
    """How the members become one score, where they differ, and how much by their seeds alone.

    facts: `ensemble.json`; table: cutouts with their scores, `rests_on` what they are;
    architectures: {member: architecture}; metrics: of `lens_metrics`, by member.
    """
    text = " ".join([_chosen(facts), *(f"{sentence}." for sentence in idle_members(facts)), SHARE])
    pictures = []
    if len(architectures) > 1:
        columns = {name: table[f"probability_{name}"].to_numpy() for name in architectures}
        caption = (
            "How alike the members rank lenses (upper right) and non-lenses (lower left): "
            f"Spearman's correlation of their scores, of the {described(table, rests_on)}. Members "
            "that err together gain little by being many."
        )
        figure = agreement_figure(table["label"].to_numpy(dtype="int8"), columns)
        pictures.append(Picture("agreement", caption, figure))
    tables = {"Members": members_table(facts)}
    if facts["comparison"]:
        tables["Fusions"] = fusions_table(facts["comparison"])
    seeds = seeds_table(metrics, architectures)
    if seeds.empty:
        text += (
            " No two members share an architecture: what a seed alone changes, which the intervals "
            "leave out, cannot be told (add b=resnet18@1, say)."
        )
    else:
        tables["By seed alone: mean (lowest to highest)"] = seeds
    return Section("How members become one score", text, tables, pictures)


def _chosen(facts: Mapping[str, Any]) -> str:
    """Which fusion it is, and why."""
    text = f"{of_turns(facts)}Fusion: {facts['fusion']['strategy'].replace('_', ' ')}"
    validation = facts["validation"]
    if not facts["comparison"]:
        return f"{text}; the validation split is too small to compare others with it."
    how = (
        "the one with the highest mean below; the best single member is taken only where it beats "
        "the best of the others in 95 % of the resamplings"
        if facts.get("asked_for") == "best"  # a former version did not say
        else "as was asked for"
    )
    return (
        f"{text}, {how}. All were compared on the validation split ({validation['n_lens']:,} "
        f"lenses, {validation['n_nonlens']:,} non-lenses), each fifth scored by what was fitted to "
        "the others, with 95 % intervals; gain: over the best single member on the same "
        "resamplings."
    )


def survey_sections(
    parts: Mapping[str, pd.DataFrame], metrics: Mapping[str, Mapping[str, Any]], score: str
) -> list[Section]:
    """The surveys of the test split, compared; no section where there are not several.

    parts: of `by_survey`; metrics: what `lens_metrics` gives of `score`, a column, by survey.
    """
    if not parts:
        return []
    shown = {**parts, "all together": pd.concat(parts.values())}
    curves = {
        name: (part["label"].to_numpy(dtype="int8"), part[score].to_numpy())
        for name, part in shown.items()
        if part["label"].nunique() == 2
    }
    caption = (
        "The ensemble's true against false positive rate, of each survey's cutouts alone. Open "
        "points are of other data, and were published in:"
    )
    return [
        Section(
            "By survey",
            "Of each survey's cutouts alone, where telling one survey from the other helps no "
            "network. Surveys of other depth and seeing hold other lenses, too.",
            {"The ensemble on the test split": surveys_table(metrics)},
            [Picture("surveys", caption, roc_figure(curves), REFERENCES)] if curves else [],
        )
    ]


def selection_sections(
    selection: Mapping[str, Any],
    kinds: Mapping[str, Mapping[str, Any]],
    parts: Mapping[str, pd.DataFrame],
) -> list[Section]:
    """What is found of which lenses, and what is taken for one.

    selection: of `selection_function`; kinds: of `false_positives_by_kind`, no section where it is
    empty; parts: of `by_origin`, all that both rest on.
    """
    n, k = selection["n_nonlens"], selection["false_positives"]
    fpr = selection["fpr"]
    at = f"a false positive rate of at most {fpr:g}" if fpr else "no false positive"
    if selection["threshold"] is None:
        chosen = f"No threshold finds a lens with {at} among {n:,} non-lenses."
    else:
        chosen = (
            f"Chosen are cutouts with a probability of {threshold_text(selection['threshold'])} or "
            f"more, for {at}, the smallest in decades that {n:,} non-lenses resolve ({k} of them "
            "are chosen)."
        )
    of = "; ".join(described(part, origin) for origin, part in parts.items())
    text = f"{chosen} Of the {of}."
    pictures, tables = [], {}
    if selection["quantities"]:
        tables["Completeness, by bins of equal counts"] = completeness_table(selection)
        pictures.append(
            Picture(
                "completeness",
                "Completeness against what is known of the lenses, in bins of equal counts, with "
                "95 % intervals; dotted: of all lenses",
                completeness_figure(selection),
            )
        )
    else:
        text += " The catalogue knows nothing of its lenses that completeness could depend on."
    if selection["map"]:
        pictures.append(
            Picture(
                "completeness_map",
                "Completeness over Einstein radius and source magnitude; the numbers are lenses, "
                "and empty cells have none",
                completeness_map_figure(selection["map"]),
            )
        )
    sections = [Section("Selection function", text, tables, pictures)]
    if kinds:
        table = {"Test split, by kind of non-lens": kinds_table(kinds)}
        sections.append(Section("False positives by kind", chosen, table))
    return sections


def reject_sections(reasons: pd.Series) -> list[Section]:
    """Why cutouts could not be used; no section where all could.

    reasons: of every cutout, none where it was used.
    """
    counts = reasons.value_counts().rename_axis("reason").reset_index(name="cutouts")
    counts = counts[["cutouts", "reason"]]  # which may be long
    if counts.empty:
        return []
    text = (
        f"{counts['cutouts'].sum():,} of {len(reasons):,} cutouts of all splits could not be used, "
        f"and have no scores, for {len(counts):,} reason{'s' if len(counts) > 1 else ''}"
    )
    if len(counts) > REASONS:
        text += f", of which these are the {REASONS} most frequent"
    text += ". Which each is, `reject_reason` in scores.parquet says."
    first = counts.sort_values(["cutouts", "reason"], ascending=[False, True]).head(REASONS)
    return [Section("Rejected cutouts", text, {"By reason": first})]
