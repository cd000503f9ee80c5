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
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import filelock
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from lens_pipeline.errors import InputError
from lens_pipeline.shards.manifest import Listed, difference
from lens_pipeline.steps import write_aside
from lens_pipeline.storage import locate, protocol_of

T = TypeVar("T")
AT_A_TIME = 8  # transfers
PATIENCE = 60.0  # seconds for which a request is tried again
FIRST_PAUSE = 0.25
BAD_SIGNATURE = ("SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken", "ExpiredToken")
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, InputError, TypeError, ValueError)

log = logging.getLogger(__name__)


class StoreError(Exception):
    """A store that failed, in spite of all patience; the message names the object and the cause."""


class Store:
    """A folder or a prefix in a bucket. Raises InputError for a URL that fsspec does not know."""

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = url.rstrip("/")
        self.filesystem, self.root = locate(self.url, storage_options)
        self.is_local = isinstance(self.filesystem, LocalFileSystem)
        self._protocol = protocol_of(self.url)

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
            aside = self.at(f".{name}.{os.getpid()}")
            self.filesystem.put_file(str(source), aside)
            with Path(aside).open("rb") as file:
                os.fsync(file.fileno())  # the manifest that follows must not outlive it
            Path(aside).replace(self.at(name))
        else:
            self._again(lambda: self.filesystem.put_file(str(source), self.at(name)), name)

    def get_file(self, listed: Listed, path: Path) -> None:
        """Copy an object to a local path, whole or not at all. Raises InputError where it is not
        what the manifest lists, or there is no room for it."""
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            self._again(
                lambda: self.filesystem.get_file(self.at(listed.name), str(aside)), listed.name
            )
            wrong = difference(LocalFileSystem(), str(aside), listed)
            if wrong:
                raise InputError(f"{self.url}/{listed.name}: {wrong}; publish the shards again")
            aside.replace(path)
        except OSError as problem:
            reason = problem.strerror or _words(problem)
            raise InputError(f"{self.url}/{listed.name}: no copy at {path} ({reason})") from None
        finally:
            aside.unlink(missing_ok=True)

    def put_bytes(self, name: str, content: bytes) -> None:
        if self.is_local:
            write_aside(Path(self.at(name)), content.decode())
        else:
            self._again(lambda: self.filesystem.pipe_file(self.at(name), content), name)

    def read(self, name: str) -> bytes | None:
        """The content of a small object, None where there is none."""
        try:
            return self._again(lambda: self.filesystem.cat_file(self.at(name)), name)
        except FileNotFoundError:
            return None

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
            except FINAL:
                raise
            except Exception as problem:
                if "Credentials" in type(problem).__name__:  # botocore's, which no import needs
                    raise InputError(
                        f"{self.url}: there are no credentials for it ({_words(problem)}); give "
                        "them through the environment, as the provider's tools take them"
                    ) from None
                if getattr(problem, "errno", None) == errno.ENOSPC:
                    raise
                if time.monotonic() + pause > until:
                    raise StoreError(f"{self.url}/{name}: {_words(problem)}") from None
                log.info("%s/%s: %s; once more", self.url, name, _words(problem))
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, 10)


def transfer(files: Sequence[Listed], one: Callable[[Listed], T], what: str) -> list[T]:
    """What `one` gives for each file, several at a time; where one fails, no more are begun.

    what: they are doing, for the progress bar.
    """
    total = sum(listed.bytes for listed in files)
    with (
        tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None) as progress,
        ThreadPoolExecutor(AT_A_TIME) as pool,
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
