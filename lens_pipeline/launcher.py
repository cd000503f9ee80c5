"""Runs as operating-system processes of their own, which the daemon can tell alive from dead.

Dagster's own launcher starts runs within a code server and cannot tell whether one lives: where the
code server is killed, or the machine is restarted, its runs stay "started" for ever.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from dagster import DagsterInstance, DagsterRun, Field
from dagster import _check as check
from dagster._core.launcher.base import (
    CheckRunHealthResult,
    LaunchRunContext,
    RunLauncher,
    WorkerStatus,
)
from dagster._grpc.types import ExecuteRunArgs
from dagster._serdes import ConfigurableClass, ConfigurableClassData, serialize_value

from lens_pipeline.alerts import alert
from lens_pipeline.errors import InputError
from lens_pipeline.processes import (
    HOST,
    PID,
    RUN,
    end_rest,
    has_begun,
    is_dead,
    is_here,
    lives_here,
    process_tags,
    sign_of_life,
    signs_without_life,
    tell,
)
from lens_pipeline.settings import Settings

# Waits until the run says which process it is; where nobody gets to say so, it ends.
GATE = 'read -r go && exec "$@"'
EXECUTE = (sys.executable, "-m", "dagster", "api", "execute_run")
DEPLOYMENT = "lens/deployment"
GONE = "The process of this run has ended."
log = logging.getLogger(__name__)
CANCELED = "lens/canceled"  # by somebody on another host; its value is the run
OVER = 60  # seconds between looks at whether a run is over whose process still lives


def forget_ended_runs(instance: DagsterInstance) -> None:
    """Remove the signs of life of runs that have ended. Of one that has died the sign stays until
    somebody has said so of the run: without it nobody on another host could."""
    for sign in signs_without_life(Path(instance.root_directory)):
        run = instance.get_run_by_id(sign.name)
        if run is None or run.is_finished:
            sign.unlink(missing_ok=True)


def _tell_of_long(run: DagsterRun, limit: int) -> None:
    """Tell people: what is cancelled is no failure, of which they are told else."""
    text = f"{run.job_name} has lasted longer than {limit} seconds, and is cancelled"
    try:
        alert(Settings.load(), text, run=run.run_id)
    except InputError as problem:
        log.warning("%s", problem)


class ProcessRunLauncher(RunLauncher[Any], ConfigurableClass):
    """Starts each run as a process that leads a session of its own, on the host of whoever
    launches: Dagster's daemon.

    max_runtime_seconds: how long a run may last before it is asked to end, and then killed; 0: for
    ever. Dagster's own limit says that it has failed, tries it again, and lets it live.
    """

    def __init__(
        self, max_runtime_seconds: int = 0, inst_data: ConfigurableClassData | None = None
    ) -> None:
        self._inst_data, self._limit = inst_data, max_runtime_seconds
        self._asked: set[str] = set()  # runs whose processes were asked to end, by this one
        super().__init__()

    @property
    def inst_data(self) -> ConfigurableClassData | None:
        return self._inst_data

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        return {"max_runtime_seconds": Field(int, is_required=False)}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]
    ) -> Self:
        return cls(**config_value, inst_data=inst_data)

    @property
    def _home(self) -> Path:
        """DAGSTER_HOME."""
        return Path(self._instance.root_directory)

    def launch_run(self, context: LaunchRunContext) -> None:
        run, deployment = context.dagster_run, Settings.load().deployment
        arguments = ExecuteRunArgs(
            job_origin=check.not_none(context.job_code_origin),
            run_id=run.run_id,
            instance_ref=self._instance.get_ref(),
        )
        forget_ended_runs(self._instance)
        sign = sign_of_life(self._home, run.run_id)
        try:
            process = subprocess.Popen(
                ["sh", "-c", GATE, "run", *EXECUTE, serialize_value(arguments)],
                stdin=subprocess.PIPE,
                start_new_session=True,
                pass_fds=[sign],
            )
        finally:
            os.close(sign)
        tags = process_tags(run.run_id, process.pid)
        self._instance.add_run_tags(run.run_id, tags | {DEPLOYMENT: deployment})
        assert process.stdin is not None
        with process.stdin as gate:
            gate.write(b"\n")
        threading.Thread(target=self._see_to_end, args=(process, tags), daemon=True).start()

    def _see_to_end(self, process: subprocess.Popen[bytes], tags: Mapping[str, str]) -> None:
        """Wait for the process of a run. Where the run is over for long, as when somebody has
        forced its termination, it is asked to end, if nobody here has, and then killed."""
        run_id, looks = tags[RUN], 0  # at which the run was over
        while looks < 5:
            with suppress(subprocess.TimeoutExpired):
                process.wait(OVER)
                return
            try:
                run = self._instance.get_run_by_id(run_id)
            except Exception as problem:  # noqa: BLE001  (a database that is away for a while)
                log.warning("run %s: %s", run_id[:8], problem)
                continue
            looks = looks + 1 if run is None or run.is_finished else 0
            unasked = run is None or run.tags.get(CANCELED) == run_id
            if looks == 2 and unasked and run_id not in self._asked:
                log.warning("run %s is over, and its process lives: it is ended", run_id[:8])
                process.terminate()
        process.kill()
        process.wait()
        end_rest(tags)

    def terminate(self, run_id: str) -> bool:
        """Ask a run to end in order. One on another host, as where the pages are served from a
        container of their own, is asked by the daemon there, which monitors it; also where the two
        call themselves the same."""
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        here, dead = lives_here(run_id, run.tags), is_dead(run_id, run.tags, self._home)
        if has_begun(run_id, run.tags) and not here and not dead:
            self._instance.add_run_tags(run_id, {CANCELED: run_id})
            return True
        self._instance.report_run_canceling(run)
        if not here:
            return False
        self._asked.add(run_id)
        tell(run.tags, signal.SIGTERM)
        return True

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """Whether the process of a run lives. What a dead one has left is ended, for the run may be
        tried again."""
        if not is_dead(run.run_id, run.tags, self._home):
            if lives_here(run.run_id, run.tags):
                if self._lasts_too_long(run):
                    self.terminate(run.run_id)
                    _tell_of_long(run, self._limit)
                elif run.tags.get(CANCELED) == run.run_id:
                    self.terminate(run.run_id)
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        left = end_rest(run.tags)
        now = self._instance.get_run_by_id(run.run_id)
        if now is None or now.status != run.status:  # it has ended in order since it was listed
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        if now.tags.get(CANCELED) == run.run_id:  # before anybody here came by to ask it to end
            self._instance.report_run_canceled(now, GONE)
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        return CheckRunHealthResult(
            WorkerStatus.FAILED,
            f"process {run.tags[PID]} on {run.tags[HOST]} has died"
            + (f"; {len(left)} that it left were ended" if left else ""),
        )

    def _lasts_too_long(self, run: DagsterRun) -> bool:
        record = self._instance.get_run_record_by_id(run.run_id)
        begun = record.start_time if record is not None else None
        return bool(self._limit and begun and time.time() - begun > self._limit)

    def get_run_worker_debug_info(
        self, run: DagsterRun, include_container_logs: bool | None = True
    ) -> str | None:
        """What the daemon asks for before it gives up a run that does not start, or does not end
        though it was asked to; so what is left of its process is killed."""
        here, dead = lives_here(run.run_id, run.tags), is_dead(run.run_id, run.tags, self._home)
        if not is_here(run.run_id, run.tags) or not (here or dead):
            return None
        tell(run.tags, signal.SIGKILL)
        killed = end_rest(run.tags)
        return f"What was left of process {run.tags[PID]} is killed, with {len(killed)} others."
