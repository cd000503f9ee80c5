"""Which cutouts a batch holds, on one rank and on several."""

import json
import subprocess
import sys
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from lens_pipeline import LensDataModule
from lens_pipeline.catalogue.dataset import Dataset
from lens_pipeline.errors import InputError
from lens_pipeline.models.system import LitLensSystem
from lens_pipeline.shards import open_shards, publish_shards
from lens_pipeline.shards.sampling import EpochBatches, ShardLoader, Windows


def epoch(
    n: int, batch_size: int, ranks: int, number: int = 0, **how: Any
) -> list[list[list[int]]]:
    """The batches of each rank."""
    found = []
    for rank in range(ranks):
        sampler = EpochBatches(n, batch_size, seed=3, rank=rank, ranks=ranks, **how)
        sampler.set_epoch(number)
        found.append(list(sampler))
        assert len(sampler) == len(found[-1])
    return found


@pytest.mark.parametrize("n", [8, 9, 64, 65, 101, 1000])
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


SHARD = np.repeat(np.arange(30), 100)[:2950]  # the last one is shorter


@pytest.mark.parametrize("size", [1, 4, 8, 50])
@pytest.mark.parametrize("ranks", [1, 3])
def test_windows_need_few_shards_at_a_time_and_give_every_cutout_once(
    size: int, ranks: int
) -> None:
    windows = Windows(SHARD, size, always=False)
    found = epoch(len(SHARD), 16, ranks, shuffle=True, windows=windows)
    order = [i for batches in zip(*found, strict=True) for batch in batches for i in batch]
    assert len(set(order)) == len(order) > len(SHARD) - 2 * ranks
    used = SHARD[order]
    first = [int(np.argmax(used == shard)) for shard in range(30)]
    last = [len(used) - int(np.argmax(used[::-1] == shard)) for shard in range(30)]
    together = [sum(first[s] <= at < last[s] for s in range(30)) for at in range(len(used))]
    assert max(together) <= min(30, 1.5 * size + 1 + ranks)
    assert np.mean(together) > min(30, size) / 2  # and they are mixed
    assert len(set(used[:100])) >= min(size, 30) / 2


def test_windows_follow_from_seed_and_epoch_for_any_number_of_ranks() -> None:
    windows = Windows(SHARD, 4, always=False)
    (alone,) = epoch(2950, 32, 1, shuffle=True, windows=windows)
    two = epoch(2950, 16, 2, shuffle=True, windows=windows)
    for whole, *parts in zip(alone, *two, strict=True):
        assert sorted(whole) == sorted(i for part in parts for i in part)
    assert epoch(2950, 32, 1, shuffle=True, windows=windows) == [alone]
    # Once they have arrived, all are shuffled as they would be without.
    later = epoch(2950, 32, 1, 1, shuffle=True, windows=windows)
    assert later == epoch(2950, 32, 1, 1, shuffle=True)
    always = Windows(SHARD, 4, always=True)
    again = [epoch(2950, 32, 1, n, shuffle=True, windows=always)[0] for n in (0, 1)]
    assert again[0] == alone
    assert len(set(SHARD[again[1][0]])) <= 4
    assert again[1] != alone
    evaluated = epoch(2950, 32, 2, shuffle=False, windows=always)
    assert evaluated == epoch(2950, 32, 2, shuffle=False)


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
    assert state["given"] == 3
    again = loader()
    again.load_state_dict(state)  # type: ignore[attr-defined]
    rest = [batch["index"] for batch in again]  # type: ignore[attr-defined]
    assert len(rest) == len(whole) - 3
    assert all(torch.equal(one, other) for one, other in zip(rest, whole[3:], strict=True))
    # The epoch after it is whole again.
    assert len(list(again)) == len(whole)  # type: ignore[call-overload]


def test_epochs_of_neighbouring_seeds_are_not_each_other() -> None:
    def order(seed: int, number: int) -> list[list[int]]:
        sampler = EpochBatches(1000, 16, shuffle=True, seed=seed)
        sampler.set_epoch(number)
        return list(sampler)

    orders = [order(seed, number) for seed in range(3) for number in range(3)]
    assert all(one != other for one, other in combinations(orders, 2))


def test_an_interrupted_epoch_goes_on_in_its_order_with_another_cache_or_in_another_place(
    shards_folder: Path, tmp_path: Path
) -> None:
    """Elsewhere more shards fit into the cache, or all are there: the order would be another."""
    url = publish_shards(shards_folder, "memory://bucket/lenses").url
    largest = max(path.stat().st_size for path in shards_folder.glob("*.tar"))

    def loader(place: str | Path, room: float, number: int = 0) -> ShardLoader:
        gb = room * largest / 1e9
        data = LensDataModule(place, batch_size=16, cache_dir=tmp_path / str(room), cache_gb=gb)
        found = data.train_dataloader()
        assert isinstance(found, ShardLoader)
        found.sampler.set_epoch(number)  # type: ignore[attr-defined]
        return found

    def places(batches: Iterable[Any]) -> list[list[int]]:
        return [batch["index"].tolist() for batch in batches]

    for number in (0, 1):  # in the second, only the small cache orders by shards
        whole = places(loader(url, 2.5, number))
        assert places(loader(url, 100, number)) != whole
        stopped = loader(url, 2.5, number)
        for _ in zip(range(3), stopped, strict=False):
            state = stopped.state_dict()
        for again in (loader(url, 100, number), loader(shards_folder, 100, number)):
            again.load_state_dict(state)
            first = next(iter(again))  # it may be stopped once more
            assert again.state_dict() == state | {"given": state["given"] + 1}
            again.load_state_dict(state)
            assert places(again) == whole[state["given"] :]
            assert first["index"].tolist() == whole[state["given"]]
            # Its next epoch is as its own cache has it.
            again.sampler.set_epoch(1)  # type: ignore[attr-defined]
            assert places(again) == places(loader(url, 100, 1))


def test_an_interrupted_epoch_does_not_go_on_with_other_batches(
    shards_folder: Path, dataset: Dataset
) -> None:
    state = {"given": 2, "epoch": 0, "seed": 0, "cutouts": 140, "a step": 16, "mixed": 0}

    def goes_on(place: Path, batch_size: int = 16, **changes: int) -> None:
        loader = LensDataModule(place, batch_size=batch_size).train_dataloader()
        whole = {"cutouts": loader.sampler.n}  # type: ignore[attr-defined]
        loader.load_state_dict(state | whole | changes)  # type: ignore[attr-defined]

    goes_on(shards_folder)
    goes_on(dataset.folder)
    goes_on(shards_folder, 32, given=0)  # an epoch that begins may be any
    goes_on(shards_folder, 32, given=9, batches=9)  # and what follows on one that has ended
    with pytest.raises(InputError, match="began with 16 cutouts a step .* this one has 32;"):
        goes_on(shards_folder, 32)
    with pytest.raises(InputError, match="began with 7 cutouts in all"):
        goes_on(shards_folder, cutouts=7)
    with pytest.raises(InputError, match="began with the seed 1, and this one has 0"):
        goes_on(shards_folder, seed=1)
    with pytest.raises(InputError, match="began with shards, and there are none now"):
        goes_on(dataset.folder, mixed=2)


@pytest.mark.parametrize(
    "how",
    [
        {"val_check_interval": 0.5},
        {"check_val_every_n_epoch": 2},
        {"check_val_every_n_epoch": 2, "limit_train_batches": 3},
    ],
)
def test_after_the_last_batch_of_an_epoch_the_next_one_is_whole(
    how: dict[str, Any], shards_folder: Path, tmp_path: Path
) -> None:
    """Lightning writes such a checkpoint before it asks whether there is another batch."""

    def fitted(from_checkpoint: Path | None, *callbacks: Callback) -> Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        kept = {} if callbacks else {"enable_checkpointing": False}
        trainer = Trainer(
            max_epochs=3, accelerator="cpu", num_sanity_val_steps=0, default_root_dir=tmp_path,
            callbacks=list(callbacks), **quiet, **kept, **how,
        )  # fmt: skip
        data = LensDataModule(shards_folder, batch_size=32)
        trainer.fit(LitLensSystem("lastro", image_size=32), data, ckpt_path=from_checkpoint)
        return trainer

    undisturbed = fitted(None, ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, monitor=None))
    checkpoints = list(tmp_path.glob("*.ckpt"))
    assert checkpoints
    for checkpoint in checkpoints:
        assert fitted(checkpoint).global_step == undisturbed.global_step


def test_too_few_cutouts_to_train_on_are_an_error() -> None:
    for n, ranks in ((1, 1), (3, 2), (7, 4)):
        with pytest.raises(InputError, match=f"train: {n} cutouts are too few"):
            epoch(n, 4, ranks, shuffle=True)
    assert epoch(8, 4, 4, shuffle=True)
    with pytest.raises(InputError, match="a split of 3 cutouts is too small for 4 processes"):
        epoch(3, 4, 4, shuffle=False)
    with pytest.raises(InputError, match="train: 0 cutouts are too few"):
        epoch(0, 4, 1, shuffle=True, windows=Windows(SHARD[:0], 4, always=False))


TRAIN_OVER_TWO = """
import json, sys
import pytorch_lightning as pl
from lens_pipeline import LensDataModule, LitLensSystem

class Seen(pl.Callback):
    def __init__(self):
        self.places = {"train": [], "val": []}
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.places["train"].append(batch["index"].tolist())
    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.places["val"].append(batch["index"].tolist())

if __name__ == "__main__":
    shards, out = sys.argv[1:]
    seen = Seen()
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", logger=False, callbacks=[seen],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, default_root_dir=out,
    )
    data = LensDataModule(shards, batch_size=16)
    trainer.fit(LitLensSystem("light_transformer", image_size=32), data)
    with open(f"{out}/seen-{trainer.global_rank}.json", "w") as file:
        json.dump(seen.places, file)
"""


@pytest.mark.slow
def test_two_processes_share_an_epoch(shards_folder: Path, tmp_path: Path) -> None:
    """As Lightning runs it: with its own samplers it would see some cutouts of the split twice."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN_OVER_TWO)
    command = [sys.executable, str(script), str(shards_folder), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    ranks = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    val = [place for rank in ranks for batch in rank["val"] for place in batch]
    n_val = len(open_shards(shards_folder).split("val"))
    assert sorted(val) == sorted(2 * list(range(n_val)))  # once an epoch
    first, second = ([len(batch) for batch in rank["train"]] for rank in ranks)
    assert first == second
    half = len(first) // 2
    for epoch in (slice(0, half), slice(half, None)):
        places = [place for rank in ranks for batch in rank["train"][epoch] for place in batch]
        assert len(set(places)) == len(places)
    assert ranks[0]["train"][:half] != ranks[0]["train"][half:]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("shards", [None, SHARD])
def test_of_places_that_do_not_take_part_none_is_seen(
    ranks: int, shards: np.ndarray | None
) -> None:
    among = np.random.default_rng(0).random(2950) < 0.4
    windows = Windows(shards, 4, always=True) if shards is not None else None
    found = epoch(2950, 16, ranks, shuffle=True, among=among, windows=windows)
    seen = [i for batches in found for batch in batches for i in batch]
    assert len(set(seen)) == len(seen) > among.sum() - 2 * ranks
    assert among[seen].all()
    assert len({len(batches) for batches in found}) == 1


def test_batches_are_gathered_ahead_in_their_order(shards_folder: Path) -> None:
    """By a thread, as for a GPU; asking for pinned memory where there is none is no error."""
    plain = LensDataModule(shards_folder, batch_size=16).train_dataloader()
    ahead = LensDataModule(shards_folder, batch_size=16, pin_memory=True).train_dataloader()
    for mine, theirs in zip(plain, ahead, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
