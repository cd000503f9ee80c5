"""Runs as processes: who may end one."""

import signal
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from lens_pipeline.launcher import ProcessRunLauncher
from lens_pipeline.processes import process_tags
from lens_pipeline.runner import open_instance
from lens_pipeline.settings import Settings


def test_a_run_that_is_cancelled_on_another_host_is_ended_by_the_daemon_on_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    job = dg.GraphDefinition("long").to_job()
    with open_instance(Settings.load(home=tmp_path)) as instance:
        launcher = instance.run_launcher
        assert isinstance(launcher, ProcessRunLauncher)
        run_id = instance.create_run_for_job(job, tags=process_tags(process.pid)).run_id

        def run() -> dg.DagsterRun:
            found = instance.get_run_by_id(run_id)
            assert found is not None
            return found

        with monkeypatch.context() as elsewhere:
            elsewhere.setattr("socket.gethostname", lambda: "webserver")
            assert launcher.terminate(run_id)
            launcher.check_run_worker_health(run())
            assert process.poll() is None  # nobody else's process of that number is touched
        launcher.check_run_worker_health(run())
        assert process.wait(10) == -signal.SIGTERM
        assert run().status is dg.DagsterRunStatus.CANCELING
