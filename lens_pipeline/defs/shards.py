"""From the dataset to shards, here and in the cloud: `lens_shards`, `cloud_shards`."""

import time
import warnings
from pathlib import Path

import dagster as dg

from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.stages import (
    CLOUD,
    DATASET,
    SHARDS,
    code_version,
    log,
    made,
    result,
    run_stage,
)
from lens_pipeline.errors import InputError
from lens_pipeline.steps import Recipe, Step

WRITER = "lens_pipeline.shards.writer"
PUBLISH = "lens_pipeline.shards.cloud"


@dg.asset(
    key=SHARDS,
    deps=[DATASET],
    group_name="data",
    kinds={"webdataset"},
    code_version=code_version(WRITER),
)
def lens_shards(context: dg.AssetExecutionContext, lens: LensHome) -> dg.MaterializeResult:
    """WebDataset tars of every split (float16), an index for random access, and a manifest.

    The dataset version is the manifest's sha256.
    """
    from lens_pipeline.shards.manifest import read_manifest
    from lens_pipeline.shards.writer import write_shards

    upstream = made(context, DATASET)
    recipe = Recipe(
        stage="lens_shards",
        modules=(WRITER,),
        libraries=("torch", "numpy", "pandas", "pyarrow", "pillow"),
        inputs={"dataset": upstream.content},
    )
    step = run_stage(
        SHARDS,
        recipe,
        lens.settings.home / "shards",
        lambda out: write_shards(upstream.folder, out),
        lens.settings,
    )
    manifest = read_manifest(step.folder)
    return result(
        step,
        {
            "dataset version": manifest.dataset_version,
            "shards": len(manifest.shards),
            "samples": sum(shard.samples for shard in manifest.shards),
            "MB": sum(shard.bytes for shard in manifest.shards) / 1e6,
        },
    )


@dg.asset(
    key=CLOUD,
    deps=[SHARDS],
    group_name="data",
    kinds={"webdataset"},
    code_version=code_version(PUBLISH),
    check_specs=[
        dg.AssetCheckSpec(
            "cloud_equals_manifest",
            asset=CLOUD,
            blocking=True,
            description="Every shard at LENS_CLOUD_URL has the size and checksum of the manifest.",
        )
    ],
)
def cloud_shards(context: dg.AssetExecutionContext, lens: LensHome) -> dg.MaterializeResult:
    """The shards at LENS_CLOUD_URL (a folder, `s3://`, `gs://`), under their version, verified."""
    from lens_pipeline.shards.cloud import publish_shards, published_problems

    settings = lens.settings
    begun = time.perf_counter()
    log.info("cloud_shards ...")
    upstream = made(context, SHARDS)
    shards, storage = Path(upstream.location), settings.storage_options
    try:
        published = publish_shards(shards, settings.cloud, storage_options=storage)
    except InputError as problem:
        raise InputError(f"LENS_CLOUD_URL: {problem}") from None
    problems = published_problems(shards, published.url, storage)
    seconds = time.perf_counter() - begun
    reused = not published.uploaded
    log.info("cloud_shards: %s in %.1f s", "reused" if reused else "made", seconds)
    # What lies there is decided by its version alone.
    key = published.dataset_version[:32]
    step = Step(shards, key, published.dataset_version, seconds, reused)
    return result(
        step,
        {
            "dataset version": published.dataset_version,
            "uploaded": len(published.uploaded),
            "already there": len(published.skipped),
            "MB": published.bytes / 1e6,
        },
        checks=(
            dg.AssetCheckResult(
                check_name="cloud_equals_manifest",
                passed=not problems,
                metadata={"problems": len(problems), "first": "; ".join(problems[:5])},
            ),
        ),
        location=published.url,
    )


def observed_shards() -> dg.SourceAsset:
    """`cloud_shards` where another deployment publishes them: the newest version at LENS_SOURCE is
    observed, and what was made from an older one is then out of date."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)

        @dg.observable_source_asset(
            key=CLOUD,
            group_name="data",
            description="The newest version of the shards that are published at LENS_SOURCE.",
        )
        def cloud_shards(lens: LensHome) -> dg.ObserveResult:
            from lens_pipeline.shards.cloud import published_version
            from lens_pipeline.shards.manifest import read_manifest

            settings = lens.settings
            url = published_version(settings.source, settings.storage_options)
            manifest = read_manifest(url, settings.storage_options)
            return dg.ObserveResult(
                data_version=dg.DataVersion(manifest.dataset_version[:32]),
                metadata={
                    "location": url,
                    "content": manifest.dataset_version,
                    "dataset version": manifest.dataset_version,
                    "shards": len(manifest.shards),
                    "samples": sum(shard.samples for shard in manifest.shards),
                    "MB": sum(shard.bytes for shard in manifest.shards) / 1e6,
                },
            )

    return cloud_shards
