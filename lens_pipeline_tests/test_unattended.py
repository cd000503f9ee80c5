"""Schedules and sensors launch runs that nobody asked for; whatever is killed comes back."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from lens_pipeline.registry import MODEL
from lens_pipeline.runner import prepare_home
from lens_pipeline.settings import Settings
from lens_pipeline_tests.conftest import client_of, summary_of
from lens_pipeline_tests.deployed import documented
from lens_pipeline_tests.served import Served, until

EPOCHS = 100  # so long a training that each kill is sure to meet it
SENSORS = """
import time
import dagster as dg

RUNNING = dg.DefaultSensorStatus.RUNNING

@dg.sensor(minimum_interval_seconds=1, default_status=RUNNING)
def looks(context):
    time.sleep(600)

@dg.sensor(minimum_interval_seconds=1, default_status=RUNNING)
def tells(context):
    print("told", flush=True)

defs = dg.Definitions(sensors=[looks, tells])
"""


@pytest.mark.slow
def test_a_sensor_that_takes_long_delays_no_other(tmp_path: Path) -> None:
    """As one that looks at a source of many cutouts, beside one that tells of failed runs."""
    (tmp_path / "sensors.py").write_text(SENSORS)
    settings = Settings.load(home=tmp_path)
    prepare_home(settings)
    command = [sys.executable, "-m", "dagster._daemon", "run", "-f", "sensors.py"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        daemon = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | {"DAGSTER_HOME": str(settings.dagster_home)},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        # The first time each sensor may have its turn before the slow one has.
        until(lambda: log.read_text().count("told") > 2, 60, f"it is told\n{log.read_text()}")
    finally:
        os.killpg(daemon.pid, signal.SIGKILL)  # in order it would wait for the slow one
        daemon.wait()


@pytest.mark.slow
def test_a_dropped_catalogue_becomes_a_challenger_and_dropped_again_nothing(
    simulated_catalogue: Path, tmp_path: Path
) -> None:
    place = tmp_path / "source"
    place.mkdir()
    settings = {
        "LENS_SOURCE": str(place / "catalogue.parquet"),
        "LENS_PRESET": "tiny",
        "LENS_RETRAIN_CRON": "* * * * *",
    }

    def drop() -> None:
        for file in sorted(simulated_catalogue.parent.iterdir(), reverse=True):
            # With its time of change: the same file, not one with the same pixels.
            shutil.copy2(file, place)

    with Served(tmp_path / "home", tmp_path / "log", settings) as served:
        for name in ("source_changed", "follow_up"):
            served.switch_on("sensor", name)
        time.sleep(70)
        assert served.runs() == []  # there is nothing to launch
        drop()
        served.switch_on("schedule", "weekly_retraining")
        client = MlflowClient(served.mlflow, served.mlflow)

        def challenger() -> str | None:
            try:
                return str(client.get_model_version_by_alias(MODEL, "challenger").version)
            except MlflowException:
                return None

        assert until(challenger, 600, f"a challenger\n{served.log}") == "1"
        busy = ["QUEUED", "NOT_STARTED", "STARTING", "STARTED"]
        both = {"data", "full_pipeline"}  # of the sensor, of the schedule
        until(lambda: {run["jobName"] for run in served.runs()} == both, 200, "two jobs")
        until(lambda: not served.runs(statuses=busy), 200, "all runs end")
        runs = served.runs()
        assert {run["status"] for run in runs} == {"SUCCESS"}
        assert all(
            {"dagster/sensor_name", "dagster/schedule_name"} & set(run["tags"]) for run in runs
        )
        drop()
        time.sleep(150)  # two ticks of each
        assert served.runs() == runs


@pytest.mark.slow
def test_what_is_killed_comes_back_and_a_training_goes_on_where_it_was(tmp_path: Path) -> None:
    home = tmp_path / "home"
    settings = {"LENS_PRESET": "tiny", "LENS_ARCHS": "lastro"}
    training = {"checkpoints__lastro": {"config": {"training": {"epochs": EPOCHS}}}}

    def kill_run(run: str) -> None:
        os.kill(served.process_of(run), signal.SIGKILL)

    def kill(*words: str) -> None:
        for process in served.processes(*words):
            process.kill()

    def trains(run: str, goes_on: bool = True) -> None:
        """Until a run has saved an epoch of its own."""
        begun = time.time()
        said = "goes on from" if goes_on else "checkpoints/lastro ..."
        until(
            lambda: any(said in message for message in served.messages(run)),
            180,
            f"{said}\n{served.log}",
        )
        saved = "checkpoints/lastro/.*/last.ckpt"
        until(lambda: any(f.stat().st_mtime > begun for f in home.glob(saved)), 120, "an epoch")

    def retried(run: str) -> str:
        """The run that a dead one is tried again by."""
        assert served.ended(run, 120)["status"] == "FAILURE"
        assert any("has died" in message for message in served.messages(run))
        return str(
            until(
                lambda: [r for r in served.runs() if r["parentRunId"] == run],
                300,
                f"run {run} is tried again",
            )[0]["runId"]
        )

    with Served(home, tmp_path / "log", settings) as served:
        first = served.launch("full_pipeline", ops=training)
        trains(first, goes_on=False)
        (tracked,) = client_of(home).search_runs(["1"])  # who looks on sees what is trained
        assert tracked.data.params["training.epochs"] == str(EPOCHS)
        kill_run(first)
        second = retried(first)
        trains(second)
        kill("api", "grpc")
        trains(second)
        kill("dagster._daemon")
        kill_run(second)  # which nobody sees
        third = retried(second)
        trains(third)
        kill("dagster_webserver")
        kill("mlflow", "server")
        until(lambda: served.log.count("is started again") == 4, 60, served.log)
        until(lambda: served.answers(), 60, "the pages answer again")
        assert served.ended(third, 900)["status"] == "SUCCESS", served.messages(third)
    summary = summary_of(home)
    assert summary["model"]["version"] == "1"
    curves = pd.read_csv(next(home.glob("checkpoints/lastro/[!.]*/curves.csv")))
    assert curves["epoch"].tolist() == list(range(EPOCHS))


@pytest.mark.slow
def test_a_run_ends_where_it_is_cancelled_and_where_its_pages_are_closed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    settings = {"LENS_PRESET": "tiny", "LENS_ARCHS": "lastro"}
    training = {"checkpoints__lastro": {"config": {"training": {"epochs": 1000}}}}

    def trains(served: Served) -> tuple[str, int]:
        """A run that has begun to train, and its process."""
        run = served.launch("full_pipeline", ops=training)
        until(
            lambda: any(re.search(r"epoch \d+/", said) for said in served.messages(run)),
            180,
            f"an epoch\n{served.log}",
        )
        return run, served.process_of(run)

    def nothing_of(leader: int) -> bool:
        living = [p.pid for p in psutil.process_iter(["status"]) if p.info["status"] != "zombie"]
        of_session = []
        for pid in living:
            with suppress(ProcessLookupError):
                of_session += [pid] if os.getsid(pid) == leader else []
        return not of_session

    with Served(home, tmp_path / "log", settings) as served:
        run, process = trains(served)
        answer = served.ask(
            "mutation ($run: String!) { terminateRun(runId: $run) { __typename } }", run=run
        )
        assert answer["terminateRun"]["__typename"] == "TerminateRunSuccess"
        assert served.ended(run, 60)["status"] == "CANCELED"
        until(lambda: nothing_of(process), 30, "its processes have ended")
        run, process = trains(served)
        goes_on = any("goes on from" in message for message in served.messages(run))
        assert goes_on, served.messages(run)
    until(lambda: nothing_of(process), 30, "its processes have ended")
    with Served(home, tmp_path / "log", settings) as served:
        assert served.run(run)["status"] == "CANCELED"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("fuser") is None, reason="fuser is not installed")
def test_what_a_killed_show_leaves_is_ended_as_it_is_documented(tmp_path: Path) -> None:
    """And what another home's has begun goes on."""
    settings = {"LENS_PRESET": "tiny", "LENS_ARCHS": "lastro"}
    training = {"checkpoints__lastro": {"config": {"training": {"epochs": 1000}}}}
    home = tmp_path / "home"
    with Served(tmp_path / "other", tmp_path / "other.log") as other:
        killed = Served(home, tmp_path / "log", settings).__enter__()
        run = killed.launch("full_pipeline", ops=training)
        until(lambda: "epoch 1/" in "".join(killed.messages(run)), 180, killed.log)
        left = killed.processes()
        killed.server.kill()
        killed.server.wait()
        commands = [
            line
            for line in documented("What happens when something dies")
            if not line.startswith("export")
        ]
        subprocess.run(
            ["bash", "-euc", "\n".join(commands)],
            env=os.environ | {"LENS_HOME": str(home)},
            check=True,
        )
        assert psutil.wait_procs(left, timeout=60)[1] == []
        assert other.answers()
        assert other.processes("dagster._daemon")
    with Served(home, tmp_path / "log", settings) as served:
        assert served.run(run)["status"] in ("FAILURE", "CANCELED")
