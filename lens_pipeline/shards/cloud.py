"""Publishing shards: to a folder or an object store, each version in a folder of its own.

`<url>/<version>/` holds the shards, the index and, put last, the manifest. `<url>/latest.json` says
which version is the newest; it is swapped when a version is whole.
"""

import logging
import posixpath
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens_pipeline.errors import InputError, first_of
from lens_pipeline.locations import publishable
from lens_pipeline.shards.checked import CheckedFolder
from lens_pipeline.shards.manifest import MANIFEST, Listed, Manifest
from lens_pipeline.shards.patience import StoreError
from lens_pipeline.shards.store import Store, read_manifest
from lens_pipeline.shards.transfers import transfer
from lens_pipeline.shards.versions import LATEST, Latest

# In a version's folder while it is published. An upload that only finds what is there already must
# not look as old as that, or `prune` would take it for one that was stopped.
AT_WORK = ".publishing"
STILL = 3600  # seconds after which that is said again
STOPPED = 86_400  # seconds after which nobody writes a file any more

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedShards:
    """url: of the version's folder; uploaded, skipped: names of files; bytes: that were sent.

    states: {name: what tells the state in which an object was found whole from later ones}.
    """

    url: str
    dataset_version: str
    uploaded: tuple[str, ...]
    skipped: tuple[str, ...]
    bytes: int
    states: Mapping[str, str]


def publish_shards(
    shards: str | Path,
    url: str,
    *,
    storage_options: Mapping[str, Any] | None = None,
    every_byte: bool = False,
) -> PublishedShards:
    """Copy the shards in a folder to `<url>/<version>/`, a folder or fsspec URL.

    Several files at a time; those that are there already, by their checksum, are skipped, so that
    an upload that was stopped goes on. Each is checked before and after, and the manifest put last:
    who sees one sees a whole dataset. A file in a folder that has not changed since it was last
    found whole is not read again for that, unless `every_byte` is asked for. Then `latest.json`
    names the version, unless it names one whose upload began later. Raises InputError where
    `shards` has no manifest or is damaged, where nothing may be written, or for a URL that holds
    braces; StoreError where the store fails for long, or somebody has removed meanwhile what was
    there: what was the newest before, still is.
    """
    shards, manifest = Path(shards), read_manifest(shards)
    version = manifest.dataset_version
    top = Store(publishable(url), storage_options)
    created = top.check_writable().isoformat()
    Latest.at(top)  # raises for a damaged one before anything is sent
    place = Store(posixpath.join(top.url, version), storage_options)
    if place.is_local:
        Path(place.root).mkdir(exist_ok=True)
        _remove_asides(Path(place.root))

    def publish(listed: Listed) -> bool:
        say_so()
        if copies.is_whole(listed):
            return False
        place.put_file(shards / listed.name, listed.name)
        if not copies.is_whole(listed):
            raise StoreError(f"{place.url}/{listed.name}: is not what was put there")
        return True

    with _at_work(place) as say_so, _compared(shards, place, every_byte) as copies:
        sent = transfer(manifest.files, publish, "publishing")
        uploaded = [listed.name for listed, new in zip(manifest.files, sent, strict=True) if new]
        skipped = [listed.name for listed, new in zip(manifest.files, sent, strict=True) if not new]
        if place.read(MANIFEST) != manifest.text.encode():
            uploaded.append(MANIFEST)
        # Even where it is there: its time says when this version was published last.
        place.put_text(MANIFEST, manifest.text)
        _check_there(place, manifest)
        _point_to(top, version, created)
    n_bytes = sum(listed.bytes for listed in manifest.files if listed.name in uploaded)
    return PublishedShards(
        place.url, version, tuple(uploaded), tuple(skipped), n_bytes, copies.states
    )


class _Copies:
    """The files of a folder, and what lies of them at a place; states: see `PublishedShards`."""

    def __init__(
        self,
        here: CheckedFolder,
        place: Store,
        there: CheckedFolder | None,
        states: Mapping[str, str],
    ) -> None:
        self.here, self.place, self.there, self.states = here, place, there, dict(states)

    def is_whole(self, listed: Listed) -> bool:
        """Whether a file is there as the manifest lists it. Raises InputError where it is not so
        here: it must not be published."""
        if self.there is not None:
            self.here.require(listed)
            return self.there.difference(listed) is None
        checksums = self.here.checksums(listed)
        state = self.place.state_of(listed, checksums, self.states.get(listed.name))
        if state is not None:
            self.states[listed.name] = state
        return state is not None


@contextmanager
def _compared(
    shards: Path, place: Store, every_byte: bool = False, states: Mapping[str, str] | None = None
) -> Iterator[_Copies]:
    with CheckedFolder(shards, every_byte) as here, ExitStack() as stack:
        there = None
        if place.is_local:
            there = stack.enter_context(CheckedFolder(Path(place.root), every_byte))
        yield _Copies(here, place, there, states or {})


def _remove_asides(folder: Path) -> None:
    """What uploads have left there that were stopped while they put a file."""
    for aside in folder.glob(".*.*.*"):
        with suppress(FileNotFoundError):  # another process was quicker
            if time.time() - aside.stat().st_mtime > STOPPED:
                aside.unlink()


@contextmanager
def _at_work(place: Store) -> Iterator[Callable[[], None]]:
    """While a version is published, an object in its folder is young: what is given keeps it so,
    and is to be called again and again."""
    said, lock = [-float("inf")], threading.Lock()

    def say_so() -> None:
        with lock:
            if time.monotonic() - said[0] > STILL:
                place.put_text(AT_WORK, "")
                said[0] = time.monotonic()

    say_so()
    yield say_so
    with suppress(InputError):  # objects may be put there, and not removed
        place.remove(AT_WORK)


def _check_there(place: Store, manifest: Manifest) -> None:
    """Raises StoreError where a file has gone since it was found or put, by a `prune` that had
    begun before; the manifest goes, too."""
    files = [*manifest.files, Listed(MANIFEST, "", len(manifest.text.encode()))]
    found = transfer(files, lambda listed: place.about(listed.name), "checking")
    gone = [
        listed.name
        for listed, about in zip(files, found, strict=True)
        if about is None or about["size"] != listed.bytes
    ]
    if gone:
        with suppress(InputError):  # objects may be put there, and not removed
            place.remove(MANIFEST)
        raise StoreError(
            f"{place.url}: {first_of(gone)}: removed by somebody while it was published; publish "
            "it again"
        )


def _point_to(store: Store, version: str, created: str) -> None:
    def newer(found: bytes | None) -> bytes | None:
        before = Latest.parse(found, f"{store.url}/{LATEST}") if found else None
        if before is None:
            return Latest(version, created, 1).content
        another = before.version != version
        if before.created <= created:
            return Latest(version, created, before.sequence + another).content
        if another:
            log.warning(
                "%s/%s: still names version %s, whose upload began later (%s), and not %s (%s)",
                *(store.url, LATEST, before.version, before.created, version, created),
            )
        return None

    store.swap(LATEST, newer)


def published_problems(
    shards: Path,
    url: str,
    storage_options: Mapping[str, Any] | None = None,
    states: Mapping[str, str] | None = None,
) -> list[str]:
    """How what lies at the URL of a version differs from the whole shards in a folder; each problem
    names its object. states: in which `publish_shards` has found them whole."""
    place = Store(url, storage_options)
    manifest = read_manifest(shards)
    with _compared(shards, place, states=states) as copies:
        there = transfer(manifest.files, copies.is_whole, "comparing")
    problems = [
        f"{place.url}/{listed.name}: is missing, or not as the manifest says"
        for listed, whole in zip(manifest.files, there, strict=True)
        if not whole
    ]
    if place.read(MANIFEST) != manifest.text.encode():
        problems.append(f"{place.url}/{MANIFEST}: is missing, or another")
    return problems
