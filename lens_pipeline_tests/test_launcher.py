"""Runs as processes: who may end one."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import psutil
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
        run_id = instance.create_run_for_job(job).run_id
        instance.add_run_tags(run_id, process_tags(run_id, process.pid))

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


def test_what_does_not_end_though_it_was_asked_to_is_killed_with_what_it_started(
    tmp_path: Path,
) -> None:
    program = """if True:
        import signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, flush=True)
        time.sleep(600)"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    job = dg.GraphDefinition("long").to_job()
    with open_instance(Settings.load(home=tmp_path)) as instance:
        run_id = instance.create_run_for_job(job).run_id
        instance.add_run_tags(run_id, process_tags(run_id, process.pid))
        assert instance.run_launcher.terminate(run_id)
        run = instance.get_run_by_id(run_id)
        assert run is not None
        time.sleep(1)
        assert process.poll() is None
        # As the daemon does when its patience ends: `cancel_timeout_seconds`.
        assert "killed" in (instance.run_launcher.get_run_worker_debug_info(run) or "")
    assert process.wait(10) == -signal.SIGKILL
    assert psutil.wait_procs([child], timeout=10)[0] == [child]
    process.stdout.close()
