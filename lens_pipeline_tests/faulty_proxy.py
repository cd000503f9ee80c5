"""A proxy that spoils what passes between an object store and its client."""

import asyncio
import json
import re
import socket
import struct
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Self
from urllib.parse import urlsplit

from lens_pipeline_tests.object_stores import HOST

BLOCK = 2**18


@dataclass
class _Rule:
    """What to do to the requests in whose `METHOD /path?query` or headers the pattern is found."""

    only: str


@dataclass
class _Every(_Rule):
    n: int
    status: int
    code: str
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
    `METHOD /path?query` or headers it is found. Headers pass unchanged, so that the signature of a
    request, which covers the Host that the client has spoken to, stays true.

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

    def every(self, n: int, *, status: int = 503, code: str = "", only: str = "") -> None:
        """Every n-th request is taken in whole, answered with this status, and sent no further.

        code: S3's name of the reason; by default a usual one.
        """
        self._rule = _Every(only, n, status, code)

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

    def __exit__(self, *_: object) -> None:
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
        sent = f"{self.seen[-1]}\n{request.raw.decode('latin-1')}"
        if rule is not None and not re.search(rule.only, sent):
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
                    writer.write(_refusal(request, method, rule.status, rule.code))
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


def _refusal(request: _Head, method: str, status: int, code: str) -> bytes:
    """An answer as the store in question would give it."""
    phrase = HTTPStatus(status).phrase
    if "x-amz-date" in request.headers:
        usual = {500: "InternalError", 503: "SlowDown"}.get(status, phrase.replace(" ", ""))
        code = code or usual
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
