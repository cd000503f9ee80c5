"""Places for shards: a folder, or a prefix in a bucket, through fsspec.

Whatever a store raises becomes a message that names the object and the cause. What may pass, such
as a server that restarts, is tried again for some time.
"""

import base64
import errno
import hashlib
import json
import logging
import os
import posixpath
import queue
import random
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import filelock
import fsspec
from fsspec.implementations.local import LocalFileSystem

from lens_pipeline.errors import InputError
from lens_pipeline.progress import progress_bar
from lens_pipeline.shards.manifest import MANIFEST, Listed, Manifest, difference
from lens_pipeline.steps import write_aside
from lens_pipeline.storage import FINAL, lacks_credentials, locate, protocol_of

T = TypeVar("T")
R = TypeVar("R")
AT_A_TIME = 8  # transfers
PATIENCE = 60.0  # seconds for which a request is tried again
FIRST_PAUSE = 0.25
BEHIND_THE_END = ("InvalidRange", "416")
NOT_SHOWN = (403, 410)  # what web servers may answer for what is not there
BAD_SIGNATURE = ("SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken", "ExpiredToken")
IN_MEMORY = 10**9  # bytes of objects that are fetched
BLOCK = 2**26  # bytes that are asked for at once: what a lost connection costs

log = logging.getLogger(__name__)


_opened: weakref.WeakValueDictionary[int, fsspec.AbstractFileSystem] = weakref.WeakValueDictionary()
_inherited: list[fsspec.AbstractFileSystem] = []
_readers: weakref.WeakKeyDictionary[fsspec.AbstractFileSystem, fsspec.AbstractFileSystem] = (
    weakref.WeakKeyDictionary()
)
_making_readers = threading.Lock()


def _keep_inherited() -> None:
    """In a process that was forked: it never closes the connections of the one that it comes from.

    Collected here, a filesystem would take its sockets off the event loop's epoll, which both
    processes share: there, the next answer would be waited for until the timeout.
    """
    global _making_readers  # which another thread may have held
    _inherited.extend(_opened.values())
    _making_readers = threading.Lock()


os.register_at_fork(after_in_child=_keep_inherited)


class StoreError(Exception):
    """A store that failed, in spite of all patience; the message names the object and the cause."""


class Store:
    """A folder or a prefix in a bucket. Raises InputError for a URL that fsspec does not know."""

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url, self.storage_options = url.rstrip("/"), storage_options
        self.filesystem, self.root = locate(self.url, storage_options)
        _opened[id(self.filesystem)] = self.filesystem
        self.is_local = isinstance(self.filesystem, LocalFileSystem)
        self._protocol = protocol_of(self.url)

    @cached_property
    def _reader(self) -> fsspec.AbstractFileSystem:
        """s3fs, by itself, makes of one attempt to read 25: minutes where a connection stalls.

        One for each filesystem: a client of S3 takes a fifth of a second to make.
        """
        if self._protocol != "s3":
            return self.filesystem
        with _making_readers:
            reader = _readers.get(self.filesystem)
            if reader is None:
                own = {**(self.storage_options or {}), "skip_instance_cache": True}
                reader, _ = locate(self.url, own)
                reader.retries = 1
                _opened[id(reader)] = _readers[self.filesystem] = reader
        return reader

    def at(self, name: str) -> str:
        """The path of an object for the filesystem."""
        return posixpath.join(self.root, name)

    def check_writable(self) -> None:
        """Raises InputError, at once, where nothing can be written: which of the reasons it is."""
        probe = f".writable-{uuid.uuid4().hex}"
        try:
            if self.is_local:
                self.filesystem.makedirs(self.root, exist_ok=True)
            self.put_bytes(probe, b"")
        except FileNotFoundError:
            bucket = self.root.partition("/")[0]
            raise InputError(f"{self.url}: there is no bucket {bucket}") from None
        except PermissionError as problem:
            refused = "credentials are refused" if _code(problem) in BAD_SIGNATURE else "no writing"
            raise InputError(f"{self.url}: {refused} ({_words(problem)})") from None
        except OSError as problem:
            raise InputError(f"{self.url}: cannot be written ({_words(problem)})") from None
        try:
            self._again(lambda: self.filesystem.rm_file(self.at(probe)), probe)
        except PermissionError:
            log.info("%s: objects may be put there, and not removed", self.url)

    def put_file(self, source: Path, name: str) -> None:
        """A store shows an object when it is whole; in a folder it is renamed into place."""
        if self.is_local:
            # Not by the process: two containers that share a folder may have the same number.
            aside = self.at(f".{name}.{uuid.uuid4().hex[:12]}")
            self.filesystem.put_file(str(source), aside)
            with Path(aside).open("rb") as file:
                os.fsync(file.fileno())  # the manifest that follows must not outlive it
            Path(aside).replace(self.at(name))
        else:
            self._again(lambda: self.filesystem.put_file(str(source), self.at(name)), name)

    def put_bytes(self, name: str, content: bytes) -> None:
        if self.is_local:
            write_aside(Path(self.at(name)), content.decode())
        else:
            self._again(lambda: self.filesystem.pipe_file(self.at(name), content), name)

    def remove(self, name: str) -> None:
        """Remove an object, if it is there. Raises InputError where it may not be removed."""
        try:
            with suppress(FileNotFoundError):  # another process was quicker
                self._again(lambda: self.filesystem.rm_file(self.at(name)), name)
        except PermissionError as problem:
            raise InputError(f"{self.url}/{name}: may not be removed ({problem})") from None

    def read(self, name: str) -> bytes | None:
        """The content of a small object, None where there is none. Raises InputError where it may
        not be read."""
        try:
            return self._again(lambda: self.filesystem.cat_file(self.at(name)), name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError as problem:
            raise self._forbidden(name, problem) from None

    def manifest(self) -> Manifest | None:
        """None where there is none. Raises InputError for one that is not as it was written."""
        content = self.read(MANIFEST)
        return None if content is None else Manifest.parse(content, f"{self.url}/{MANIFEST}")

    def about(self, name: str) -> dict[str, Any] | None:
        """What the filesystem says of an object, its `size` among it; None where there is none."""
        try:
            return self._again(lambda: self._info(name), name)
        except FileNotFoundError:
            return None

    def part(self, name: str, start: int, n_bytes: int) -> bytes:
        """So many bytes of an object from `start` on, or as many as there are. Raises InputError
        where there is no such object, or it may not be read."""

        def get() -> bytes:
            try:
                return self._reader.cat_file(self.at(name), start=start, end=start + n_bytes)
            except Exception as problem:
                if _code(problem) in BEHIND_THE_END:
                    return b""
                raise

        try:
            return self._again(get, name)
        except FileNotFoundError:
            raise InputError(f"{self.url}/{name}: is missing") from None
        except PermissionError as problem:
            raise self._forbidden(name, problem) from None

    def whole(self, name: str, n_bytes: int) -> bytes | bytearray:
        """The content of an object. Raises InputError where it has another size."""
        content: bytes | bytearray = self.part(name, 0, BLOCK)
        size = len(content)
        if size == BLOCK:
            first, content = content, bytearray(n_bytes)
            content[:size] = first
            while size <= n_bytes:
                part = self.part(name, size, BLOCK)
                content[size : size + len(part)] = part
                size += len(part)
                if len(part) < BLOCK:
                    break
        if size != n_bytes:
            more = "more" if size > n_bytes else size
            raise InputError(f"{self.url}/{name}: has {more} bytes, not {n_bytes} as was announced")
        return content

    def listed(self, listed: Listed) -> bytes | bytearray:
        """The content of an object. Raises InputError where it is not what the manifest lists."""
        content = self.whole(listed.name, listed.bytes)
        found = hashlib.sha256(content).hexdigest()
        if found != listed.sha256:
            raise InputError(
                f"{self.url}/{listed.name}: has sha256 {found[:12]}...; the manifest says "
                f"{listed.sha256[:12]}...; publish the shards again"
            )
        return content

    def _forbidden(self, name: str, problem: PermissionError) -> InputError:
        return InputError(f"{self.url}/{name}: may not be read ({_words(problem)})")

    def holds(self, listed: Listed, md5: str | None = None) -> bool:
        """Whether an object is what the manifest lists; md5: of what is.

        By the checksum that the store gives where it can be compared; else it is read back.
        """
        try:
            info = self._again(lambda: self._info(listed.name), listed.name)
        except FileNotFoundError:
            return False
        if info["size"] != listed.bytes:
            return False
        if md5 is not None and _md5_of(info) == md5:
            return True
        wrong = self._again(
            lambda: difference(self.filesystem, self.at(listed.name), listed), listed.name
        )
        return wrong is None

    def swap(self, name: str, change: Callable[[bytes | None], bytes | None]) -> bytes | None:
        """Replace a small object by what `change` makes of it; None leaves it as it is. Returns
        what lies there.

        Where another process was quicker, `change` is asked again: a folder, S3 and GCS can tell;
        of other stores the last one wins.
        """
        if self.is_local:
            with filelock.FileLock(self.at(f".{name}.lock")):
                found = self.read(name)
                wanted = change(found)
                if wanted is not None:
                    self.put_bytes(name, wanted)
            return wanted if wanted is not None else found
        while True:
            found, token = self._with_token(name)
            wanted = change(found)
            if wanted is None:
                return found
            if self._put_if(name, wanted, token):
                return wanted

    def _with_token(self, name: str) -> tuple[bytes | None, str | None]:
        """An object, and what tells this state of it from others."""
        while True:
            try:
                before = self._again(lambda: self._info(name), name)
            except FileNotFoundError:
                return None, None
            content = self.read(name)
            token = str(before.get("generation") or before.get("ETag"))
            if content is not None and len(content) == before["size"]:
                return content, token

    def _put_if(self, name: str, content: bytes, token: str | None) -> bool:
        """Whether an object that was in the state of the token (None: absent) is replaced."""
        path = self.at(name)

        def put() -> bool:
            try:
                if token is None:
                    self.filesystem.pipe_file(path, content, mode="create")
                elif self._protocol == "s3":
                    self.filesystem.pipe_file(path, content, IfMatch=token)
                elif self._protocol == "gs":
                    self._replace_generation(path, content, token)
                else:
                    self.filesystem.pipe_file(path, content)
            except Exception as problem:
                if _is_precondition(problem):
                    return False
                raise
            return True

        return self._again(put, name)

    def _replace_generation(self, path: str, content: bytes, generation: str) -> None:
        """GCS's conditional put, which gcsfs has for absent objects alone."""
        bucket, key, _ = self.filesystem.split_path(path)
        about = json.dumps({"name": key}).encode()
        parts = [
            (b"application/json; charset=UTF-8", about),
            (b"application/octet-stream", content),
        ]
        body = b"".join(b"--=\nContent-Type: %s\n\n%s\n" % part for part in parts) + b"--=--"
        self.filesystem.call(
            "POST",
            f"{self.filesystem._location}/upload/storage/v1/b/{bucket}/o",
            uploadType="multipart",
            ifGenerationMatch=generation,
            headers={"Content-Type": 'multipart/related; boundary="="'},
            data=body,
        )

    def _info(self, name: str) -> dict[str, Any]:
        return dict(self.filesystem.info(self.at(name)))

    def _again(self, request: Callable[[], T], name: str) -> T:
        """What a request gives, tried for PATIENCE seconds. Raises StoreError after that; at once
        what trying again does not change."""
        until, pause = time.monotonic() + PATIENCE, FIRST_PAUSE
        while True:
            try:
                return request()
            except InputError:
                raise
            except (TypeError, ValueError) as problem:  # of the client, which was not made
                raise InputError(
                    f"{self.url}: cannot be used ({_words(problem)}); correct the address, or "
                    "LENS_STORAGE_OPTIONS"
                ) from None
            except FINAL:
                raise
            except Exception as problem:
                if lacks_credentials(problem):
                    raise InputError(
                        f"{self.url}: there are no credentials for it ({_words(problem)}); give "
                        "them through the environment, as the provider's tools take them"
                    ) from None
                if getattr(problem, "errno", None) == errno.ENOSPC:
                    raise
                if getattr(problem, "status", None) in NOT_SHOWN:
                    raise FileNotFoundError(name) from None
                if time.monotonic() + pause > until:
                    raise StoreError(f"{self.url}/{name}: {_words(problem)}") from None
                log.info("%s/%s: %s; once more", self.url, name, _words(problem))
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, 10)


def at_a_time(n_bytes: int) -> int:
    """How many transfers, of which each keeps so many bytes in memory."""
    return max(1, min(AT_A_TIME, IN_MEMORY // max(1, n_bytes)))


def transfer(
    files: Sequence[Listed],
    one: Callable[[Listed], T],
    what: str,
    at_a_time: int = AT_A_TIME,
) -> list[T]:
    """What `one` gives for each file, several at a time; where one fails, no more are begun.

    what: they are doing, for the progress bar.
    """
    total = sum(listed.bytes for listed in files)
    with (
        progress_bar(total=total, desc=what, unit="B", unit_scale=True) as progress,
        ThreadPoolExecutor(at_a_time) as pool,
    ):

        def told(listed: Listed) -> T:
            done = one(listed)
            progress.update(listed.bytes)
            return done

        try:
            return list(pool.map(told, files))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def ahead_of(items: Iterable[T], get: Callable[[T], R], at_a_time: int) -> Generator[R, None, None]:
    """What `get` gives of each item, in their order, begun before it is asked for: so many at a
    time, by threads that no end of the process waits for. Errors come in their item's place."""
    tasks: queue.SimpleQueue[tuple[T, Future[R]] | None] = queue.SimpleQueue()

    def work() -> None:
        while (task := tasks.get()) is not None:
            item, future = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(get(item))
            except BaseException as problem:  # noqa: BLE001 - whoever waits for it is told
                future.set_exception(problem)

    for _ in range(at_a_time):
        threading.Thread(target=work, daemon=True).start()
    begun: deque[Future[R]] = deque()
    try:
        for item in items:
            begun.append(Future())
            tasks.put((item, begun[-1]))
            if len(begun) > at_a_time:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()
        for _ in range(at_a_time):
            tasks.put(None)


def _code(problem: Exception) -> str:
    """What a store calls the reason, `AccessDenied` or `412`; empty where it does not say."""
    answer = getattr(problem.__cause__, "response", None)  # of an S3 store
    if isinstance(answer, Mapping):
        return str(answer.get("Error", {}).get("Code", ""))
    return str(getattr(problem, "code", ""))


def _is_precondition(problem: Exception) -> bool:
    """Whether a conditional put was refused because the object has changed meanwhile."""
    conflicts = ("PreconditionFailed", "ConditionalRequestConflict", "412")
    return isinstance(problem, FileExistsError) or _code(problem) in conflicts


def _md5_of(info: Mapping[str, Any]) -> str | None:
    """The MD5 that a store gives of an object; an ETag may be something else, and then differs."""
    if info.get("md5Hash"):
        return base64.b64decode(info["md5Hash"]).hex()
    return str(info.get("ETag", "")).strip('"') or None


def md5_of_listed(path: Path, listed: Listed) -> str:
    """The MD5 of a local file. Raises InputError where it is not what the manifest lists: it must
    not be published."""
    wrong = difference(LocalFileSystem(), str(path), listed)
    if wrong:
        raise InputError(f"{path}: {wrong}; write the shards again")
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _words(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:300] or type(problem).__name__
