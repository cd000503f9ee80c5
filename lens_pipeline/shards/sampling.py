"""Which cutouts a batch holds: an order that follows from (seed, epoch), shared out over ranks."""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

SMALLEST = 2  # cutouts a rank: batch normalisation cannot use a batch of one


class EpochBatches(DistributedSampler[list[int]]):
    """Batches of places in a split, one list each.

    Training (shuffle): the places in an order that (seed, epoch) decides, cut into global batches
    of `batch_size` x ranks, of which every rank takes its part; so each has the same number of
    batches, and a global batch holds the same cutouts for any number of ranks. Where too few are
    left for the last one, they wait for another epoch. Evaluation: every place exactly once, over
    all ranks together.
    rank, ranks: of torch.distributed where it runs, else 0 of 1. `start`: batches to leave out at
    the next iteration, for an epoch that goes on.
    """

    # Lightning replaces samplers in distributed runs, but for this class and its children.
    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int | None = None,
        ranks: int | None = None,
    ) -> None:
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.n, self.batch_size, self.shuffle, self.seed = n, batch_size, shuffle, seed
        self.rank = rank if rank is not None else torch.distributed.get_rank() if running else 0
        self.ranks = ranks or (torch.distributed.get_world_size() if running else 1)
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        if not self.shuffle:
            return math.ceil(len(self._mine()) / self.batch_size)
        whole, left = divmod(self.n, self.batch_size * self.ranks)
        return whole + (left > 0 and (left >= SMALLEST * self.ranks or whole == 0))

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        numbers = range(start, len(self))
        if not self.shuffle:
            mine, step = self._mine(), self.batch_size
            yield from (list(mine[k * step : (k + 1) * step]) for k in numbers)
            return
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.n, generator=generator)
        step = self.batch_size * self.ranks
        for k in numbers:
            yield order[k * step + self.rank : (k + 1) * step : self.ranks].tolist()

    def _mine(self) -> range:
        return range(self.rank, self.n, self.ranks)


class ShardLoader(DataLoader[Any]):
    """A loader of batches of `EpochBatches`, whose state is how many of the epoch it has given.

    Lightning keeps the state with a checkpoint, and gives it back when it goes on. Without worker
    processes, a thread gathers the next batch while one is used.
    """

    given = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        assert isinstance(self.sampler, EpochBatches)
        self.given = self.sampler.start
        for batch in super().__iter__() if self.num_workers else self._gathered():
            self.given += 1
            yield batch
        self.given = 0

    def _gathered(self) -> Iterator[Any]:
        def gather(places: list[int]) -> Any:
            batch = self.dataset[places]
            return {k: v.pin_memory() for k, v in batch.items()} if self.pin_memory else batch

        ahead: Future[Any] | None = None
        with ThreadPoolExecutor(1) as pool:
            for places in self.sampler:
                now, ahead = ahead, pool.submit(gather, places)
                if now:
                    yield now.result()
            if ahead:
                yield ahead.result()

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert isinstance(self.sampler, EpochBatches)
        self.sampler.start = state["given"]
