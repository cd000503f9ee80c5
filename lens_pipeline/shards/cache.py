"""Files near at hand: mapped, and kept in a folder of bounded size that processes share."""

import errno
import mmap
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import filelock
import numpy as np
import pyarrow as pa

from lens_pipeline.errors import FULL, InputError
from lens_pipeline.settings import Settings
from lens_pipeline.steps import LOCKS

GB = 10**9
OF_A_VERSION = re.compile(r"[0-9a-f]{32}")  # folders of a cache's own
BLOCK = 2**18  # bytes that are written at once: ext4 took up to nine times as long for all at once


def mapped(path: Path, least: int, written: bool = False) -> memoryview:
    """The bytes of a file. Raises InputError where there is none, or fewer bytes than `least`.

    Through Arrow: a map of Python's keeps a descriptor, of which a process may have a thousand.
    written: it just was, and lies in memory: all its pages are mapped here, not one by one where
    they are needed.
    """
    try:
        with pa.memory_map(str(path)) as file:
            size = file.size()
            if size < max(least, 1):
                raise InputError(
                    f"{path}: was cut to {size} bytes; write or fetch the shards again"
                )
            view = memoryview(file.read_buffer())
    except OSError as problem:
        raise InputError(f"{path}: cannot be read ({_reason(problem)})") from None
    if written:
        np.frombuffer(view, np.uint8)[:: mmap.PAGESIZE].max()
    return view


def _reason(problem: OSError) -> str:
    """In words, without the path; and the way out where it is not one of the cache's settings."""
    said = os.strerror(problem.errno) if problem.errno else str(problem)
    if problem.errno == errno.EMFILE:
        return f"{said}; raise `ulimit -n`"
    if os.strerror(errno.ENOMEM) in said:
        return f"{said}; raise `sysctl vm.max_map_count`, or `ulimit -v`"
    return said


@dataclass(frozen=True)
class CacheFolder:
    """A folder with a folder for each dataset, which processes share: the tars and indices in those
    take no more than `bound` bytes; the ones that were opened least recently go first.

    Who has a file mapped goes on reading it when it is gone.
    """

    path: Path
    bound: int

    @classmethod
    def of(cls, path: Path, gb: float | None = None) -> Self:
        """gb: 10^9 bytes; LENS_CACHE_GB by default."""
        return cls(path, int((Settings.load().cache_gb if gb is None else gb) * GB))

    def check_holds(self, n_bytes: int, what: str) -> None:
        """Raises InputError where so many bytes are more than it may hold."""
        if n_bytes > self.bound:
            raise InputError(
                f"{what}: {n_bytes} bytes; the cache may hold {self.bound}: raise LENS_CACHE_GB "
                "(cache_gb)"
            )

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        """For what is done to a file, or to the folder, by one thread of one process at a time.

        Raises InputError where it cannot be locked.
        """
        locks = path.parent / LOCKS
        lock = filelock.FileLock(locks / f"{path.name}.lock", poll_interval=0.01)
        try:
            locks.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as problem:
            raise InputError(f"{path}: cannot be locked ({_reason(problem)})") from None
        try:
            yield
        finally:
            lock.release()

    def open(self, path: Path, least: int) -> memoryview:
        """The bytes of a file, which is noted as used. Raises InputError where it is gone."""
        content = mapped(path, least)
        self.touch(path)
        return content

    def touch(self, path: Path) -> None:
        """Note a file as used."""
        with suppress(OSError):  # gone meanwhile, or another user's
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))

    @contextmanager
    def room(self, n_bytes: int, needed: frozenset[Path] = frozenset()) -> Iterator[None]:
        """Room for so many bytes while its block runs; `needed` goes last where it is made."""
        with self.lock(self.path / "folder"):
            self._make_room(n_bytes, needed)
            yield

    def write(self, path: Path, content: bytes | bytearray, source: str) -> memoryview:
        """Write a file where there is `room`, whole or not at all, and map it. Raises InputError,
        naming the source, where it cannot be written."""
        aside = self.path / ".incoming"
        try:
            aside.unlink(missing_ok=True)  # of a process that was killed
            with aside.open("wb") as file:
                for begin in range(0, len(content), BLOCK):
                    file.write(memoryview(content)[begin : begin + BLOCK])
            view = mapped(aside, len(content), written=True)
            path.parent.mkdir(exist_ok=True)
            aside.replace(path)
        except OSError as problem:
            full = "; make room there, or lower LENS_CACHE_GB (cache_gb)"
            raise InputError(
                f"{source}: cannot be kept at {path} ({_reason(problem)})"
                + (full if problem.errno in FULL else "")
            ) from None
        finally:
            aside.unlink(missing_ok=True)
        return view

    def _make_room(self, n_bytes: int, needed: frozenset[Path]) -> None:
        files = [
            (path in needed, stat.st_atime_ns, stat.st_size, path) for path, stat in self._files()
        ]
        total = sum(size for _, _, size, _ in files)
        for _, _, size, path in sorted(files):
            if total + n_bytes <= self.bound:
                break
            path.unlink(missing_ok=True)
            total -= size

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for folder in os.scandir(self.path):
            # Others are somebody's, who has put the cache among them.
            if OF_A_VERSION.fullmatch(folder.name) and folder.is_dir():
                for file in os.scandir(folder):
                    if file.is_file():
                        with suppress(FileNotFoundError):
                            yield Path(file.path), file.stat()
