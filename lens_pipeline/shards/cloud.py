"""Publishing shards: to a folder or an object store, under their version, manifest last."""

import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from lens_pipeline.shards.manifest import MANIFEST, difference, read_manifest


@dataclass(frozen=True)
class PublishedShards:
    """url: of the version's folder; uploaded, skipped: names of files; bytes: that were sent."""

    url: str
    dataset_version: str
    uploaded: tuple[str, ...]
    skipped: tuple[str, ...]
    bytes: int


def publish_shards(
    shards: Path, url: str, *, storage_options: Mapping[str, Any] | None = None
) -> PublishedShards:
    """Copy the shards in a folder to `<url>/<version>/`, a folder or fsspec URL.

    Files that are there already, with the manifest's checksum, are skipped. The manifest is put
    last: who sees one sees a whole dataset. Raises InputError where `shards` has no manifest.
    """
    manifest = read_manifest(shards)
    version = manifest.dataset_version
    place = posixpath.join(url, version)
    filesystem, root = fsspec.url_to_fs(place, **dict(storage_options or {}))
    filesystem.makedirs(root, exist_ok=True)
    uploaded, skipped, sent = [], [], 0
    total = sum(listed.bytes for listed in manifest.files)
    with tqdm(total=total, desc="publishing", unit="B", unit_scale=True, disable=None) as progress:
        for listed in manifest.files:
            target = posixpath.join(root, listed.name)
            if difference(filesystem, target, listed) is None:
                skipped.append(listed.name)
            else:
                _put(filesystem, shards / listed.name, target)
                uploaded.append(listed.name)
                sent += listed.bytes
            progress.update(listed.bytes)
    target = posixpath.join(root, MANIFEST)
    if not filesystem.exists(target) or filesystem.cat_file(target) != manifest.text.encode():
        _put(filesystem, shards / MANIFEST, target)
        uploaded.append(MANIFEST)
    return PublishedShards(place, version, tuple(uploaded), tuple(skipped), sent)


def _put(filesystem: fsspec.AbstractFileSystem, source: Path, target: str) -> None:
    """An object store shows an object when it is whole; in a folder it is renamed into place."""
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.put_file(str(source), target)
        return
    folder, name = posixpath.split(target)
    aside = Path(folder, f".{name}.{os.getpid()}")
    filesystem.put_file(str(source), str(aside))
    aside.replace(target)
