"""Which cutouts a batch holds: an order that follows from (seed, epoch), shared out over ranks."""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from lens_pipeline.errors import InputError

SMALLEST = 2  # cutouts a rank: batch normalisation cannot use a batch of one


def rank_of_ranks() -> tuple[int, int]:
    """(this process's rank, their number) of torch.distributed where it runs, else 0 of 1."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class EpochBatches(DistributedSampler[list[int]]):
    """Batches of places in a split, one list each.

    Training (shuffle): the places in an order that (seed, epoch) decides, cut into global batches
    of `batch_size` x ranks, of which every rank takes its part; so each has the same number of
    batches, and a global batch holds the same cutouts for any number of ranks. Where too few are
    left for the last one, they wait for another epoch; InputError where that are all. Evaluation:
    every place exactly once, over all ranks together.
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
        self.n, self.batch_size, self.shuffle, self.seed = n, batch_size, shuffle, seed
        self._given = rank, ranks
        self.epoch, self.start = 0, 0

    # Asked when they are used: a loader may be made before torch.distributed runs.
    @property
    def rank(self) -> int:  # type: ignore[override]
        given = self._given[0]
        return rank_of_ranks()[0] if given is None else given

    @property
    def ranks(self) -> int:
        return self._given[1] or rank_of_ranks()[1]

    def __len__(self) -> int:
        if not self.shuffle:
            return math.ceil(len(self._mine()) / self.batch_size)
        if self.n < SMALLEST * self.ranks:
            raise InputError(
                f"train: {self.n} cutouts are too few to train on; each of {self.ranks} processes "
                f"needs {SMALLEST}"
            )
        whole, left = divmod(self.n, self.batch_size * self.ranks)
        return whole + (left >= SMALLEST * self.ranks)

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


class ResumableLoader(DataLoader[Any]):
    """A loader whose state is how many of the epoch's batches it has given.

    Lightning keeps the state with a checkpoint, and gives it back when it goes on.
    """

    given, start = 0, 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.given, self.start = self.start, 0
        try:
            for batch in self.batches_from(self.given):
                self.given += 1
                yield batch
        except InputError as problem:  # of a worker, it comes with that process's traceback
            said = str(problem).strip().splitlines()[-1]
            raise InputError(said.rpartition("InputError: ")[2]) from None
        self.given = 0

    def batches_from(self, start: int) -> Iterator[Any]:
        """Those of this epoch, but for the first `start`."""
        return islice(super().__iter__(), start, None)

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["given"]


class ShardLoader(ResumableLoader):
    """A loader of batches of `EpochBatches`.

    Without worker processes they are gathered in this one: on a CPU when they are asked for, since
    the step takes all cores; for a GPU by a thread, which pins the next while one is used.
    """

    def batches_from(self, start: int) -> Iterator[Any]:
        assert isinstance(self.sampler, EpochBatches)
        self.sampler.start = start
        if self.num_workers:
            return super().batches_from(0)
        return self._pinned_ahead() if self.pin_memory else map(self._gather, self.sampler)

    def _gather(self, places: list[int]) -> dict[str, Any]:
        return self.dataset[places]

    def _pinned_ahead(self) -> Iterator[Any]:
        def pinned(places: list[int]) -> dict[str, Any]:
            return {name: part.pin_memory() for name, part in self._gather(places).items()}

        ahead: Future[Any] | None = None
        with ThreadPoolExecutor(1) as pool:
            for places in self.sampler:
                now, ahead = ahead, pool.submit(pinned, places)
                if now:
                    yield now.result()
            if ahead:
                yield ahead.result()
