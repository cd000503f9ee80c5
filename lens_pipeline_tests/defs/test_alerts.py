"""What people are told of runs that fail and of new versions."""

from collections.abc import Callable

import dagster as dg
import pytest

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
    alert(
        Settings.load(),
        "refused wJalrXUtnFEMI at postgresql://lens:pw-of-lens@db/mlflow",
        run="https://store/x?X-Amz-Signature=abcdef",
    )
    (content,) = webhook.posted
    assert content == {
        "text": "refused *** at postgresql://lens:***@db/mlflow",
        "deployment": "staging",
        "run": "https://store/x?***",
    }
    for secret in ("wJalrXUtnFEMI", "pw-of-lens", "t0ps3cret"):
        assert secret not in caplog.text


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
        f"run {run[:8]} of failing failed: spoils: "
        "lens_pipeline.errors.InputError: catalogue.csv: row 7: label 2 is neither 0 nor 1"
    )
    assert (told["run"], told["job"]) == (run, "failing")


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


def test_each_new_version_is_told_once(instance: dg.DagsterInstance, webhook: Webhook) -> None:
    def registered(version: str, aliases: str, gate: str) -> None:
        facts = {"model": "lens_ensemble", "version": version, "aliases": aliases, "gate": gate}
        instance.report_runless_asset_event(
            dg.AssetMaterialization("registered_ensemble", metadata=facts)
        )

    sensor = Sensor("new_challenger", instance)
    sensor.tick()
    assert webhook.posted == []
    registered("1", "challenger, champion", "")
    registered("1", "challenger, champion", "")
    for _ in range(3):
        sensor.tick()
    registered("2", "challenger", "8 lenses, fewer than 50")
    for _ in range(2):
        sensor.tick()
    registered("1", "champion", "")  # made again from old settings
    sensor.tick()
    assert webhook.texts == [
        "lens_ensemble version 1 is registered; it has become champion",
        "lens_ensemble version 2 is registered; it stays challenger: 8 lenses, fewer than 50",
    ]
