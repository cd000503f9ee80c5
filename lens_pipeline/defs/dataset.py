"""From a source to the processed dataset: `cutout_catalogue`, `processed_dataset`."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from lens_pipeline import presets
from lens_pipeline.defs.dataset_checks import (
    FEW,
    STATISTICS,
    all_pixels_are_finite,
    bands_are_as_in_the_last_version,
    each_origin_holds_both_classes,
    every_split_holds_both_classes,
    no_group_spans_two_splits,
    no_near_duplicates_across_splits,
    no_position_is_in_two_splits,
    pixels_of,
)
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.stages import (
    CATALOGUE,
    DATASET,
    FIRST,
    Made,
    column_schema,
    drawn,
    made,
    picture,
    result,
    run_stage,
    stage,
    table,
)
from lens_pipeline.errors import InputError, NoAnswerError
from lens_pipeline.settings import Settings
from lens_pipeline.steps import Recipe, digest

if TYPE_CHECKING:
    import pandas as pd

    from lens_pipeline.catalogue.dataset import Dataset
    from lens_pipeline.catalogue.table import Catalogue
    from lens_pipeline.simulation.config import SimulationConfig

SIMULATE = "lens_pipeline.simulation.simulate"
TABLE = "lens_pipeline.catalogue.table"
BUILD = "lens_pipeline.catalogue.build"
COLUMNS = {
    "id": "Unique, any characters.",
    "path": "The image.",
    "label": "1 lens, 0 not, empty unknown: scored, never trained on.",
    "group": "What falls into one split together: host galaxy, sky region.",
    "split": "Stated by the catalogue; where it is empty, the group decides.",
    "kind": "What the cutout shows: a lens, or which non-lens.",
    "defect": "Of a simulated image: cosmic rays, a trail, bad columns, or nothing.",
    "survey": "Whose image it is.",
    "ra": "Degrees.",
    "dec": "Degrees.",
    "pixel_scale": "Arcsec/pixel.",
    "bands": "Those of the image, in its order.",
    "flux_unit": "`background_sigma` where pixels are in that unit already.",
    "simulated": "Whether the cutout is simulated.",
    "host": "The id of the real galaxy that is the lens galaxy; empty where it is simulated.",
    "z_lens": "Redshift of the lens galaxy.",
    "velocity_dispersion": "Of the lens galaxy, km/s.",
    "axis_ratio": "Minor over major axis of the lens galaxy's mass and light.",
    "position_angle": "Of the lens galaxy's major axis, radians from +x (along columns) towards +y "
    "(along rows).",
    "x": "Of the lens galaxy, along columns, arcsec from the middle of the cutout.",
    "y": "Of the lens galaxy, along rows, arcsec from the middle of the cutout.",
    "lens_radius": "Half-light radius of the lens galaxy along sqrt(major x minor axis), arcsec.",
    "lens_magnitude": "Of the lens galaxy, AB, in r.",
    "lens_g_r": "Colour g - r of the lens galaxy, mag.",
    "lens_r_i": "Colour r - i of the lens galaxy, mag.",
    "z_source": "Redshift of the source.",
    "einstein_radius": "Arcsec.",
    "shear": "External shear; no unit.",
    "shear_angle": "Of the shear, radians from +x towards +y.",
    "magnification": "Of the source's flux, in all its images together.",
    "arc_snr": "Signal-to-noise ratio of the arcs, in the best band.",
    "arc_contrast": "Of the arcs over the lens galaxy's light, where they are seen best.",
    "source_galaxy": "The name of the real galaxy that is the source; empty where that is smooth.",
    "source_x": "Of the source before lensing, along columns, arcsec from the lens galaxy.",
    "source_y": "Of the source before lensing, along rows, arcsec from the lens galaxy.",
    "source_radius": "Half-light radius of the source, unlensed, along sqrt(major x minor axis), "
    "arcsec.",
    "source_axis_ratio": "Minor over major axis of a smooth source.",
    "source_angle": "Of the source's major axis, radians from +x towards +y.",
    "source_magnitude": "Of the source, unlensed, AB, in r.",
    "source_g_r": "Colour g - r of the source, mag.",
    "source_r_i": "Colour r - i of the source, mag.",
}
log = logging.getLogger(__name__)


def simulated(settings: Settings) -> "list[SimulationConfig]":
    """What is simulated: one configuration a survey, which differ by nothing but the survey."""
    from lens_pipeline.simulation import DEFAULT_SURVEY, load_config

    names = settings.survey or (DEFAULT_SURVEY,)
    configs = [load_config(name, settings.simulation) for name in names]
    for name, config in zip(settings.surveys, configs, strict=False):
        if config.survey.name != name:
            raise InputError(
                f"LENS_SURVEY: {name}: the simulation calls it {config.survey.name}; name it so"
            )
    return configs


def catalogue_recipe(settings: Settings) -> Recipe:
    from lens_pipeline.catalogue.table import source_fingerprint

    if settings.is_simulated:
        from lens_pipeline.catalogue.images import files_fingerprint
        from lens_pipeline.simulation.pool import pool_catalogue

        preset = presets.chosen(settings)
        configs = simulated(settings)
        config = configs[0]
        inputs = {}
        for number, psf in enumerate(config.survey.psfs):
            inputs[f"psf {number}"] = source_fingerprint(psf)
        if config.hosts is not None:
            options = settings.storage_options
            images = pool_catalogue(config.hosts, options).references
            inputs["hosts"] = source_fingerprint(config.hosts, options)
            inputs["images"] = files_fingerprint(images, options)
        libraries = ("torch", "caustics", "astropy", "numpy", "scipy", "scikit-image", "pandas")
        return Recipe(
            stage="cutout_catalogue",
            modules=(SIMULATE,),
            libraries=(*libraries, "pyarrow"),
            inputs=inputs,
            settings={
                "configs": [one.model_dump(mode="json") for one in configs],
                "n": settings.n_cutouts or preset.n_cutouts,
                "seed": settings.seed,
                "image_size": presets.image_size(settings),
            },
        )
    return table_recipe(settings, source_fingerprint(settings.source, settings.storage_options))


def table_recipe(settings: Settings, source: str) -> Recipe:
    """source: a hash of the user's own catalogue."""
    return Recipe(
        stage="cutout_catalogue",
        modules=(TABLE,),
        libraries=("astropy", "pandas", "pyarrow"),
        inputs={"source": source},
        settings={"source": settings.source},
    )


def make_catalogue(settings: Settings, recipe: Recipe, out: Path) -> None:
    """Raises NoAnswerError where what was read is not what `recipe` says."""
    if settings.is_simulated:
        from lens_pipeline.simulation.simulate import simulate_surveys

        arguments = recipe.settings | {"configs": simulated(settings)}
        simulate_surveys(out, **arguments, storage_options=settings.storage_options)
    else:
        from lens_pipeline.catalogue.table import read_catalogue

        catalogue = read_catalogue(settings.source, settings.storage_options)
        catalogue.table.to_parquet(out / "catalogue.parquet", index=False)
    _check_unchanged(settings.source, recipe.key, catalogue_recipe(settings).key)


def _check_unchanged(source: str, before: str, after: str) -> None:
    """Else what was read would be kept as what was there before, and taken for that again."""
    if after != before:
        raise NoAnswerError(f"{source}: changed while it was read; try again once it rests")


def catalogue_of(settings: Settings, upstream: Made, survey: str | None = None) -> "Catalogue":
    """The validated catalogue: of LENS_SURVEY, or of one of these; messages about it name the
    user's own source."""
    from lens_pipeline.catalogue.table import read_catalogue

    whole = replace(read_catalogue(upstream.folder / "catalogue.parquet"), source=settings.source)
    of_one = settings.is_simulated and not settings.surveys
    if of_one or not settings.survey:
        return whole
    return whole.of_surveys([survey] if survey else settings.survey, settings.seed)


@stage(
    CATALOGUE,
    modules=(SIMULATE, TABLE),
    by_chance=True,  # the source may lie in a store
    group_name="data",
    kinds={"parquet"},
    by_schedule=True,
    check_specs=[
        dg.AssetCheckSpec(
            "no_position_is_in_two_splits",
            asset=CATALOGUE,
            description="No two splits hold cutouts of one place on the sky, as of one galaxy in "
            "two surveys (give those one group). Of rows with `ra` and `dec`.",
        )
    ],
)
def cutout_catalogue(lens: LensHome) -> dg.MaterializeResult:
    """Which galaxies there are, and which of them are lenses: a validated table, one row a cutout.

    The user's own (LENS_SOURCE), or the simulator's, with every parameter of what it drew.
    """
    from lens_pipeline.catalogue.dataset import PARTS
    from lens_pipeline.catalogue.splits import assign_splits, class_counts

    settings = lens.settings
    recipe = catalogue_recipe(settings)
    root = settings.home / "catalogue"
    step = run_stage(
        CATALOGUE, recipe, root, lambda out: make_catalogue(settings, recipe, out), settings
    )
    rows = catalogue_of(settings, Made(str(step.folder), step.content)).table
    labels, split = rows["label"], assign_splits(rows, settings.seed)
    of_splits = digest([step.content, settings.survey, settings.seed])
    return result(
        step,
        {
            "source": settings.source,
            "cutouts": len(rows),
            "lenses": int((labels == 1).sum()),
            "non-lenses": int((labels == 0).sum()),
            "unlabelled": int(labels.isna().sum()),
            "groups": int(rows["group"].nunique()),
            "splits": _counts_table({p: class_counts(labels[split == p]) for p in PARTS}, "split"),
            **({"kinds": _kinds_table(rows)} if "kind" in rows else {}),
            **({"surveys": _surveys_table(rows)} if "survey" in rows else {}),
            "first rows": table(rows.head(FIRST)),
            "dagster/row_count": len(rows),
            "dagster/column_schema": column_schema(rows, COLUMNS),
        },
        checks=(no_position_is_in_two_splits(rows, split, of_splits, settings),),
    )


def _counts_table(counts: Mapping[str, Mapping[str, int]], by: str) -> dg.MetadataValue:
    """Cutouts of each class by split or survey, and the fraction of lenses among the labelled."""
    import pandas as pd

    rows = pd.DataFrame(counts).T.rename_axis(by).reset_index()
    labelled = rows["n_lens"] + rows["n_nonlens"]
    return table(rows.assign(lens_fraction=rows["n_lens"] / labelled))


def _kinds_table(rows: "pd.DataFrame") -> dg.MetadataValue:
    """How many cutouts there are of each kind, of the most frequent ones."""
    return table(rows["kind"].value_counts().rename("n").head(FIRST).reset_index())


def _surveys_table(rows: "pd.DataFrame") -> dg.MetadataValue:
    """Cutouts of each class by survey: where their mixtures differ, a network may learn to tell the
    surveys in place of the lenses."""
    from lens_pipeline.catalogue.splits import class_counts

    by_survey = rows.groupby(rows["survey"].fillna(""), sort=True)["label"]
    return _counts_table({str(name): class_counts(label) for name, label in by_survey}, "survey")


def draw_training_cutouts(dataset: "Dataset") -> bytes:
    """Or others, where a survey has none to train on."""
    from lens_pipeline.catalogue.dataset import PARTS
    from lens_pipeline.evaluation.plots import first_cutouts_sheet, jpeg_bytes

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
    catalogue = catalogue_of(settings, upstream, survey)
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
            _check_unchanged(settings.source, recipe.inputs["images"], images)

    root = settings.home / "dataset"
    step = run_stage(DATASET, recipe, root, build, settings, survey=survey)
    dataset = open_dataset(step.folder)
    sheet = drawn("cutouts.jpg", step, lambda: draw_training_cutouts(dataset), settings)
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
            "splits": _counts_table(dataset.facts["splits"], "split"),
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
