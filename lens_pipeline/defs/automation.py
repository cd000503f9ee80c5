"""Jobs over the asset graph."""

import dagster as dg

full_pipeline = dg.define_asset_job(
    "full_pipeline",
    selection=dg.AssetSelection.all(),
    description="From the source to a registered ensemble.",
)
