"""Content-addressed steps: the key of a step, reuse, locks, and what is not used any more.

A step writes one folder, named by its key. The key hashes the content of the step's inputs, its
settings, what the library modules do that it runs, and the versions of the libraries that
decide its output. A folder is complete when its `complete.json`, written last, lists every file.
"""

import importlib.metadata
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock

from lens_pipeline.code_hashes import source_hashes
from lens_pipeline.errors import NoAnswerError
from lens_pipeline.files import digest, file_sha256, write_aside

COMPLETE = "complete.json"
LOCKS, HOLDER = ".locks", ".holder"
PATIENCE = 10  # seconds of waiting for a lock before its holder is named
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """All that decides a step's output.

    inputs: {name: content hash}; settings: JSON-serialisable; modules: the library modules that
    the step calls; libraries: distributions whose version decides the output.
    """

    stage: str
    modules: tuple[str, ...]
    libraries: tuple[str, ...] = ()
    inputs: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def parts(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "inputs": self.inputs,
            "settings": self.settings,
            "code": source_hashes(self.modules),
            "libraries": {name: importlib.metadata.version(name) for name in self.libraries},
        }

    @cached_property
    def key(self) -> str:
        """32 hexadecimal digits."""
        return digest(self.parts)[:32]


@dataclass(frozen=True)
class Step:
    """A finished step: its folder, its key, a hash of what the folder holds, how it came."""

    folder: Path
    key: str
    content: str
    seconds: float
    reused: bool


def _whole(folder: Path, verify: bool) -> dict[str, Any] | None:
    """The folder's `complete.json` if every file it lists is there in full, else None."""
    try:
        complete = json.loads((folder / COMPLETE).read_text())
        for name, wanted in complete["files"].items():
            path = folder / name
            if path.stat().st_size != wanted["bytes"]:
                raise ValueError(f"{path} has the wrong size")
            if verify and file_sha256(path) != wanted["sha256"]:
                raise ValueError(f"{path} has the wrong sha256")
    except (OSError, ValueError, KeyError, TypeError) as problem:
        if folder.exists():
            log.warning("%s is damaged (%s): it is made again", folder, problem)
        return None
    return complete


def inputs_of(folder: Path) -> dict[str, str]:
    """{name: content hash} of the inputs that a finished step's folder was made from."""
    inputs: dict[str, str] = json.loads((folder / COMPLETE).read_text())["inputs"]
    return inputs


def _seal(folder: Path, recipe: Recipe, seconds: float) -> str:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    complete = {"schema": 1, **recipe.parts, "key": recipe.key, "seconds": seconds, "files": files}
    write_aside(folder / COMPLETE, json.dumps(complete, indent=1, default=str))
    return _content(files)


def _content(files: dict[str, Any]) -> str:
    return digest({name: entry["sha256"] for name, entry in files.items()})


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One holder at a time, across processes; the system frees it when the holder dies.

    Who it was stands in a file beside it, which tells by its date when the step was last used.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = path.with_suffix(HOLDER)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=PATIENCE)
    except filelock.Timeout:
        who = holder.read_text() if holder.exists() else "an unknown process"
        log.warning("waiting for %s, held by %s", path.stem, who)
        lock.acquire()
    try:
        write_aside(holder, f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        with suppress(OSError):  # somebody may have removed all of it
            holder.touch()  # it may have taken days
        lock.release()


def last_used(folder: Path) -> float:
    """When a step's folder was last made or reused, in seconds since 1970; 0 of what no step has
    made."""
    holder = folder.parent / LOCKS / f"{folder.name}{HOLDER}"
    return holder.stat().st_mtime if holder.exists() else 0.0


def run_step(
    recipe: Recipe,
    root: Path,
    build: Callable[[Path], object],
    *,
    verify: bool = False,
    goes_on: bool = False,
) -> Step:
    """The folder `root/<key>`: reused where it is whole, else made by `build(empty folder)`.

    `build` writes into a folder aside, which is renamed when it has returned; whoever sees the
    folder sees all of it. A second process that wants the same key waits, then reuses.
    verify: check the sha256 of a folder that is reused, not only the sizes of its files. goes_on:
    `build` can go on with what it left in the folder when it was stopped.
    """
    begun = time.perf_counter()
    folder = root / recipe.key
    with locked(root / LOCKS / f"{recipe.key}.lock"):
        found = _reuse(folder, recipe, verify) or _make(folder, recipe, build, goes_on)
    return replace(found, seconds=time.perf_counter() - begun)


def check_unchanged(source: str, before: object, after: object) -> None:
    """Raises NoAnswerError where what a step's inputs were hashed from is not what it was: what was
    read would be kept as that, and taken for it again."""
    if after != before:
        raise NoAnswerError(f"{source}: changed while it was read; try again once it rests")


def _check_code(recipe: Recipe) -> None:
    """Raises NoAnswerError where a step's code is not what its key was hashed from: modules are
    imported where they are used, maybe hours later, and what new ones make would be kept as made by
    the old."""
    try:
        now = source_hashes(recipe.modules, anew=True)
    except (ImportError, OSError, SyntaxError):  # one is gone, or half written
        now = {}
    if now != recipe.parts["code"]:
        raise NoAnswerError(
            f"{recipe.stage}: the code changed while it ran; the same command again makes it"
        )


def _reuse(folder: Path, recipe: Recipe, verify: bool) -> Step | None:
    complete = _whole(folder, verify)
    if complete is None:
        return None
    return Step(folder, recipe.key, _content(complete["files"]), 0.0, reused=True)


def _make(folder: Path, recipe: Recipe, build: Callable[[Path], object], goes_on: bool) -> Step:
    _check_code(recipe)  # else what is tried again would be made in vain
    begun = time.perf_counter()
    aside = _partial(folder)
    if not goes_on:
        shutil.rmtree(aside, ignore_errors=True)  # of a process that died
    aside.mkdir(parents=True, exist_ok=goes_on)
    (aside / COMPLETE).unlink(missing_ok=True)  # of one that died before it could be renamed
    build(aside)
    _check_code(recipe)
    content = _seal(aside, recipe, time.perf_counter() - begun)
    shutil.rmtree(folder, ignore_errors=True)  # damaged: `_reuse` has refused it
    aside.rename(folder)
    return Step(folder, recipe.key, content, 0.0, reused=False)


def _partial(folder: Path) -> Path:
    """Where a step's folder is made."""
    return folder.with_name(f".partial-{folder.name}")


@dataclass(frozen=True)
class Removed:
    """A folder that was there, and how many bytes are free without it."""

    folder: Path
    bytes: int


def remove_unused(root: Path, before: float, kept: Collection[str] = ()) -> list[Removed]:
    """Remove the folders in `root` that no step has made, reused or begun since `before`, a time in
    seconds since 1970; what is needed is made again.

    Those whose keys are `kept` stay, and what a process is at. What cannot be removed is told in
    the log.
    """
    removed: list[Removed] = []
    for holder in sorted(root.glob(f"{LOCKS}/*{HOLDER}")):
        folder = root / holder.stem
        lock = filelock.FileLock(holder.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            continue
        try:
            partial = [file.stat().st_mtime for file in _partial(folder).rglob("*")]
            if max(holder.stat().st_mtime, *partial, 0) < before:  # it may have been killed
                whole = [] if folder.name in kept else [folder]
                removed += _remove([*whole, _partial(folder)], folder)
        except OSError as problem:
            log.warning("%s cannot be removed (%s)", folder, problem)
        finally:
            lock.release()
    return removed


def _remove(folders: Iterable[Path], of: Path) -> Iterator[Removed]:
    """Renamed first: a folder that is half removed must not be taken for one."""
    going = of.with_name(f".removed-{of.name}")
    for folder in (going, *folders):
        if folder.exists():
            files = [path.stat() for path in folder.rglob("*") if path.is_file()]
            n_bytes = sum(file.st_size for file in files if file.st_nlink == 1)
            folder.rename(going)
            shutil.rmtree(going)
            yield Removed(folder, n_bytes)
