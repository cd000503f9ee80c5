"""Which processes live, by their tags, and what a dead one has left."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lens_pipeline.errors import InputError
from lens_pipeline.processes import (
    HOST,
    PID,
    RUN,
    STARTED,
    check_locks,
    end_rest,
    is_dead,
    process_tags,
    sign_of_life,
    signs_without_life,
)
from lens_pipeline_tests.served import until

# Starts a child that would live on, tells its number, and waits.
PARENT = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def family() -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A process that leads a session, and its child."""
    leader = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert leader.stdout is not None
    child = psutil.Process(int(leader.stdout.readline()))
    yield leader, child
    for process in (leader, child):
        if psutil.pid_exists(process.pid):
            os.kill(process.pid, signal.SIGKILL)
    leader.wait()
    leader.stdout.close()


Family = tuple[subprocess.Popen[str], psutil.Process]


def test_a_killed_process_is_dead_before_anybody_asked_how_it_ended(
    family: Family, tmp_path: Path
) -> None:
    leader, _ = family
    tags = process_tags("r", leader.pid)
    assert not is_dead("r", tags, tmp_path)
    leader.kill()
    # A zombie, for nobody has waited for it.
    until(lambda: is_dead("r", tags, tmp_path), 10, "it is dead")
    assert psutil.Process(leader.pid).status() == psutil.STATUS_ZOMBIE
    leader.wait()
    assert is_dead("r", tags, tmp_path)


def test_a_process_with_the_number_of_a_dead_one_is_another(family: Family, tmp_path: Path) -> None:
    leader, child = family
    tags = process_tags("r", leader.pid) | {STARTED: "1"}
    assert is_dead("r", tags, tmp_path)
    assert end_rest(tags) == []  # it is somebody else's
    assert child.is_running()


def test_a_process_of_another_host_that_gives_no_sign_is_not_known_to_be_dead(
    family: Family, tmp_path: Path
) -> None:
    """As one of a version that gave none, or of a home that is not shared."""
    leader, _ = family
    tags = process_tags("r", leader.pid) | {HOST: "elsewhere"}
    leader.kill()
    leader.wait()
    assert not is_dead("r", tags, tmp_path)
    assert not is_dead("r", {}, tmp_path)


def test_a_process_of_another_host_is_dead_once_it_has_let_go_of_its_sign_of_life(
    tmp_path: Path,
) -> None:
    """Also where it never got to say that it ends, and where this host has its number, too."""
    sign = sign_of_life(tmp_path, "r")
    holder = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, pass_fds=[sign]
    )
    os.close(sign)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    tags = process_tags("r") | {HOST: "elsewhere"}
    for _ in range(2):  # who asks takes nothing away
        assert not is_dead("r", tags, tmp_path)
        assert signs_without_life(tmp_path) == []
    holder.kill()
    holder.wait()
    assert is_dead("r", tags, tmp_path)
    assert not is_dead("r", {**tags, RUN: "the first"}, tmp_path)
    assert [sign.name for sign in signs_without_life(tmp_path)] == ["r"]
    assert end_rest(tags) == []  # what has these numbers here is somebody else's
    os.kill(child, signal.SIGKILL)
    holder.stdout.close()


def test_a_run_is_not_taken_for_the_one_whose_tags_it_inherits(
    family: Family, tmp_path: Path
) -> None:
    leader, _ = family
    tags = process_tags("r", leader.pid)
    leader.kill()
    leader.wait()
    assert is_dead("r", tags, tmp_path)
    assert not is_dead("tried again", tags, tmp_path)


def test_what_a_dead_process_has_left_is_ended_and_nothing_else(family: Family) -> None:
    leader, child = family
    tags = process_tags("r", leader.pid)
    leader.kill()
    leader.wait()
    other = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
    )
    assert child.is_running()
    assert end_rest(tags) == [child.pid]
    until(
        lambda: not psutil.pid_exists(child.pid) or child.status() == "zombie", 10, "it has ended"
    )
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_process_in_another_container_of_the_same_name_lives(
    family: Family, tmp_path: Path
) -> None:
    """Its number is another's here, with a session of its own, or nobody's; it holds its sign."""
    sign = sign_of_life(tmp_path, "r")
    leader, child = family
    another = process_tags("r", leader.pid) | {STARTED: "1"}
    assert not is_dead("r", another, tmp_path)
    assert end_rest(another) == []
    assert child.is_running()
    nobody = process_tags("r") | {PID: str(2**22 + 1)}  # beyond the highest number of Linux
    assert not is_dead("r", nobody, tmp_path)
    os.close(sign)
    assert is_dead("r", nobody, tmp_path)


def test_a_dead_process_whose_child_holds_its_sign_is_dead(tmp_path: Path) -> None:
    sign = sign_of_life(tmp_path, "r")
    leader = subprocess.Popen(
        [sys.executable, "-c", PARENT.replace('600)"])', '600)"], close_fds=False)')],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        pass_fds=[sign],
    )
    os.close(sign)
    assert leader.stdout is not None
    child = int(leader.stdout.readline())
    tags = process_tags("r", leader.pid)
    leader.kill()
    leader.wait()
    assert signs_without_life(tmp_path) == []  # it is held
    assert is_dead("r", tags, tmp_path)
    assert end_rest(tags) == [child]
    leader.stdout.close()


def test_a_file_system_without_locks_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(InputError, match=f"{tmp_path}: its file system knows no locks"):
        check_locks(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}: its file system knows no locks"):
        sign_of_life(tmp_path, "r")
