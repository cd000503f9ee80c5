"""Content-addressed steps: the key of a step, reuse, locks, write aside and rename.

A step writes one folder, named by its key. The key hashes the content of the step's inputs, its
settings, what the library modules do that it runs, and the versions of the libraries that
decide its output. A folder is complete when its `complete.json`, written last, lists every file.
"""

import ast
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import filelock

from lens_pipeline.errors import NoAnswerError

PACKAGE = "lens_pipeline"
COMPLETE = "complete.json"
MOST_SOURCES = 1000  # that are remembered: those of some versions of this package
LOCKS, HOLDER = ".locks", ".holder"
PATIENCE = 10  # seconds of waiting for a lock before its holder is named
log = logging.getLogger(__name__)


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
    removed in either case; and all that processes which were killed have left of theirs.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
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


def _remove_all(aside: Path) -> None:
    for path in aside.parent.glob(f"{glob.escape(aside.name)}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _source(module: str) -> bytes:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    return Path(spec.origin).read_bytes()


_first_source = cache(_source)


def _written_out(node: Any) -> Any:
    """A syntax tree for JSON, without what is empty: `ast.dump` has that or not, by the version."""
    if isinstance(node, ast.AST):
        parts = {name: _written_out(part) for name, part in ast.iter_fields(node)}
        return [type(node).__name__, {name: part for name, part in parts.items() if part}]
    if isinstance(node, list):
        return [_written_out(one) for one in node]
    return None if node is None else repr(node)


def _parsed(source: bytes) -> tuple[str, list[str]]:
    """sha256 of what a module does, and what of this package it imports anywhere.

    Of its syntax tree, without docstrings: a comment makes nothing again, nor does another version
    of Python, which may know of parts that this code has none of.
    """
    tree = ast.parse(source)
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return digest(_written_out(tree)), sorted(n for n in found if n.startswith(f"{PACKAGE}."))


class _KnownSources:
    """What `_parsed` gives, by the source; kept where Python keeps what it has compiled of the same
    files: parsing all of them takes most of the time in which Dagster's processes load."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._by = hashlib.sha256(_first_source(__name__)).hexdigest()
        self._known: dict[str, tuple[str, list[str]]] = {}
        with suppress(OSError, ValueError, TypeError, KeyError):
            kept = json.loads(file.read_text())
            if kept["by"] == self._by:
                self._known = kept["known"]
        self._n_kept = len(self._known)

    def of(self, source: bytes) -> tuple[str, list[str]]:
        key = hashlib.sha256(source).hexdigest()
        if key not in self._known:
            self._known[key] = _parsed(source)
        return self._known[key]

    def keep(self) -> None:
        """Write down what is new, where that is possible."""
        if len(self._known) == self._n_kept or sys.dont_write_bytecode:
            return
        self._known = dict([*self._known.items()][-MOST_SOURCES:])
        self._n_kept = len(self._known)
        with suppress(OSError):
            write_aside(self._file, json.dumps({"by": self._by, "known": self._known}))


@cache
def _known_sources() -> _KnownSources:
    compiled = importlib.util.cache_from_source(__file__)
    return _KnownSources(Path(compiled).with_name(f"{PACKAGE}.sources.json"))


@cache
def _is_module_file(name: str) -> bool:
    # A package's own __init__ only names what lies inside, so it decides nothing.
    path = Path(__file__).parent.joinpath(*name.split(".")[1:]).with_suffix(".py")
    return path.is_file()


def source_hashes(modules: Iterable[str], anew: bool = False) -> dict[str, str]:
    """{module: sha256 of its code} of these modules and all of this package that they import; as it
    was when it was first asked for, unless `anew`."""
    read, known = _source if anew else _first_source, _known_sources()
    hashes: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in hashes:
            hashes[module], imported = known.of(read(module))
            waiting.extend(name for name in imported if _is_module_file(name))
    known.keep()
    return hashes


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
