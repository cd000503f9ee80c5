"""A deployment: the Compose file's services as processes of this machine, driven by the commands of
docs/operations.md.

What a container runtime does with the file is done here by hand: variables are filled in, and what
is mounted is found where it lies on this machine.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import yaml

from lens_pipeline_tests.object_stores import free_ports
from lens_pipeline_tests.postgres import PASSWORD, PROGRAMS
from lens_pipeline_tests.served import Pages, until

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
OPERATIONS = ROOT / "docs" / "operations.md"
VARIABLE = re.compile(r"\$\{(\w+):?([?+-]?)([^{}]*)\}")  # the innermost of nested ones


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
