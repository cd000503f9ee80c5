"""WebDataset tars by their URLs: which they are, and how they can be read."""

import hashlib
import posixpath
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from lens_pipeline.catalogue.dataset import CutoutFormat, Split
from lens_pipeline.errors import InputError
from lens_pipeline.files import digest, file_sha256
from lens_pipeline.locations import absolute, protocol_of
from lens_pipeline.shards.cache import CacheFolder
from lens_pipeline.shards.cutouts import cropped
from lens_pipeline.shards.foreign import ImageDecoder, index_tars
from lens_pipeline.shards.manifest import Listed, Manifest
from lens_pipeline.shards.reader import shards_at
from lens_pipeline.shards.store import Store
from lens_pipeline.shards.streaming import read_tar
from lens_pipeline.shards.transfers import AT_A_TIME, ahead_of, at_a_time, transfer
from lens_pipeline.shards.versions import version_at
from lens_pipeline.storage import state_of


@dataclass(frozen=True)
class Tars:
    """The tars of a split: either a `split` for reading at places, or a `decoder` for streaming.

    content: a hash of what lies in them, or, without a manifest, of their sizes and ETags or times,
    of those that are not streamed; patterns: {split: URL with braces} of all splits, where a
    manifest beside them says so.
    """

    urls: Sequence[str]
    format: CutoutFormat
    content: str | None = None
    split: Split | None = None
    decoder: ImageDecoder | None = None
    patterns: Mapping[str, str] = field(default_factory=dict)


def open_tars(
    pattern: str,
    name: str,
    *,
    image_size: int | None = None,
    flux_unit: str | None = None,
    cache: Path | None = None,
    cache_gb: float | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Tars:
    """The tars that a path or fsspec URL with braces names; errors name it as `name`.

    See `LensWebDatasetDataModule`. Raises InputError where there are none, where they are not just
    those of a split of the manifest that lies beside them, or where one is not whole.
    """
    urls = expanded(pattern, name)
    store = Store(posixpath.dirname(urls[0]), storage_options)
    shards = shards_at(store, cache, cache_gb)
    if shards is not None:
        split = _split_named(shards.manifest, urls, store.url, name)
        mine = cropped(shards, image_size, store.url)
        patterns = shards.manifest.patterns(store.url)
        content = digest([shards.content, split])
        return Tars(urls, mine.format, content, mine.split(split), patterns=patterns)
    if store.is_local or cache is not None:
        names = [posixpath.basename(url) for url in urls]
        states: list[Any]
        if cache is None or store.is_local:
            paths = [Path(store.at(tar)) for tar in names]
            indexed = index_tars(paths, image_size, flux_unit).held()
            # The bytes, which are read anyway: who copies tars to each job's disk has the same.
            states = [file_sha256(path) for path in paths]
        else:
            listed = dict(zip(names, ahead_of(names, store.about, AT_A_TIME), strict=True))
            paths = _copied(store, listed, CacheFolder.of(cache, cache_gb))
            indexed = index_tars(paths, image_size, flux_unit).held()
            states = [about and (state_of(about) or about["size"]) for about in listed.values()]
        content = digest([names, states, flux_unit])
        return Tars(urls, indexed.decoder.form, content, indexed)
    first = next(read_tar(store, posixpath.basename(urls[0])), None)
    if first is None:
        raise InputError(f"{urls[0]}: no cutouts")
    decoder = ImageDecoder.like(first, urls[0], image_size, flux_unit)
    return Tars(urls, decoder.form, decoder=decoder)


def in_versions(
    patterns: Mapping[str, str], storage_options: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """{name: pattern}: where there are no such tars in their folder, and a `latest.json` is, those
    of the version that it names, which is one for all of a folder."""
    versions: dict[str, str] = {}
    found = {}
    for name, pattern in patterns.items():
        folder, tar = posixpath.split(expanded(pattern, name)[0])
        if folder not in versions:
            versions[folder] = version_at(folder, storage_options, tar)
        whole = pattern if folder in pattern else _placed(pattern)
        found[name] = whole.replace(f"{folder}/", f"{versions[folder]}/")
    return found


def expanded(pattern: str, name: str) -> list[str]:
    """The paths (absolute) or URLs that a pattern with braces stands for, in its order."""
    try:
        named = list(braceexpand(pattern))
    except ValueError:
        raise InputError(f"{name}: {pattern}: a brace is missing") from None
    urls = [_placed(url) for url in named]
    folders = {posixpath.dirname(url) for url in urls}
    if len(folders) > 1:
        raise InputError(f"{name}: {pattern}: the tars must lie in one folder")
    return urls


def _placed(tar: str) -> str:
    """A path made absolute, by its folder: a tar may be a link to where its content lies, and what
    lies beside it counts."""
    if protocol_of(tar):
        return absolute(tar)
    folder, name = posixpath.split(tar)
    return posixpath.join(absolute(folder), name)


def _split_named(manifest: Manifest, urls: Sequence[str], folder: str, name: str) -> str:
    """The split of the manifest whose tars these are. Raises InputError where they are not all."""
    split_of = {shard.name: shard.split for shard in manifest.shards}
    named = [posixpath.basename(url) for url in urls]
    found = [split_of[tar] for tar in named if tar in split_of]
    split = found[0] if found else name.removesuffix("_urls")
    right = {shard.name for shard in manifest.shards if shard.split == split}
    if set(named) != right or len(named) != len(right):
        pattern = manifest.patterns(folder).get(split, "none")
        raise InputError(
            f"{name}: names {len(named)} tars, which are not just the {len(right)} of the split "
            f"{split} there; those are {pattern}"
        )
    return split


def _copied(
    store: Store, listed: Mapping[str, dict[str, Any] | None], cache: CacheFolder
) -> list[Path]:
    """Local copies of tars that no manifest describes, renewed where size or ETag have changed.

    listed: what the store says of each.
    """
    path_of, tars = {}, []
    for name, about in listed.items():
        if about is None:
            raise InputError(f"{store.url}/{name}: there is no such file")
        state = state_of(about) or uuid.uuid4().hex
        key = hashlib.sha256(f"{store.url}/{name} {state}".encode()).hexdigest()[:32]
        # Without the signature that a URL may end in.
        path_of[name] = cache.path / key / name.partition("?")[0]
        tars.append(Listed(name, "", about["size"]))
    cache.check_holds(sum(tar.bytes for tar in tars), f"{store.url}: {len(tars)} tars")
    needed = frozenset(path_of.values())

    def copy(tar: Listed) -> None:
        path = path_of[tar.name]
        with cache.lock(path):
            if path.is_file():
                cache.touch(path)
            else:
                content = store.whole(tar.name, tar.bytes)
                with cache.room(tar.bytes, needed):
                    cache.write(path, content, f"{store.url}/{tar.name}")

    transfer(tars, copy, "fetching", at_a_time(max(tar.bytes for tar in tars)))
    return list(path_of.values())
