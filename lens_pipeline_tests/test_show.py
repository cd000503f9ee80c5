"""What `lens-pipeline show` says on its terminal, and which code it runs."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lens_pipeline_tests.served import Served, until

ALERT = """
from lens_pipeline.alerts import alert
from lens_pipeline.settings import Settings

alert(Settings.load(), "run 4ce1f47a failed:\\n  no room")
"""
# Of libraries that each server, the code server, a run or a step imports, and of Python's own.
TAKEN = (
    *("yaml", "requests", "click", "grpc", "sqlalchemy", "gql", "pandas", "torch", "mlflow"),
    *("dagster", "select", "random", "signal"),
)


@pytest.mark.slow
def test_no_file_of_the_working_directory_is_run_and_the_terminal_is_left_to_alerts(
    home: Path, tmp_path: Path
) -> None:
    """A survey's folder may hold any file; and the tracebacks of a run are on its page."""
    folder = tmp_path / "survey"
    folder.mkdir()
    for name in TAKEN:
        trap = f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\nraise SystemExit(1)\n"
        (folder / f"{name}.py").write_text(trap)
    own = Path(shutil.copytree(home, tmp_path / "home"))
    training = {"checkpoints__lastro": {"config": {"training": {"epochs": 0}}}}
    with Served(own, tmp_path / "log", folder=folder) as served:
        run = served.launch("training", ops=training)
        assert served.ended(run, 180)["status"] == "FAILURE"
        messages = own / "dagster" / "servers.log"
        assert "training.epochs: Input should be greater than" in messages.read_text()
        with messages.open("ab") as file:  # as the code server does, which evaluates sensors
            subprocess.run([sys.executable, "-c", ALERT], stderr=file, check=True)
        until(lambda: "no room" in served.log, 10, served.log)
        lines = served.log.splitlines()
        assert lines[:4] == [
            f"Dagster  {served.dagster}",
            f"MLflow   {served.mlflow}/#/experiments/1/runs?workflowType=machine_learning",
            f"Messages {messages}",
            "Ctrl-C ends what runs here.",
        ]
        assert "alert: run 4ce1f47a failed: no room" in lines
        assert [line for line in lines[4:] if not line.startswith("alert: ")] == []
        messages.unlink()
        time.sleep(2)  # several looks at it
        assert served.server.poll() is None, served.log
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


@pytest.mark.slow
def test_links_lead_where_people_are_told_to_find_mlflow(tmp_path: Path) -> None:
    """Beside a server that is another's none is started."""
    told = {"LENS_MLFLOW_PAGE": "https://mlflow.example/lenses"}
    with Served(tmp_path / "theirs", tmp_path / "their log", told) as theirs:
        tracked = told | {"MLFLOW_TRACKING_URI": theirs.mlflow}
        with Served(tmp_path / "own", tmp_path / "log", tracked) as own:
            assert own.processes("mlflow", "server") == []
            for served, shown in ((theirs, theirs.mlflow), (own, "https://mlflow.example/lenses")):
                assert f"MLflow   {shown}/#/experiments/1/runs" in served.log
                (daemon,) = served.processes("dagster._daemon")
                assert told.items() <= daemon.environ().items()
