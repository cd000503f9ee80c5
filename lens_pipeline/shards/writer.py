"""A processed dataset -> WebDataset tars, an index for random access, a manifest."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from lens_pipeline.catalogue.columns import image_columns
from lens_pipeline.catalogue.dataset import Dataset, ImageFile, open_dataset
from lens_pipeline.catalogue.splits import PARTS, class_counts
from lens_pipeline.cores import n_cores
from lens_pipeline.progress import progress_bar
from lens_pipeline.shards.encoding import Encoding
from lens_pipeline.shards.manifest import (
    Manifest,
    Shard,
    check_shard_size,
    shard_name,
    write_manifest,
)
from lens_pipeline.shards.tar import Bytes, Member, tar_end, tar_part, word_sums
from lens_pipeline.storage import filling

PART = 2**23  # bytes of pixels at a time: few calls, for each waits for the interpreter lock


def write_shards(
    dataset: Dataset | str | Path,
    out: str | Path,
    *,
    shard_size: int = 1000,
    encoding: str = "float16",
    quality: int | None = None,
) -> Manifest:
    """Write a processed dataset, or that in a folder, as shards into `out`, a folder that holds
    nothing, or is made.

    `{split}-{number:06d}.tar` with `shard_size` cutouts each: per sample `.npy` (or `.png`, `.jpg`:
    see `Encoding`), `.cls` (1 lens, 0 not; absent for unlabelled), `.json` (its `id`, and how a
    `png16` is stored); `index.parquet`; `catalogue.parquet`, the rows of the dataset's tables in
    the same order, without their paths; `manifest.json`, last. The cutouts of a split are in no
    order, so that every shard is a sample of it. Shards are written in parallel, a thread a core.
    The same dataset gives the same bytes. Raises InputError for settings out of range, and where
    `out` holds anything.
    """
    check_shard_size(shard_size)
    source = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
    stored = Encoding(encoding, source.format.units, quality)
    total = sum(counts["n"] for counts in source.facts["splits"].values())
    mixed = {part: _mixed(source.table(part)) for part in PARTS}
    shards, tables = [], []
    with filling(out) as folder:
        with (
            progress_bar(total=total, desc="writing shards", unit="cutout") as progress,
            ExitStack() as stack,
            _a_thread_a_core() as pool,
        ):
            # Opened here, and not by threads: see `catalogue.images`.
            files = {part: stack.enter_context(source.open_images(part)) for part in PARTS}
            portions = _portions(source, files, mixed, shard_size)
            for shard, table in pool.map(lambda portion: portion.write(folder, stored), portions):
                shards.append(shard)
                tables.append(table)
                progress.update(shard.samples)
        rows = pd.concat(mixed.values(), ignore_index=True)
        return write_manifest(
            folder,
            format=asdict(source.format),
            encoding={"name": stored.name, "quality": stored.quality},
            dataset=source.facts["content"],
            simulated=source.facts["origin"] == "simulation",
            shards=tuple(shards),
            index=pd.concat(tables, ignore_index=True),
            catalogue=rows.drop(columns=image_columns(rows)),
        )


@contextmanager
def _a_thread_a_core() -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch computes alone: every core has one of them."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(
            n_cores(), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)  # which threads that begin later take up


@dataclass(frozen=True)
class _Portion:
    """The cutouts of one shard; `first` is the number of the first in its split.

    images: of the split, which its shards share; table: their rows, whose index says where they lie
    in it.
    """

    name: str
    split: str
    first: int
    images: ImageFile
    bands: tuple[str, ...]
    shape: tuple[int, ...]
    table: pd.DataFrame

    def write(self, folder: Path, encoding: Encoding) -> tuple[Shard, pd.DataFrame]:
        """Write the tar; returns what the manifest and the index say of it."""
        digest, size = hashlib.sha256(), 0
        offsets, payloads_bytes, sums = [], [], []
        step = max(1, PART // (4 * int(np.prod(self.shape))))
        block = np.empty((step, *self.shape), np.float32)
        scratch = np.empty(2 * PART, np.uint8)
        others = _others(self.table, encoding.stated(self.bands, self.shape))
        with (folder / self.name).open("wb", buffering=0) as file:
            for start in range(0, len(self.table), step):
                rows = slice(start, min(start + step, len(self.table)))
                n = rows.stop - start
                cutouts = self.images.gather(self.table.index[rows].to_numpy(), block)
                pixels = _pixels(cutouts, self.shape, encoding)
                members = [pixels, *(member.part(rows) for member in others)]
                part, places = tar_part(self.first + start, n, members, scratch)
                begin = places[encoding.extension]
                if encoding.is_raw:
                    _fill_in(part, begin, cutouts, encoding.dtype)
                length = pixels.sizes(n) - len(pixels.prefix)
                sums.append(word_sums(part, begin, length))
                offsets.append(begin + size)
                payloads_bytes.append(length)
                size += file.write(part.data)
                digest.update(part.data)
            tail = tar_end(size)
            size += file.write(tail)
            digest.update(tail)
        label = self.table["label"]
        index = {
            "id": self.table["id"].to_numpy(),
            "label": label.array,
            "group": self.table["group"].to_numpy(),
            "offset": np.concatenate(offsets),
            "bytes": np.concatenate(payloads_bytes),
            "word_sum": np.concatenate(sums),
            "dtype": encoding.dtype.str,
            "shape": [self.shape] * len(self.table),
            "split": self.split,
            "shard": self.name,
        }
        counts = class_counts(label)
        shard = Shard(self.name, digest.hexdigest(), size, self.split, *counts.values())
        return shard, pd.DataFrame(index)


def _others(table: pd.DataFrame, stated: dict[str, Any]) -> list[Member]:
    """What stands beside the pixels of some samples; stated: of all of them."""
    quoted = json.JSONEncoder().encode
    more = "".join(f", {quoted(name)}: {quoted(value)}" for name, value in stated.items())
    abouts = [f'{{"id": {quoted(name)}{more}}}'.encode() for name in table["id"].tolist()]
    members = [Member("json", abouts)]
    if table["label"].notna().all():
        members.append(Member("cls", [b"%d" % label for label in table["label"].tolist()]))
    return members


def _pixels(cutouts: NDArray[np.float32], shape: tuple[int, ...], encoding: Encoding) -> Member:
    if not encoding.is_raw:
        return Member(encoding.extension, [encoding.encode(image) for image in cutouts])
    n_bytes = int(np.prod(shape)) * encoding.dtype.itemsize
    return Member(encoding.extension, n_bytes, encoding.npy_header(shape))


def _fill_in(
    part: Bytes, begin: NDArray[np.int64], cutouts: NDArray[np.float32], dtype: np.dtype[Any]
) -> None:
    """Put the pixels of each sample where the part of a tar has room for them.

    NumPy converts to float16 one number at a time, torch with the processor's instructions.
    """
    stride = len(part) // len(begin)
    alike = (
        len(part) == stride * len(begin)
        and not np.diff(begin - stride * np.arange(len(begin))).any()
    )
    flat = torch.from_numpy(cutouts).flatten(1)
    n_bytes = flat.shape[1] * dtype.itemsize
    if alike:
        rooms = [part.reshape(-1, stride)[:, begin[0] : begin[0] + n_bytes]]
        sources = [flat]
    else:  # a long id takes a block more than others
        rooms, sources = [part[at : at + n_bytes] for at in begin], [*flat]
    for room, source in zip(rooms, sources, strict=True):
        torch.from_numpy(room.view(dtype)).copy_(source)


def _mixed(table: pd.DataFrame) -> pd.DataFrame:
    """The rows, the index still saying where each was, in an order that their ids decide.

    Catalogues are often sorted, by class or by place on the sky; what reads a few shards at a time
    would have batches of one kind.
    """
    ids = table["id"].to_numpy(dtype=object)
    return table.iloc[np.argsort(pd.util.hash_array(ids, categorize=False), kind="stable")]


def _portions(
    dataset: Dataset,
    files: Mapping[str, ImageFile],
    tables: Mapping[str, pd.DataFrame],
    shard_size: int,
) -> Iterator[_Portion]:
    for split, table in tables.items():
        shape = dataset.images(split).shape[1:]
        for number, first in enumerate(range(0, len(table), shard_size)):
            rows = table.iloc[first : first + shard_size]
            name = shard_name(split, number)
            yield _Portion(name, split, first, files[split], dataset.format.bands, shape, rows)
