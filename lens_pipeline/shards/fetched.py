"""Remote shards: fetched ahead of need, and kept in a folder that processes share, or in memory."""

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Self

from fsspec.implementations.local import LocalFileSystem

from lens_pipeline.errors import InputError
from lens_pipeline.progress import progress_bar
from lens_pipeline.shards.cache import GB, CacheFolder
from lens_pipeline.shards.manifest import Listed, Manifest, difference
from lens_pipeline.shards.memory import ShardContent
from lens_pipeline.shards.store import Store
from lens_pipeline.shards.transfers import ahead_of, at_a_time

KEPT_IN_MEMORY = GB  # bytes of shards that are kept where no folder may be

_LOCAL = LocalFileSystem()
_verified: set[tuple[int, ...]] = set()  # files whose sha256 has been checked by this process


def _is_whole(path: Path, listed: Listed) -> bool:
    """Whether a local file is what the manifest lists; its sha256 is read once a process for each
    (inode, size, time of change). Raises FileNotFoundError where there is none."""
    stat = path.stat()
    state = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if state not in _verified and difference(_LOCAL, str(path), listed) is None:
        _verified.add(state)
    return state in _verified


class Fetched(ABC):
    """The shards and the index of a manifest at a URL, each fetched when it is asked for, or ahead
    of that.

    Threads may share it; a process that was forked, or sent it, opens connections of its own.
    shared: whether processes share what is fetched; bound: bytes of it that are kept.
    """

    shared: bool
    bound: int

    def __init__(
        self, url: str, manifest: Manifest, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        self.url, self.manifest, self.storage_options = url, manifest, storage_options
        self.listed = {listed.name: listed for listed in (*manifest.shards, manifest.index)}
        self.largest = max(self.listed.values(), key=lambda listed: listed.bytes)
        self.at_a_time = at_a_time(self.largest.bytes)
        self._process = 0
        self._contents: dict[str, ShardContent] = {}
        self._ahead: set[Ahead] = set()

    @property
    def store(self) -> Store:
        if self._process != os.getpid():
            self._store = Store(self.url, self.storage_options)
            self._process = os.getpid()
        return self._store

    def contents(self, names: Iterable[str]) -> dict[str, ShardContent]:
        """The content of files by their names, whole and checked; those that are not there yet are
        waited for.

        Raises InputError where one is missing or not what the manifest lists, or where there is no
        room for it; StoreError where the store fails for long: the messages name the object.
        """
        found: dict[str, ShardContent] = {}
        missing = []
        for name in names:
            content = self._contents.get(name)
            if content is None:
                missing.append(name)
            else:
                found[name] = content
        if missing:
            brought = ahead_of(missing, self._bring, min(len(missing), self.at_a_time))
            found |= zip(missing, brought, strict=True)
        return found

    def _bring(self, name: str) -> ShardContent:
        with self._lock(name):
            for ahead in list(self._ahead):
                if name in ahead.failed:
                    raise ahead.failed.pop(name)
            return self._brought(name)

    def _brought(self, name: str) -> ShardContent:
        content = self._contents.get(name)
        if content is None:
            content = ShardContent(self._kept(self.listed[name]))
            self._contents[name] = content
        return content

    def _needed(self) -> set[str]:
        return {name for ahead in list(self._ahead) for name in list(ahead.held)}

    @abstractmethod
    def _lock(self, name: str) -> AbstractContextManager[object]:
        """Held while a file is fetched."""

    @abstractmethod
    def _kept(self, listed: Listed) -> memoryview:
        """A file, from what is kept, or fetched and kept."""


class ShardCache(Fetched):
    """Kept in a folder of their version in a `CacheFolder`: of several processes one fetches, the
    others wait. Raises InputError where it may not hold the largest of them."""

    shared = True

    def __init__(
        self,
        url: str,
        manifest: Manifest,
        cache: CacheFolder,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(url, manifest, storage_options)
        self.cache, self.bound = cache, cache.bound
        self.folder = cache.path / manifest.dataset_version[:32]
        cache.check_holds(self.largest.bytes, f"{url}/{self.largest.name}")

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardCache, (self.url, self.manifest, self.cache, self.storage_options)

    def _lock(self, name: str) -> AbstractContextManager[object]:
        return self.cache.lock(self.folder / name)

    def _kept(self, listed: Listed) -> memoryview:
        path = self.folder / listed.name
        with suppress(InputError, FileNotFoundError):  # another process may just be making room
            if _is_whole(path, listed):
                self._drop_gone()
                return self.cache.open(path, listed.bytes)
        content = self.store.listed(listed)
        needed = frozenset(self.folder / name for name in self._needed())
        with self.cache.room(len(content), needed):
            self._drop_gone()
            return self.cache.write(path, content, f"{self.url}/{listed.name}")

    def _drop_gone(self) -> None:
        """What made room, in whichever process, takes it as long as it is mapped here."""
        if sum(listed.bytes for listed in self.listed.values()) <= self.bound:
            return
        for name in list(self._contents):
            if not (self.folder / name).exists():
                self._contents.pop(name, None)


class ShardMemory(Fetched):
    """Kept in the memory of this process."""

    shared = False

    def __init__(
        self, url: str, manifest: Manifest, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(url, manifest, storage_options)
        self.bound = max(KEPT_IN_MEMORY, 4 * self.largest.bytes)
        self._locks = {name: threading.Lock() for name in self.listed}

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardMemory, (self.url, self.manifest, self.storage_options)

    def _lock(self, name: str) -> AbstractContextManager[object]:
        return self._locks[name]

    def _kept(self, listed: Listed) -> memoryview:
        content = memoryview(self.store.listed(listed))
        needed = self._needed()
        kept = {name: len(one.view) for name, one in list(self._contents.items())}
        total = sum(kept.values())
        for name in sorted(kept, key=lambda name: name in needed):  # else the oldest first
            if total + len(content) <= self.bound:
                break
            self._contents.pop(name, None)
            total -= kept[name]
        return content


class Ahead:
    """Fetches files in the background while its block runs: several at a time, in the order in
    which they are needed, and no more than may be kept until the first of them have been read.

    read_after: after how many steps, of which `read` is told, each has been read. held: bytes of
    those that were begun, and not read yet; failed: why one could not be fetched, told to who asks
    for it.
    """

    def __init__(self, fetched: Fetched, read_after: Mapping[str, int]) -> None:
        self.fetched, self.order = fetched, list(read_after)
        self.held: dict[str, int] = {}
        self.failed: dict[str, Exception] = {}
        self._ends = sorted((after, name) for name, after in read_after.items())
        self._n_read = 0
        self._read: set[str] = set()
        self._ended = False
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        self.fetched._ahead.add(self)
        if any(name not in self.fetched._contents for name in self.order):
            threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.fetched._ahead.discard(self)
        with self._changed:
            self._ended = True
            self._changed.notify()

    def read(self, n: int) -> None:
        """So many steps have been taken."""
        while self._n_read < len(self._ends) and self._ends[self._n_read][0] <= n:
            name = self._ends[self._n_read][1]
            self._n_read += 1
            with self._changed:
                self._read.add(name)
                self.held.pop(name, None)
                self._changed.notify()

    def _run(self) -> None:
        sizes = {name: self.fetched.listed[name].bytes for name in self.order}
        about: dict[str, Any] = {"unit": "B", "unit_scale": True, "leave": False}
        with progress_bar(total=sum(sizes.values()), desc="fetching", **about) as progress:
            for n_bytes in ahead_of(self._begun(sizes), self._bring, self.fetched.at_a_time):
                progress.update(n_bytes)

    def _begun(self, sizes: Mapping[str, int]) -> Iterator[str]:
        """The names in their order, each when there may be room for it."""
        for name in self.order:
            with self._changed:
                while self.held and sum(self.held.values()) + sizes[name] > self.fetched.bound:
                    if self._ended:
                        return
                    self._changed.wait()
                if self._ended:
                    return
                if name in self._read:
                    continue
                self.held[name] = sizes[name]
            yield name

    def _bring(self, name: str) -> int:
        with suppress(InputError), self.fetched._lock(name):  # nor can lock it who asks for it
            try:
                return len(self.fetched._brought(name).view)
            except Exception as problem:  # noqa: BLE001 - told when the file is asked for
                self.failed[name] = problem
        return 0
