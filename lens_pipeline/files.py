"""Files and folders that become visible whole or not at all, and hashes of what they hold."""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO
from uuid import uuid4

import filelock

from lens_pipeline.errors import FULL, InputError


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON-serialisable value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def file_aside(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes `path` when the block ends well, so that a reader sees the old one or the
    new one, never a part."""
    # Not by the process: two containers that share a folder may have the same number.
    aside = path.with_name(f".{path.name}.{uuid4().hex[:12]}")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_aside(path: Path, text: str) -> None:
    """Write a small file as `file_aside` does."""
    with file_aside(path) as file:
        file.write(text.encode())


def is_taken(out: Path) -> bool:
    """Whether there is more at a path than an empty folder, of which another can take the place: as
    it cannot of a link to one, or of one that a disk is mounted on."""
    if out.is_symlink() or os.path.ismount(out):
        return True
    try:
        return out.exists() and not (out.is_dir() and not any(out.iterdir()))
    except PermissionError:  # nobody knows what is in it
        return True


@contextmanager
def folder_aside(out: Path) -> Iterator[Path]:
    """An empty folder that becomes `out` when the block ends well, and is removed when it fails.

    What else is written beside `out` meanwhile, under names that begin with the folder's, is
    removed in either case; and all that processes which were killed have left of theirs. Raises
    InputError where it cannot be made there.
    """
    make_folder(out.parent)
    for lock in out.parent.glob(f".{glob.escape(out.name)}.*.lock"):
        with suppress(OSError), filelock.FileLock(lock, timeout=0):  # nobody holds it
            _remove_all(lock.with_suffix(""))
    # Not by the process: in a container that was killed the next has the same number.
    aside = out.with_name(f".{out.name}.{uuid4().hex[:12]}")
    with filelock.FileLock(f"{aside}.lock"):
        try:
            aside.mkdir()
            yield aside
            aside.rename(out)
        finally:
            _remove_all(aside)


def make_folder(folder: Path) -> None:
    """A folder, with those above it. Raises InputError where it cannot be made, or written
    into; as OSError comes only what a full disk raises."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        if problem.errno in FULL:
            raise
        raise InputError(
            f"{folder}: cannot be made, or written into ({problem.strerror}); name another place"
        ) from None


def _remove_all(aside: Path) -> None:
    for path in aside.parent.glob(f"{glob.escape(aside.name)}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
