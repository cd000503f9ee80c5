"""From the dataset to shards, here and in the cloud: `lens_shards`, `cloud_shards`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from lens_pipeline.defs.dataset_checks import check_not_refused
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.shown import table
from lens_pipeline.defs.stages import (
    AGAIN,
    CLOUD,
    DATASET,
    LOCATION,
    OWNERS,
    PUBLISHED_FROM,
    SHARDS,
    begun,
    log,
    made,
    quiet,
    result,
    run_stage,
    source_of,
    stage,
)
from lens_pipeline.defs.surveys import of_every_survey
from lens_pipeline.errors import InputError, NoAnswerError, told_of
from lens_pipeline.settings import Settings
from lens_pipeline.steps import Recipe, Step, run_step

WRITER = "lens_pipeline.shards.writer"
PUBLISH = "lens_pipeline.shards.cloud"
MERGE = "lens_pipeline.shards.merge"
SHOWN = 100  # shards in a table

if TYPE_CHECKING:
    from lens_pipeline.shards.manifest import Manifest


@stage(
    SHARDS,
    modules=(WRITER,),
    by_chance=False,
    by_survey=True,
    deps=[DATASET],
    group_name="data",
    kinds={"webdataset"},
    by_schedule=True,
    check_specs=[
        dg.AssetCheckSpec(
            "manifest_is_whole",
            asset=SHARDS,
            blocking=True,
            description="Every file that the manifest lists is there, to the byte.",
        )
    ],
)
def lens_shards(
    context: dg.AssetExecutionContext, lens: LensHome, survey: str | None
) -> dg.MaterializeResult:
    """The same cutouts packed for training: a few large files in place of a million small ones.

    WebDataset tars of every split (float16), an index for random access, and a manifest, whose
    sha256 is the dataset version.
    """
    from lens_pipeline.shards.store import read_manifest
    from lens_pipeline.shards.verify import verify_shards

    def write(out: Path) -> None:
        from lens_pipeline.shards.writer import write_shards  # loads torch

        write_shards(upstream.folder, out)

    upstream = made(context, DATASET, survey)
    check_not_refused(upstream, lens.settings)
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
        write,
        lens.settings,
        survey=survey,
    )
    manifest = read_manifest(step.folder)
    problems = verify_shards(step.folder, every_byte=lens.settings.verify)
    if problems:
        log.error("  %s; make the shards again with --verify (LENS_VERIFY=true)", problems[0])
    return result(
        step,
        _described(manifest),
        checks=(
            dg.AssetCheckResult(
                check_name="manifest_is_whole",
                passed=not problems,
                metadata=_counted(problems),
            ),
        ),
    )


def _described(manifest: "Manifest") -> dict[str, Any]:
    """What the UI shows of shards, wherever they lie."""
    import pandas as pd

    rows = pd.DataFrame([vars(shard) for shard in manifest.shards[:SHOWN]])
    return {
        "dataset version": manifest.dataset_version,
        "shards": len(manifest.shards),
        "samples": sum(shard.samples for shard in manifest.shards),
        "MB": sum(shard.bytes for shard in manifest.shards) / 1e6,
        "format": dg.MetadataValue.json(manifest.format),
        "table": table(
            rows.assign(MB=rows["bytes"] / 1e6, sha256=rows["sha256"].str[:12])[
                ["name", "split", "samples", "n_lens", "n_nonlens", "MB", "sha256"]
            ]
        ),
    }


def _counted(problems: list[str]) -> dict[str, Any]:
    return {"problems": len(problems), "at most": 0, "first": "; ".join(problems[:5])}


@stage(
    CLOUD,
    modules=(PUBLISH, MERGE),
    by_chance=True,
    deps=[of_every_survey(SHARDS)],
    group_name="data",
    kinds={"webdataset"},
    by_schedule=True,
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
    """The shards where every machine can read them, under their version, compared once there.

    At LENS_CLOUD_URL: a folder, `s3://`, `gs://`. Those of several surveys are one version there.
    """
    from lens_pipeline.shards.cloud import publish_shards, published_problems
    from lens_pipeline.shards.store import read_manifest

    settings = lens.settings
    ended = begun(CLOUD)
    storage = settings.storage_options
    shards = _merged(context, settings) if settings.surveys else made(context, SHARDS).folder
    try:
        published = publish_shards(
            shards, settings.cloud, storage_options=storage, every_byte=settings.verify
        )
    except InputError as problem:
        raise told_of("LENS_CLOUD_URL", problem) from None
    problems = published_problems(shards, published.url, storage, published.states)
    reused = not published.uploaded
    seconds = ended(reused)
    # What lies there is decided by its version alone.
    key = published.dataset_version[:32]
    step = Step(shards, key, published.dataset_version, seconds, reused)
    return result(
        step,
        {
            **_described(read_manifest(shards)),
            "uploaded": len(published.uploaded),
            "already there": len(published.skipped),
            "uploaded MB": published.bytes / 1e6,
            PUBLISHED_FROM: str(shards),
        },
        checks=(
            dg.AssetCheckResult(
                check_name="cloud_equals_manifest",
                passed=not problems,
                metadata=_counted(problems),
            ),
        ),
        location=published.url,
    )


def _merged(context: dg.AssetExecutionContext, settings: Settings) -> Path:
    """The folder with the shards of all surveys."""
    from lens_pipeline.shards.merge import merge_shards

    parts = {survey: made(context, SHARDS, survey) for survey in settings.surveys}
    recipe = Recipe(
        stage="merged_shards",
        modules=(MERGE,),
        libraries=("pandas", "pyarrow"),
        inputs={survey: part.content for survey, part in parts.items()},
    )
    folders = {survey: part.folder for survey, part in parts.items()}
    return run_step(
        recipe,
        settings.home / "shards",
        lambda out: merge_shards(folders, out),
        verify=settings.verify,
    ).folder


def observed_shards(retries: bool) -> dg.AssetsDefinition:
    """`cloud_shards` where another deployment publishes them: the newest version at LENS_SOURCE is
    observed, and what was made from an older one is then out of date. retries: as of a stage's
    asset."""

    def cloud_shards(lens: LensHome) -> dg.ObserveResult:
        from lens_pipeline.shards.store import read_manifest
        from lens_pipeline.shards.versions import published_version

        settings = lens.settings
        try:
            url = published_version(settings.source, settings.storage_options)
            manifest = read_manifest(url, settings.storage_options)
        except NoAnswerError as problem:
            if not retries:
                raise
            again = AGAIN.max_retries, AGAIN.delay
            raise dg.RetryRequested(*again) from problem  # what is observed takes no policy
        return dg.ObserveResult(
            asset_key=CLOUD,
            data_version=dg.DataVersion(manifest.dataset_version[:32]),
            metadata={
                LOCATION: url,
                "content": manifest.dataset_version,
                **_described(manifest),
            },
        )

    spec = dg.AssetSpec(
        CLOUD,
        group_name="data",
        kinds={"webdataset"},
        owners=OWNERS,
        metadata=source_of(cloud_shards),
        description="The newest version of the shards that are published at LENS_SOURCE.",
    )
    with quiet():
        return dg.multi_observable_source_asset(specs=[spec])(cloud_shards)
