"""A home that `lens-pipeline show` serves, driven as a browser does: through GraphQL."""

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil

from lens_pipeline.processes import PID
from lens_pipeline.runner import open_instance
from lens_pipeline.settings import Settings
from lens_pipeline_tests.conftest import LENS_PIPELINE
from lens_pipeline_tests.object_stores import free_ports

PLACE = {"repositoryName": "__repository__", "repositoryLocationName": "lens_pipeline"}
# urllib keeps the proxies that the environment named when it was first used.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
T = TypeVar("T")
RUNS = """query ($filter: RunsFilter) { runsOrError(filter: $filter) { ... on Runs { results {
    runId parentRunId jobName status tags { key value }
    assetMaterializations { assetKey { path } } } } } }"""
LAUNCH = """mutation ($params: ExecutionParams!) { launchRun(executionParams: $params) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""


def until(found: Callable[[], T], seconds: float, what: str) -> T:
    """What `found` returns as soon as it is true. AssertionError where that takes too long."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.5)
    return value


class Pages:
    """Dagster's pages, driven through GraphQL. dagster: their address; log: its servers' words."""

    dagster: str
    log: str

    def ask(self, query: str, **variables: object) -> dict[str, Any]:
        """The `data` of Dagster's answer."""
        request = urllib.request.Request(
            f"{self.dagster}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with DIRECT.open(request, timeout=60) as answer:
            content = json.load(answer)
        assert "errors" not in content, content
        return dict(content["data"])

    def switch_on(self, kind: str, name: str) -> None:
        """A schedule or sensor: kind is `schedule` or `sensor`."""
        of_kind = kind.capitalize()
        selector = {**PLACE, f"{kind}Name": name}
        answer = self.ask(
            f"mutation ($on: {of_kind}Selector!) {{ start{of_kind}({kind}Selector: $on) "
            "{ __typename ... on PythonError { message } } }",
            on=selector,
        )[f"start{of_kind}"]
        assert answer["__typename"] in ("ScheduleStateResult", "Sensor"), answer

    def launch(self, job: str, **config: object) -> str:
        """Launch a job; its run's id."""
        params = {"selector": {**PLACE, "jobName": job}, "mode": "default"}
        answer = self.ask(LAUNCH, params={**params, "runConfigData": config})["launchRun"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return str(answer["run"]["runId"])

    def runs(self, **of: object) -> list[dict[str, Any]]:
        """The runs of a filter, newest first; `tags` is {key: value}."""
        found = self.ask(RUNS, filter=of)["runsOrError"]["results"]
        return [{**run, "tags": {t["key"]: t["value"] for t in run["tags"]}} for run in found]

    def run(self, run_id: str) -> dict[str, Any]:
        (found,) = self.runs(runIds=[run_id])
        return found

    def ended(self, run_id: str, seconds: float) -> dict[str, Any]:
        """A run, once it has ended."""
        of = {"runIds": [run_id], "statuses": ["SUCCESS", "FAILURE", "CANCELED"]}
        (run,) = until(lambda: self.runs(**of), seconds, f"run {run_id} ends\n{self.log}")
        return run

    def messages(self, run_id: str) -> list[str]:
        """What the log of a run says."""
        query = """query ($id: ID!) { logsForRun(runId: $id, limit: 5000) { ... on EventConnection
            { events { ... on MessageEvent { message } } } } }"""
        events = self.ask(query, id=run_id)["logsForRun"]["events"]
        return [event["message"] for event in events if event.get("message")]


class Served(Pages):
    """A context in which `home` is served; `environment` is added to this process's own, `folder`
    is the working directory, by default this process's.

    dagster, mlflow: addresses; log: what the command has written.
    """

    def __init__(
        self,
        home: Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._folder = folder
        self.home, self._log, self._environment = home, log, dict(environment or {})
        ports = free_ports(2)
        self.dagster, self.mlflow = (f"http://127.0.0.1:{port}" for port in ports)
        self._command = [LENS_PIPELINE, "show", "--home", str(home)]
        self._command += ["--dagster-port", str(ports[0]), "--mlflow-port", str(ports[1])]

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self.server = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env=os.environ | self._environment,
            )
        try:
            until(lambda: "Ctrl-C" in self.log or self.server.poll() is not None, 240, "pages")
            assert self.server.poll() is None, self.log
        except AssertionError:
            self.server.terminate()  # it would go on beside the other tests
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.send_signal(signal.SIGTERM)
        assert self.server.wait(timeout=60) == 0, self.log

    @property
    def log(self) -> str:  # type: ignore[override]
        return self._log.read_text()

    def answers(self) -> bool:
        """Whether both pages can be had."""
        try:
            for address in (self.dagster, self.mlflow):
                with DIRECT.open(address, timeout=10):
                    pass
        except OSError:
            return False
        return True

    def process_of(self, run_id: str) -> int:
        """The number of the process that runs a run."""
        with open_instance(Settings.load(home=self.home)) as instance:
            run = instance.get_run_by_id(run_id)
        assert run is not None
        return int(run.tags[PID])

    def processes(self, *words: str) -> list[psutil.Process]:
        """The processes below this command in whose command line all words stand."""
        below = psutil.Process(self.server.pid).children(recursive=True)
        return [
            process for process in below if all(word in _command_line(process) for word in words)
        ]


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
