"""Reading shards back: what of them is not as it was written, and which samples that hits."""

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lens_pipeline.errors import InputError, NoAnswerError, first_of
from lens_pipeline.progress import progress_bar
from lens_pipeline.settings import Settings
from lens_pipeline.shards.checked import CheckedFolder
from lens_pipeline.shards.manifest import INDEX, Listed, Manifest, Shard
from lens_pipeline.shards.patience import RefusedError
from lens_pipeline.shards.store import Store, read_manifest


def verify_shards(
    location: str | Path,
    storage_options: Mapping[str, Any] | None = None,
    *,
    every_byte: bool = True,
) -> list[str]:
    """What is wrong with the shards in a folder or at a URL; nothing when they are whole.

    Each problem names its file. storage_options: LENS_STORAGE_OPTIONS by default. every_byte: is
    read back and checked against the manifest; else, in a folder, only files that have changed
    since they were last found whole are read. Raises InputError where one may not be read,
    StoreError where the store fails for long.
    """
    if storage_options is None:
        storage_options = Settings.load().storage_options
    store = Store(str(location), storage_options)
    try:
        manifest = read_manifest(location, storage_options)
    except (NoAnswerError, RefusedError):
        raise  # it says nothing of the shards
    except InputError as problem:
        return [str(problem)]
    if store.is_local and not every_byte:
        with CheckedFolder(Path(store.root)) as checked:
            return list(_problems(store, manifest, checked.difference))
    return list(_problems(store, manifest, store.difference))


def _problems(
    store: Store, manifest: Manifest, difference_of: Callable[[Listed], str | None]
) -> Iterator[str]:
    total = sum(listed.bytes for listed in manifest.files)
    index_is_whole = False
    with progress_bar(total=total, desc="verifying", unit="B", unit_scale=True) as progress:
        for listed in (manifest.index, manifest.catalogue, *manifest.shards):
            wrong = difference_of(listed)
            if listed is manifest.index:
                index_is_whole = wrong is None
            elif wrong and isinstance(listed, Shard) and index_is_whole:
                wrong += _damage(store, listed.name)
            if wrong:
                yield f"{store.url}/{listed.name}: {wrong}"
            progress.update(listed.bytes)


def _damage(store: Store, shard: str) -> str:
    """Which samples of a damaged shard have other pixels than were written; empty where it is
    missing."""
    import pandas as pd

    content = store.read(shard)
    if content is None:
        return ""
    whole = io.BytesIO(store.read(INDEX) or b"")
    index: Any = pd.read_parquet(whole, filters=[("shard", "==", shard)])
    damaged = []
    for sample in index.itertuples():
        pixels = content[sample.offset : sample.offset + sample.bytes]
        if np.frombuffer(pixels + bytes(-len(pixels) % 8), "<u8").sum() != sample.word_sum:
            damaged.append(str(sample.id))
    if not damaged:
        return "; the pixels of every sample are whole, a header or label is not"
    return f"; damaged samples: {first_of(damaged)}"
