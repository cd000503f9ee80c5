"""Tars read from beginning to end over the network, where nothing may be kept on the disk."""

import hashlib
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lens_pipeline.errors import InputError
from lens_pipeline.shards.foreign import END, Decoder, RawSample, samples_of
from lens_pipeline.shards.manifest import Shard
from lens_pipeline.shards.sampling import SMALLEST, ResumableLoader, rank_of_ranks
from lens_pipeline.storage import locate

BLOCK = 2**20


class _Watched:
    """A file that is read once, from its beginning: how long it was, its sha256, its end."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.size, self.end = file, hashlib.sha256(), 0, b""

    def read(self, n: int = -1) -> bytes:
        content = self.file.read(n)
        self.digest.update(content)
        self.size += len(content)
        self.end = (self.end + content)[-len(END) :]
        return content


def read_tar(
    url: str, listed: Shard | None = None, storage_options: Mapping[str, Any] | None = None
) -> Iterator[RawSample]:
    """The samples of a tar at an fsspec URL, in their order.

    Raises InputError, at the latest after the last one, where the tar is not whole: where its end
    is missing, or it is not what the manifest lists.
    """
    filesystem, inside = locate(url, storage_options)
    try:
        file = filesystem.open(inside, "rb", block_size=BLOCK)
    except OSError as problem:
        raise InputError(f"{url}: cannot be opened ({' '.join(str(problem).split())})") from None
    with file as opened:
        watched = _Watched(opened)

        def files() -> Iterator[tuple[str, bytes, int]]:
            with tarfile.open(fileobj=watched, mode="r|", bufsize=BLOCK) as tar:  # type: ignore[call-overload]
                for file in tar:
                    content = tar.extractfile(file)
                    yield file.name, b"" if content is None else content.read(), file.offset_data

        try:
            yield from samples_of(files(), url)
            while watched.read(BLOCK):
                pass
        except tarfile.TarError as problem:
            raise InputError(f"{url}: is no whole tar ({problem})") from None
    if watched.end != END:
        raise InputError(f"{url}: is no whole tar (its end is missing)")
    if listed and (watched.size, watched.digest.hexdigest()) != (listed.bytes, listed.sha256):
        raise InputError(f"{url}: is not what its manifest lists; publish the shards again")


@dataclass
class TarStream(IterableDataset[dict[str, Tensor]]):
    """Batches `image` (n, bands, height, width) and `label` float32 (n,) of tars at fsspec URLs.

    Tars are shared out over the workers of a loader; every rank reads them all and decodes its part
    of each global batch, so that all have the same number of training batches, and each sample is
    seen once in evaluation, whatever lies in the tars. shuffle: the order of the tars, and of
    samples within `buffer` of them, follows from (seed, epoch). listed: what the manifest says of
    the tars, where there is one.
    """

    urls: Sequence[str]
    decoder: Decoder
    batch_size: int
    shuffle: bool
    seed: int = 0
    buffer: int = 1000
    listed: Mapping[str, Shard] = field(default_factory=dict)
    storage_options: Mapping[str, Any] = field(default_factory=dict)

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

    def n_batches(self, workers: int) -> int:
        """Of each rank. Raises TypeError where no manifest tells how many samples there are."""
        if any(url not in self.listed for url in self.urls):
            raise TypeError("the tars have no manifest: how many batches they hold is not known")
        rank, ranks = rank_of_ranks()
        whole, total = self.batch_size * ranks, 0
        for number in range(workers):
            n = sum(self.listed[url].samples for url in list(self.urls)[number::workers])
            full, left = divmod(n, whole)
            total += full + (left >= SMALLEST * ranks if self.shuffle else left > rank)
        return total

    def _samples(self, urls: Iterable[str]) -> Iterator[tuple[str, RawSample]]:
        for url in urls:
            for sample in read_tar(url, self.listed.get(url), self.storage_options):
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
        state = super().state_dict() | {"epoch": self.next_epoch.number - (self.given > 0)}
        try:
            len(self)
        except TypeError:
            # Lightning takes a batch ahead of such loaders: better the epoch once more than one
            # batch never.
            state["given"] = 0
        return state

    def load_state_dict(self, state: dict[str, int]) -> None:
        super().load_state_dict(state)
        self.next_epoch.number = state["epoch"]

    def __len__(self) -> int:
        """Raises TypeError where no manifest tells how many samples there are."""
        assert isinstance(self.dataset, TarStream)
        return self.dataset.n_batches(max(1, self.num_workers))
