"""Who may score into a folder of parts: one command, or several that each have a share of the rows,
on as many machines as see the folder."""

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lens_pipeline.errors import InputError
from lens_pipeline.files import write_aside

ABOUT = "parts.json"
LOCK = ".lock"
_HELD = (errno.EAGAIN, errno.EACCES)  # by another


@dataclass(frozen=True)
class Share:
    """Of the rows, what one of several commands scores: 2/4 is the second of four."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Share":
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match and 1 <= int(match[1]) <= int(match[2]):
            return cls(int(match[1]), int(match[2]))
        raise InputError(f"--share {text}: must be i/n, as 2/4: the second of four")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def name(self) -> str:
        """In the names of files."""
        return f"{self.number}of{self.of}"

    def rows(self, n: int, together: int) -> NDArray[np.integer]:
        """Which of n rows: of every so many that are together, each share has some."""
        rows = np.arange(n)
        return rows[rows // together % self.of == self.number - 1]


@contextmanager
def claimed(folder: Path, about: dict[str, Any], share: Share | None) -> Iterator[None]:
    """Keep others away from a folder of parts of what `about` says: all, or, with a share, those
    that want the same share, or no share. One that is empty afterwards is removed.

    Raises InputError where they are there already, and where the parts are of something else.
    """
    folder.mkdir(exist_ok=True)
    try:
        with ExitStack() as held:
            if share is None:
                held.enter_context(_locked(folder / LOCK, fcntl.LOCK_EX, "scoring into it"))
            else:
                what = f"scoring into it, and without --share {share}"
                held.enter_context(_locked(folder / LOCK, fcntl.LOCK_SH, what))
                own = folder / f"{LOCK}-{share.name}"
                held.enter_context(_locked(own, fcntl.LOCK_EX, f"scoring share {share}"))
            _check_same(folder, about, share)
            yield
    finally:
        with suppress(OSError):  # it holds something: parts, or the lock of who came meanwhile
            folder.rmdir()


@contextmanager
def _locked(path: Path, how: int, what: str) -> Iterator[None]:
    """The system frees it when its holder dies, on whichever machine that is."""
    try:
        file = path.open("a+b")
    except FileNotFoundError:
        raise InputError(f"{path.parent}: another process has just finished it") from None
    with file:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except OSError as problem:
            if problem.errno in _HELD:
                raise InputError(f"{path.parent}: another process is {what}; wait for it") from None
            raise InputError(
                f"{path.parent}: its file system has no locks ({problem.strerror}); mount it with "
                "them, or name an --out on another"
            ) from None
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise InputError(f"{path.parent}: another process has just finished it")
        yield


def _check_same(folder: Path, about: dict[str, Any], share: Share | None) -> None:
    path, has_parts = folder / ABOUT, any(folder.glob("part-*"))
    if not path.exists() and has_parts:
        raise InputError(f"{folder}: has parts, and no {ABOUT} to say of what; remove it")
    if not path.exists() or not (has_parts or share):
        write_aside(path, json.dumps(about, indent=1))
        return
    found = _read(path)
    holds = "has parts of" if has_parts else "was begun by a share, and has no parts yet, of"
    for name in sorted(about.keys() | found.keys()):
        if found.get(name) != about.get(name):
            raise InputError(
                f"{folder}: {holds} another {name.replace('_', ' ')} "
                f"({_shown(found.get(name))}; now {_shown(about.get(name))}); go on with that, "
                "name another --out, or remove the folder to begin again"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path}: cannot be read; remove {path.parent} to begin again")
    return found


def _shown(value: Any) -> str:
    return ", ".join(map(str, value.values())) if isinstance(value, dict) else str(value)
