"""Which cutouts a batch holds, on one rank and on several."""

from pathlib import Path

import pytest
import torch

from lens_pipeline import LensDataModule
from lens_pipeline.shards.sampling import EpochBatches


def epoch(
    n: int, batch_size: int, ranks: int, number: int = 0, **how: bool
) -> list[list[list[int]]]:
    """The batches of each rank."""
    found = []
    for rank in range(ranks):
        sampler = EpochBatches(n, batch_size, seed=3, rank=rank, ranks=ranks, **how)
        sampler.set_epoch(number)
        found.append(list(sampler))
        assert len(sampler) == len(found[-1])
    return found


@pytest.mark.parametrize("n", [1, 7, 64, 65, 101, 1000])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_evaluation_sees_each_cutout_exactly_once(n: int, ranks: int) -> None:
    seen = [i for batches in epoch(n, 16, ranks, shuffle=False) for batch in batches for i in batch]
    assert sorted(seen) == list(range(n))


@pytest.mark.parametrize("n", [64, 65, 101, 1000, 1003])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_training_gives_every_rank_as_many_batches_and_no_cutout_twice(n: int, ranks: int) -> None:
    found = epoch(n, 16, ranks, shuffle=True)
    assert len({len(batches) for batches in found}) == 1
    seen = [i for batches in found for batch in batches for i in batch]
    assert len(set(seen)) == len(seen) > n - 2 * ranks
    assert all(len(batch) >= 2 for batches in found for batch in batches)
    # Another epoch has another order, and other leftovers.
    assert epoch(n, 16, ranks, 1, shuffle=True) != found


def test_a_global_batch_holds_the_same_cutouts_for_any_number_of_ranks() -> None:
    (alone,) = epoch(1000, 32, 1, shuffle=True)
    two = epoch(1000, 16, 2, shuffle=True)
    for whole, *parts in zip(alone, *two, strict=True):
        assert sorted(whole) == sorted(i for part in parts for i in part)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_interrupted_epoch_goes_on_at_the_batch_where_it_stopped(
    shards_folder: Path, num_workers: int
) -> None:
    def loader() -> object:
        data = LensDataModule(shards_folder, batch_size=16, num_workers=num_workers)
        found = data.train_dataloader()
        found.sampler.set_epoch(4)
        return found

    whole = [batch["index"] for batch in loader()]  # type: ignore[attr-defined]
    stopped = loader()
    batches = iter(stopped)  # type: ignore[call-overload]
    for _ in range(3):
        next(batches)
    state = stopped.state_dict()  # type: ignore[attr-defined]
    assert state == {"given": 3}
    again = loader()
    again.load_state_dict(state)  # type: ignore[attr-defined]
    rest = [batch["index"] for batch in again]  # type: ignore[attr-defined]
    assert len(rest) == len(whole) - 3
    assert all(torch.equal(one, other) for one, other in zip(rest, whole[3:], strict=True))
    # The epoch after it is whole again.
    assert len(list(again)) == len(whole)  # type: ignore[call-overload]
