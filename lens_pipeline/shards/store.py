"""Places for shards: a folder, or a prefix in a bucket, through fsspec.

Requests are made with patience, and what a store raises is told in words: see `patience`.
"""

import errno
import hashlib
import json
import logging
import os
import posixpath
import shutil
import threading
import uuid
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import filelock
import fsspec
from fsspec.implementations.local import LocalFileSystem

from lens_pipeline.errors import InputError, words_of
from lens_pipeline.files import file_aside, write_aside
from lens_pipeline.locations import protocol_of
from lens_pipeline.shards.checksums import PART, Checksums
from lens_pipeline.shards.manifest import MANIFEST, Listed, Manifest, difference
from lens_pipeline.shards.patience import RefusedError, code_of, is_precondition, patiently
from lens_pipeline.storage import blames_the_request, locate, state_of

T = TypeVar("T")
BEHIND_THE_END = ("InvalidRange", "416")
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


def read_manifest(
    location: str | Path, storage_options: Mapping[str, Any] | None = None
) -> Manifest:
    """The manifest in a folder or at an fsspec URL. Raises InputError where there is none."""
    manifest = Store(str(location), storage_options).manifest()
    if manifest is None:
        raise no_manifest(location)
    return manifest


def no_manifest(location: str | Path) -> InputError:
    return InputError(
        f"{location}/{MANIFEST}: there is no such file; shards are whole once their manifest is "
        "there"
    )


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

    def check_writable(self) -> datetime:
        """The time by the clock that dates its objects: ours may be another. Raises InputError, at
        once, where nothing can be written, or seen of it: which of the reasons it is."""
        probe = f".writable-{uuid.uuid4().hex}"

        def put() -> None:
            if self.is_local:
                self.filesystem.makedirs(self.root, exist_ok=True)
            self.filesystem.pipe_file(self.at(probe), b"")

        try:
            self._again(put, "", "no writing")
        except FileNotFoundError:
            bucket = self.root.partition("/")[0]
            raise InputError(f"{self.url}: there is no bucket {bucket}") from None
        except OSError as problem:
            raise InputError(f"{self.url}: cannot be written ({words_of(problem)})") from None
        try:
            written = written_at(self._again(lambda: self._info(probe), "", "no reading"))
            with suppress(FileNotFoundError):  # S3 says so only to who may list
                self._again(lambda: self._info(f"{probe}.none"), "", "no listing")
        finally:
            try:
                self.remove(probe)
            except RefusedError:
                log.info("%s: objects may be put there, and not removed", self.url)
        return written

    def put_file(self, source: Path, name: str) -> None:
        """A store shows an object when it is whole; in a folder it is renamed into place."""
        if self.is_local:
            with source.open("rb") as whole, file_aside(Path(self.at(name))) as file:
                shutil.copyfileobj(whole, file)
        else:
            # Of parts of a size that is known, the store's checksum is known, too.
            parts = {"chunksize": PART} if self._protocol == "s3" else {}
            self._again(
                lambda: self.filesystem.put_file(str(source), self.at(name), **parts),
                name,
                "may not be put",
            )

    def put_text(self, name: str, content: str) -> None:
        if self.is_local:
            write_aside(Path(self.at(name)), content)
        else:
            self._again(
                lambda: self.filesystem.pipe_file(self.at(name), content.encode()),
                name,
                "may not be put",
            )

    def remove(self, name: str) -> None:
        """Remove an object, if it is there. Raises RefusedError where it may not be removed."""
        with suppress(FileNotFoundError):  # another process was quicker
            self._again(lambda: self.filesystem.rm_file(self.at(name)), name, "may not be removed")

    def read(self, name: str) -> bytes | None:
        """The content of a small object, None where there is none. Raises RefusedError where it may
        not be read."""
        try:
            return self._again(lambda: self.filesystem.cat_file(self.at(name)), name)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def manifest(self) -> Manifest | None:
        """None where there is none. Raises InputError for one that is not as it was written."""
        content = self.read(MANIFEST)
        return None if content is None else Manifest.parse(content, f"{self.url}/{MANIFEST}")

    def about(self, name: str) -> dict[str, Any] | None:
        """What the filesystem says of an object, its `size` among it; None where there is none."""
        try:
            return self._again(lambda: self._info(name), name)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def part(self, name: str, start: int, n_bytes: int) -> bytes:
        """So many bytes of an object from `start` on, or as many as there are. Raises InputError
        where there is no such object, or it may not be read."""

        def get() -> bytes:
            try:
                return self._reader.cat_file(self.at(name), start=start, end=start + n_bytes)
            except Exception as problem:
                if code_of(problem) in BEHIND_THE_END:
                    return b""
                raise

        try:
            return self._again(get, name)
        except FileNotFoundError:
            raise InputError(f"{self.url}/{name}: is missing") from None

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

    def difference(self, listed: Listed) -> str | None:
        """How an object that is read back differs from what the manifest lists, or None."""
        return self._again(
            lambda: difference(self.filesystem, self.at(listed.name), listed), listed.name
        )

    def state_of(
        self, listed: Listed, checksums: Checksums, whole: str | None = None
    ) -> str | None:
        """What tells the state of an object from later ones; None where it is not what the manifest
        lists. checksums: of what is; whole: the state in which it was that before.

        By the checksum that the store gives where it can be compared; else it is read back.
        """
        info = self.about(listed.name)
        if info is None or info["size"] != listed.bytes:
            return None
        state = state_of(info)
        if checksums.are_of(info) or (state is not None and state == whole):
            return state or ""
        return None if self.difference(listed) else state or ""

    def swap(self, name: str, change: Callable[[bytes | None], bytes | None]) -> None:
        """Replace a small object by what `change` makes of it; None leaves it as it is.

        Where another process was quicker, `change` is asked again: a folder, S3 and GCS can tell;
        of other stores the last one wins.
        """
        if self.is_local:
            with filelock.FileLock(self.at(f".{name}.lock")):
                wanted = change(self.read(name))
                if wanted is not None:
                    self.put_text(name, wanted.decode())
            return
        while True:
            found, token = self._with_token(name)
            wanted = change(found)
            if wanted is None or self._put_if(name, wanted, token):
                return

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
                if is_precondition(problem):
                    return False
                if getattr(problem, "errno", None) != errno.ENOSYS:
                    raise
                log.warning(
                    "%s/%s: its store has no conditional put: of two at once the last one wins",
                    *(self.url, name),
                )
                if self._with_token(name)[1] != token:
                    return False
                self.filesystem.pipe_file(path, content)
            return True

        return self._again(put, name, "may not be put")

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
        try:
            return dict(self.filesystem.info(self.at(name)))
        except FileNotFoundError as problem:
            # Of a web server fsspec says so whatever it has answered.
            cause = problem.__cause__ if self._protocol in ("http", "https") else None
            if not isinstance(cause, Exception) or isinstance(cause, FileNotFoundError):
                raise
            if blames_the_request(cause):
                raise
            raise cause from None

    def _again(self, request: Callable[[], T], name: str, refused: str = "may not be read") -> T:
        return patiently(request, self.url, name, refused, local=self.is_local)


def written_at(info: Mapping[str, Any]) -> datetime:
    """When an object was written, by what a filesystem says of it; now where it does not say."""
    changed = info.get("LastModified") or info.get("mtime")
    if isinstance(changed, datetime):
        return changed.astimezone(UTC)
    return datetime.now(UTC) if changed is None else datetime.fromtimestamp(changed, UTC)
