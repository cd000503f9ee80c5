"""Dagster's and MLflow's pages on one home."""

import socket
import subprocess
import sys
import time

from lens_pipeline.errors import InputError
from lens_pipeline.runner import open_instance
from lens_pipeline.settings import Settings, masked
from lens_pipeline.tracking import Tracking

HOST = "127.0.0.1"


def serve(settings: Settings, dagster_port: int, mlflow_port: int) -> int:
    """Serve both until one ends or Ctrl-C; prints their addresses. A run may be writing meanwhile.

    Where MLFLOW_TRACKING_URI names a server, that one is printed and none is started. Raises
    InputError where a port is taken.
    """
    for option, port in (("--dagster-port", dagster_port), ("--mlflow-port", mlflow_port)):
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                raise InputError(f"{option} {port}: is in use; name another")
    with open_instance(settings):
        pass
    assert Tracking(settings).experiment_id  # creates the database before two servers would
    workspace = ["-m", "lens_pipeline.definitions"]
    dagster = [sys.executable, "-m", "dagster_webserver", *workspace, "-h", HOST]
    commands = [
        [*dagster, "-p", str(dagster_port)],
        [sys.executable, "-m", "dagster._daemon", "run", *workspace],
    ]
    print(f"Dagster  http://{HOST}:{dagster_port}", flush=True)
    if settings.mlflow_uri.startswith("http"):
        print(f"MLflow   {masked(settings.mlflow_uri)}", flush=True)
    else:
        mlflow = [sys.executable, "-m", "mlflow", "server", "--host", HOST]
        store = ["--backend-store-uri", settings.mlflow_uri]
        commands.append([*mlflow, "--port", str(mlflow_port), *store])
        print(f"MLflow   http://{HOST}:{mlflow_port}", flush=True)
    servers = [subprocess.Popen(command) for command in commands]
    try:
        while all(server.poll() is None for server in servers):
            time.sleep(0.5)
    except KeyboardInterrupt:
        return 0
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait()
    return 1
