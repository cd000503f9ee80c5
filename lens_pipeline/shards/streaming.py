"""Tars without a manifest, read from beginning to end over the network, where nothing may be kept
on the disk."""

import posixpath
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lens_pipeline.errors import InputError
from lens_pipeline.shards.foreign import (
    END,
    ImageDecoder,
    RawSample,
    WholeTarInfo,
    check_end,
    samples_of,
)
from lens_pipeline.shards.sampling import SMALLEST, ResumableLoader, rank_of_ranks
from lens_pipeline.shards.store import Store
from lens_pipeline.shards.transfers import AT_A_TIME, ahead_of

BLOCK = 2**23  # bytes that are fetched at once


class _Ahead:
    """An object that is read once, from its beginning: blocks of it are fetched ahead, each tried
    again where it fails."""

    def __init__(self, store: Store, name: str, size: int) -> None:
        self.end, self._left = b"", b""

        def block(start: int) -> bytes:
            content = store.part(name, start, BLOCK)
            if len(content) > BLOCK:
                raise InputError(
                    f"{store.url}/{name}: its server gives files only whole, and cannot be "
                    "streamed from; name a cache_dir"
                )
            return content

        self._blocks = ahead_of(range(0, size, BLOCK), block, AT_A_TIME)

    def read(self, n: int) -> bytes:
        if not self._left:
            self._left = next(self._blocks, b"")
        content, self._left = self._left[:n], self._left[n:]
        self.end = (self.end + content)[-len(END) :]
        return content

    def close(self) -> None:
        self._blocks.close()


def read_tar(store: Store, name: str) -> Iterator[RawSample]:
    """The samples of a tar, in their order.

    Raises InputError where there is none, and, at the latest after the last sample, where its end
    is missing; StoreError where the store fails for long.
    """
    url, about = f"{store.url}/{name}", store.about(name)
    if about is None:
        raise InputError(f"{url}: there is no such file")
    opened = _Ahead(store, name, about["size"])

    def files() -> Iterator[tuple[str, bytes, int]]:
        with tarfile.open(  # type: ignore[call-overload]
            fileobj=opened, mode="r|", bufsize=BLOCK, tarinfo=WholeTarInfo
        ) as tar:
            for file in tar:
                content = tar.extractfile(file)
                yield file.name, b"" if content is None else content.read(), file.offset_data
            while rest := tar.fileobj.read(BLOCK):
                check_end(rest)

    try:
        yield from samples_of(files(), url)
    except tarfile.TarError as problem:
        raise InputError(f"{url}: is no whole tar ({problem})") from None
    finally:
        opened.close()
    if opened.end != END:
        raise InputError(f"{url}: is no whole tar (its end is missing)")


@dataclass
class TarStream(IterableDataset[dict[str, Tensor]]):
    """Batches `image` (n, bands, height, width) and `label` float32 (n,) of tars at fsspec URLs,
    all in one folder.

    Tars are shared out over the workers of a loader; every rank reads them all and decodes its part
    of each global batch, so that all have the same number of training batches, and each sample is
    seen once in evaluation, whatever lies in the tars. shuffle: the order of the tars, and of
    samples within `buffer` of them, follows from (seed, epoch).
    """

    urls: Sequence[str]
    decoder: ImageDecoder
    batch_size: int
    shuffle: bool
    seed: int
    buffer: int
    storage_options: Mapping[str, Any]

    def __post_init__(self) -> None:
        # Epoch, rank, ranks: workers see them change, and do not know them by themselves.
        self.state = torch.tensor([0, 0, 1]).share_memory_()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        epoch, rank, ranks = self.state.tolist()
        random = np.random.default_rng([self.seed, epoch, number])
        urls = list(self.urls)[number::workers]
        if self.shuffle:
            random.shuffle(urls)
        samples = self._samples(urls)
        if self.shuffle:
            samples = _shuffled(samples, self.buffer, random)
        for batch in self._global_batches(samples, ranks):
            mine = batch[rank::ranks]
            if mine:
                for url, sample in mine:
                    if sample.label < 0:
                        raise InputError(f"{url}: sample {sample.id} has no label")
                images = np.stack([self.decoder(sample, url) for url, sample in mine])
                labels = torch.tensor([float(sample.label) for _, sample in mine])
                yield {"image": torch.from_numpy(images), "label": labels}

    def _samples(self, urls: Iterable[str]) -> Iterator[tuple[str, RawSample]]:
        store = Store(posixpath.dirname(self.urls[0]), self.storage_options)
        for url in urls:
            for sample in read_tar(store, posixpath.basename(url)):
                yield url, sample

    def _global_batches(self, samples: Iterator[Any], ranks: int) -> Iterator[list[Any]]:
        """For all ranks together; of a last one that is not full, in training, what is even."""
        whole, batch = self.batch_size * ranks, []
        for sample in samples:
            batch.append(sample)
            if len(batch) == whole:
                yield batch
                batch = []
        if not self.shuffle:
            yield batch
        elif len(batch) >= SMALLEST * ranks:
            yield batch[: len(batch) // ranks * ranks]


def _shuffled(samples: Iterator[Any], n: int, random: np.random.Generator) -> Iterator[Any]:
    """In another order: each leaves a buffer of n at random."""
    waiting: list[Any] = []
    for sample in samples:
        if len(waiting) < n:
            waiting.append(sample)
            continue
        place = int(random.integers(n))
        yield waiting[place]
        waiting[place] = sample
    random.shuffle(waiting)
    yield from waiting


@dataclass
class _NextEpoch:
    number: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.number = epoch


class StreamLoader(ResumableLoader):
    """A loader of the batches of a `TarStream`; each iteration is another epoch, unless Lightning
    says which is next."""

    def __init__(self, dataset: TarStream, **how: Any) -> None:
        super().__init__(dataset, batch_size=None, **how)
        self.next_epoch = _NextEpoch()
        # Where Lightning looks for it. A method of the loader's own would make a circle, and the
        # workers outlive their loader.
        vars(self.sampler)["set_epoch"] = self.next_epoch.set_epoch

    def batches_from(self, start: int) -> Iterator[Any]:
        assert isinstance(self.dataset, TarStream)
        self.dataset.state.copy_(torch.tensor([self.next_epoch.number, *rank_of_ranks()]))
        self.next_epoch.number += 1
        return super().batches_from(start)

    def state_dict(self) -> dict[str, int]:
        # How many batches there are is not known, and Lightning takes one ahead of such loaders:
        # better the epoch once more than one batch never.
        return {"given": 0, "epoch": self.next_epoch.number - (self.given > 0)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        super().load_state_dict(state)
        self.next_epoch.number = state["epoch"]
