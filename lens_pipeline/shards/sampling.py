"""Which cutouts a batch holds: an order that follows from (seed, epoch), shared out over ranks."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lens_pipeline.errors import InputError
from lens_pipeline.shards.prefetch import gathered_ahead

SMALLEST = 2  # cutouts a rank: batch normalisation cannot use a batch of one


def rank_of_ranks() -> tuple[int, int]:
    """(this process's rank, their number) of torch.distributed where it runs, else 0 of 1."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


@dataclass(frozen=True)
class Windows:
    """An order for cutouts whose shards arrive one by one: shards in any order, and the cutouts of
    `size` of them mixed; 0 where all are there, and all cutouts are mixed.

    shard: int (n,), the number of each cutout's; always: in every epoch, not in the first alone.
    """

    shard: NDArray[np.integer]
    size: int
    always: bool

    def order(self, generator: torch.Generator, size: int) -> NDArray[np.integer]:
        """A shard gives its cutouts, at random, while `size` others begin; half a window of shards
        begins at once, and half of one ends together, or there the mixing would be poor."""
        n_shards = int(self.shard.max()) + 1
        turn = torch.randperm(n_shards, generator=generator)
        begin = (turn - size / 2).clamp(0, max(n_shards - size, 0)).numpy()
        within = torch.rand(len(self.shard), generator=generator, dtype=torch.float64).numpy()
        return np.argsort(begin[self.shard] + size * within, kind="stable")


class EpochBatches(DistributedSampler[list[int]]):
    """Batches of places in a split, one list each.

    Training (shuffle): the places in an order that (seed, epoch) decides, cut into global batches
    of `batch_size` x ranks, of which every rank takes its part; so each has the same number of
    batches, and a global batch holds the same cutouts for any number of ranks. Where too few are
    left for the last one, two for each rank, they wait for another epoch; InputError where that
    are all. Evaluation: every place exactly once, over all ranks together; InputError where there
    is none for some.
    windows: of shards that are fetched, an order that needs them one after the other; other epochs,
    and other splits, are shuffled as a whole.
    among: bool (n,), the places that take part, else all; only they count.
    rank, ranks: of torch.distributed where it runs, else 0 of 1. For an epoch that goes on,
    `start`: batches to leave out at the next iteration; `began_with`: how many shards it mixes, if
    not as many as `windows` say.
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
        windows: Windows | None = None,
        among: NDArray[np.bool_] | None = None,
    ) -> None:
        self.among = np.ones(n, dtype=bool) if among is None else among
        self.whole, self.n = n, int(np.count_nonzero(self.among))
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.windows = windows
        self._given = rank, ranks
        self.epoch, self.start = 0, 0
        self.began_with: int | None = None

    # Asked when they are used: a loader may be made before torch.distributed runs.
    @property
    def rank(self) -> int:  # type: ignore[override]
        given = self._given[0]
        return rank_of_ranks()[0] if given is None else given

    @property
    def ranks(self) -> int:
        return self._given[1] or rank_of_ranks()[1]

    @property
    def mixed(self) -> int:
        """How many shards are mixed in this epoch; 0: all."""
        if self.began_with is not None:
            return self.began_with
        if self.windows is None or not (self.epoch == 0 or self.windows.always):
            return 0
        return self.windows.size

    def __len__(self) -> int:
        if not self.shuffle:
            if 0 < self.n < self.ranks:  # a rank without a batch would not meet the others
                raise InputError(
                    f"a split of {self.n} cutouts is too small for {self.ranks} processes; "
                    "use fewer"
                )
            return math.ceil(len(range(self.rank, self.n, self.ranks)) / self.batch_size)
        if self.n < SMALLEST * self.ranks:
            raise InputError(
                f"train: {self.n} cutouts are too few to train on; each of {self.ranks} processes "
                f"needs {SMALLEST}; use fewer processes, or more cutouts"
            )
        whole, left = divmod(self.n, self.batch_size * self.ranks)
        return whole + (left >= SMALLEST * self.ranks)

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        places = self.places(start)
        for first in range(0, len(places), self.batch_size):
            yield places[first : first + self.batch_size].tolist()

    def places(self, start: int) -> NDArray[np.integer]:
        """Of this rank, from batch `start` on, in the order of the batches."""
        end = len(self) * self.batch_size
        return self._order()[self.rank :: self.ranks][start * self.batch_size : end]

    def _order(self) -> NDArray[np.integer]:
        order = self._order_of_all()
        return order[self.among[order]]

    def _order_of_all(self) -> NDArray[np.integer]:
        if not self.shuffle:
            return np.arange(self.whole)
        # A sum would give a seed's second epoch the order of the next one's first.
        state = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]))
        if self.windows is not None and self.mixed:
            return self.windows.order(generator, self.mixed)
        return torch.randperm(self.whole, generator=generator).numpy()


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
        except GeneratorExit:  # at the interpreter's end, where there is no InputError any more
            raise
        except InputError as problem:
            # Of a worker, it comes with that process's traceback.
            said = str(problem).strip().splitlines()[-1]
            raise type(problem)(said.rpartition(f"{type(problem).__name__}: ")[2]) from None
        self.given = 0

    def batches_from(self, start: int) -> Iterator[Any]:
        """Those of this epoch, but for the first `start`."""
        return islice(super().__iter__(), start, None)

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["given"]


class _Reading(Protocol):
    def read(self, n: int) -> None: ...


class ShardLoader(ResumableLoader):
    """A loader of batches of `EpochBatches`.

    Without worker processes they are gathered in this one: on a CPU when they are asked for, since
    the step takes all cores; for a GPU by a thread, the next ones while one is used, and brought to
    `device` meanwhile, if one is given.
    ahead: fetches, while its block runs, what places will need, and is told how many of them have
    been read.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: EpochBatches,
        ahead: Callable[[NDArray[np.integer]], AbstractContextManager[_Reading]] | None = None,
        device: torch.device | None = None,
        **how: Any,
    ) -> None:
        if not isinstance(sampler, EpochBatches):
            raise InputError(
                "overfit_batches: is not for these loaders, whose sampler gives whole batches; "
                "take limit_train_batches and limit_val_batches"
            )
        # It gives whole batches. Lightning, which makes it anew to predict, says so, too.
        super().__init__(dataset, sampler=sampler, **(how | {"batch_size": None}))
        self.ahead, self.device = ahead, device
        self.began_with: int | None = None  # of the epoch that goes on, if one does
        self.goes_on: int | None = None  # its number

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Lightning may have taken the last batch, and gone on with the next epoch, without asking
        # whether it was.
        assert isinstance(self.sampler, EpochBatches)
        if self.goes_on not in (None, self.sampler.epoch):
            self.start, self.began_with = 0, None
        self.goes_on = None
        return super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """With what decides the order of the epoch, beside its seed and number."""
        assert isinstance(self.sampler, EpochBatches)
        return super().state_dict() | {
            "epoch": self.sampler.epoch,
            "seed": self.sampler.seed,
            "cutouts": self.sampler.n,
            "a step": self.sampler.batch_size * self.sampler.ranks,
            "mixed": self.sampler.mixed,
            "batches": len(self.sampler),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The epoch goes on in the order that it began with, whatever cache there is now. Raises
        InputError where that cannot be: some cutouts would be seen twice, and others not at all."""
        super().load_state_dict(state)
        assert isinstance(self.sampler, EpochBatches)
        if not self.start:
            return
        now = self.state_dict()
        ended = state["given"] == state.get("batches")  # then the next may be of other batches
        for name, what in (
            ("cutouts", "{} cutouts in all"),
            ("a step", "{} cutouts a step (batch_size x processes)"),
            ("seed", "the seed {}"),
        ):
            if not ended and state.get(name, now[name]) != now[name]:
                raise InputError(
                    f"the epoch that is to go on began with {what.format(state[name])}, and this "
                    f"one has {now[name]}; go on with the same"
                )
        self.goes_on = state.get("epoch")
        self.began_with = state.get("mixed")
        if self.began_with and self.sampler.windows is None:
            raise InputError(
                "the epoch that is to go on began with shards, and there are none now; go on with "
                "the shards"
            )

    def batches_from(self, start: int) -> Iterator[Any]:
        assert isinstance(self.sampler, EpochBatches)
        self.sampler.start = start
        self.sampler.began_with, self.began_with = self.began_with, None
        if self.num_workers:
            batches = super().batches_from(0)
        elif self.pin_memory:
            batches = gathered_ahead(self._gather, self.sampler, self._stream)
        else:
            batches = map(self._gather, self.sampler)
        return batches if self.ahead is None else self._fetched(batches, self.ahead, start)

    def _fetched(self, batches: Iterator[Any], ahead: Any, start: int) -> Iterator[Any]:
        assert isinstance(self.sampler, EpochBatches)
        with ahead(self.sampler.places(start)) as reading:
            for number, batch in enumerate(batches, 1):
                reading.read(number * self.sampler.batch_size)
                yield batch

    @cached_property
    def _stream(self) -> torch.cuda.Stream | None:
        # One for all epochs: each has memory of its own.
        return torch.cuda.Stream(self.device) if self.device is not None else None

    def _gather(self, places: list[int]) -> dict[str, Any]:
        return self.dataset[places]
