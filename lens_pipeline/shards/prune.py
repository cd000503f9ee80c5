"""Removing old versions of published shards, which nothing else does."""

import posixpath
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lens_pipeline.errors import InputError
from lens_pipeline.shards.checked import RECORD
from lens_pipeline.shards.cloud import LATEST, Latest
from lens_pipeline.shards.manifest import MANIFEST, Listed
from lens_pipeline.shards.store import Store
from lens_pipeline.shards.transfers import transfer

YOUNG = timedelta(days=1)
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
        try:
            found = self._again(lambda: self.filesystem.find(self.at(version), detail=True), "")
        except PermissionError as problem:
            raise InputError(f"{self.url}: may not be listed ({problem})") from None
        versions: dict[str, dict[str, Any]] = {}
        for path, about in found.items():
            version, _, name = posixpath.relpath(path, self.root).partition("/")
            if name and _VERSION.fullmatch(version):
                versions.setdefault(version, {})[name] = about
        return versions

    def newest(self) -> str | None:
        content = self.read(LATEST)
        return Latest.parse(content, f"{self.url}/{LATEST}").version if content else None

    def now(self) -> datetime:
        """By the clock that dates its objects: ours may be another."""
        probe = f".time-{uuid.uuid4().hex}"
        self.put_text(probe, "")
        about = self.about(probe)
        assert about is not None
        self.remove(probe)
        return _changed(about)


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
    store.check_writable()
    found = _judged(store, store.objects(), keep, referred)
    if not found:
        raise InputError(f"{url}: no shards are published there")
    if dry_run:
        return found
    return [one if one.kept else _removed(store, one) for one in found]


def _judged(
    store: _Versions,
    objects: Mapping[str, Mapping[str, Any]],
    keep: int,
    referred: Mapping[str, str],
) -> list[FoundVersion]:
    now, latest = store.now(), store.newest()
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


def _removed(store: _Versions, one: FoundVersion) -> FoundVersion:
    """Remove a version; its manifest first, for who sees one sees a whole dataset. Returns what
    became of it: it is kept where it has been published again since it was judged."""
    for remove in (_remove_manifest, _remove_rest):
        objects = store.objects(one.version).get(one.version, {})
        if store.newest() == one.version:
            return replace(one, kept=True, reason=f"{LATEST} names it")
        if any(written > one.published for written in _written(objects)):
            return replace(one, kept=True, reason="is being published again")
        remove(store, one.version, objects)
    return one


def _remove_manifest(store: _Versions, version: str, objects: Mapping[str, Any]) -> None:
    store.remove(f"{version}/{MANIFEST}")


def _remove_rest(store: _Versions, version: str, objects: Mapping[str, Any]) -> None:
    files = [Listed(f"{version}/{name}", "", about["size"]) for name, about in objects.items()]
    transfer(files, lambda listed: store.remove(listed.name), "removing")
    if store.is_local:
        with suppress(OSError):  # somebody has just put something there
            Path(store.at(version)).rmdir()


def _written(objects: Mapping[str, Mapping[str, Any]]) -> list[datetime]:
    """When the objects of a version were written; who only reads it may write a record beside."""
    published = [about for name, about in objects.items() if name != RECORD]
    return [_changed(about) for about in published or objects.values()]


def _changed(about: Mapping[str, Any]) -> datetime:
    """When an object was written, by what a filesystem says of it."""
    changed = about.get("LastModified") or about["mtime"]
    return changed if isinstance(changed, datetime) else datetime.fromtimestamp(changed, UTC)
