"""Killed, interrupted, and run again: nothing half-made is taken for whole, nothing is lost."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lens_pipeline_tests.conftest import LENS_PIPELINE, client_of, summary_of
from lens_pipeline_tests.served import Served

ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("LENS_", "MLFLOW_"))}


class Job:
    """The main job in a process group of its own."""

    def __init__(
        self, home: Path, *more: str, environment: Mapping[str, str] | None = None
    ) -> None:
        command = [LENS_PIPELINE, "run", "--preset", "tiny", "--home", str(home), *more]
        self.log = home.with_name(f"{home.name}-{time.time_ns()}.log")
        self.process = subprocess.Popen(
            command,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=ENVIRONMENT | dict(environment or {}),
        )

    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, line: str) -> None:
        """Until it has said so."""
        begun = time.monotonic()
        while line not in self.text():
            assert self.process.poll() is None, f"ended before {line!r}:\n{self.text()}"
            assert time.monotonic() - begun < 120, f"never said {line!r}:\n{self.text()}"
            time.sleep(0.02)

    def end(self, how: signal.Signals) -> tuple[int, float]:
        """Signal the whole group; (exit status, seconds it took)."""
        begun = time.monotonic()
        os.killpg(self.process.pid, how)
        status = self.process.wait(timeout=60)
        return status, time.monotonic() - begun


def finish(
    home: Path, *more: str, environment: Mapping[str, str] | None = None
) -> dict[str, object]:
    job = Job(home, *more, environment=environment)
    assert job.process.wait(timeout=300) == 0, job.text()
    return summary_of(home)


# So long a training that the kill is sure to meet it; it holds the only slot of the pool.
LONG = ("--set", "lastro.training.epochs=300")
IN_TRAINING = "epoch 2/300"
MOMENTS = [
    "cutout_catalogue ...",
    "lens_shards ...",
    IN_TRAINING,
    "checkpoints/lastro: ",
    "registered_ensemble ...",
]


@pytest.mark.slow
def test_killed_at_five_moments_a_run_completes_with_the_same_result(
    home: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "home"
    for delay in (0.1, 0.3, 0.6):  # while MLflow makes its database, which takes a second
        job = Job(mine)
        while not list(mine.glob("*mlflow.db*")):
            assert job.process.poll() is None, job.text()
            time.sleep(0.01)
        time.sleep(delay)
        assert job.end(signal.SIGKILL)[0] == -signal.SIGKILL
    for moment in MOMENTS:
        job = Job(mine, *(LONG if moment == IN_TRAINING else ()))
        job.wait_for(moment)
        status, _ = job.end(signal.SIGKILL)
        assert status == -signal.SIGKILL
        for done in mine.glob("*/*/complete.json"):
            for name, entry in json.loads(done.read_text())["files"].items():
                assert (done.parent / name).stat().st_size == entry["bytes"]
    ours = finish(mine)
    undisturbed = summary_of(home)
    assert ours["ensemble"] == undisturbed["ensemble"]
    assert ours["members"] == undisturbed["members"]
    # What was finished before the last kill was not done again.
    stages = ours["stages"]
    assert all(stages[name]["reused"] for name in stages if name != "registered_ensemble")  # type: ignore[index, union-attr]
    client = client_of(mine)
    assert len(client.search_model_versions("name = 'lens_ensemble'")) == 1
    # Of what was asked for nothing is half-made; the long training may be asked for again.
    left = [path.parent.name for path in mine.rglob(".partial-*") if path.is_dir()]
    assert left == ["lastro"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_within_ten_seconds_and_the_next_goes_on(
    how: signal.Signals, tmp_path: Path
) -> None:
    mine = tmp_path / "home"
    job = Job(mine, "--set", "lastro.training.epochs=300")
    job.wait_for("epoch 2/300")
    status, seconds = job.end(how)
    assert status == 130
    assert seconds < 10
    assert "error: interrupted; the same command goes on" in job.text()
    summary = finish(mine)
    assert summary["stages"]["processed_dataset"]["reused"]  # type: ignore[index]


@pytest.mark.slow
def test_runs_at_once_on_a_fresh_home_make_each_step_once_and_one_champion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of the command line, one of the pages, which are opened meanwhile."""
    mine = tmp_path / "home"
    easy = {"LENS_GATE_MIN_LENS": "1", "LENS_GATE_MIN_NONLENS": "1", "LENS_GATE_MIN_AUROC": "0"}
    for name, value in {**easy, "LENS_PRESET": "tiny"}.items():
        monkeypatch.setenv(name, value)
    jobs = [Job(mine, environment=easy), Job(mine, environment=easy)]
    with Served(mine, tmp_path / "log") as served:
        launched = served.launch("full_pipeline")
        assert served.answers()
        for job in jobs:
            assert job.process.wait(timeout=600) == 0, job.text()
        assert served.ended(launched, 300)["status"] == "SUCCESS", served.messages(launched)
        client = MlflowClient(served.mlflow, served.mlflow)
        assert [found.version for found in client.search_model_versions("")] == ["1"]
        assert client.get_model_version_by_alias("lens_ensemble", "champion").version == "1"
        said = [job.text() for job in jobs] + ["\n".join(served.messages(launched))]
    for step in ("cutout_catalogue", "checkpoints/lastro", "lens_ensemble", "registered_ensemble"):
        assert [f"{step}: made" in text for text in said].count(True) == 1, step
    stages = finish(mine, environment={**easy, "LENS_VERIFY": "true"})["stages"]
    assert all(stage["reused"] for stage in stages.values())  # type: ignore[attr-defined]
