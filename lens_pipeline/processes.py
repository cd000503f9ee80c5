"""Which process runs a run, whether it lives, and what it has left behind."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile

import psutil

from lens_pipeline.errors import InputError

# Dagster's pages hide tags that begin so: nothing in these is for people.
HOST, PID, STARTED = (f".dagster/lens_pipeline_{what}" for what in ("host", "pid", "started"))
# Whose tags these are: a run that is tried again inherits those of the first.
RUN = ".dagster/lens_pipeline_run"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
SIGNS = ".alive"  # in DAGSTER_HOME: a file by the id of each run, locked while its process lives


def process_tags(run_id: str, pid: int | None = None) -> dict[str, str]:
    """Tags that tell which process (by default this one) runs a run, even when its number is used
    again."""
    pid = pid or os.getpid()
    return {RUN: run_id, HOST: socket.gethostname(), PID: str(pid), STARTED: _started(pid)}


def _started(pid: int) -> str:
    """When a process that has not ended was started, by a clock that nobody sets. Raises
    NoSuchProcess."""
    statistics = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():
        return str(psutil.Process(pid).create_time())
    try:
        # Field 3 and on, counted behind the name, which may hold anything: `man 5 proc_pid_stat`.
        fields = statistics.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    if fields[0] in "ZX":  # it has ended; whoever started it has not asked how
        raise psutil.NoSuchProcess(pid)
    return fields[19]


def check_locks(folder: Path) -> None:
    """Raises InputError where the file system of a folder knows no locks."""
    with TemporaryFile(dir=folder) as file:
        _lock(file.fileno(), folder)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as problem:
        if problem.errno not in NO_LOCKS:
            raise
        raise InputError(
            f"{folder}: its file system knows no locks (flock), by which runs are kept apart; "
            "mount it with them, or set LENS_HOME to a folder of another"
        ) from None


def sign_of_life(home: Path, run_id: str) -> int:
    """The descriptor of a new file in `home`, DAGSTER_HOME, which tells other hosts that a run
    lives: it is locked until it is closed in this process, and in those that it is passed to.
    """
    folder = home / SIGNS
    folder.mkdir(exist_ok=True)
    aside = folder / f".{run_id}"
    descriptor = os.open(aside, os.O_RDWR | os.O_CREAT)
    _lock(descriptor, home)
    aside.rename(folder / run_id)  # whoever sees it finds it locked
    return descriptor


def signs_without_life(home: Path) -> list[Path]:
    """The files of runs whose processes have ended; by their names, the runs' ids."""
    return [sign for sign in (home / SIGNS).glob("[!.]*") if is_free(sign)]


def is_free(sign: Path) -> bool:
    """Whether a file is there and locked by nobody."""
    try:
        with sign.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # others may ask at the same time
    except OSError:
        return False
    return True


def has_begun(run_id: str, tags: Mapping[str, str]) -> bool:
    """Whether a run has a process, or had one."""
    return tags.get(RUN) == run_id


def is_here(run_id: str, tags: Mapping[str, str]) -> bool:
    """Whether the process of a run is, or was, one of this host."""
    return has_begun(run_id, tags) and tags[HOST] == socket.gethostname()


def lives_here(run_id: str, tags: Mapping[str, str]) -> bool:
    """Whether the process of a run is one of this host, and not of another of the same name."""
    return is_here(run_id, tags) and not _has_ended(tags)


def tell(tags: Mapping[str, str], told: signal.Signals) -> None:
    """Send a signal to the process of a run that lives here, if it still does."""
    if not _has_ended(tags):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(tags[PID]), told)


def is_dead(run_id: str, tags: Mapping[str, str], home: Path) -> bool:
    """Whether the process of a run is known to be gone: it was on this host, and is not now; or on
    another, and has let go of its sign of life in `home`, DAGSTER_HOME.

    Where it is not here, and something that has left nothing here holds its sign, it is on another
    host of the same name: a container beside this one.
    """
    sign = home / SIGNS / run_id
    if not is_here(run_id, tags):
        return has_begun(run_id, tags) and is_free(sign)
    if not _has_ended(tags):
        return False
    return not sign.exists() or is_free(sign) or bool(_rest(tags))


def _has_ended(tags: Mapping[str, str]) -> bool:
    """Whether no process here has the number of a run's and was started when it was."""
    try:
        return _started(int(tags[PID])) != tags[STARTED]
    except psutil.NoSuchProcess:
        return True


def _rest(tags: Mapping[str, str]) -> list[int]:
    """The other processes here of the session that a process led; none where its number is another
    process's by now, whose session is its own."""
    leader, found = int(tags[PID]), []
    with contextlib.suppress(psutil.NoSuchProcess):
        if _started(leader) != tags[STARTED]:
            return []
    for process in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if process != leader and os.getsid(process) == leader:
                found.append(process)
    return found


def end_rest(tags: Mapping[str, str]) -> list[int]:
    """Kill what a dead process that led a session has left of it on this host, and return their
    numbers.

    A step that trains outlives the run's process when that is killed, and would write on beside the
    next try. The number of a session's leader is not given to another process while one of the
    session lives; should it be somebody else's by now, nothing of ours is left.
    """
    if tags[HOST] != socket.gethostname():
        return []
    ended = []
    for process in _rest(tags):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)
            ended.append(process)
    return ended
