"""The service that tells people when nobody here can is told that all is well, while it is."""

import time

import dagster as dg
import pytest
from dagster._daemon.types import DaemonHeartbeat
from dagster._utils.error import SerializableErrorInfo

from lens_pipeline.errors import InputError
from lens_pipeline_tests.defs.conftest import Webhook
from lens_pipeline_tests.defs.ticks import Sensor

HOUR = 3600


@pytest.fixture
def parts(instance: dg.DagsterInstance) -> list[str]:
    """Those of the daemon of a home; all have just given a sign of life."""
    kinds = sorted(instance.get_required_daemon_types())
    for kind in kinds:
        instance.add_daemon_heartbeat(DaemonHeartbeat(time.time(), kind, "of-one-process"))
    return kinds


def test_it_is_told_at_each_tick_while_every_part_of_the_daemon_works(
    instance: dg.DagsterInstance, webhook: Webhook, parts: list[str]
) -> None:
    sensor = Sensor("heartbeat", instance)
    for _ in range(2):
        sensor.tick()
    assert webhook.asked == 2 * ["/beats/t0ps3cret"]
    assert webhook.posted == []


def test_it_is_told_of_parts_that_find_faults_elsewhere_too(
    instance: dg.DagsterInstance, webhook: Webhook, parts: list[str]
) -> None:
    """As where definitions do not load: of that others tell."""
    fault = SerializableErrorInfo("no such setting", [], None)
    for kind in parts:
        instance.add_daemon_heartbeat(DaemonHeartbeat(time.time(), kind, "one", [fault]))
    Sensor("heartbeat", instance).tick()
    assert len(webhook.asked) == 1


@pytest.mark.parametrize("kind", ["SCHEDULER", "QUEUED_RUN_COORDINATOR"])
def test_it_is_not_told_where_a_part_has_ended(
    instance: dg.DagsterInstance, webhook: Webhook, parts: list[str], kind: str
) -> None:
    instance.add_daemon_heartbeat(DaemonHeartbeat(time.time() - HOUR, kind, "of-one-process"))
    sensor = Sensor("heartbeat", instance)
    sensor.tick()
    assert webhook.asked == []
    assert sensor.skipped == f"LENS_HEARTBEAT_URL is not told: {kind.lower()} has ended"


def test_one_that_cannot_be_told_fails_the_tick_and_is_not_shown(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, parts: list[str]
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("LENS_HEARTBEAT_URL", "http://127.0.0.1:9/beats/t0ps3cret")
    with pytest.raises(InputError, match="LENS_HEARTBEAT_URL: cannot be told") as problem:
        Sensor("heartbeat", instance).tick()
    assert "t0ps3cret" not in str(problem.value)


def test_where_there_is_no_such_service_nothing_is_requested(
    instance: dg.DagsterInstance, parts: list[str]
) -> None:
    sensor = Sensor("heartbeat", instance)
    sensor.tick()
    assert sensor.skipped == "LENS_HEARTBEAT_URL is not set"
