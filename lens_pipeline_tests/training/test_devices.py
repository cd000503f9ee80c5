"""GPUs are given out by names and locks, which need none."""

import subprocess
import sys
import time
from pathlib import Path

CLAIMS = """
import sys, time
from pathlib import Path
from lens_pipeline.training.devices import claimed
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
            text=True,
        )

    def has(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def end(self, kill: bool = False) -> None:
        if kill:
            self.process.kill()
        self.process.communicate()


def test_two_trainings_never_share_a_gpu(tmp_path: Path) -> None:
    trainings = [Training(tmp_path, "0,1,3", 1) for _ in range(3)]
    assert sorted(training.has() for training in trainings) == [["0"], ["1"], ["3"]]
    fourth = Training(tmp_path, "0,1,3", 1)
    time.sleep(3)
    assert fourth.process.poll() is None  # it waits
    trainings[1].end(kill=True)
    (freed,) = fourth.has()
    assert freed in "013"
    for training in (trainings[0], trainings[2], fourth):
        training.end()


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


def test_those_that_need_several_do_not_wait_for_each_other_for_ever(tmp_path: Path) -> None:
    trainings = [Training(tmp_path, names, 2) for names in ("a,b", "b,a") for _ in range(2)]
    for training in trainings:
        assert training.process.stdin is not None
        training.process.stdin.close()  # each ends as soon as it has had its turn
    assert [sorted(training.has()) for training in trainings] == [["a", "b"]] * 4
    for training in trainings:
        assert training.process.wait(timeout=60) == 0
