"""Which version of what is upstream a step takes, while others are made."""

from collections.abc import Callable

import dagster as dg
import pytest

from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.stages import made
from lens_pipeline.errors import InputError

UPSTREAM = dg.AssetKey("upstream")
RESUMES = {"dagster/is_resume_retry": "true"}  # as the daemon marks what it tries again


def version(name: str) -> dg.AssetMaterialization:
    return dg.AssetMaterialization(UPSTREAM, metadata={"location": "", "content": name})


@dg.asset
def upstream(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    return dg.MaterializeResult(metadata={"location": "", "content": context.run_id})


@dg.asset(deps=[upstream], required_resource_keys={"lens"})
def first(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    """Others publish a new version while it is made."""
    taken = made(context, UPSTREAM).content
    context.instance.report_runless_asset_event(version("new"))
    return dg.MaterializeResult(metadata={"taken": taken})


@dg.asset(deps=[upstream, first], required_resource_keys={"lens"})
def second(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    if context.run.tags.get("fails") == "true":
        raise RuntimeError
    return dg.MaterializeResult(metadata={"taken": made(context, UPSTREAM).content})


definitions = dg.Definitions(
    [upstream, first, second],
    jobs=[
        dg.define_asset_job("whole", [upstream, first, second]),
        dg.define_asset_job("training", [first, second]),
    ],
    resources={"lens": LensHome()},
    executor=dg.in_process_executor,
)


def whole() -> dg.JobDefinition:
    return definitions.resolve_job_def("whole")


def training() -> dg.JobDefinition:
    return definitions.resolve_job_def("training")


def taken(ran: dg.JobExecutionResult, name: str) -> str:
    (event,) = ran.asset_materializations_for_node(name)
    return str(event.metadata["taken"].value)


def test_all_steps_of_a_run_take_the_version_that_was_there_when_it_began(
    instance: dg.DagsterInstance,
) -> None:
    with pytest.raises(InputError, match="upstream was not made before this run; materialise it"):
        training().execute_in_process(instance=instance)
    instance.report_runless_asset_event(version("old"))
    # As by "Report materialization" on Dagster's pages, of which nothing can be taken.
    instance.report_runless_asset_event(dg.AssetMaterialization(UPSTREAM))
    ran = training().execute_in_process(instance=instance)
    assert [taken(ran, name) for name in ("first", "second")] == ["old", "old"]
    ran = training().execute_in_process(instance=instance)
    assert [taken(ran, name) for name in ("first", "second")] == ["new", "new"]
    ran = whole().execute_in_process(instance=instance)
    assert [taken(ran, name) for name in ("first", "second")] == [ran.run_id, ran.run_id]


@pytest.mark.parametrize("job", [whole, training])
def test_a_run_that_is_tried_again_goes_on_with_the_version_that_it_began_with(
    job: Callable[[], dg.JobDefinition], instance: dg.DagsterInstance
) -> None:
    instance.report_runless_asset_event(version("old"))
    tried = dg.execute_job(dg.reconstructable(job), instance, tags={"fails": "true"})
    began_with = taken(tried, "first")
    for fails in ("true", "false"):  # the second try is tried again, too
        assert not tried.success
        tried = dg.execute_job(
            dg.reconstructable(job),
            instance,
            tags=RESUMES | {"fails": fails},
            reexecution_options=dg.ReexecutionOptions.from_failure(tried.run_id, instance),
        )
    assert taken(tried, "second") == began_with
    anew = dg.execute_job(
        dg.reconstructable(training),
        instance,
        reexecution_options=dg.ReexecutionOptions(tried.run_id),
    )
    assert taken(anew, "first") == "new"
