"""Training on a GPU: its precisions, its memory, and what it leaves for others."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pytorch_lightning import Trainer

from lens_pipeline import LensDataModule, LitEnsembleSystem, LitLensSystem
from lens_pipeline.errors import InputError
from lens_pipeline.models.system import load_system
from lens_pipeline.shards.prefetch import gathered_ahead
from lens_pipeline.training import TrainedMember
from lens_pipeline.training.config import TrainConfig
from lens_pipeline.training.devices import resolved_precision
from lens_pipeline_tests.training.killed import in_a_process
from lens_pipeline_tests.training.small import small_config, train_on

pytestmark = pytest.mark.gpu

TRAIN = """
import sys
from lens_pipeline.cli import main
sys.exit(main(["train", "--arch", "lastro", "--epochs", sys.argv[3],
               "--data-root", sys.argv[1], "--checkpoint-dir", sys.argv[2]]))
"""


def _config(arch: str = "lastro", **sections: Any) -> TrainConfig:
    return small_config(arch, epochs=12, monitor="val/auroc").with_changes(sections, "test")


def _images(shards: Path) -> torch.Tensor:
    split = LensDataModule(shards).split("val")
    return torch.from_numpy(split.gather(list(range(len(split)))).astype(np.float32))


@pytest.mark.parametrize(
    ("arch", "how"),
    [
        ("lastro", {}),
        ("lastro", {"hardware": {"precision": "16-mixed"}}),
        ("resnet18", {"hardware": {"channels_last": True}, "training": {"ema": 0.5}}),
        ("light_transformer", {"hardware": {"strategy": "ddp"}}),
    ],
    ids=["auto", "fp16", "channels_last", "ddp"],
)
def test_what_a_gpu_has_learnt_a_cpu_scores_alike(
    arch: str, how: dict[str, Any], uneven_shards: Path, tmp_path: Path
) -> None:
    config = _config(arch, **how).with_changes({"training": {"epochs": 41}}, "test")
    trained = train_on(config, uneven_shards, tmp_path)
    assert trained.curves["val/auroc"].max() > 0.9
    checkpoint = torch.load(trained.checkpoint, weights_only=True)
    assert {value.dtype for value in checkpoint["state_dict"].values()} <= {
        *(torch.float32, torch.int64)
    }
    with torch.inference_mode():
        on_a_cpu = load_system(trained.checkpoint)(_images(uneven_shards)).numpy()
    # Convolutions in TF32 have ten bits.
    scores = trained.val_scores["logit"]
    np.testing.assert_allclose(scores, on_a_cpu, rtol=1e-2, atol=0.01 * np.std(on_a_cpu))
    table = pd.read_csv(next((tmp_path / "logs").glob("csv/*/metrics.csv")))
    assert 0 < table["gpu/peak_memory"].max() < 80  # GB


def test_auto_is_bf16_where_the_gpu_computes_in_it() -> None:
    modern = torch.cuda.get_device_capability() >= (8, 0)
    assert resolved_precision(_config()) == ("bf16-mixed" if modern else "16-mixed")
    assert resolved_precision(_config(hardware={"accelerator": "cpu"})) == "32-true"


@pytest.mark.parametrize("arch", ["resnet18", "vit_b_16"])
def test_compiled_it_learns_the_same(arch: str, uneven_shards: Path, tmp_path: Path) -> None:
    """In the first steps; later, rounding has made two trainings of them."""
    how = {"epochs": 1, "batch_size": 32, "learning_rate": 1e-5, "augment": False}
    members = {
        compiled: train_on(
            _config(arch, model={"compile_model": compiled, "dropout_rate": 0.0}, training=how),
            uneven_shards,
            tmp_path / str(compiled),
        )
        for compiled in (False, True)
    }
    losses = {compiled: member.curves["train/loss"].item() for compiled, member in members.items()}
    assert losses[True] == pytest.approx(losses[False], rel=0.01)
    images = _images(uneven_shards)
    with torch.inference_mode():
        eager, compiled = (load_system(members[c].checkpoint)(images) for c in (False, True))
    assert torch.allclose(eager, compiled, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_killed_it_goes_on_to_the_same_end(
    precision: str, uneven_shards: Path, tmp_path: Path
) -> None:
    config = _config(
        training={"epochs": 3, "save_every_n_steps": 2},
        hardware={"precision": precision, "deterministic": True},
    )
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert in_a_process(config, uneven_shards, undisturbed) == 0
    for at in (3, 8):
        assert in_a_process(config, uneven_shards, killed, at) == -signal.SIGKILL
    assert in_a_process(config, uneven_shards, killed) == 0
    ours, theirs = (
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (killed, undisturbed)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    pd.testing.assert_frame_equal(TrainedMember(killed).curves, TrainedMember(undisturbed).curves)


def test_batches_wait_in_pinned_memory(uneven_shards: Path) -> None:
    batch = next(iter(LensDataModule(uneven_shards, batch_size=16).train_dataloader()))
    assert all(value.is_pinned() for value in batch.values())


def test_more_gpus_than_there_are(uneven_shards: Path, tmp_path: Path) -> None:
    there = torch.cuda.device_count()
    with pytest.raises(InputError, match=rf"hardware\.devices {there + 1}: this machine has"):
        train_on(_config(hardware={"devices": there + 1}), uneven_shards, tmp_path)


@pytest.fixture
def little_memory(uneven_shards: Path, tmp_path: Path) -> Iterator[None]:
    """A GPU on which a resnet50 trains in batches of 8, and not of 64."""
    needed = []
    for size in (8, 64):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        how = {"epochs": 1, "batch_size": size}
        train_on(_config("resnet50", training=how), uneven_shards, tmp_path / f"room{size}")
        needed.append(torch.cuda.max_memory_allocated())
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(sum(needed) / 2 / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_too_little_memory(little_memory: None, uneven_shards: Path, tmp_path: Path) -> None:
    how = {"epochs": 1, "batch_size": 64}
    with pytest.raises(InputError, match=r"training\.batch_size 64: .*accumulate_grad_batches"):
        train_on(_config("resnet50", training=how), uneven_shards, tmp_path / "told")
    gc.collect()
    torch.cuda.empty_cache()
    found = _config("resnet50", training=how | {"find_batch_size": True})
    trained = train_on(found, uneven_shards, tmp_path / "found")
    assert 8 <= trained.config.training.batch_size < 64
    assert len(trained.curves) == 1


def test_two_trainings_take_turns_on_one_gpu(uneven_shards: Path, tmp_path: Path) -> None:
    """Each begins where the other has ended, and the one that waits says so."""
    if torch.cuda.device_count() > 1:
        pytest.skip("there is a GPU for each")
    trainings = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(uneven_shards), str(tmp_path / name), "40"],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(tmp_path)},  # of whose claims no other training knows
        )
        for name in ("one", "two")
    ]
    said = [training.communicate()[1] for training in trainings]
    assert [training.returncode for training in trainings] == [0, 0], said
    assert sum("waiting for 1 of the GPUs" in text for text in said) == 1
    begun, ended = (
        sorted((tmp_path / name / file).stat().st_mtime for name in ("one", "two"))
        for file in ("settings.yaml", "val_scores.parquet")
    )
    assert begun[1] >= ended[0]


def test_an_ensemble_scores_alike_on_gpu_and_cpu(uneven_shards: Path, tmp_path: Path) -> None:
    two = {"model_type": "ensemble", "architectures": ["lastro", "b=lastro@1"]}
    training = {"epochs": 12, "batch_size": 16, "monitor": "val/auroc"}
    config = TrainConfig.parse({"model": two, "training": training}, "test")
    trained = train_on(config, uneven_shards, tmp_path, system_type=LitEnsembleSystem)
    data = LensDataModule(uneven_shards)  # which brings a trainer's batches to its GPU
    Trainer(logger=False, limit_train_batches=1, max_epochs=1).fit(LitLensSystem("lastro"), data)
    loader = data.test_dataloader()
    assert next(iter(loader))["image"].device.type == "cpu"
    tables = [
        LitEnsembleSystem.load_from_checkpoint(trained.checkpoint, device).predict(loader)
        for device in ("cpu", "cuda")
    ]
    for name in ("logit", "std", "entropy", "probability_lastro"):
        np.testing.assert_allclose(tables[0][name], tables[1][name], rtol=0.02, atol=0.02)


def test_batches_come_whole_beside_work_that_takes_longer() -> None:
    """Whatever the GPU is still to do with those before them, and whoever keeps one."""
    stream, n, shape = torch.cuda.Stream(), 60, (64, 3, 128, 128)
    heavy = torch.randn(4096, 4096, device="cuda")

    def gather(places: list[int]) -> dict[str, torch.Tensor]:
        return {"image": torch.full(shape, float(places[0])).pin_memory()}

    for taken in (n, 7):  # to the end, and given up
        kept, seen = [], []
        batches = gathered_ahead(gather, [[number] for number in range(n)], stream)
        for number, batch in enumerate(batches):
            for _ in range(5):
                heavy = (heavy @ heavy).clamp(-1, 1)  # some milliseconds behind
            seen += [batch["image"].amin(), batch["image"].amax()]
            if number % 10 == 3:
                kept.append(batch["image"])
            del batch
            if number + 1 == taken:
                break
        del batches
        other = [torch.full(shape, -1.0, device="cuda") for _ in range(6)]
        assert torch.stack(seen).tolist() == [float(i) for i in range(taken) for _ in "12"]
        assert [image.unique().tolist() for image in kept] == [[i] for i in range(3, taken, 10)]
        assert all(bool((one == -1).all()) for one in other)
