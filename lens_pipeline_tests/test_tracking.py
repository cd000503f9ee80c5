"""MLflow runs of trainings: whose they are, and what is written into them."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from mlflow.entities import Metric
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from lens_pipeline import tracking as tables
from lens_pipeline.cli import main
from lens_pipeline.errors import InputError
from lens_pipeline.settings import Settings
from lens_pipeline.tracking import EXPERIMENT, HOME_ID, Tracking
from lens_pipeline_tests.conftest import client_of
from lens_pipeline_tests.object_stores import S3Server, free_ports
from lens_pipeline_tests.postgres import PASSWORD


def _says(home: Path, uri: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `promote` says of a registry in a database, which it refuses in a few seconds."""
    begun = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        assert main(["promote", "1", "--home", str(home)]) == 2
    assert time.monotonic() - begun < 30
    return capsys.readouterr().err


def test_a_database_that_lets_nobody_in_is_told_at_once(
    postgresql: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = postgresql.replace(PASSWORD, "another-word")
    said = _says(tmp_path, wrong, capsys)
    assert "MLFLOW_TRACKING_URI: postgresql://" in said
    assert "does not let us in" in said
    assert "password authentication failed" in said
    assert "another-word" not in said
    said = _says(tmp_path, postgresql.replace("/postgres", "/none_such"), capsys)
    assert "none_such" in said
    assert "does not exist" in said


def test_a_database_that_is_not_there_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (port,) = free_ports(1)
    said = _says(tmp_path, f"postgresql://lens:{PASSWORD}@127.0.0.1:{port}/mlflow", capsys)
    assert "gives no answer" in said
    assert str(port) in said
    assert PASSWORD not in said


@pytest.mark.parametrize("by", ["the client", "the logger"])
def test_an_interruption_while_something_is_written_locks_no_database(
    by: str, tmp_path: Path
) -> None:
    """Else the end of the run waits for itself, and other runs of the home for it."""
    tracking = Tracking(Settings.load(home=tmp_path))
    run_id = tracking.start_run("lastro", "key", {})
    logger, when = tracking.logger(run_id), int(time.time() * 1000)
    names = [f"val/{i}" for i in range(12)]
    main_thread = threading.get_ident()

    def write(step: int) -> None:
        if by == "the logger":
            logger.log_metrics(dict.fromkeys(names, 0.5), step)
        else:
            metrics = [Metric(name, 0.5, when, step) for name in names]
            tracking.client.log_batch(run_id, metrics=metrics)

    def interrupted(step: int, seconds: float) -> None:
        threading.Timer(seconds, signal.pthread_kill, (main_thread, signal.SIGINT)).start()
        write(step)
        time.sleep(10)  # where it comes too late

    write(0)  # which makes its connections
    begun = time.perf_counter()
    write(1)
    within = np.random.default_rng(0).uniform(0, time.perf_counter() - begun, 10)
    for step, seconds in enumerate(within, start=2):
        with pytest.raises(KeyboardInterrupt):
            interrupted(step, seconds)
        tracking.client.set_tag(run_id, "interrupted", str(step))  # raises where it is locked


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("sqlite:///{folder}", "{folder} cannot be opened"),
        ("sqlite:///{folder}/none/m.db", "{folder}/none/m.db cannot be opened"),
        ("postgresql+typo://host/db", ".* is none that MLflow takes .Can't load plugin"),
    ],
)
def test_records_that_cannot_be_opened_are_named(
    uri: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(folder=tmp_path))
    with pytest.raises(InputError, match=f"MLFLOW_TRACKING_URI: {said.format(folder=tmp_path)}"):
        _ = Tracking(Settings.load(home=tmp_path / "home")).client


def test_a_place_of_records_may_be_written_as_in_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my records").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/my%20records/m.db")
    _ = Tracking(Settings.load(home=tmp_path / "home")).client
    assert [path.name for path in (tmp_path / "my records").iterdir()] == ["m.db"]


@pytest.mark.parametrize("content", [b"no database " * 500, None], ids=["another file", "torn"])
def test_a_database_that_is_damaged_is_named(content: bytes | None, tmp_path: Path) -> None:
    settings = Settings.load(home=tmp_path)
    if content is None:
        _ = Tracking(settings).client
        whole = settings.mlflow_database.read_bytes()
        content = whole[:4096] + b"\xff" * (len(whole) - 4096)
    settings.mlflow_database.write_bytes(content)
    with pytest.raises(InputError, match=r"mlflow.db: is no database of MLflow, or damaged \("):
        _ = Tracking(settings).client


def test_an_experiment_that_was_deleted_is_restored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its name can be given to no other, and a run in it would fail after hours of training."""
    settings = Settings.load(home=tmp_path)
    first = Tracking(settings)
    first.client.delete_experiment(first.experiment_id)
    again = Tracking(settings)
    assert again.experiment_id == first.experiment_id
    again.start_run("lastro", "key", {})
    assert f"the experiment {EXPERIMENT} was deleted; it is restored" in caplog.text


def test_a_run_of_another_home_on_the_same_server_is_left_alone(tmp_path: Path) -> None:
    tables._create_database(tmp_path / "shared.db")  # quickly: see `tables_of_mlflow`
    server = f"sqlite:///{tmp_path / 'shared.db'}"
    one, two = (
        Tracking(Settings.load(home=tmp_path / name, MLFLOW_TRACKING_URI=server))
        for name in ("one", "two")
    )
    first = one.start_run("lastro", "key", {})
    assert two.find_run("key") is None
    second = two.start_run("lastro", "key", {})
    assert one.client.get_run(first).info.status == "RUNNING"
    one.finish_run(first, {"epochs": 1})
    third = two.start_run("lastro", "key", {})  # the second was left unfinished
    status = {run: one.client.get_run(run).info.status for run in (first, second, third)}
    assert status == {first: "FINISHED", second: "FAILED", third: "RUNNING"}


def test_a_home_on_a_shared_file_system_knows_its_runs_on_each_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that a former version has made, which named the host and the path alone."""
    settings = Settings.load(home=tmp_path / "home")
    monkeypatch.setattr("socket.gethostname", lambda: "node01")
    first = Tracking(settings).start_run("lastro", "key", {})
    older = Tracking(settings).start_run("lastro", "older", {})
    Tracking(settings).client.delete_tag(older, HOME_ID)
    assert Tracking(settings).start_run("lastro", "older", {}, goes_on=True) == older
    monkeypatch.setattr("socket.gethostname", lambda: "node02")
    there = Tracking(settings)
    assert there.start_run("lastro", "key", {}, goes_on=True) == first
    found = there.find_run("older")
    assert found is not None
    assert found.info.run_id == older


FIRST_USE = """
import sys
from pathlib import Path
from lens_pipeline.settings import Settings
from lens_pipeline.tracking import Tracking

print("ready", flush=True)
sys.stdin.readline()
print(Tracking(Settings.load(home=Path(sys.argv[1])))._home_id)
"""


def test_processes_that_first_use_a_home_together_know_it_as_one(tmp_path: Path) -> None:
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST_USE, str(tmp_path)], stdin=pipe, stdout=pipe, text=True
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert len({process.communicate(timeout=60)[0] for process in processes}) == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["id"]


def test_parameters_that_a_run_has_are_kept_and_others_added(tmp_path: Path) -> None:
    tracking = Tracking(Settings.load(home=tmp_path))
    run = tracking.start_run("lastro", "key", {})
    tracking.tell_parameters(run, {"training": {"epochs": 3}})
    tracking.finish_run(run, {"training": {"epochs": 4, "batch_size": 8}})
    params = tracking.client.get_run(run).data.params
    assert params == {"training.epochs": "3", "training.batch_size": "8"}


def test_a_home_that_was_moved_or_copied_keeps_its_models_in_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own records name the folder where it was."""

    def recorded(home: Path, name: str) -> Path:
        """A run with a file, and its folder."""
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # which MLflow sets
        found = Tracking(Settings.load(home=home))
        run = found.start_run(name, name, {})
        found.client.log_text(run, "text", f"{name}.txt")
        (file,) = (home / "mlartifacts").rglob(f"{name}.txt")
        return file

    first, moved, copied = (tmp_path / name for name in ("first", "moved", "copied"))
    first.mkdir()
    inside = recorded(first, "before").relative_to(first)
    first.rename(moved)
    recorded(moved, "moved")
    assert not first.exists()
    shutil.copytree(moved, copied)
    recorded(copied, "copied")
    assert not [*moved.rglob("copied.txt")]
    client = client_of(copied)
    for run in client.search_runs(["1"]):
        assert run.info.artifact_uri.startswith((copied / "mlartifacts").as_uri())
        assert len(client.list_artifacts(run.info.run_id)) == 1
    assert (moved / inside).exists()


def test_mlflow_keeps_artifacts_on_s3_as_the_deployment_offers(
    s3_bucket: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By libraries of its own, which it does not ask for."""
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", s3_server.url)
    (tmp_path / "text.txt").write_text("pixels")
    artifacts = get_artifact_repository(f"{s3_bucket}/mlflow")
    artifacts.log_artifact(str(tmp_path / "text.txt"))
    assert [found.path for found in artifacts.list_artifacts()] == ["text.txt"]
