"""From a source to a catalogue: `cutout_catalogue`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from lens_pipeline import presets
from lens_pipeline.catalogue.column_help import COLUMNS
from lens_pipeline.defs.dataset_checks import no_position_is_in_two_splits
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.shown import FIRST, column_schema, table
from lens_pipeline.defs.stages import CATALOGUE, result, run_stage, stage
from lens_pipeline.defs.surveys import check_surveys_named
from lens_pipeline.files import digest
from lens_pipeline.settings import Settings
from lens_pipeline.steps import Recipe, check_unchanged

if TYPE_CHECKING:
    import pandas as pd

    from lens_pipeline.catalogue.table import Catalogue

SIMULATE = "lens_pipeline.simulation.simulate"
TABLE = "lens_pipeline.catalogue.table"


def catalogue_recipe(settings: Settings) -> Recipe:
    from lens_pipeline.catalogue.table import source_fingerprint

    if settings.is_simulated:
        from lens_pipeline.simulation import load_configs

        preset = presets.chosen(settings)
        configs = load_configs(settings.survey, settings.simulation)
        config = configs[0]
        inputs = {}
        for number, psf in enumerate(config.survey.psfs):
            inputs[f"psf {number}"] = source_fingerprint(psf)
        if config.hosts is not None:
            # They load torch and astropy.
            from lens_pipeline.catalogue.images import files_fingerprint
            from lens_pipeline.simulation.pool import pool_catalogue

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
        from lens_pipeline.simulation import load_configs
        from lens_pipeline.simulation.simulate import simulate_surveys

        configs = load_configs(settings.survey, settings.simulation)
        arguments = recipe.settings | {"configs": configs}
        simulate_surveys(out, **arguments, storage_options=settings.storage_options)
    else:
        from lens_pipeline.catalogue.table import read_catalogue

        catalogue = read_catalogue(settings.source, settings.storage_options)
        catalogue.table.to_parquet(out / "catalogue.parquet", index=False)
    check_unchanged(settings.source, recipe.key, catalogue_recipe(settings).key)


def catalogue_of(settings: Settings, folder: Path, survey: str | None = None) -> "Catalogue":
    """The validated catalogue: of LENS_SURVEY, or of one of these; messages about it name the
    user's own source."""
    from lens_pipeline.catalogue.table import read_catalogue

    whole = replace(read_catalogue(folder / "catalogue.parquet"), source=settings.source)
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
def cutout_catalogue(context: dg.AssetExecutionContext, lens: LensHome) -> dg.MaterializeResult:
    """Which galaxies there are, and which of them are lenses: a validated table, one row a cutout.

    The user's own (LENS_SOURCE), or the simulator's, with every parameter of what it drew.
    """
    from lens_pipeline.catalogue.splits import PARTS, assign_splits, class_counts

    check_surveys_named(context)
    settings = lens.settings
    recipe = catalogue_recipe(settings)
    root = settings.home / "catalogue"
    step = run_stage(
        CATALOGUE, recipe, root, lambda out: make_catalogue(settings, recipe, out), settings
    )
    rows = catalogue_of(settings, step.folder).table
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
            "splits": counts_table({p: class_counts(labels[split == p]) for p in PARTS}, "split"),
            **({"kinds": _kinds_table(rows)} if "kind" in rows else {}),
            **({"surveys": _surveys_table(rows)} if "survey" in rows else {}),
            "first rows": table(rows.head(FIRST)),
            "dagster/row_count": len(rows),
            "dagster/column_schema": column_schema(rows, COLUMNS),
        },
        checks=(no_position_is_in_two_splits(rows, split, of_splits, settings),),
    )


def counts_table(counts: Mapping[str, Mapping[str, int]], by: str) -> dg.MetadataValue:
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
    return counts_table({str(name): class_counts(label) for name, label in by_survey}, "survey")
