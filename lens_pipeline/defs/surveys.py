"""Surveys as partitions of the data: each is made, checked and looked at by itself, and what is
trained takes all of them together."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dagster as dg
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)

from lens_pipeline.defs.resources import LensHome
from lens_pipeline.errors import InputError
from lens_pipeline.files import digest
from lens_pipeline.settings import Settings

SEVERITIES = (dg.AssetCheckSeverity.WARN, dg.AssetCheckSeverity.ERROR)  # the worst last


def partitioned(surveys: Sequence[str]) -> dict[str, Any]:
    """What `dagster.asset` takes for an asset that is made survey by survey. One run makes all that
    are asked for, so that what follows sees them together."""
    return {
        "partitions_def": dg.StaticPartitionsDefinition([*surveys]),
        "backfill_policy": dg.BackfillPolicy.single_run(),
    }


def of_every_survey(key: dg.AssetKey) -> dg.AssetDep:
    """A dependency of what is of no survey, as a training, on all partitions of what is."""
    return dg.AssetDep(key, partition_mapping=dg.AllPartitionMapping())


def every_survey(settings: Settings) -> dict[str, str]:
    """The tags of a run that makes the data of all surveys; none where they are made as one."""
    if not settings.surveys:
        return {}
    first, *_, last = settings.surveys
    return {ASSET_PARTITION_RANGE_START_TAG: first, ASSET_PARTITION_RANGE_END_TAG: last}


def check_surveys_named(context: dg.AssetExecutionContext) -> None:
    """Raises InputError where a run makes anything survey by survey, and names none: also before
    what takes long and is of no survey."""
    if context.has_partition_key or context.has_partition_key_range:
        return
    assets = context.job_def.asset_layer
    for key in assets.asset_graph.toposorted_asset_keys:
        if key in assets.selected_asset_keys and assets.asset_graph.get(key).partitions_def:
            raise InputError(
                f"{key.to_user_string()}: is made survey by survey, and this run names none; "
                "choose its partitions"
            )


def over_surveys(
    body: Callable[..., dg.MaterializeResult],
) -> Callable[..., dg.MaterializeResult]:
    """The function of an asset that is made survey by survey, from that of one survey, which is
    given its name; None where it is not partitioned."""

    def every(context: dg.AssetExecutionContext, lens: LensHome) -> dg.MaterializeResult:
        if not context.assets_def.partitions_def:
            return body(context, lens, None)
        check_surveys_named(context)
        results = {survey: body(context, lens, survey) for survey in context.partition_keys}
        for survey, result in results.items():
            context.add_asset_metadata(result.metadata or {}, partition_key=survey)
        versions = [result.data_version for result in results.values()]
        # Of all that one run makes, Dagster takes one data version: where one survey's changes, the
        # others count as changed, too. What follows is reused all the same.
        of_all = versions[0] if len(versions) == 1 else dg.DataVersion(digest(versions)[:32])
        return dg.MaterializeResult(
            data_version=of_all,
            check_results=_together({s: result.check_results for s, result in results.items()}),
        )

    every.__name__, every.__doc__ = body.__name__, body.__doc__
    return every


def _together(
    results: Mapping[str, Sequence[dg.AssetCheckResult]],
) -> list[dg.AssetCheckResult]:
    """Each check once, over all surveys: passed where it is in each, else as severe as the worst;
    what it judged stands behind the survey's name."""
    return [
        dg.AssetCheckResult(
            check_name=of_check[0].check_name,
            passed=all(one.passed for one in of_check),
            severity=max(
                (one.severity for one in of_check if not one.passed),
                key=SEVERITIES.index,
                default=SEVERITIES[-1],
            ),
            description="; ".join(
                f"{survey}: {one.description}"
                for survey, one in zip(results, of_check, strict=True)
                if one.description
            )
            or None,
            metadata={
                f"{survey}: {name}": value
                for survey, one in zip(results, of_check, strict=True)
                for name, value in one.metadata.items()
            },
        )
        for of_check in zip(*results.values(), strict=True)
    ]
