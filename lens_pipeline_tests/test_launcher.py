"""Runs as processes: who may end one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import psutil
import pytest
from dagster._core.launcher.base import LaunchRunContext, WorkerStatus

from lens_pipeline.launcher import CANCELED, ProcessRunLauncher
from lens_pipeline.processes import PID, STARTED, process_tags, sign_of_life
from lens_pipeline.runner import open_instance, release_dead_runs
from lens_pipeline.settings import Settings
from lens_pipeline_tests.served import until


@dg.op
def waits(context: dg.OpExecutionContext) -> None:
    context.log.info("has begun")
    time.sleep(600)


@dg.job
def long_job() -> None:
    waits()


def launched(instance: dg.DagsterInstance) -> dg.DagsterRun:
    """A run of `long_job` that has begun, as the daemon launches one."""
    origin = dg.reconstructable(long_job).get_python_origin()
    run = instance.create_run_for_job(long_job, job_code_origin=origin)
    instance.run_launcher.launch_run(LaunchRunContext(dagster_run=run, workspace=None))

    def begun() -> bool:
        logged = instance.all_logs(run.run_id)
        return any("has begun" in entry.user_message for entry in logged)

    until(begun, 60, "the run begins")
    found = instance.get_run_by_id(run.run_id)
    assert found is not None
    return found


def test_a_launched_run_that_dies_under_another_host_name_is_found_and_its_sign_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node of a cluster that shares the home, or on a machine that is renamed."""
    monkeypatch.setenv("LENS_DEPLOYMENT", "staging")
    with open_instance(Settings.load(home=tmp_path)) as instance:
        run = launched(instance)
        assert run.tags["lens/deployment"] == "staging"
        monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
        assert release_dead_runs(instance) == []
        health = instance.run_launcher.check_run_worker_health(run)
        assert health.status is WorkerStatus.RUNNING
        signs = tmp_path / "dagster" / ".alive"
        assert [sign.name for sign in signs.iterdir()] == [run.run_id]
        process = psutil.Process(int(run.tags[PID]))
        for killed in (process, *process.children(recursive=True)):
            killed.kill()
            killed.wait(10)
        health = instance.run_launcher.check_run_worker_health(run)
        assert health.status is WorkerStatus.FAILED
        assert not instance.run_launcher.terminate(run.run_id)  # there is nobody to be asked
        assert release_dead_runs(instance) == [run.run_id]
        assert list(signs.iterdir()) == []


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


def test_a_run_of_another_host_of_the_same_name_is_ended_there(tmp_path: Path) -> None:
    """As of two containers that share their host's name, and a home."""
    job = dg.GraphDefinition("long").to_job()
    with (
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as innocent,
        open_instance(Settings.load(home=tmp_path)) as instance,
    ):
        run_id = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED).run_id
        instance.add_run_tags(run_id, process_tags(run_id, innocent.pid) | {STARTED: "1"})
        sign = sign_of_life(Path(instance.root_directory), run_id)  # it lives there
        assert instance.run_launcher.terminate(run_id)
        run = instance.get_run_by_id(run_id)
        assert run is not None
        assert run.tags[CANCELED] == run_id
        instance.run_launcher.check_run_worker_health(run)
        assert instance.run_launcher.get_run_worker_debug_info(run) is None
        os.close(sign)
        assert innocent.poll() is None
        innocent.kill()


def test_a_run_that_died_before_it_could_be_asked_to_end_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the daemon is stopped soon after: it is not tried again."""
    job = dg.GraphDefinition("long").to_job()
    with (
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process,
        open_instance(Settings.load(home=tmp_path)) as instance,
    ):
        run_id = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED).run_id
        instance.add_run_tags(run_id, process_tags(run_id, process.pid))
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr("socket.gethostname", lambda: "webserver")
            assert instance.run_launcher.terminate(run_id)
        process.kill()
        process.wait()
        run = instance.get_run_by_id(run_id)
        assert run is not None
        health = instance.run_launcher.check_run_worker_health(run)
        assert health.status is not WorkerStatus.FAILED
        now = instance.get_run_by_id(run_id)
        assert now is not None
        assert now.status is dg.DagsterRunStatus.CANCELED


def test_a_run_whose_termination_is_forced_on_another_host_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dagster says at once that it is cancelled, and asks about it no more."""
    monkeypatch.setattr("lens_pipeline.launcher.OVER", 2)
    monkeypatch.setattr(subprocess.Popen, "kill", lambda _: 1 / 0)  # it ends in order
    with open_instance(Settings.load(home=tmp_path)) as instance:
        run = launched(instance)
        process = psutil.Process(int(run.tags[PID]))
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr("socket.gethostname", lambda: "webserver")
            assert instance.run_launcher.terminate(run.run_id)
        assert process.is_running()
        instance.report_run_canceled(run)
        until(lambda: not process.is_running(), 60, "the process ends")
        assert not psutil.pid_exists(process.pid)  # whoever launched it has asked how


def test_a_run_that_lasts_too_long_is_cancelled_and_people_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And not tried again, as one that has failed; Dagster's own limit lets its process live."""
    with open_instance(Settings.load(home=tmp_path)):
        pass
    file = tmp_path / "dagster" / "dagster.yaml"
    limit = "max_runtime_seconds: {}".format
    assert limit(259200) in file.read_text()
    file.write_text(file.read_text().replace(limit(259200), limit(2)))
    with open_instance(Settings.load(home=tmp_path)) as instance:
        run = launched(instance)
        process = psutil.Process(int(run.tags[PID]))
        process.suspend()  # it does not end though it is asked to
        time.sleep(2)
        instance.run_launcher.check_run_worker_health(run)
        assert "long_job has lasted longer than 2 seconds, and is cancelled" in caplog.text
        now = instance.get_run_by_id(run.run_id)
        assert now is not None
        assert now.status is dg.DagsterRunStatus.CANCELING
        # As the daemon does when its patience ends.
        assert "killed" in (instance.run_launcher.get_run_worker_debug_info(now) or "")
        assert psutil.wait_procs([process], timeout=10)[0] == [process]


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
