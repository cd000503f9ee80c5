"""Sensors of these definitions, tick by tick."""

import json

import dagster as dg

from lens_pipeline.definitions import make_definitions
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.settings import Settings

RESOURCES = {"lens": LensHome()}
SURVEYS = ("des", "hsc")


class Sensor:
    """One of them, which keeps its cursor as the daemon does."""

    def __init__(self, name: str, instance: dg.DagsterInstance) -> None:
        definitions = make_definitions(Settings.load())
        self._sensor, self._instance = definitions.resolve_sensor_def(name), instance
        self.cursor: str | None = None
        self.requested: list[dg.RunRequest] = []  # by all ticks
        self.skipped = ""  # why the last tick has requested none

    def an_hour_later(self) -> None:
        """Its last look at all cutouts is an hour ago."""
        cursor = json.loads(self.cursor or "{}")
        self.cursor = json.dumps({**cursor, "looked": cursor["looked"] - 3600})

    def tick(self) -> list[str]:
        """The keys of the runs that it requests."""
        with dg.build_sensor_context(
            instance=self._instance,
            cursor=self.cursor,
            sensor_name=self._sensor.name,
            resources=RESOURCES,
        ) as context:
            found = self._sensor.evaluate_tick(context)
        self.cursor = found.cursor
        self.skipped = found.skip_message or ""
        self.requested += found.run_requests or []
        return [str(request.run_key) for request in found.run_requests or []]
