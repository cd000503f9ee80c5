"""Reading shards back: what of them is not as it was written, and which samples that hits."""

import posixpath
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from lens_pipeline.errors import InputError, NoAnswerError, first_of
from lens_pipeline.progress import progress_bar
from lens_pipeline.shards.checked import checked_folder
from lens_pipeline.shards.manifest import INDEX, Listed, Manifest, Shard, difference
from lens_pipeline.shards.store import read_manifest
from lens_pipeline.storage import locate


def verify_shards(
    location: str | Path,
    storage_options: Mapping[str, Any] | None = None,
    *,
    every_byte: bool = True,
) -> list[str]:
    """What is wrong with the shards in a folder or at a URL; nothing when they are whole.

    Each problem names its file. every_byte: is read back and checked against the manifest; else, in
    a folder, only files that have changed since they were last found whole are read.
    """
    try:
        manifest = read_manifest(location, storage_options)
    except NoAnswerError:
        raise  # it says nothing of the shards
    except InputError as problem:
        return [str(problem)]
    filesystem, root = locate(str(location), storage_options)
    if isinstance(filesystem, LocalFileSystem) and not every_byte:
        with checked_folder(Path(root)) as checked:
            return list(_problems(filesystem, root, manifest, checked.difference))

    def found(listed: Listed) -> str | None:
        return difference(filesystem, posixpath.join(root, listed.name), listed)

    return list(_problems(filesystem, root, manifest, found))


def _problems(
    filesystem: fsspec.AbstractFileSystem,
    root: str,
    manifest: Manifest,
    difference_of: Callable[[Listed], str | None],
) -> Iterator[str]:
    total = sum(listed.bytes for listed in manifest.files)
    index_is_whole = False
    with progress_bar(total=total, desc="verifying", unit="B", unit_scale=True) as progress:
        for listed in (manifest.index, manifest.catalogue, *manifest.shards):
            path = posixpath.join(root, listed.name)
            wrong = difference_of(listed)
            if listed is manifest.index:
                index_is_whole = wrong is None
            elif wrong and isinstance(listed, Shard) and index_is_whole and filesystem.exists(path):
                index_path = posixpath.join(root, INDEX)
                wrong += f"; {_damage(filesystem, path, listed.name, index_path)}"
            if wrong:
                yield f"{path}: {wrong}"
            progress.update(listed.bytes)


def _damage(filesystem: fsspec.AbstractFileSystem, path: str, shard: str, index_path: str) -> str:
    """Which samples of a damaged shard have other pixels than were written."""
    import pandas as pd

    with filesystem.open(index_path, "rb") as file:
        index = pd.read_parquet(file, filters=[("shard", "==", shard)])
    damaged = []
    with filesystem.open(path, "rb") as file:
        for sample in index.itertuples():
            file.seek(sample.offset)
            content = file.read(sample.bytes)
            found = np.frombuffer(content + bytes(-len(content) % 8), "<u8").sum()
            if found != sample.word_sum:
                damaged.append(str(sample.id))
    if not damaged:
        return "the pixels of every sample are whole, a header or label is not"
    return f"damaged samples: {first_of(damaged)}"
