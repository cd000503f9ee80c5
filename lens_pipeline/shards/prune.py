"""Removing old versions of published shards, which nothing else does."""

import logging
import posixpath
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lens_pipeline.errors import InputError, first_of
from lens_pipeline.shards.checked import RECORD
from lens_pipeline.shards.cloud import AT_WORK
from lens_pipeline.shards.manifest import MANIFEST, Listed
from lens_pipeline.shards.patience import RefusedError
from lens_pipeline.shards.store import Store, written_at
from lens_pipeline.shards.transfers import transfer
from lens_pipeline.shards.versions import LATEST, Latest

YOUNG = timedelta(days=1)
log = logging.getLogger(__name__)
_VERSION = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class FoundVersion:
    """A version at a URL: when it was written to last, by the store's own clock; why it is kept,
    or else why not."""

    version: str
    published: datetime
    bytes: int
    kept: bool
    reason: str


class _Versions(Store):
    def objects(self, version: str = "") -> dict[str, dict[str, Any]]:
        """{version: {name of an object: what the store says of it}}, of one or all; nothing else
        that is there."""
        found = self._again(
            lambda: self.filesystem.find(self.at(version), detail=True), "", "may not be listed"
        )
        versions: dict[str, dict[str, Any]] = {}
        for path, about in found.items():
            version, _, name = posixpath.relpath(path, self.root).partition("/")
            if name and _VERSION.fullmatch(version):
                versions.setdefault(version, {})[name] = about
        return versions

    def newest(self) -> str | None:
        latest = Latest.at(self)
        return latest.version if latest else None

    def published_again(self, one: FoundVersion) -> str | None:
        """What tells that a version is, or has been, published since it was judged."""
        if self.newest() == one.version:
            return f"{LATEST} names it"
        for name in (AT_WORK, MANIFEST):
            about = self.about(f"{one.version}/{name}")
            if about is not None and written_at(about) > one.published:
                return "is being published again"
        return None


def prune_versions(
    url: str,
    keep: int,
    *,
    referred: Mapping[str, str],
    dry_run: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> list[FoundVersion]:
    """Remove old versions at a URL; returns what became of each, the newest first.

    Kept are the `keep` newest whole ones, the one that `latest.json` names, those that are
    `referred` to ({version: by what}), and what was written to within a day; so an upload without a
    manifest is one that was stopped. What is written to while others are removed stays, too.
    dry_run: remove nothing. Raises InputError for keep < 1, where there are no versions, and where
    nothing may be removed.
    """
    if keep < 1:
        raise InputError(f"keep {keep}: at least 1 is needed")
    store = _Versions(url, storage_options)
    if store.is_local and not Path(store.root).is_dir():
        raise InputError(f"{url}: there is no such folder")
    try:
        now = store.check_writable()
    except RefusedError:
        if not dry_run:
            raise
        now = datetime.now(UTC)
    found = _judged(store, store.objects(), now, keep, referred)
    if not found:
        raise InputError(f"{url}: no shards are published there")
    if dry_run:
        return found
    return [one if one.kept else _removed(store, one) for one in found]


def _judged(
    store: _Versions,
    objects: Mapping[str, Mapping[str, Any]],
    now: datetime,
    keep: int,
    referred: Mapping[str, str],
) -> list[FoundVersion]:
    latest = store.newest()
    published = {version: max(_written(those)) for version, those in objects.items()}
    ordered = sorted(objects, key=lambda version: (published[version], version), reverse=True)
    newest = [version for version in ordered if MANIFEST in objects[version]][:keep]
    found = []
    for version in ordered:
        reasons = {
            f"{LATEST} names it": version == latest,
            f"of the newest {keep}": version in newest,
            "younger than a day": now - published[version] < YOUNG,
            f"{referred.get(version)} refers to it": version in referred,
        }
        kept = "; ".join(reason for reason, holds in reasons.items() if holds)
        old = "is older" if MANIFEST in objects[version] else "an upload that was stopped"
        n_bytes = sum(about["size"] for about in objects[version].values())
        found.append(FoundVersion(version, published[version], n_bytes, bool(kept), kept or old))
    return found


class _PublishedAgainError(Exception):
    """A version must not be removed any more; says why."""


def _removed(store: _Versions, one: FoundVersion) -> FoundVersion:
    """Remove a version; its manifest first, for who sees one sees a whole dataset. Returns what
    became of it: what is left is kept where it has been published again since it was judged."""

    def remove(listed: Listed) -> None:
        if reason := store.published_again(one):
            raise _PublishedAgainError(reason)
        store.remove(f"{one.version}/{listed.name}")

    objects = store.objects(one.version).get(one.version, {})
    files = [Listed(name, "", about["size"]) for name, about in objects.items()]
    try:
        for listed in files:
            if listed.name == MANIFEST:
                remove(listed)
        transfer([listed for listed in files if listed.name != MANIFEST], remove, "removing")
    except _PublishedAgainError as problem:
        one = replace(one, kept=True, reason=str(problem))
    if store.is_local:
        with suppress(OSError):  # somebody has just put something there
            Path(store.at(one.version)).rmdir()
    if store.newest() == one.version:
        _tell_what_is_lost(store, one.version)
    return one


def _tell_what_is_lost(store: _Versions, version: str) -> None:
    """Who publishes a version again may have seen what was on its way to be removed."""
    manifest = Store(posixpath.join(store.url, version), store.storage_options).manifest()
    needed = [MANIFEST, *(listed.name for listed in (manifest.files if manifest else ()))]
    there = store.objects(version).get(version, {})
    lost = [name for name in needed if name not in there]
    if lost:
        log.warning(
            "%s/%s: was published again while it was removed, and is the newest; it lacks %s: "
            "publish it once more",
            *(store.url, version, first_of(lost)),
        )


def _written(objects: Mapping[str, Mapping[str, Any]]) -> list[datetime]:
    """When the objects of a version were written; who only reads it may write a record beside."""
    published = [about for name, about in objects.items() if name != RECORD]
    return [written_at(about) for about in published or objects.values()]
