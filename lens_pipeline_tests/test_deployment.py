"""The deployment: its files agree with the rest, and the services' own commands, run as processes
on a real PostgreSQL, carry the main job.

What a container runtime does with the Compose file is done here by hand: variables are filled in,
and what is mounted is found where it lies on this machine.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dagster as dg
import psutil
import pytest
import yaml

from lens_pipeline.commit import code_commit
from lens_pipeline.defs.stages import REGISTERED
from lens_pipeline.runner import open_instance
from lens_pipeline.settings import Settings
from lens_pipeline.terminal import ENVIRONMENT
from lens_pipeline_tests.conftest import client_of
from lens_pipeline_tests.object_stores import free_ports
from lens_pipeline_tests.postgres import PASSWORD, PROGRAMS
from lens_pipeline_tests.served import Pages, until

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
OPERATIONS = ROOT / "docs" / "operations.md"
VARIABLE = re.compile(r"\$\{(\w+):?([?+-]?)([^{}]*)\}")  # the innermost of nested ones
NEW_PASSWORD = "an0ther-w@rd/%"
SECRET = re.compile("PASSWORD|WEBHOOK|OPTIONS|TRACKING_URI")


def compose_files() -> list[Path]:
    return sorted(DEPLOY.glob("compose*.yaml"))


def interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    """What Compose makes of the variables in what it has read: an empty one counts as absent."""

    def filled_in(found: re.Match[str]) -> str:
        name, rule, default = found.groups()
        if rule == "?":
            assert variables.get(name), f"{name}: {default}"
        if rule == "+":
            return default if variables.get(name) else ""
        return variables.get(name) or default

    if isinstance(value, dict):
        return {name: interpolated(inner, variables) for name, inner in value.items()}
    if isinstance(value, list):
        return [interpolated(inner, variables) for inner in value]
    while isinstance(value, str) and VARIABLE.search(value):
        value = VARIABLE.sub(filled_in, value)
    return value


def env_file(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)  # type: ignore[misc]


def documented(section: str) -> list[str]:
    """The commands that docs/operations.md gives under a heading."""
    _, _, text = OPERATIONS.read_text().partition(f"\n## {section}\n")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text.partition("\n## ")[0], re.M | re.S)
    assert blocks, section
    return [line for block in blocks for line in block.splitlines()]


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
    destination = [w for w in service["command"] if not w.startswith("--artifacts-destination")]
    server = psutil.Popen(
        [sys.executable, "-m", *destination],
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
    subprocess.run([*install, str(source)], check=True, cwd=tmp_path, capture_output=True)
    program = "import lens_pipeline.definitions as d; print(d.__file__)"
    environment = os.environ | {"PYTHONPATH": str(site)}
    found = subprocess.check_output(
        [sys.executable, "-c", program], text=True, cwd=tmp_path, env=environment
    )
    assert found.startswith(str(site))
    files = {path.name for path in (site / "lens_pipeline").iterdir()}
    assert files >= {path.name for path in (ROOT / "lens_pipeline").glob("*.yaml")}


@dataclass
class Deployment(Pages):
    """The Compose file's services as processes of this machine.

    root: stands for the containers' file system: what is mounted at /var/lib/lens lies at
    root/var/lib/lens. database: PostgreSQL's URI, with its password.
    """

    root: Path
    logs: Path
    database: str
    running: dict[str, psutil.Popen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        server = urlsplit(self.database)
        code, dagster, mlflow = (str(port) for port in free_ports(3))
        self.dagster, self.mlflow = f"http://127.0.0.1:{dagster}", f"http://127.0.0.1:{mlflow}"
        self.client = {"PGHOST": "127.0.0.1", "PGPORT": str(server.port), "PGPASSWORD": PASSWORD}
        self.variables = env_file(DEPLOY / ".env.example") | self.client
        self.variables |= {"LENS_CODE_HOST": "127.0.0.1", "LENS_CODE_PORT": code}
        self.variables |= {"LENS_DAGSTER_PORT": dagster, "LENS_MLFLOW_PORT": mlflow}
        self.variables |= {"MLFLOW_TRACKING_URI": self.mlflow}
        self.variables |= {"LENS_SOURCE": "simulation", "LENS_PRESET": "tiny"}
        self.folder = re.findall(r"^WORKDIR (\S+)$", (DEPLOY / "Dockerfile").read_text(), re.M)[-1]
        folders = {self.folder}
        files = {}
        for service in self.services.values():
            folders |= {volume.split(":")[1] for volume in service["volumes"]}
            files |= {config["target"]: config["source"] for config in service["configs"]}
        for folder in folders:
            self.here(folder).mkdir(parents=True)
        for target, source in files.items():
            self.here(target).parent.mkdir(parents=True, exist_ok=True)
            content = (DEPLOY / self.compose["configs"][source]["file"]).read_text()
            self.here(target).write_text(content)
        self.mounted = re.compile(r"(?<![\w/.-])(" + "|".join([*files, *folders]) + ")")

    @property
    def compose(self) -> dict[str, Any]:
        read = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
        return dict(interpolated(read, self.variables))

    @property
    def services(self) -> dict[str, Any]:
        return dict(self.compose["services"])

    @property
    def log(self) -> str:  # type: ignore[override]
        return (self.logs / "daemon").read_text()

    def here(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def found(self, text: str) -> str:
        """A text with the containers' paths as they are here."""
        return self.mounted.sub(lambda path: str(self.here(path[0])), text)

    def environment(self, name: str) -> dict[str, str]:
        """What a service finds in its environment, over what every process here needs."""
        programs = f"{Path(sys.executable).parent}:{PROGRAMS[-1]}:{os.environ['PATH']}"
        service = self.services[name]
        # Within its own container PostgreSQL is found without being told where.
        given = self.variables if "env_file" in service else self.client
        own = {k: self.found(v) for k, v in service["environment"].items()}
        return os.environ | given | own | {"PATH": programs}

    def execute(self, name: str, command: str, typed: str = "") -> str:
        """What a command prints in the container of a service; what it is fed from, or goes to, is
        a file of the host's."""
        command, redirected = re.fullmatch(r"(.*?)( [<>] \S+)?", command).groups("")
        within = f"(cd {self.folder}; {command}){redirected}"
        done = subprocess.run(
            ["bash", "-euc", self.found(within)],
            cwd=self.logs.parent,
            env=self.environment(name),
            input=typed,
            start_new_session=True,  # what asks for a password would ask the terminal
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def follow(self, section: str, typed: str = "") -> None:
        """Do what docs/operations.md says under a heading, but for building and starting."""
        for line in documented(section):
            action, *words = line.removeprefix("docker compose ").split(" ")
            if action == "stop":
                self.stop(*words)
            elif action in ("exec", "run"):
                service, command = re.sub("^(-T |--rm |--no-deps )*", "", " ".join(words)).split(
                    " ", 1
                )
                self.execute(service, command, typed)

    def healthy(self, name: str) -> bool:
        if name in self.running and self.running[name].poll() is not None:
            raise AssertionError(f"{name} has ended:\n{(self.logs / name).read_text()[-3000:]}")
        test = self.services[name]["healthcheck"]["test"]
        assert test[0] == "CMD"
        done = subprocess.run(
            test[1:], env=self.environment(name), capture_output=True, check=False
        )
        return done.returncode == 0

    def up(self) -> None:
        for name, service in self.services.items():
            if "command" not in service or name in self.running:
                continue
            for other in service["depends_on"]:
                until(lambda other=other: self.healthy(other), 180, f"{other} is not healthy")
            with (self.logs / name).open("ab") as log:
                self.running[name] = psutil.Popen(
                    [self.found(word) for word in service["command"]],
                    cwd=self.here(self.folder),
                    env=self.environment(name),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        for name in self.running:
            until(lambda name=name: self.healthy(name), 180, f"{name} is not healthy")

    def stop(self, *names: str) -> None:
        """Ask services to end; what they have started ends with them, as in a container."""
        asked = [self.running.pop(name) for name in names if name in self.running]
        below: list[psutil.Process] = []
        for process in asked:
            with suppress(psutil.NoSuchProcess):
                below += process.children(recursive=True)
                process.terminate()
        psutil.wait_procs(asked, timeout=60)
        for left in (*asked, *below):
            with suppress(psutil.NoSuchProcess):
                left.kill()


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
