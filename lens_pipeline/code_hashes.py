"""Hashes of what this package's modules do, by which what they have made is made again or not."""

import ast
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from lens_pipeline.files import write_aside

PACKAGE = "lens_pipeline"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
MOST_SOURCES = 1000  # that are remembered: those of some versions of this package


def _source(module: str) -> bytes:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    return Path(spec.origin).read_bytes()


_first_source = cache(_source)


def _parsed(source: bytes) -> tuple[str, list[str]]:
    """sha256 of what a module does, and what of this package it imports anywhere.

    Of its syntax tree, without docstrings: a comment makes nothing again, nor does another version
    of Python, which may know of parts that this code has none of.
    """
    words: list[str] = []
    imported: set[str] = set()
    _read(ast.parse(source), words, imported)
    sha256 = hashlib.sha256(" ".join(words).encode()).hexdigest()
    return sha256, sorted(name for name in imported if name.startswith(f"{PACKAGE}."))


def _read(node: Any, words: list[str], imported: set[str]) -> None:
    """Write out a part of a syntax tree, but for what is empty: `ast.dump` has that or not, by the
    version, and is slower."""
    if isinstance(node, list):
        words.append("[")
        for one in node:
            _read(one, words, imported)
        words.append("]")
    elif isinstance(node, ast.AST):
        if isinstance(node, DOCUMENTED):
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        words.append(f"({type(node).__name__}")
        for name, part in ast.iter_fields(node):
            if part is not None and part != []:
                words.append(name)
                _read(part, words, imported)
        words.append(")")
    else:
        words.append(repr(node))


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
