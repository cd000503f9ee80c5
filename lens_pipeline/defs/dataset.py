"""From a source to the processed dataset: `cutout_catalogue`, `processed_dataset`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from lens_pipeline import presets
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.stages import (
    CATALOGUE,
    DATASET,
    Made,
    code_version,
    drawn,
    made,
    picture,
    result,
    run_stage,
)
from lens_pipeline.settings import Settings
from lens_pipeline.steps import Recipe

if TYPE_CHECKING:
    from lens_pipeline.catalogue.dataset import Dataset
    from lens_pipeline.catalogue.table import Catalogue

SIMULATION = "lens_pipeline.simulation.simulate"
TABLE = "lens_pipeline.catalogue.table"
BUILD = "lens_pipeline.catalogue.dataset"


def catalogue_recipe(settings: Settings) -> Recipe:
    from lens_pipeline.catalogue.table import source_fingerprint

    if settings.source == "simulation":
        from lens_pipeline.catalogue.images import files_fingerprint
        from lens_pipeline.simulation import load_config
        from lens_pipeline.simulation.pool import pool_catalogue

        preset = presets.chosen(settings)
        config = load_config(settings.survey, settings.simulation)
        inputs = {}
        if config.survey.psf is not None:
            inputs["psf"] = source_fingerprint(config.survey.psf)
        if config.hosts is not None:
            options = settings.storage_options
            images = pool_catalogue(config.hosts, options).references
            inputs["hosts"] = source_fingerprint(config.hosts, options)
            inputs["images"] = files_fingerprint(images, options)
        libraries = ("torch", "caustics", "astropy", "numpy", "scipy", "scikit-image", "pandas")
        return Recipe(
            stage="cutout_catalogue",
            modules=(SIMULATION,),
            libraries=(*libraries, "pyarrow"),
            inputs=inputs,
            settings={
                "config": config.model_dump(mode="json"),
                "n": settings.n_cutouts or preset.n_cutouts,
                "seed": settings.seed,
                "image_size": presets.image_size(settings),
            },
        )
    return Recipe(
        stage="cutout_catalogue",
        modules=(TABLE,),
        libraries=("astropy", "pandas", "pyarrow"),
        inputs={"source": source_fingerprint(settings.source, settings.storage_options)},
        settings={"source": settings.source},
    )


def make_catalogue(settings: Settings, recipe: Recipe, out: Path) -> None:
    if settings.source == "simulation":
        from lens_pipeline.simulation import load_config
        from lens_pipeline.simulation.simulate import simulate_catalogue

        config = load_config(settings.survey, settings.simulation)
        storage = settings.storage_options
        arguments = recipe.settings | {"config": config}
        simulate_catalogue(out, **arguments, storage_options=storage)
    else:
        from lens_pipeline.catalogue.table import read_catalogue

        catalogue = read_catalogue(settings.source, settings.storage_options)
        catalogue.table.to_parquet(out / "catalogue.parquet", index=False)


def catalogue_of(settings: Settings, upstream: Made) -> "Catalogue":
    """The validated catalogue; messages about it name the user's own source."""
    from lens_pipeline.catalogue.table import read_catalogue

    return replace(read_catalogue(upstream.folder / "catalogue.parquet"), source=settings.source)


@dg.asset(
    key=CATALOGUE,
    group_name="data",
    kinds={"parquet"},
    code_version=code_version(SIMULATION, TABLE),
)
def cutout_catalogue(lens: LensHome) -> dg.MaterializeResult:
    """A validated table, one row a cutout: the user's (LENS_SOURCE), or the simulator's."""
    settings = lens.settings
    recipe = catalogue_recipe(settings)
    root = settings.home / "catalogue"
    step = run_stage(
        CATALOGUE, recipe, root, lambda out: make_catalogue(settings, recipe, out), settings
    )
    table = catalogue_of(settings, Made(str(step.folder), step.content)).table
    labels = table["label"]
    return result(
        step,
        {
            "source": settings.source,
            "cutouts": len(table),
            "lenses": int((labels == 1).sum()),
            "non-lenses": int((labels == 0).sum()),
            "unlabelled": int(labels.isna().sum()),
            "groups": int(table["group"].nunique()),
        },
    )


def draw_training_cutouts(dataset: "Dataset") -> bytes:
    from lens_pipeline.evaluation.plots import first_cutouts_sheet, jpeg_bytes

    images, table = dataset.images("train"), dataset.table("train")
    return jpeg_bytes(first_cutouts_sheet(images, table, dataset.format.units))


@dg.asset(
    key=DATASET,
    deps=[CATALOGUE],
    group_name="data",
    kinds={"numpy"},
    code_version=code_version(BUILD),
    check_specs=[
        dg.AssetCheckSpec(
            "no_group_spans_two_splits",
            asset=DATASET,
            blocking=True,
            description="Rows of one group (host galaxy, sky region) are all in one split.",
        ),
        dg.AssetCheckSpec(
            "no_near_duplicates_across_splits",
            asset=DATASET,
            description="No two splits hold cutouts of the same sky (give those one group).",
        ),
    ],
)
def processed_dataset(context: dg.AssetExecutionContext, lens: LensHome) -> dg.MaterializeResult:
    """Cutouts float32 (n, bands, height, width) per split, in units of the background's sigma.

    `train`, `val`, `test`, `unlabelled`, each with its table; and the cutouts that were rejected.
    """
    from lens_pipeline.catalogue.dataset import (
        LIBRARIES,
        build_dataset,
        check_rejects,
        open_dataset,
    )
    from lens_pipeline.catalogue.images import files_fingerprint

    settings = lens.settings
    upstream = made(context, CATALOGUE)
    catalogue = catalogue_of(settings, upstream)
    inputs = {"catalogue": upstream.content}
    if settings.source != "simulation":
        inputs["images"] = files_fingerprint(catalogue.references, settings.storage_options)
    recipe = Recipe(
        stage="processed_dataset",
        modules=(BUILD,),
        libraries=LIBRARIES,
        inputs=inputs,
        settings={
            "image_size": presets.image_size(settings),
            "bands": settings.bands,
            "pad": settings.pad,
            "split_seed": settings.seed,
            "origin": settings.source,
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

    step = run_stage(DATASET, recipe, settings.home / "dataset", build, settings)
    dataset = open_dataset(step.folder)
    sheet = drawn("cutouts.jpg", step, lambda: draw_training_cutouts(dataset), settings)
    torn = dataset.groups_in_two_splits()
    duplicates = dataset.near_duplicates()
    rejects = dataset.rejects()
    # It may have been made when more were allowed.
    check_rejects(rejects, dataset.facts["n_rows"], settings.max_reject_fraction, settings.source)
    return result(
        step,
        {
            "cutouts": picture(sheet),
            "splits": dg.MetadataValue.json(dataset.facts["splits"]),
            "bands": ", ".join(dataset.format.bands),
            "units": dataset.format.units,
            "rejects": len(rejects),
            "reject fraction": len(rejects) / dataset.facts["n_rows"],
            "first rejects": dg.MetadataValue.md(rejects.head(20).to_csv(index=False, sep="|")),
        },
        checks=(
            dg.AssetCheckResult(
                check_name="no_group_spans_two_splits",
                passed=not torn,
                metadata={"groups": len(torn), "first": ", ".join(torn[:5])},
            ),
            dg.AssetCheckResult(
                check_name="no_near_duplicates_across_splits",
                passed=duplicates.empty,
                severity=dg.AssetCheckSeverity.WARN,
                metadata={
                    "pairs": len(duplicates),
                    "alike, but not compared": dataset.facts["n_alike_not_compared"],
                    "first": dg.MetadataValue.table(
                        [
                            dg.TableRecord({str(name): value for name, value in pair.items()})
                            for pair in duplicates.head(20).to_dict("records")
                        ],
                        dg.TableSchema([dg.TableColumn(str(name)) for name in duplicates]),
                    ),
                },
            ),
        ),
    )
