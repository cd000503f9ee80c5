"""The one Dagster entry point."""

import dagster as dg

from lens_pipeline.defs.automation import full_pipeline
from lens_pipeline.defs.checkpoints import checkpoint_assets
from lens_pipeline.defs.dataset import cutout_catalogue, processed_dataset
from lens_pipeline.defs.ensemble import ensemble_asset, ensemble_evaluation
from lens_pipeline.defs.registry import registered_ensemble
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.shards import cloud_shards, lens_shards
from lens_pipeline.presets import chosen_members
from lens_pipeline.settings import Settings


def make_definitions(settings: Settings) -> dg.Definitions:
    """The asset graph with the members that the settings name."""
    return dg.Definitions(
        assets=[
            cutout_catalogue,
            processed_dataset,
            lens_shards,
            cloud_shards,
            *checkpoint_assets(settings),
            ensemble_asset(chosen_members(settings)),
            ensemble_evaluation,
            registered_ensemble,
        ],
        jobs=[full_pipeline],
        resources={"lens": LensHome()},
        # A step's process is forked from one that has loaded these definitions already.
        executor=dg.multiprocess_executor.configured(
            {"start_method": {"forkserver": {"preload_modules": ["lens_pipeline.definitions"]}}}
        ),
    )


defs = make_definitions(Settings.load())
