"""Files wherever they lie: a local path, or a URL that fsspec knows (`s3://`, `gs://`, ...)."""

import errno
import itertools
import os
import posixpath
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lens_pipeline.errors import InputError, NoAnswerError, words_of
from lens_pipeline.locations import at_home, protocol_of

CONNECT_LIMIT, READ_LIMIT = 10, 15  # seconds
CLAIM = ".filling"  # in a folder while somebody writes into it
BUCKETS = ("s3", "gs")
# Files of one folder: it may hold far more than are asked for, and a listing tells of all of them.
WORTH_LISTING = 200
AT_A_TIME = 16  # files that a store is asked for
ASKED_TOGETHER = 1000  # files whose answers are held in memory
FEW = 100  # files that a server that is no bucket can be asked for before anything is read
# What a store raises of a thing that is as it is; all else may be over in a while.
FINAL = (
    *(FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError),
    *(InputError, TypeError, ValueError),
)
# `errno` of a folder, which may lie on another machine: what may be over in a while.
PASSING = (errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
_ASK_AGAIN = (408, 429)  # of the statuses that blame who asks
_Question = Callable[[], Mapping[str, Any] | None]


@contextmanager
def asking(location: str) -> Iterator[None]:
    """Around what asks a store, and nothing else: what may be over in a while comes out as
    NoAnswerError. All else a local path raises as it is."""
    try:
        yield
    except Exception as problem:
        if not protocol_of(location) and getattr(problem, "errno", None) in PASSING:
            raise NoAnswerError(
                f"{location}: cannot be read now ({words_of(problem)}); try again later"
            ) from None
        final = isinstance(problem, FINAL) or lacks_credentials(problem)
        if final or not protocol_of(location) or blames_the_request(problem):
            raise
        raise NoAnswerError(
            f"{location}: its store fails ({words_of(problem)}); try again later, or correct "
            "the address"
        ) from None


@contextmanager
def filling(out: str | Path) -> Iterator[Path]:
    """A local folder for what the block writes: one that holds nothing, made where there is none.
    Where the block fails it holds nothing again.

    Raises InputError for one that holds anything, or that another writer fills: who has its files
    mapped would be killed by the system, were they written again.
    """
    folder = Path(out)
    claim = folder / CLAIM
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claim.touch(exist_ok=False)
        holds = any(path != claim for path in folder.iterdir())
    except FileExistsError as problem:
        if not folder.is_dir():
            raise InputError(f"{folder}: cannot be written to ({problem.strerror})") from None
        holds = True
    except OSError as problem:
        raise InputError(f"{folder}: cannot be written to ({problem.strerror})") from None
    else:
        if holds:
            claim.unlink()
    if holds:
        raise InputError(f"{folder}: exists and is not empty; name another folder, or remove it")
    try:
        yield folder
    except BaseException:
        for path in folder.iterdir():
            with suppress(OSError):  # what went wrong before is to be told
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    claim.unlink()


def lacks_credentials(problem: Exception) -> bool:
    """Whether it is one of the errors that providers' libraries raise without credentials."""
    return "Credentials" in type(problem).__name__  # each has its own, and no import needs them


def blames_the_request(problem: Exception) -> bool:
    """Whether it is a server's answer that says so, and will be the same another time."""
    status = getattr(problem, "status", None) or getattr(problem, "code", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in _ASK_AGAIN


def locate(
    location: str, storage_options: Mapping[str, Any] | None = None
) -> tuple[fsspec.AbstractFileSystem, str]:
    """(the filesystem, the path in it). Raises InputError for a kind that is not known, and where
    its options are wrong; NoAnswerError where it asks a server for that, which does not answer."""
    options = _defaults(protocol_of(location))
    for name, value in (storage_options or {}).items():
        both = isinstance(value, dict) and isinstance(options.get(name), dict)
        options[name] = {**options[name], **value} if both else value
    if not protocol_of(location):  # in a path `::` is no chain, as it is to fsspec
        return LocalFileSystem(**options), str(at_home(location).absolute())
    try:
        return fsspec.url_to_fs(location, **options)
    except (ValueError, ImportError) as problem:
        raise InputError(f"{location}: cannot be used ({words_of(problem)})") from None
    except Exception as problem:  # noqa: BLE001  (each has its own; words may hold a secret)
        passing = isinstance(problem, OSError) and not isinstance(problem, FINAL)
        names = ", ".join(storage_options or ()) or "its credentials"
        raise (NoAnswerError if passing else InputError)(
            f"{location}: cannot be connected to ({type(problem).__name__}); correct {names}, as "
            "LENS_STORAGE_OPTIONS or the environment gives them"
        ) from None


def state_of(info: Mapping[str, Any]) -> str | None:
    """What tells a file's state from later ones, by what a filesystem says of it; None where it
    says nothing of the kind."""
    names = ("ETag", "etag", "mtime", "LastModified", "Last-Modified")
    changed = next((info[name] for name in names if info.get(name) is not None), None)
    return None if changed is None else f"{info.get('size')} {changed}"


def states_of(
    paths: Iterable[str], storage_options: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, str | None]]:
    """(path, its `state_of`), sorted by the path; None of what cannot be had, for what is
    wrong is told when it is read. Raises NoAnswerError where a store fails."""
    for path, info in _infos(paths, storage_options):
        yield path, None if info is None else state_of(info)


def known_states(
    paths: Collection[str], storage_options: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """{path: what tells its state from later ones} of the paths of which that is known; of a local
    one that is missing, too. A server that is no bucket is asked for no more than `FEW` files.
    Raises NoAnswerError where a store fails."""
    of_servers = {path for path in paths if protocol_of(path) not in ("", *BUCKETS)}
    asked = set(paths) - of_servers if len(of_servers) > FEW else paths
    states = {}
    for path, info in _infos(asked, storage_options):
        state = None if info is None else state_of(info)
        if info is not None and state is not None:
            # A file that was moved into place keeps its time, but for that of its inode.
            states[path] = f"{state} {info.get('created', '')}"
        elif not protocol_of(path):
            states[path] = "missing"
    return states


def _infos(
    paths: Iterable[str], storage_options: Mapping[str, Any] | None
) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    """(path, what its filesystem says of it), sorted; None of what cannot be had.

    A bucket is asked once for a thousand objects of a folder; stores are asked for several files
    at a time. Raises NoAnswerError where one fails.
    """
    for stored, together in itertools.groupby(sorted(paths), lambda path: bool(protocol_of(path))):
        if stored:
            yield from _stored_infos(together, storage_options)
        else:
            yield from _local_infos(together)


def _local_infos(paths: Iterable[str]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Of several at a time: a folder that lies on another machine takes its time for each."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        while some := list(itertools.islice(paths, AT_A_TIME * ASKED_TOGETHER)):
            parts = [some[number::AT_A_TIME] for number in range(AT_A_TIME)]
            answers = pool.map(lambda part: [_local_info(path) for path in part], parts)
            found: list[dict[str, Any] | None] = [None] * len(some)
            for number, of_part in enumerate(answers):
                found[number::AT_A_TIME] = of_part
            yield from zip(some, found, strict=True)


def _local_info(path: str) -> dict[str, Any] | None:
    try:
        stat = Path(path).stat()  # fsspec takes five times as long
        if not os.access(path, os.R_OK):  # when it may be, its time of change stays
            return None
    except (OSError, ValueError):
        return None
    return {"size": stat.st_size, "mtime": stat.st_mtime, "created": stat.st_ctime}


def _stored_infos(
    paths: Iterable[str], storage_options: Mapping[str, Any] | None
) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    questions = (
        (path, _question(path, listed, storage_options))
        for path, listed in _with_listings(paths, storage_options)
    )

    def answer(question: tuple[str, _Question]) -> tuple[str, Mapping[str, Any] | None]:
        path, ask = question
        try:
            with asking(path):
                return path, ask()
        except NoAnswerError:
            raise
        except Exception:  # noqa: BLE001  (each store has errors of its own)
            return path, None

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        while some := list(itertools.islice(questions, ASKED_TOGETHER)):
            yield from pool.map(answer, some)


def _with_listings(
    paths: Iterable[str], storage_options: Mapping[str, Any] | None
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """(each of the sorted paths, `_listed` of its folder)"""
    for folder, group in itertools.groupby(paths, posixpath.dirname):
        together = list(group)
        listed = _listed(folder, storage_options) if len(together) >= WORTH_LISTING else None
        yield from ((path, listed) for path in together)


def _question(
    path: str, listed: dict[str, Any] | None, storage_options: Mapping[str, Any] | None
) -> _Question:
    """What gives what is known of a file. Here, for in each thread fsspec connects anew."""
    try:
        filesystem, inside = locate(path, storage_options)
    except Exception:  # noqa: BLE001  (each store has errors of its own)
        return lambda: None
    return partial(filesystem.info if listed is None else listed.get, inside)


def _listed(folder: str, storage_options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a bucket says of all in a folder, by name; None of what is no bucket, or may not be
    listed."""
    if protocol_of(folder) not in BUCKETS:
        return None
    filesystem, inside = locate(folder, storage_options)
    try:
        with asking(folder):
            return {entry["name"]: entry for entry in filesystem.ls(inside, detail=True)}
    except NoAnswerError:
        raise
    except Exception:  # noqa: BLE001  (each store has errors of its own)
        return None


def _defaults(protocol: str) -> dict[str, Any]:
    """A connection that stalls is given up: else libraries wait for minutes, or for ever. And
    listings are always fresh, for other processes put and remove objects, too."""
    if protocol == "s3":
        config = {
            "connect_timeout": CONNECT_LIMIT,
            "read_timeout": READ_LIMIT,
            "retries": {"max_attempts": 1},  # s3fs tries again five times around these
        }
        return {"config_kwargs": config, "use_listings_cache": False}
    if protocol == "gs":
        import aiohttp

        limit = aiohttp.ClientTimeout(sock_connect=CONNECT_LIMIT, sock_read=READ_LIMIT)
        return {"requests_timeout": limit, "use_listings_cache": False}
    return {}
