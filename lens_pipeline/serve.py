"""Dagster's and MLflow's pages on one home."""

import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._grpc.client import DagsterGrpcClient
from dagster._serdes import deserialize_value
from dagster._utils.error import SerializableErrorInfo

from lens_pipeline.alerts import MARK
from lens_pipeline.errors import InputError
from lens_pipeline.files import write_aside
from lens_pipeline.processes import is_free
from lens_pipeline.registry import answering
from lens_pipeline.runner import LOCATION, end_launched_runs, open_instance, release_dead_runs
from lens_pipeline.settings import HOST, SERVED, Settings
from lens_pipeline.tracking import Tracking, experiment_page, short_waits

# No workers for MLflow's evaluation jobs, and no libraries' warnings on the terminal.
QUIET = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONWARNINGS": "ignore"}
# Of the installed commands, where modules are looked for first when one of them is run. Servers
# are told, for there must be such a place: uvicorn, MLflow's server, would make it the working
# directory (see `terminal.ENVIRONMENT`), and Dagster leaves out whatever is first.
FIRST = str(Path(sys.executable).parent)
PATIENCE = 3  # seconds that the daemon, then the other servers, have for an orderly end
# Seconds for a schedule or sensor to look at the source: a store may hold many cutouts.
LOOKING = {f"DAGSTER_{kind}_GRPC_TIMEOUT_SECONDS": "600" for kind in ("SENSOR", "SCHEDULE")}
SAID = 10 << 20  # bytes of what former servers have written that are kept
DAEMON = "dagster._daemon"
LASTED = 30  # seconds; what ends before would do so again
LOADED_AGAIN = 60  # seconds; no less, or it would be taken for one that ends at once
log = logging.getLogger(__name__)


class Server:
    """A process that serves until it is ended."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        lock: int,
        messages: "Messages | None",
    ) -> None:
        """messages: where it writes, and all that it starts; None: on the terminal."""
        self.name = command[0]
        self._command = [sys.executable, "-m", *command]
        self._environment, self._lock, self._messages = dict(environment), lock, messages
        self._begun, self.process = time.monotonic(), self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._messages.file.open("ab") if self._messages else nullcontext() as output:
            return subprocess.Popen(
                self._command,
                env=self._environment,
                pass_fds=[self._lock],
                stdout=output,
                stderr=output,
            )

    def revive(self) -> None:
        """Start it again where it has ended. Raises RuntimeError where it did so at once."""
        if self.process.poll() is None:
            return
        lasted, self._begun = time.monotonic() - self._begun, time.monotonic()
        if lasted < LASTED:
            where = self._messages.file if self._messages else "its messages above"
            raise RuntimeError(f"{self.name} ended as soon as it had begun; see {where}")
        log.warning("%s has ended (%d) and is started again", self.name, self.process.returncode)
        self.process = self._start()


class CodeServer(Server):
    """What loads the definitions, for daemon and page: one of its own the daemon would start anew
    each minute, with all that Dagster imports, for as long as it lives. What keeps them from
    loading is shown on the page."""

    def __init__(self, where: Path, *how: Any) -> None:
        """where: its socket."""
        what = ("--module-name", "lens_pipeline.definitions", "--location-name", LOCATION)
        more = ("--working-directory", FIRST, "--lazy-load-user-code", "--log-level", "error")
        super().__init__(("dagster", "api", "grpc", "--socket", str(where), *what, *more), *how)
        self._where = where

    def _start(self) -> subprocess.Popen[bytes]:
        self._loaded, self._asked = False, time.monotonic()
        return super()._start()

    def revive(self) -> None:
        """And start it anew, a minute after it began, where they did not load: what kept them from
        it, a store that did not answer, may have passed."""
        due = not self._loaded and time.monotonic() - self._asked > LOADED_AGAIN
        if due and self.process.poll() is None:
            found, self._asked = self._has_definitions(), time.monotonic()
            self._loaded = found is True
            if found is False:
                _end([self])
                self._begun, self.process = time.monotonic(), self._start()
        super().revive()

    def _has_definitions(self) -> bool | None:
        """None where it does not answer."""
        try:
            said = DagsterGrpcClient(socket=str(self._where)).list_repositories()
        except DagsterUserCodeUnreachableError:
            return None
        return not isinstance(deserialize_value(said), SerializableErrorInfo)


class Messages:
    """A file that servers and launched runs write into: tracebacks, Dagster's console log, and
    among them alerts, which are for whoever has the pages served."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._read = file.stat().st_size if file.exists() else 0  # of former servers

    def new_alerts(self) -> list[str]:
        """Those of which whole lines have been written since the last time."""
        try:
            opened = self.file.open("rb")
        except FileNotFoundError:  # somebody has removed it: the servers' is without a name
            return []
        with opened as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(min(self._read, size))  # somebody may have emptied it
            written, newline, _ = file.read().rpartition(b"\n")
            self._read = min(self._read, size) + len(written + newline)
        lines = written.decode(errors="replace").splitlines()
        return [line for line in lines if line.startswith(MARK)]


@dataclass(frozen=True)
class Pages:
    """addresses: {"Dagster": URL, "MLflow": URL}; needed: the code server and the daemon; shown:
    what is behind the addresses; messages: what they write, None where that is on the terminal."""

    addresses: dict[str, str]
    needed: tuple[Server, ...]
    shown: tuple[Server, ...]
    messages: Messages | None
    given_up: list[Server] = field(default_factory=list)

    def revive(self) -> None:
        """Start again what has ended; of the pages, what ended as soon as it had begun is given up.
        Raises RuntimeError where what is needed did so."""
        for server in self.needed:
            server.revive()
        for page in self.shown:
            if page in self.given_up:
                continue
            try:
                page.revive()
            except RuntimeError as problem:
                log.error("%s; it is left so, and all else goes on", problem)
                self.given_up.append(page)


@contextmanager
def pages(
    settings: Settings, dagster_port: int, mlflow_port: int, verbose: bool = False
) -> Iterator[Pages]:
    """Both pages, once they answer, and Dagster's daemon; all are ended on leaving, and so are the
    runs that the daemon has launched: they go on where they were when they are launched again.

    A run of the command line may be writing meanwhile. Where MLFLOW_TRACKING_URI names a server,
    its address is given and none is started. Raises InputError where a port is taken, RuntimeError
    where a server ends as soon as it has begun. verbose: servers write on the terminal.
    """
    addresses = {"Dagster": f"http://{HOST}:{dagster_port}"}
    ports = {"--dagster-port": dagster_port}
    if settings.mlflow_uri.startswith("http"):
        addresses["MLflow"] = str(settings.mlflow_pages)
    else:
        addresses["MLflow"] = f"http://{HOST}:{mlflow_port}"
        ports["--mlflow-port"] = mlflow_port
    served = settings.dagster_home / SERVED
    if served.exists() and not is_free(served):  # as a port that is in use is likely to be its own
        raise _served_already(settings)
    if len({*ports.values()}) < len(ports):
        raise InputError(f"--mlflow-port {mlflow_port}: is that of --dagster-port; name another")
    for option, port in ports.items():
        if _answers((HOST, port)):
            raise InputError(f"{option} {port}: is in use; name another")
    # Its URI may hold a password, which everybody would read among a command's arguments.
    environment = LOOKING | os.environ | QUIET | {"UVICORN_APP_DIR": FIRST}
    environment.pop("DAGSTER_GRPC_PORT", None)  # which would be another place of the code server
    environment["PYTHONPATH"] = os.pathsep.join([FIRST, *_python_path()])
    environment["MLFLOW_BACKEND_STORE_URI"] = settings.mlflow_uri
    environment["LENS_MLFLOW_PAGE"] = settings.mlflow_page or addresses["MLflow"]
    about = {
        "dagster_page": addresses["Dagster"],
        "mlflow_page": environment["LENS_MLFLOW_PAGE"],
        "settings": settings.kept,
    }
    short = "/tmp" if len(gettempdir()) > 70 else None  # of a socket's path, which has 100 bytes
    with (
        open_instance(settings) as instance,
        _alone(settings, about) as lock,
        TemporaryDirectory(prefix="lens-", dir=short) as folder,
    ):
        # Asking creates the database before two servers would.
        with short_waits(), answering("MLFLOW_TRACKING_URI"):
            experiment = Tracking(settings).experiment_id
        addresses["MLflow"] = experiment_page(addresses["MLflow"], experiment)
        release_dead_runs(instance)
        messages = None if verbose else Messages(_shortened(settings.dagster_home / "servers.log"))
        servers: list[Server] = []
        how = (environment, lock, messages)

        def begun(server: Server) -> Server:
            servers.append(server)
            return server

        def wait_for(answers: Callable[[], bool]) -> None:
            while not answers():
                for server in servers:
                    server.revive()
                time.sleep(0.2)

        try:
            shown = []
            if "--mlflow-port" in ports:
                shown.append(begun(Server(_mlflow(mlflow_port), *how)))
            where = Path(folder) / "code"
            code = begun(CodeServer(where, *how))
            wait_for(lambda: _answers(str(where)))
            asking = _workspace(where, settings.dagster_home)
            launching = (DAEMON, "run", *asking, "--log-level", "warning")
            daemon = begun(Server(launching, *how))
            page = ("dagster_webserver", *asking, "-h", HOST, "-p", str(dagster_port))
            shown.append(begun(Server(page, *how)))
            wait_for(lambda: all(_answers((HOST, port)) for port in ports.values()))
            yield Pages(addresses, (code, daemon), tuple(shown), messages)
        finally:
            try:  # who is told twice to end may be told within this, too
                # It would launch what waits.
                _end([server for server in servers if server.name == DAEMON])
                end_launched_runs(instance)
            finally:
                _end(servers)


def _shortened(file: Path) -> Path:
    """A file that has grown for years: what it said last."""
    if file.exists() and file.stat().st_size > SAID:
        file.write_bytes(file.read_bytes()[-SAID:])
    return file


def _python_path() -> list[str]:
    """What PYTHONPATH says."""
    return [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]


@contextmanager
def _alone(settings: Settings, about: Mapping[str, Any]) -> Iterator[int]:
    """A lock on LENS_HOME, for its servers to inherit: they may outlive this process, and two
    daemons would launch each run twice. Raises InputError where it is held.

    about: see `Settings.shown`.
    """
    with (settings.dagster_home / SERVED).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _served_already(settings) from None
        file.truncate(0)
        file.write(json.dumps(about))
        file.flush()
        yield file.fileno()


def _served_already(settings: Settings) -> InputError:
    page = settings.shown.get("dagster_page", "the address that it has printed")
    return InputError(
        f"LENS_HOME: {settings.home} is served already, at {page}; look there, or end that "
        "`lens-pipeline show` with Ctrl-C first (docs/operations.md, What happens when something "
        "dies, where it is gone and its servers are not)"
    )


def _end(servers: Sequence[Server]) -> None:
    for server in servers:
        server.process.terminate()
    deadline = time.monotonic() + PATIENCE
    for server in servers:
        try:
            server.process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            server.process.kill()


def _workspace(code: Path, home: Path) -> Sequence[str]:
    """The flags of the servers that ask the code server at this socket. home: where nobody cleans
    up, for they read it whenever they are started again."""
    server = {"grpc_server": {"socket": str(code), "location_name": LOCATION}}
    file = home / "served.yaml"  # of which JSON is a part
    write_aside(file, json.dumps({"load_from": [server]}))
    return ("-w", str(file))


def _mlflow(port: int) -> Sequence[str]:
    address = ("--host", HOST, "--port", str(port), "--workers", "1")
    return ("mlflow", "server", *address, "--uvicorn-opts", "--log-level warning")


def _answers(address: tuple[str, int] | str) -> bool:
    """address: of the network, or a socket's path."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as probe:
        return probe.connect_ex(address) == 0


def serve(settings: Settings, dagster_port: int, mlflow_port: int, verbose: bool = False) -> int:
    """Serve `pages` until Ctrl-C; prints their addresses once they answer, and alerts. A server
    that ends, or is killed, is started again."""
    if not settings.dagster_home.exists():
        log.warning("LENS_HOME: %s is new: nothing has run there yet", settings.home)
    try:
        log.info("starting the pages ...")
        with pages(settings, dagster_port, mlflow_port, verbose) as found:
            for name, address in found.addresses.items():
                print(f"{name:8} {address}")
            if found.messages is not None:
                print(f"Messages {found.messages.file}")
            print("Ctrl-C ends what runs here.", flush=True)
            while True:
                time.sleep(0.5)
                for told in found.messages.new_alerts() if found.messages else ():
                    log.warning("%s", told)
                found.revive()
    except KeyboardInterrupt:
        return 0
