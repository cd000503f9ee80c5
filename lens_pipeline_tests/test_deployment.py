"""The deployment: its files agree with the rest, and the services' own commands, run as processes
on a real PostgreSQL, carry the main job."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from http.client import HTTPConnection
from pathlib import Path

import dagster as dg
import pandas as pd
import psutil
import pytest
import yaml

from lens_pipeline.cli import main
from lens_pipeline.commit import code_commit
from lens_pipeline.defs.stages import REGISTERED
from lens_pipeline.runner import open_instance
from lens_pipeline.settings import Settings
from lens_pipeline.terminal import ENVIRONMENT
from lens_pipeline_tests.conftest import client_of
from lens_pipeline_tests.deployed import (
    DEPLOY,
    OPERATIONS,
    ROOT,
    VARIABLE,
    Deployment,
    documented,
    env_file,
    interpolated,
)
from lens_pipeline_tests.object_stores import free_ports
from lens_pipeline_tests.postgres import PASSWORD
from lens_pipeline_tests.served import until

NEW_PASSWORD = "an0ther-w@rd/%"
SECRET = re.compile("PASSWORD|WEBHOOK|HEARTBEAT|OPTIONS|TRACKING_URI")


def compose_files() -> list[Path]:
    return sorted(DEPLOY.glob("compose*.yaml"))


def test_the_example_of_an_env_file_names_every_variable_and_no_secret() -> None:
    example = env_file(DEPLOY / ".env.example")
    used = {found[0] for path in compose_files() for found in VARIABLE.findall(path.read_text())}
    assert used <= set(example)
    settings = {f"LENS_{name.upper()}" for name in Settings.model_fields}
    assert {name for name in example if name.startswith("LENS_")} <= used | settings
    assert not [name for name, value in example.items() if SECRET.search(name) and value]


def test_the_services_are_not_refused_for_variables_of_their_deployment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each gets all of `.env`; what is no setting must not be taken for a misspelled one."""
    settings = {f"LENS_{name.upper()}" for name in Settings.model_fields}
    for name in env_file(DEPLOY / ".env.example"):
        if name.startswith("LENS_") and name not in settings:
            monkeypatch.setenv(name, "a value")
    Settings.load()


def test_what_is_built_knows_its_commit_and_no_env_file_hides_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    (name,) = compose["x-lens"]["build"]["args"]
    image = (DEPLOY / "Dockerfile").read_text()
    assert f"ARG {name}=\nENV {name}=${name}\n" in image
    assert name not in env_file(DEPLOY / ".env.example")  # the services get all of it, last
    (command,) = {line for line in OPERATIONS.read_text().splitlines() if name in line}
    said = subprocess.check_output(
        ["bash", "-euc", f"{command}; echo ${name}"], cwd=ROOT, text=True
    )
    assert said.strip() == code_commit()
    monkeypatch.setenv(name, 40 * "a")
    assert code_commit() == 40 * "a"


def test_what_is_started_in_the_image_has_the_environment_of_a_command() -> None:
    image = (DEPLOY / "Dockerfile").read_text()
    assert [name for name, value in ENVIRONMENT.items() if f"{name}={value}" not in image] == []


def test_mlflow_answers_behind_a_proxy_that_is_named_and_behind_no_other(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    variables = env_file(DEPLOY / ".env.example") | {"PGPASSWORD": "x"}
    variables |= {"LENS_MLFLOW_HOSTS": "lens.example", "LENS_MLFLOW_PORT": str(port)}
    variables["LENS_MLFLOW_ORIGINS"] = "https://lens.example"
    read = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    service = interpolated(read, variables)["services"]["mlflow"]
    database = {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    left_out = ("--artifacts-destination", "--workers")  # one answers as all do
    command = [word for word in service["command"] if not word.startswith(left_out)]
    server = psutil.Popen(
        [sys.executable, "-m", *command, "--workers=1"],
        cwd=tmp_path,
        env=os.environ | service["environment"] | database,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def status(host: str, **headers: str) -> int:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        path = "/ajax-api/2.0/mlflow/experiments/search"
        content = {"Content-Type": "application/json"}
        with closing(connection):
            connection.request(
                "POST", path, '{"max_results": 1}', content | {"Host": host} | headers
            )
            return connection.getresponse().status

    def answers() -> bool:
        with suppress(OSError):
            return status("localhost:1") == 200
        return False

    try:
        until(answers, 120, "MLflow answers")
        assert status("lens.example", Origin="https://lens.example") == 200
        assert status("lens.example", Origin="https://other.example") == 403
        assert status("other.example") == 403
    finally:
        below = server.children(recursive=True)
        server.terminate()
        psutil.wait_procs([server, *below], timeout=30)


def test_images_are_pinned_and_every_service_is_watched_and_started_again() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for name, service in services.items():
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"], name
    base = re.findall(r"^FROM (.+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    for image in [*base, services["postgres"]["image"]]:
        assert re.search(r":\d+\.\d+[\w.-]*$", image), image


def test_the_instance_of_a_deployment_differs_from_that_of_one_machine_where_it_says_so() -> None:
    here = yaml.safe_load((ROOT / "lens_pipeline" / "dagster.yaml").read_text())
    there = yaml.safe_load((DEPLOY / "dagster.yaml").read_text())
    assert there.pop("storage")
    for limits in (here, there):
        del limits["concurrency"]["pools"]["default_limit"]
        del limits["concurrency"]["runs"]["max_concurrent_runs"]
    assert there == here


def test_what_the_container_file_copies_makes_a_package_whose_definitions_load(
    tmp_path: Path,
) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for copied in re.findall(r"^COPY (.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE):
        for name in copied.split():
            subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
            assert f"!{name}" in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    install = [sys.executable, "-m", "uv", "pip", "install", "--no-deps", "--target", str(site)]
    install.append("--no-build-isolation")  # with the setuptools of these tests, from nowhere else
    subprocess.run([*install, str(source)], check=True, cwd=tmp_path, capture_output=True)
    program = "import lens_pipeline.definitions as d; print(d.__file__)"
    environment = os.environ | {"PYTHONPATH": str(site)}
    found = subprocess.check_output(
        [sys.executable, "-c", program], text=True, cwd=tmp_path, env=environment
    )
    assert found.startswith(str(site))
    files = {path.name for path in (site / "lens_pipeline").iterdir()}
    assert files >= {path.name for path in (ROOT / "lens_pipeline").glob("*.yaml")}


@pytest.fixture
def deployment(tmp_path: Path, postgresql: str) -> Iterator[Deployment]:
    (tmp_path / "logs").mkdir()
    found = Deployment(tmp_path / "root", tmp_path / "logs", postgresql)
    setup = "/docker-entrypoint-initdb.d/databases.sql"
    found.execute("postgres", f"psql -U lens -d postgres -f {setup}")
    try:
        yield found
    finally:
        found.stop(*found.running)


DAEMONS = "{ instance { daemonHealth { allDaemonStatuses { daemonType required healthy } } } }"
LOCATION = """{ workspaceOrError { ... on Workspace { locationEntries {
  name locationOrLoadError { __typename ... on PythonError { message } }
} } } }"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_services_carry_the_main_job_and_a_backup_brings_all_of_it_back(
    deployment: Deployment, tmp_path: Path
) -> None:
    import mlflow

    deployment.up()
    (location,) = deployment.ask(LOCATION)["workspaceOrError"]["locationEntries"]
    assert location["name"] == "lens_pipeline"
    assert location["locationOrLoadError"]["__typename"] == "RepositoryLocation", location
    daemons = deployment.ask(DAEMONS)["instance"]["daemonHealth"]["allDaemonStatuses"]
    assert daemons
    assert not [daemon for daemon in daemons if daemon["required"] and not daemon["healthy"]]

    run_id = deployment.launch("full_pipeline")
    assert deployment.ended(run_id, 600)["status"] == "SUCCESS", deployment.log[-5000:]
    rows = deployment.execute("postgres", 'psql -U lens -d dagster -Atc "select run_id from runs"')
    assert run_id in rows.split()
    home = deployment.here("/var/lib/lens")
    assert not list(home.rglob("*.db"))
    summary = (home / "reports" / "summary.json").read_text()

    def registered(to: str) -> set[str]:
        """The files of the registered model, as the tracking server gives them."""
        mlflow.set_tracking_uri(deployment.mlflow)
        mlflow.set_registry_uri(deployment.mlflow)  # a test before may have set another
        folder = mlflow.artifacts.download_artifacts(
            artifact_uri="models:/lens_ensemble@challenger", dst_path=str(tmp_path / to)
        )
        return {path.name for path in Path(folder).rglob("*") if path.is_file()}

    files = registered("before")
    assert "MLmodel" in files

    new = deployment.here("/data/new_field")
    assert main(["simulate", "--n", "24", "--out", str(new)]) == 0
    pd.read_parquet(new / "catalogue.parquet").to_csv(new / "catalogue.csv", index=False)
    deployment.follow("Score")
    scores = pd.read_parquet(home / "scores" / "new_field.parquet")
    assert len(scores) == 24
    assert scores["probability"].notna().all()
    assert (home / "scores" / "new_field.top.html").exists()

    deployment.follow("Back up")
    deployment.stop(*deployment.running)
    for place in ("/var/lib/lens", "/var/lib/mlartifacts"):
        for path in deployment.here(place).iterdir():
            if path.name != "dagster":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    deployment.execute("postgres", "dropdb -U lens mlflow")
    deployment.follow("Restore")
    deployment.follow("Upgrade")
    deployment.follow("Rotate credentials", typed=f"{NEW_PASSWORD}\n{NEW_PASSWORD}\n")
    deployment.variables["PGPASSWORD"] = deployment.client["PGPASSWORD"] = NEW_PASSWORD
    deployment.up()
    assert deployment.run(run_id)["status"] == "SUCCESS"
    assert registered("after") == files
    assert (home / "reports" / "summary.json").read_text() == summary
    deployment.follow("Start")
    deployment.follow("Schedules and sensors")
    deployment.follow("Clean up")

    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    for password in (PASSWORD, NEW_PASSWORD):
        assert not [path for path in written if password.encode() in path.read_bytes()]


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="sqlite3 is not installed")
def test_a_home_that_is_in_use_is_backed_up_restored_and_upgraded(
    own_home: Path, tmp_path: Path
) -> None:

    backup, restored = tmp_path / "backup", tmp_path / "restored"
    (restored / "dagster").mkdir(parents=True)  # damaged
    for name in ("cache/0f/train-000000.tar", "cache/models/lens_ensemble/1/MLmodel"):
        (own_home / name).parent.mkdir(parents=True)
        (own_home / name).touch()
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"BACKUP": str(backup), "PATH": programs}

    def follow(section: str, home: Path) -> None:
        lines = [line for line in documented(section) if not line.startswith(("docker", "export"))]
        subprocess.run(
            ["bash", "-euc", "\n".join(lines)],
            env=environment | {"LENS_HOME": str(home)},
            check=True,
        )

    with open_instance(Settings.load(home=own_home)) as instance:
        run_id = instance.create_run_for_job(dg.GraphDefinition("late").to_job()).run_id
        follow("Back up", own_home)
    follow("Restore", restored)
    with open_instance(Settings.load(home=restored)) as instance:
        assert instance.get_run_by_id(run_id)
        assert instance.fetch_materializations(REGISTERED, limit=1).records
    client = client_of(restored)
    assert client.get_model_version_by_alias("lens_ensemble", "challenger").version

    def files(home: Path) -> set[Path]:
        found = {path.relative_to(home) for path in home.rglob("*") if path.is_file()}
        return {path for path in found if ".db-" not in path.name}

    assert files(restored) == files(own_home) - {Path("cache/0f/train-000000.tar")}
    assert len([*tmp_path.glob("restored.damaged-*")]) == 1
    follow("Upgrade", restored)
