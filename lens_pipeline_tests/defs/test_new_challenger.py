"""What people are told of new versions in the registry, and of its champion."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest
from mlflow.exceptions import MlflowException

from lens_pipeline import tracking
from lens_pipeline.alerts import TRIES
from lens_pipeline.cli import main
from lens_pipeline.errors import InputError
from lens_pipeline.registry import MODEL, Registry
from lens_pipeline.settings import Settings
from lens_pipeline_tests.defs.conftest import Webhook
from lens_pipeline_tests.defs.ticks import Sensor


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


def test_a_new_version_is_told_where_runs_were_deleted(
    instance: dg.DagsterInstance, versions: Versions, webhook: Webhook
) -> None:
    """SQLite gives the numbers of their events to those that come next."""
    sensor = Sensor("new_challenger", instance)
    versions.register("challenger, champion", "")

    @dg.asset
    def registered_ensemble(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        facts = {"version": "1", "gate": ""}  # made again
        return dg.MaterializeResult(metadata=facts)

    ran = dg.materialize([registered_ensemble], instance=instance)
    sensor.tick()
    instance.delete_run(ran.run_id)
    webhook.posted.clear()
    versions.register("challenger", "few lenses")
    for _ in range(2):
        sensor.tick()
    assert webhook.texts == [
        "lens_ensemble version 2 is registered; it stays challenger: few lenses"
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
        tracking._create_database(tmp_path / "other.db")  # quickly: see `tables_of_mlflow`
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
