"""What people are told of runs that fail and of new versions."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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
from mlflow.exceptions import MlflowException

from lens_pipeline.alerts import TRIES, alert
from lens_pipeline.cli import main
from lens_pipeline.errors import InputError
from lens_pipeline.registry import MODEL, Registry
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
    for wrong in ("hooks.example/t0ps3cret", "https://hooks.example/t0p s3cret", "https:///s3cret"):
        monkeypatch.setenv("LENS_WEBHOOK_URL", wrong)
        with pytest.raises(InputError, match="LENS_WEBHOOK_URL") as problem:
            Settings.load()
        assert "s3cret" not in str(problem.value)


def test_a_webhook_that_has_moved_is_one_that_cannot_be_told(webhook: Webhook) -> None:
    """A redirection is followed by a GET, without the text."""
    webhook.answers = TRIES * [302]
    with pytest.raises(InputError, match=r"LENS_WEBHOOK_URL: cannot be told \(HTTP Error 302"):
        alert(Settings.load(), "anything")
    assert webhook.posted == []


def test_schedules_and_sensors_that_fail_are_told_of_until_they_work(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    """A schedule at once, for its next tick is in a week; a sensor when it fails again."""
    moment = 1_790_000_000.0  # 2026-09-21 14:13 UTC

    def ended(name: str, status: TickStatus) -> None:
        nonlocal moment
        moment += 60
        kind = InstigatorType.SCHEDULE if name.endswith("ing") else InstigatorType.SENSOR
        code = RegisteredCodeLocationOrigin("lens_pipeline")
        origin = RemoteRepositoryOrigin(code, "__repository__").get_instigator_origin(name)
        data = ScheduleInstigatorData("0 3 * * 1") if kind is InstigatorType.SCHEDULE else None
        state = InstigatorState(origin, kind, InstigatorStatus.RUNNING, data)
        if instance.get_instigator_state(origin.get_id(), state.selector_id) is None:
            instance.add_instigator_state(state)
        error = None
        if status is TickStatus.FAILURE:
            first = SerializableErrorInfo(
                "lens_pipeline.errors.InputError: no\n source\n", [], None
            )
            error = SerializableErrorInfo("Error in config", [], None, cause=first)
        instance.create_tick(
            TickData(
                *(origin.get_id(), name, kind, status, moment),
                run_ids=[],
                error=error,
                selector_id=state.selector_id,
            )
        )

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


@dataclass
class Versions:
    """A real registry of versions without models, in LENS_HOME."""

    instance: dg.DagsterInstance
    registry: Registry

    def register(self, aliases: str, gate: str) -> str:
        """A new version, as `registered_ensemble` tells Dagster of it: its number."""
        client = self.registry.client
        with suppress(MlflowException):
            client.create_registered_model(MODEL)
        number = str(client.create_model_version(MODEL, "file:///none").version)
        if "challenger" in aliases:
            self.registry.set_alias("challenger", number)
        if "champion" in aliases:
            self.registry.promote(number)
        self.made(number, aliases, gate)
        return number

    def made(self, version: str, aliases: str, gate: str) -> None:
        facts = {"model": MODEL, "version": version, "aliases": aliases, "gate": gate}
        self.instance.report_runless_asset_event(
            dg.AssetMaterialization("registered_ensemble", metadata=facts)
        )


@pytest.fixture
def versions(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Versions:
    monkeypatch.setenv("LENS_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return Versions(instance, Registry(Settings.load()))


def test_each_new_version_is_told_once(
    instance: dg.DagsterInstance, versions: Versions, webhook: Webhook
) -> None:
    sensor = Sensor("new_challenger", instance)
    sensor.tick()  # there is no registry
    assert webhook.posted == []
    versions.register("challenger, champion", "")
    versions.made("1", "challenger, champion", "")
    for _ in range(3):
        sensor.tick()
    versions.register("challenger", "8 lenses, fewer than 50")
    for _ in range(2):
        sensor.tick()
    versions.made("1", "champion", "")  # made again from old settings
    sensor.tick()
    assert webhook.texts == [
        "lens_ensemble version 1 is registered; it has become champion",
        "lens_ensemble version 2 is registered; it stays challenger: 8 lenses, fewer than 50",
    ]


def test_of_several_versions_between_two_ticks_each_is_told(
    instance: dg.DagsterInstance, versions: Versions, webhook: Webhook
) -> None:
    sensor = Sensor("new_challenger", instance)
    versions.register("challenger, champion", "")
    sensor.tick()
    webhook.posted.clear()
    versions.register("challenger", "few lenses")
    versions.register("challenger, champion", "passed")
    versions.made("2", "", "few lenses")  # made again from old settings
    for _ in range(2):
        sensor.tick()
    assert webhook.texts == [
        "lens_ensemble version 2 is registered; it is not champion: few lenses; "
        "lens_ensemble version 3 is registered; it has become champion"
    ]
    assert webhook.posted[0]["version"] == "3"


def test_versions_of_another_registry_are_told_though_their_numbers_were(
    instance: dg.DagsterInstance,
    versions: Versions,
    webhook: Webhook,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sensor = Sensor("new_challenger", instance)
    for aliases in ("challenger, champion", "challenger"):
        versions.register(aliases, "few lenses")
        sensor.tick()
    webhook.posted.clear()
    with monkeypatch.context() as moved:
        moved.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
        Versions(instance, Registry(Settings.load())).register("challenger", "few lenses")
        for _ in range(2):
            sensor.tick()
    assert webhook.texts == [
        "lens_ensemble version 1 is registered; it stays challenger: few lenses"
    ]


def test_an_older_version_that_came_up_again_is_not_called_challenger(
    instance: dg.DagsterInstance, versions: Versions, webhook: Webhook
) -> None:
    """By a sensor that has told nothing yet."""
    for _ in range(2):
        versions.register("challenger", "few lenses")
    versions.made("1", "", "few lenses")
    Sensor("new_challenger", instance).tick()
    assert webhook.texts == [
        "lens_ensemble version 1 is registered; it is not champion: few lenses"
    ]


def test_each_change_of_the_champion_is_told_once_whoever_made_it(
    instance: dg.DagsterInstance, versions: Versions, webhook: Webhook
) -> None:
    def told() -> list[str]:
        webhook.posted.clear()
        for _ in range(2):
            sensor.tick()
        return webhook.texts

    sensor = Sensor("new_challenger", instance)
    home = ["--home", str(versions.registry.settings.home)]
    versions.register("challenger, champion", "")
    versions.register("challenger", "few lenses")
    assert main(["promote", "2", *home]) == 0  # before anybody was told that it stays challenger
    assert told() == ["lens_ensemble version 2 is registered; it has become champion"]
    assert main(["rollback", *home]) == 0
    assert told() == ["lens_ensemble version 1 is champion, in the place of version 2"]
    versions.register("challenger", "few lenses")
    assert main(["promote", "2", *home]) == 0
    assert told() == [
        "lens_ensemble version 3 is registered; it stays challenger: few lenses; "
        "lens_ensemble version 2 is champion, in the place of version 1"
    ]
    versions.registry.client.delete_registered_model_alias(MODEL, "champion")
    assert told() == ["lens_ensemble has no champion any more; it was version 2"]
    assert main(["promote", "3", *home]) == 0
    webhook.answers = TRIES * [503]
    with pytest.raises(InputError, match="LENS_WEBHOOK_URL"):
        sensor.tick()
    assert told() == ["lens_ensemble version 3 is champion"]


@pytest.mark.parametrize("cursor", ["1", '{"version": 1, "champion": 1}'])
def test_what_a_former_version_was_told_of_is_not_told_again(
    cursor: str, instance: dg.DagsterInstance, versions: Versions, webhook: Webhook
) -> None:
    sensor = Sensor("new_challenger", instance)
    versions.register("challenger, champion", "")
    sensor.cursor = cursor
    sensor.tick()
    assert webhook.texts == []
    versions.register("challenger, champion", "")
    sensor.tick()
    assert webhook.texts == ["lens_ensemble version 2 is registered; it has become champion"]


def test_nothing_is_told_while_the_registry_cannot_be_asked(
    instance: dg.DagsterInstance,
    versions: Versions,
    webhook: Webhook,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions.register("challenger, champion", "")
    sensor = Sensor("new_challenger", instance)
    with monkeypatch.context() as gone:
        gone.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        gone.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        sensor.tick()
    assert webhook.texts == []
    assert "cannot be asked who is champion" in sensor.skipped
    sensor.tick()
    assert webhook.texts == ["lens_ensemble version 1 is registered; it has become champion"]
