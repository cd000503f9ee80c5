"""WebDataset tars by their URLs: which they are, and how they can be read."""

import hashlib
import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from lens_pipeline.catalogue.dataset import CutoutFormat
from lens_pipeline.errors import InputError
from lens_pipeline.settings import absolute
from lens_pipeline.shards.cloud import newest_version
from lens_pipeline.shards.cutouts import Split, cropped, cut_to
from lens_pipeline.shards.encoding import Encoding
from lens_pipeline.shards.foreign import Decoder, ImageDecoder, StoredDecoder, index_tars
from lens_pipeline.shards.manifest import MANIFEST, Manifest, Shard, read_manifest
from lens_pipeline.shards.reader import open_shards
from lens_pipeline.shards.streaming import read_tar
from lens_pipeline.storage import locate, state_of


@dataclass(frozen=True)
class Tars:
    """The tars of one split: either a `split` for reading at places, or a `decoder` for streaming.

    listed: what a manifest says of each URL.
    """

    urls: Sequence[str]
    format: CutoutFormat
    split: Split | None = None
    decoder: Decoder | None = None
    listed: Mapping[str, Shard] = field(default_factory=dict)


def open_tars(
    pattern: str,
    name: str,
    *,
    image_size: int | None = None,
    flux_unit: str | None = None,
    cache: Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Tars:
    """The tars that a path or fsspec URL with braces names; errors name it as `name`.

    See `LensWebDatasetDataModule`. Where there are none in their folder, and a `latest.json` is,
    they are those of the version that it names. Raises InputError where there are none, where they
    are not just those of a split of the manifest that lies beside them, or where one is not whole.
    """
    options = dict(storage_options or {})
    urls = expanded(pattern, name)
    folder = posixpath.dirname(urls[0])
    filesystem, root = locate(folder, options)
    local = isinstance(filesystem, LocalFileSystem)
    there = filesystem.exists(posixpath.join(root, posixpath.basename(urls[0])))
    newest = None if there else newest_version(folder, options)
    if newest is not None:
        urls = [posixpath.join(newest, posixpath.basename(url)) for url in urls]
        folder, root = newest, posixpath.join(root, posixpath.basename(newest))
    if filesystem.exists(posixpath.join(root, MANIFEST)):
        manifest = read_manifest(folder, options)
        shards = _shards_named(manifest, urls, folder, name)
        if local or cache is not None:
            whole = open_shards(folder, cache=cache, storage_options=options)
            mine = cropped(whole, image_size, folder)
            return Tars(urls, mine.format, mine.split(shards[0].split))
        stored = CutoutFormat.from_dict(manifest.format)
        form = cut_to(stored, image_size, folder)
        encoding = Encoding(units=stored.units, **manifest.encoding)
        decoder: Decoder = StoredDecoder(stored, form, encoding)
        return Tars(urls, form, None, decoder, dict(zip(urls, shards, strict=True)))
    if local or cache is not None:
        paths = [_local(url) for url in urls] if local else _copied(urls, cache, options)
        split = index_tars(paths, image_size, flux_unit)
        return Tars(urls, split.decoder.form, split)
    first = next(read_tar(urls[0], None, options), None)
    if first is None:
        raise InputError(f"{urls[0]}: no cutouts")
    decoder = ImageDecoder.like(first, urls[0], image_size, flux_unit)
    return Tars(urls, decoder.form, None, decoder)


def expanded(pattern: str, name: str) -> list[str]:
    """The paths (absolute) or URLs that a pattern with braces stands for, in its order."""
    try:
        urls = [absolute(url) for url in braceexpand(pattern)]
    except ValueError:
        raise InputError(f"{name}: {pattern}: a brace is missing") from None
    folders = {posixpath.dirname(url) for url in urls}
    if len(folders) > 1:
        raise InputError(f"{name}: {pattern}: the tars must lie in one folder")
    return urls


def _shards_named(manifest: Manifest, urls: Sequence[str], folder: str, name: str) -> list[Shard]:
    """What the manifest says of the tars. Raises InputError where they are not all of a split."""
    of_name = {shard.name: shard for shard in manifest.shards}
    named = [posixpath.basename(url) for url in urls]
    found = [of_name[tar] for tar in named if tar in of_name]
    split = found[0].split if found else name.removesuffix("_urls")
    right = {shard.name for shard in manifest.shards if shard.split == split}
    if set(named) != right or len(named) != len(right):
        pattern = manifest.patterns(folder).get(split, "none")
        raise InputError(
            f"{name}: names {len(named)} tars, which are not just the {len(right)} of the split "
            f"{split} there; those are {pattern}"
        )
    return found


def _local(url: str) -> Path:
    return Path(locate(url)[1])


def _copied(urls: Sequence[str], cache: Path | None, options: dict[str, Any]) -> list[Path]:
    """Local copies of tars that no manifest describes, renewed where size or ETag have changed."""
    assert cache is not None
    paths = []
    for url in tqdm(urls, desc="fetching shards", unit="shard", disable=None):
        filesystem, inside = locate(url, options)
        try:
            about = filesystem.info(inside)
        except FileNotFoundError:
            raise InputError(f"{url}: there is no such file") from None
        state = state_of(about)
        folder = cache / hashlib.sha256(f"{url} {state}".encode()).hexdigest()[:32]
        path = folder / posixpath.basename(url)
        if state is None or not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.{os.getpid()}")
            filesystem.get_file(inside, str(aside))
            aside.replace(path)
        paths.append(path)
    return paths
