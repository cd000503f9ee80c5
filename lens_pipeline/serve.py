"""Dagster's and MLflow's pages on one home."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lens_pipeline.errors import InputError, masked
from lens_pipeline.runner import open_instance
from lens_pipeline.settings import Settings
from lens_pipeline.tracking import Tracking

HOST = "127.0.0.1"
# No workers for MLflow's evaluation jobs, and no libraries' warnings on the terminal.
QUIET = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONWARNINGS": "ignore"}
PATIENCE = 6  # seconds that the servers have for an orderly end


@dataclass(frozen=True)
class Pages:
    """addresses: {"Dagster": URL, "MLflow": URL}; servers: the processes behind them."""

    addresses: dict[str, str]
    servers: tuple["subprocess.Popen[bytes]", ...]

    def alive(self) -> bool:
        return all(server.poll() is None for server in self.servers)


@contextmanager
def pages(settings: Settings, dagster_port: int, mlflow_port: int) -> Iterator[Pages]:
    """Both pages, once they answer, and Dagster's daemon; all are ended on leaving.

    A run may be writing meanwhile. Where MLFLOW_TRACKING_URI names a server, its address is given
    and none is started. Raises InputError where a port is taken, RuntimeError where a server ends
    before it answers.
    """
    addresses = {"Dagster": f"http://{HOST}:{dagster_port}"}
    ports = {"--dagster-port": dagster_port}
    if settings.mlflow_uri.startswith("http"):
        addresses["MLflow"] = masked(settings.mlflow_uri)
    else:
        addresses["MLflow"] = f"http://{HOST}:{mlflow_port}"
        ports["--mlflow-port"] = mlflow_port
    for option, port in ports.items():
        if _answers(port):
            raise InputError(f"{option} {port}: is in use; name another")
    with open_instance(settings):
        pass
    assert Tracking(settings).experiment_id  # creates the database before two servers would
    commands = _commands(dagster_port, mlflow_port if len(ports) == 2 else None)
    # Its URI may hold a password, which everybody would read among a command's arguments.
    environment = os.environ | QUIET | {"MLFLOW_BACKEND_STORE_URI": settings.mlflow_uri}
    servers = tuple(
        subprocess.Popen([sys.executable, "-m", *command], env=environment) for command in commands
    )
    found = Pages(addresses, servers)
    try:
        while not all(_answers(port) for port in ports.values()):
            if not found.alive():
                raise RuntimeError("a server has ended before it answered; see its messages above")
            time.sleep(0.2)
        yield found
    finally:
        for server in servers:
            server.terminate()
        deadline = time.monotonic() + PATIENCE
        for server in servers:
            try:
                server.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                server.kill()


def _commands(dagster_port: int, mlflow_port: int | None) -> list[Sequence[str]]:
    workspace = Path(__file__).with_name("workspace.yaml")
    definitions = ("-w", str(workspace), "--code-server-log-level", "warning")
    commands: list[Sequence[str]] = [
        ("dagster_webserver", *definitions, "-h", HOST, "-p", str(dagster_port)),
        ("dagster._daemon", "run", *definitions),
    ]
    if mlflow_port is not None:
        address = ("--host", HOST, "--port", str(mlflow_port), "--workers", "1")
        quiet = ("--uvicorn-opts", "--log-level warning")
        commands.append(("mlflow", "server", *address, *quiet))
    return commands


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def serve(settings: Settings, dagster_port: int, mlflow_port: int) -> int:
    """Serve `pages` until one ends or Ctrl-C; prints their addresses once they answer."""
    try:
        with pages(settings, dagster_port, mlflow_port) as found:
            for name, address in found.addresses.items():
                print(f"{name:8} {address}", flush=True)
            print("Ctrl-C ends both.", flush=True)
            while found.alive():
                time.sleep(0.5)
    except KeyboardInterrupt:
        return 0
    return 1
