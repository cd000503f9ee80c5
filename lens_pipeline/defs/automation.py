"""Jobs over the asset graph."""

import dagster as dg

from lens_pipeline.defs.stages import CLOUD

full_pipeline = dg.define_asset_job(
    "full_pipeline",
    # Of what is made elsewhere and only observed here, Dagster takes what is named.
    selection=dg.AssetSelection.all() | dg.AssetSelection.assets(CLOUD),
    description="From the source to a registered ensemble.",
)
