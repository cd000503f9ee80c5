"""GPUs are given out by names and locks, which need none."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lens_pipeline.training.claims import claimed
from lens_pipeline.training.devices import VISIBLE, of_the_host, visible_gpus

CLAIMS = """
import sys, time
from pathlib import Path
from lens_pipeline.training.claims import claimed
with claimed(sys.argv[2].split(","), int(sys.argv[3]), Path(sys.argv[1])) as mine:
    print(*mine, flush=True)
    sys.stdin.readline()
time.sleep(float(sys.argv[4]))  # what a process holds while it lives is too much
"""


class Training:
    """A process that claims `n` of `names` and holds them until it is told to end."""

    def __init__(self, folder: Path, names: str, n: int, lives_on: float = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLAIMS, str(folder), names, str(n), str(lives_on)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def has(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def waits(self) -> bool:
        """Whether it comes to say so."""
        assert self.process.stderr is not None
        return any("waiting for" in line for line in self.process.stderr)

    def end(self, kill: bool = False) -> None:
        if kill:
            self.process.kill()
        self.process.communicate()


def test_a_claim_is_no_old_file(tmp_path: Path) -> None:
    """Which systems remove from where the claims are, in use or not."""
    lock = tmp_path / "0.lock"
    lock.touch()
    os.utime(lock, (0, 0))
    with claimed(["0"], 1, tmp_path):
        assert lock.stat().st_mtime > 0


def test_two_trainings_never_share_a_gpu(tmp_path: Path) -> None:
    trainings = [Training(tmp_path, "0,1,3", 1) for _ in range(3)]
    had = [training.has() for training in trainings]
    assert sorted(had) == [["0"], ["1"], ["3"]]
    fourth = Training(tmp_path, "0,1,3", 1)
    assert fourth.waits()
    trainings[1].end(kill=True)
    assert fourth.has() == had[1]
    for training in (trainings[0], trainings[2], fourth):
        training.end()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
def test_users_of_a_host_share_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with claimed(["a", "b"], 2) as mine:
        assert mine == ["a", "b"]
    for lock in tmp_path.rglob("*.lock"):
        os.chown(lock, 12345, 12345)  # of somebody who had them before
    with claimed(["a", "b"], 2) as mine:
        assert mine == ["a", "b"]
        (folder,) = tmp_path.iterdir()
        modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert (modes, stat.S_IMODE(folder.stat().st_mode)) == ({0o666}, 0o777)


def test_a_gpu_is_free_when_its_training_has_ended_and_the_process_has_not(tmp_path: Path) -> None:
    """Else a run that trains one member after another keeps it from who holds the pool's slot."""
    holder = Training(tmp_path, "0", 1, lives_on=600)
    assert holder.has() == ["0"]
    waiting = Training(tmp_path, "0", 1)
    assert holder.process.stdin is not None
    holder.process.stdin.write("end\n")
    holder.process.stdin.flush()
    assert waiting.has() == ["0"]
    assert holder.process.poll() is None
    holder.end(kill=True)
    waiting.end()


def test_those_that_need_several_hold_none_while_they_wait(tmp_path: Path) -> None:
    """Two that each hold one, and wait for the other's, would wait for ever."""
    holder = Training(tmp_path, "b", 1)
    assert holder.has() == ["b"]
    pair = Training(tmp_path, "a,b", 2)
    assert pair.waits()
    other = Training(tmp_path, "a", 1)
    assert other.has() == ["a"]
    other.end()
    holder.end()
    assert pair.has() == ["a", "b"]
    pair.end()


@pytest.mark.parametrize(
    ("visible", "shown", "meant"),
    [
        (["0"], ["GPU-b"], ["GPU-b"]),  # two jobs of Slurm's, each of which calls its own 0
        (["0"], ["GPU-a"], ["GPU-a"]),
        (["1", "0"], ["GPU-a", "GPU-b"], ["GPU-b", "GPU-a"]),
        (["GPU-b7"], ["GPU-a1", "GPU-b7c3"], ["GPU-b7c3"]),  # as CUDA takes it
        (["MIG-1"], ["GPU-a"], ["MIG-1"]),
        (["0", "1"], [], ["0", "1"]),  # a driver that does not tell
    ],
)
def test_a_gpu_is_told_from_others_by_what_it_is(
    visible: list[str], shown: list[str], meant: list[str]
) -> None:
    assert of_the_host(visible, shown) == meant


def test_a_name_of_nothing_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0, 2,")
    assert visible_gpus() == ["0", "2"]
