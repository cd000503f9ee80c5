"""From a catalogue to the cutouts that are learnt from: `processed_dataset`."""

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from lens_pipeline import presets
from lens_pipeline.defs.catalogue import catalogue_of, counts_table
from lens_pipeline.defs.dataset_checks import (
    FEW,
    STATISTICS,
    all_pixels_are_finite,
    bands_are_as_in_the_last_version,
    each_origin_holds_both_classes,
    every_split_holds_both_classes,
    no_group_spans_two_splits,
    no_near_duplicates_across_splits,
    pixels_of,
)
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.shown import FIRST, drawn, picture, table
from lens_pipeline.defs.stages import CATALOGUE, DATASET, made, result, run_stage, stage
from lens_pipeline.steps import Recipe, check_unchanged

if TYPE_CHECKING:
    from lens_pipeline.catalogue.dataset import Dataset

BUILD = "lens_pipeline.catalogue.build"
SHEETS = "lens_pipeline.evaluation.sheets"
log = logging.getLogger(__name__)


def draw_training_cutouts(dataset: "Dataset") -> bytes:
    """Or others, where a survey has none to train on."""
    from lens_pipeline.catalogue.splits import PARTS
    from lens_pipeline.evaluation.plots import jpeg_bytes
    from lens_pipeline.evaluation.sheets import first_cutouts_sheet

    part = next(part for part in PARTS if len(dataset.images(part)))
    images, table = dataset.images(part), dataset.table(part)
    return jpeg_bytes(first_cutouts_sheet(images, table, dataset.format.units))


@stage(
    DATASET,
    modules=(BUILD,),
    by_chance=True,  # the images may lie in a store
    by_survey=True,
    deps=[CATALOGUE],
    group_name="data",
    kinds={"numpy"},
    by_schedule=True,
    check_specs=[
        dg.AssetCheckSpec(
            "no_group_spans_two_splits",
            asset=DATASET,
            blocking=True,
            description="Rows of one group (host galaxy, sky region) are all in one split.",
        ),
        dg.AssetCheckSpec(
            "every_split_holds_both_classes",
            asset=DATASET,
            blocking=True,
            description=f"train, val and test have {FEW} lenses and {FEW} non-lenses each. Fewer "
            "are warned of; without any, nothing can be trained or told.",
        ),
        dg.AssetCheckSpec(
            "each_origin_holds_both_classes",
            asset=DATASET,
            description="Where simulated and real cutouts are trained on together, a tenth or more "
            "of either are lenses, and non-lenses: else what tells the origins apart (noise, "
            "artefacts) is learnt in place of arcs.",
        ),
        dg.AssetCheckSpec(
            "all_pixels_are_finite",
            asset=DATASET,
            blocking=True,
            description="No stored pixel is NaN or infinite: one is enough to spoil a training.",
        ),
        dg.AssetCheckSpec(
            "bands_are_as_in_the_last_version",
            asset=DATASET,
            description="Level, noise and brightness of each band of the training split are like "
            "those of the last version whose content is another.",
        ),
        dg.AssetCheckSpec(
            "no_near_duplicates_across_splits",
            asset=DATASET,
            description="No two splits hold cutouts of the same sky (give those one group).",
        ),
    ],
)
def processed_dataset(
    context: dg.AssetExecutionContext, lens: LensHome, survey: str | None
) -> dg.MaterializeResult:
    """The cutouts that networks learn from and are judged by, all of one size and in one unit.

    float32 (n, bands, height, width) per split (`train`, `val`, `test`, `unlabelled`), in units of
    the background's sigma, each with its table; and the cutouts that were rejected.

    Plotted are, of each band of the training split, `median` (the level of the sky), `sigma` (its
    noise), `bright` (by how much the 99th percentile exceeds the median: the galaxies) and
    `noise_correlation` (of adjacent pixels), the first three in that unit.
    """
    from lens_pipeline.catalogue.build import (
        LIBRARIES,
        build_dataset,
        check_rejects,
    )
    from lens_pipeline.catalogue.dataset import REJECTS, open_dataset, rejects_in_words
    from lens_pipeline.catalogue.images import files_fingerprint

    settings = lens.settings
    upstream = made(context, CATALOGUE)
    catalogue = catalogue_of(settings, upstream.folder, survey)
    if settings.is_simulated:
        inputs = {"catalogue": upstream.content}
    else:  # what the catalogue says of other surveys decides nothing
        inputs = {
            "rows": hashlib.sha256(catalogue.table.to_parquet()).hexdigest(),
            "images": files_fingerprint(catalogue.references, settings.storage_options),
        }
    recipe = Recipe(
        stage="processed_dataset",
        modules=(BUILD,),
        libraries=LIBRARIES,
        inputs=inputs | ({"survey": survey} if survey else {}),
        settings={
            "image_size": presets.image_size(settings),
            "bands": settings.bands,
            "pad": settings.pad,
            "split_seed": settings.seed,
            "origin": settings.source,
            "whole": survey is None,
        },
    )

    def build(out: Path) -> None:
        build_dataset(
            catalogue,
            out,
            max_reject_fraction=settings.max_reject_fraction,
            options=settings.storage_options,
            **recipe.settings,
        )
        if not settings.is_simulated:
            images = files_fingerprint(catalogue.references, settings.storage_options)
            check_unchanged(settings.source, recipe.inputs["images"], images)

    root = settings.home / "dataset"
    step = run_stage(DATASET, recipe, root, build, settings, survey=survey)
    dataset = open_dataset(step.folder)
    sheet = drawn("cutouts.jpg", step, lambda: draw_training_cutouts(dataset), SHEETS, settings)
    pixels = pixels_of(dataset, step.content, settings)
    rejects = dataset.rejects()
    # It may have been made when more were allowed.
    n_rows = dataset.facts["n_rows"]
    check_rejects(rejects, n_rows, settings.max_reject_fraction, catalogue.source)
    if len(rejects):
        log.warning("  %s", rejects_in_words(rejects, n_rows, dataset.folder / REJECTS))
    return result(
        step,
        {
            "cutouts": picture(sheet),
            "splits": counts_table(dataset.facts["splits"], "split"),
            "bands": ", ".join(dataset.format.bands),
            "units": dataset.format.units,
            "rejects": len(rejects),
            "reject fraction": len(rejects) / dataset.facts["n_rows"],
            "first rejects": table(rejects.head(FIRST)),
            STATISTICS: dg.MetadataValue.json(pixels),
            **{  # numbers, of which Dagster draws the history
                f"{name} of {band}": float(f"{value:.4g}")
                for band, of_band in pixels["statistics"].items()
                for name, value in of_band.items()
            },
        },
        checks=(
            no_group_spans_two_splits(dataset),
            every_split_holds_both_classes(dataset, survey),
            each_origin_holds_both_classes(dataset),
            all_pixels_are_finite(pixels),
            bands_are_as_in_the_last_version(context, step, pixels, survey),
            no_near_duplicates_across_splits(dataset),
        ),
    )
