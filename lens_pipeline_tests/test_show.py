"""What `lens-pipeline show` says on its terminal, and which code it runs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lens_pipeline.cli import main
from lens_pipeline.defs.stages import EVALUATION
from lens_pipeline.runner import open_instance
from lens_pipeline.serve import Messages, Pages, Server
from lens_pipeline.settings import Settings
from lens_pipeline_tests.object_stores import free_ports
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
    own_home: Path, tmp_path: Path
) -> None:
    """A survey's folder may hold any file; and the tracebacks of a run are on its page."""
    folder = tmp_path / "survey"
    folder.mkdir()
    for name in TAKEN:
        trap = f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\nraise SystemExit(1)\n"
        (folder / f"{name}.py").write_text(trap)
    training = {"checkpoints__lastro": {"config": {"training": {"epochs": 0}}}}
    with Served(own_home, tmp_path / "log", folder=folder) as served:
        run = served.launch("training", ops=training)
        assert served.ended(run, 180)["status"] == "FAILURE"
        messages = own_home / "dagster" / "servers.log"
        assert "training.epochs: Input should be greater than" in messages.read_text()
        with messages.open("ab") as file:  # as the code server does, which evaluates sensors
            subprocess.run([sys.executable, "-c", ALERT], stderr=file, check=True)
        until(lambda: "no room" in served.log, 10, served.log)
        # It is a copy of a home, which `show` is the first to open.
        moved, lines = "MLflow's records name ", served.log.splitlines()
        lines = [line for line in lines if not line.startswith(moved)]
        assert lines[:5] == [
            "starting the pages ...",
            f"Dagster  {served.dagster}",
            f"MLflow   {served.mlflow}/#/experiments/1/runs?workflowType=machine_learning",
            f"Messages {messages}",
            "Ctrl-C ends what runs here.",
        ]
        assert "alert: run 4ce1f47a failed: no room" in lines
        assert [line for line in lines[5:] if not line.startswith("alert: ")] == []
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
                page = Settings.load(home=served.home).dagster_run_page("4ce1f47a")
                assert page == f"{served.dagster}/runs/4ce1f47a"


@pytest.mark.slow
def test_a_run_of_the_command_line_is_on_the_pages_that_are_open(
    own_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Among its job's runs, with links to MLflow's; and where it has other settings, it says so."""
    run = ["run", "--preset", "tiny", "--home", str(own_home)]
    with Served(own_home, tmp_path / "log") as served:
        before = {found["runId"] for found in served.runs()}
        (definitions,) = served.processes("api", "grpc")  # once, for the daemon and the page
        assert main(run) == 0
        assert "begin it again" not in capfd.readouterr().err
        monkeypatch.setenv("LENS_GATE_MIN_LENS", "5")
        assert main(run) == 0
        assert "are open with the settings of when it was begun" in capfd.readouterr().err
        of_job = {"pipelineName": "full_pipeline"}
        here = {"key": ".dagster/repository", "value": "__repository__@lens_pipeline"}
        made = {found["runId"] for found in served.runs(**of_job, tags=[here])}
        assert len(made - before) == 2
        with open_instance(Settings.load(home=own_home)) as instance:
            event = instance.get_latest_materialization_event(EVALUATION)
        assert event is not None
        assert event.asset_materialization is not None
        members = event.asset_materialization.metadata["members"]
        assert f"({served.mlflow}/#/" in str(members.value)
        # A daemon would load its own anew each minute, for as long as it lives.
        time.sleep(max(0, definitions.create_time() + 100 - time.time()))
        assert served.processes("api", "grpc") == [definitions]
    assert main(run) == 0
    assert "begin it again" not in capfd.readouterr().err


def test_a_page_that_cannot_live_ends_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the daemon nor the runs that it has launched."""
    with (tmp_path / "lock").open("w") as lock:
        how = (dict(os.environ), lock.fileno(), Messages(tmp_path / "log"))
        daemon = Server(("http.server", str(free_ports(1)[0])), *how)
        page = Server(("this",), *how)  # prints, and has ended
        shown = Pages({}, (daemon,), (page,), None)
        page.process.wait()
        for _ in range(2):
            shown.revive()
        assert caplog.text.count("this ended as soon as it had begun") == 1
        assert daemon.process.poll() is None
        daemon.process.kill()
        daemon.process.wait()
        with pytest.raises(RuntimeError, match=r"http\.server ended as soon as it had begun"):
            shown.revive()


@pytest.mark.slow
def test_pages_that_are_told_twice_to_end_leave_no_server(tmp_path: Path) -> None:
    log = tmp_path / "home" / "dagster" / "servers.log"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"from years ago\n" * 1_000_000)
    served = Served(tmp_path / "home", tmp_path / "log").__enter__()
    servers = [
        process
        for name in ("dagster._daemon", "dagster_webserver", "mlflow")
        for process in served.processes(name)
    ]
    assert len(servers) >= 3
    for _ in range(2):
        served.server.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    served.server.wait(60)
    assert log.stat().st_size < 11 << 20
    until(lambda: not any(server.is_running() for server in servers), 30, "all servers end")


@pytest.mark.slow
def test_definitions_that_did_not_load_are_loaded_when_they_can_be(tmp_path: Path) -> None:
    """As where a store did not answer when the pages were opened, or a file was not right."""
    query = """{ workspaceOrError { ... on Workspace { locationEntries { locationOrLoadError {
        __typename ... on PythonError { errorChain { error { message } } } } } } } }"""
    training = tmp_path / "training.yaml"
    training.write_text("training: {epochs: 0}")

    def location() -> dict[str, Any]:
        (entry,) = served.ask(query)["workspaceOrError"]["locationEntries"]
        return dict(entry["locationOrLoadError"] or {"__typename": "loading"})

    with Served(tmp_path / "home", tmp_path / "log", {"LENS_TRAINING": str(training)}) as served:
        until(lambda: "training.epochs" in str(location()), 60, "it is on the page")
        training.write_text("training: {epochs: 1}")
        until(lambda: location()["__typename"] == "RepositoryLocation", 120, "they are loaded")
        assert "started again" not in served.log
