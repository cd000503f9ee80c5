"""What people are told: of runs and checks, schedules and sensors, and how."""

import json
from collections.abc import Callable

import dagster as dg
import pytest
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteRepositoryOrigin
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    ScheduleInstigatorData,
    TickData,
    TickStatus,
)
from dagster._utils.error import SerializableErrorInfo

from lens_pipeline.alerts import TRIES, alert
from lens_pipeline.errors import InputError
from lens_pipeline.settings import Settings
from lens_pipeline_tests.defs.conftest import Webhook
from lens_pipeline_tests.defs.ticks import Sensor


def test_an_alert_reaches_the_webhook_and_carries_no_secret(
    webhook: Webhook,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://lens:pw-of-lens@db/mlflow")
    monkeypatch.setenv("LENS_DEPLOYMENT", "staging")
    options = {"anon": False, "token": {"private": ["of-the-token"]}, "secret": "of-options"}
    monkeypatch.setenv("LENS_STORAGE_OPTIONS", json.dumps(options))
    alert(
        Settings.load(),
        "refused wJalrXUtnFEMI, of-the-token and of-options at "
        "postgresql://lens:pw-of-lens@db/mlflow",
        run="https://store/x?X-Amz-Signature=abcdef",
    )
    (content,) = webhook.posted
    assert content == {
        "text": "refused ***, *** and *** at postgresql://lens:***@db/mlflow",
        "deployment": "staging",
        "run": "https://store/x?***",
    }
    for secret in ("wJalrXUtnFEMI", "pw-of-lens", "t0ps3cret", "of-the-token", "of-options"):
        assert secret not in caplog.text


def test_an_alert_ends_with_the_page_of_its_run(
    webhook: Webhook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alert(Settings.load(), "a run failed", run="4ce1")
    monkeypatch.setenv("LENS_DAGSTER_PAGE", "https://dagster.example/lenses/")
    alert(Settings.load(), "a run failed", run="4ce1")
    alert(Settings.load(), "no run")
    link = "a run failed; see https://dagster.example/lenses/runs/4ce1"
    assert [content["text"] for content in webhook.posted] == ["a run failed", link, "no run"]
    assert f"alert: {link}" in caplog.text


def test_a_webhook_that_cannot_be_told_is_an_error_that_does_not_show_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("LENS_WEBHOOK_URL", "http://127.0.0.1:9/hooks/t0ps3cret")
    with pytest.raises(InputError, match="LENS_WEBHOOK_URL") as problem:
        alert(Settings.load(), "anything")
    assert "t0ps3cret" not in str(problem.value)
    assert "t0ps3cret" not in repr(Settings.load())
    for wrong in (
        *("hooks.example/t0ps3cret", "https://hooks.example/t0p s3cret", "https:///s3cret"),
        *("https://lens:t0ps3cret@hooks.example/x", "https://hooks.example/t0ps3crét"),
    ):
        monkeypatch.setenv("LENS_WEBHOOK_URL", wrong)
        with pytest.raises(InputError, match="LENS_WEBHOOK_URL") as problem:
            Settings.load()
        assert "s3cr" not in str(problem.value)
    for wrong in ("https://hooks.example:t0ps3cret/x", "http://hooks..example/t0ps3cret"):
        monkeypatch.setenv("LENS_WEBHOOK_URL", wrong)
        with pytest.raises(InputError, match="^LENS_WEBHOOK_URL: is no address of a server; corr"):
            alert(Settings.load(), "anything")


def test_a_webhook_that_has_moved_is_one_that_cannot_be_told(webhook: Webhook) -> None:
    """A redirection is followed by a GET, without the text."""
    webhook.answers = TRIES * [302]
    with pytest.raises(InputError, match=r"LENS_WEBHOOK_URL: cannot be told \(HTTP Error 302"):
        alert(Settings.load(), "anything")
    assert webhook.posted == []


BEGUN = 1_790_000_000.0  # 2026-09-21 14:13 UTC


def ticked(instance: dg.DagsterInstance, name: str, status: TickStatus, moment: float) -> None:
    """Let a schedule or sensor have had a tick that ended so."""
    kind = InstigatorType.SCHEDULE if name.endswith("ing") else InstigatorType.SENSOR
    code = RegisteredCodeLocationOrigin("lens_pipeline")
    origin = RemoteRepositoryOrigin(code, "__repository__").get_instigator_origin(name)
    data = ScheduleInstigatorData("0 3 * * 1") if kind is InstigatorType.SCHEDULE else None
    state = InstigatorState(origin, kind, InstigatorStatus.RUNNING, data)
    if instance.get_instigator_state(origin.get_id(), state.selector_id) is None:
        instance.add_instigator_state(state)
    error = None
    if status is TickStatus.FAILURE:
        first = SerializableErrorInfo("lens_pipeline.errors.InputError: no\n source\n", [], None)
        error = SerializableErrorInfo("Error in config", [], None, cause=first)
    instance.create_tick(
        TickData(
            *(origin.get_id(), name, kind, status, moment),
            run_ids=[],
            error=error,
            selector_id=state.selector_id,
        )
    )


def test_of_several_that_fail_none_is_told_of_twice_where_the_webhook_ends(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    sensor = Sensor("failed_ticks", instance)
    sensor.tick()
    for name in ("nightly_cleaning", "weekly_retraining"):
        ticked(instance, name, TickStatus.FAILURE, BEGUN)
    webhook.answers = [200, *TRIES * [503]]
    for _ in range(3):
        sensor.tick()
    assert [text.split()[2] for text in webhook.texts] == ["nightly_cleaning", "weekly_retraining"]


def test_schedules_and_sensors_that_fail_are_told_of_until_they_work(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    """A schedule at once, for its next tick is in a week; a sensor when it fails again."""
    moment = BEGUN

    def ended(name: str, status: TickStatus) -> None:
        nonlocal moment
        moment += 60
        ticked(instance, name, status, moment)

    sensor = Sensor("failed_ticks", instance)
    sensor.tick()
    for name in ("weekly_retraining", "source_changed", "follow_up"):
        ended(name, TickStatus.SKIPPED)
    ended("weekly_retraining", TickStatus.FAILURE)
    ended("source_changed", TickStatus.FAILURE)
    for _ in range(2):
        sensor.tick()
    first = "the schedule weekly_retraining failed at its tick of 2026-09-21 14:17 UTC: no source"
    assert [content["text"] for content in webhook.posted] == [first]
    ended("source_changed", TickStatus.FAILURE)
    ended("weekly_retraining", TickStatus.SUCCESS)
    for _ in range(2):
        sensor.tick()
    ended("source_changed", TickStatus.SUCCESS)
    ended("weekly_retraining", TickStatus.FAILURE)
    sensor.tick()
    told = [content["text"].partition(" failed")[0] for content in webhook.posted]
    both = "the schedule weekly_retraining", "the sensor source_changed"
    assert told == [*both, both[0]]


@pytest.fixture
def failed(instance: dg.DagsterInstance) -> Callable[[], str]:
    """Makes a run that fails: its id."""

    @dg.op
    def spoils() -> None:
        raise InputError("catalogue.csv: row 7: label 2 is neither 0 nor 1")

    @dg.job
    def failing() -> None:
        spoils()

    def run() -> str:
        return failing.execute_in_process(instance=instance, raise_on_error=False).run_id

    return run


def test_a_failed_run_is_told_once_with_where_and_why(
    instance: dg.DagsterInstance, failed: Callable[[], str], webhook: Webhook
) -> None:
    failed()  # before anyone was watching
    sensor = Sensor("failed_runs", instance)
    sensor.tick()
    run = failed()
    for _ in range(2):
        sensor.tick()
    (told,) = webhook.posted
    assert told["text"] == (
        f"run {run[:8]} of failing failed: spoils: catalogue.csv: row 7: label 2 is neither 0 nor 1"
    )
    assert (told["run"], told["job"]) == (run, "failing")


@pytest.mark.parametrize("deleted", [1, 2])
def test_a_failed_run_is_told_where_others_were_deleted(
    deleted: int, instance: dg.DagsterInstance, failed: Callable[[], str], webhook: Webhook
) -> None:
    """SQLite gives the numbers of their events to those that come next."""
    runs = [failed()]
    sensor = Sensor("failed_runs", instance)
    sensor.tick()
    runs.append(failed())
    sensor.tick()
    for run in runs[-deleted:]:
        instance.delete_run(run)
    webhook.posted.clear()
    later = [failed()]
    sensor.tick()
    later.append(failed())
    for _ in range(2):
        sensor.tick()
    assert [told["run"] for told in webhook.posted] == later


def test_what_a_former_version_was_told_of_is_not_told_again(
    instance: dg.DagsterInstance, failed: Callable[[], str], webhook: Webhook
) -> None:
    failed()
    sensor = Sensor("failed_runs", instance)
    sensor.tick()
    assert sensor.cursor is not None
    sensor.cursor = json.dumps({"record_id": json.loads(sensor.cursor)["record"]})
    for _ in range(2):
        sensor.tick()
    assert webhook.posted == []
    run = failed()
    sensor.tick()
    assert [told["run"] for told in webhook.posted] == [run]


def test_of_what_was_made_by_a_click_the_assets_are_named(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    names = ("lastro", "resnet18", "deeplens", "vit_b_16")

    def made(name: str) -> dg.AssetsDefinition:
        @dg.asset(key=["checkpoints", name])
        def checkpoint() -> None:
            if name == "lastro":
                raise OSError("no room")

        return checkpoint

    sensor = Sensor("failed_runs", instance)
    sensor.tick()
    job = dg.Definitions([made(name) for name in names]).resolve_implicit_global_asset_job_def()
    for chosen in (names[:1], names):
        keys = [dg.AssetKey(["checkpoints", name]) for name in chosen]
        job.execute_in_process(instance=instance, raise_on_error=False, asset_selection=keys)
    sensor.tick()
    said = [text.partition(" of ")[2] for text in webhook.texts]
    reason = "failed: checkpoints/lastro: OSError: no room"
    assert said == [
        f"checkpoints/lastro {reason}",
        f"checkpoints/deeplens, checkpoints/lastro, checkpoints/resnet18 and 1 more {reason}",
    ]


def test_a_failed_run_that_the_webhook_does_not_take_is_told_later(
    instance: dg.DagsterInstance, failed: Callable[[], str], webhook: Webhook
) -> None:
    sensor = Sensor("failed_runs", instance)
    sensor.tick()
    first = failed()
    webhook.answers = TRIES * [503]
    with pytest.raises(InputError, match="LENS_WEBHOOK_URL"):
        sensor.tick()
    second = failed()
    sensor.tick()
    assert [told["run"] for told in webhook.posted] == [first, second]
    third, fourth = failed(), failed()
    webhook.posted.clear()
    webhook.answers = [200, *TRIES * [503]]
    sensor.tick()
    assert [told["run"] for told in webhook.posted] == [third]
    sensor.tick()
    assert [told["run"] for told in webhook.posted] == [third, fourth]


def test_checks_that_warn_are_told_of_runs_that_ended_well(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    """What unattended runs find is on the pages alone otherwise."""
    names = ("drifts", "sound", "passes_the_gate")

    @dg.asset(check_specs=[dg.AssetCheckSpec(name, asset="processed_dataset") for name in names])
    def processed_dataset(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        failing = () if context.run.tags.get("sky") == "clear" else ("drifts", "passes_the_gate")
        results = [
            dg.AssetCheckResult(
                check_name=name,
                passed=name not in failing,
                severity=dg.AssetCheckSeverity.WARN,
                metadata={"largest change": 0.41234, "of": "sigma of r"},
            )
            for name in names
        ]
        return dg.MaterializeResult(check_results=results)

    job = dg.Definitions([processed_dataset]).resolve_implicit_global_asset_job_def()

    def run(**tags: str) -> str:
        key = [dg.AssetKey("processed_dataset")]
        return job.execute_in_process(instance=instance, asset_selection=key, tags=tags).run_id

    run()  # before anyone was watching
    sensor = Sensor("warning_checks", instance)
    sensor.tick()
    run(sky="clear")
    told = run()
    for _ in range(2):
        sensor.tick()
    assert webhook.texts == [
        f"run {told[:8]} of processed_dataset: check warns: drifts of processed_dataset "
        "(largest change 0.412)"
    ]
