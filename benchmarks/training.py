"""How near training comes to the bare step: cutouts a second of one network in three ways.

`bare step`: forward, loss, backward and AdamW on one batch that lies on the device; `plain loop`:
the same on augmented batches of our loader; `lens_pipeline`: `train`, with metrics, logs (CSV and
MLflow), progress and checkpoints, its validation not counted. 64 pixels, three bands; on a CPU in
float32, on a GPU in bf16 and compiled, in batches that it takes longer to work through than its
host to ask for. The three take turns, five times.
"""

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import MLFlowLogger
from torch import Tensor
from tqdm import tqdm

from benchmarks._cutouts import make_dataset
from benchmarks._harness import SCRATCH, Row, Target, options, report
from lens_pipeline import LensDataModule
from lens_pipeline.models.augmentation import augment
from lens_pipeline.models.optimiser import adamw
from lens_pipeline.shards.writer import write_shards
from lens_pipeline.training.config import TrainConfig
from lens_pipeline.training.train import build_system, train

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BATCHES = {"resnet18": 4096, "vit_b_16": 1024} if ON_GPU else {"resnet18": 32, "vit_b_16": 16}
# `train` takes at least so many cutouts, in whole batches. On a GPU it runs for about half a
# minute: the last checkpoint of vit_b_16 takes as long as forty steps, and trainings last longer.
CUTOUTS = 200 * 1024 if ON_GPU else 0
EPOCHS = {"resnet18": 16, "vit_b_16": 4} if ON_GPU else dict.fromkeys(BATCHES, 1)
WARM = 5  # steps that do not count
BARE, PLAIN, OURS = "bare step", "plain loop", "lens_pipeline"


def config_of(arch: str) -> TrainConfig:
    training = {"epochs": EPOCHS[arch], "batch_size": BATCHES[arch]}
    model = {"arch": arch, "compile_model": ON_GPU}
    return TrainConfig.parse({"model": model, "training": training}, "benchmark")


def synchronised() -> float:
    """The time, when the device has done all it was given."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def stepper(config: TrainConfig, data: LensDataModule) -> Callable[[Tensor, Tensor], None]:
    """A training step without anything round it."""
    torch.backends.cudnn.benchmark = ON_GPU  # as `train` has it
    system = build_system(config, data).to(DEVICE).train()
    optimiser = adamw(system, lr=1e-3, weight_decay=1e-2, fused=True)
    in_bf16 = torch.autocast("cuda", torch.bfloat16) if ON_GPU else contextlib.nullcontext()

    def step(images: Tensor, label: Tensor) -> None:
        optimiser.zero_grad()
        with in_bf16:
            loss = system.loss(system.member_logits(images), label)
        loss.backward()
        optimiser.step()

    return step


def batches(data: LensDataModule) -> Iterator[tuple[Tensor, Tensor]]:
    """Of one epoch after the other, on the device."""
    for batch in chain.from_iterable(repeat(data.train_dataloader())):
        moved = {name: value.to(DEVICE, non_blocking=True) for name, value in batch.items()}
        yield moved["image"].float(), moved["label"]


def bare_step(config: TrainConfig, data: LensDataModule, steps: int, out: Path) -> float:
    step = stepper(config, data)
    images, label = next(batches(data))
    begun = 0.0
    for number in range(WARM + steps):
        if number == WARM:
            begun = synchronised()
        step(images, label)
    return synchronised() - begun


def plain_loop(config: TrainConfig, data: LensDataModule, steps: int, out: Path) -> float:
    step = stepper(config, data)
    begun = 0.0
    for number, (images, label) in enumerate(islice(batches(data), WARM + steps)):
        if number == WARM:
            begun = synchronised()
        step(augment(images, 0.0, 0.0), label)
    return synchronised() - begun


class Stopwatch(Callback):
    """From the first step that counts to the last checkpoint, without validation."""

    seconds = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *about: Any) -> None:
        if trainer.fit_loop.total_batch_idx == WARM:
            self.seconds -= synchronised()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds += synchronised()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds -= synchronised()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds += synchronised()


def lens_pipeline(config: TrainConfig, data: LensDataModule, steps: int, out: Path) -> float:
    watch = Stopwatch()
    tracked = MLFlowLogger("benchmark", tracking_uri=f"sqlite:///{out.with_name('mlflow.db')}")
    assert tracked.run_id  # makes the database
    train(config, data, out, [tracked], [watch])
    shutil.rmtree(out)
    trained = config.training.epochs * len(data.train_dataloader())
    return watch.seconds * steps / (trained - WARM)


WAYS = {BARE: bare_step, PLAIN: plain_loop, OURS: lens_pipeline}


def measured(arch: str, steps: int, repeats: int) -> tuple[list[Row], list[Target]]:
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    config = config_of(arch)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as name:
        folder = Path(name)
        n = max((WARM + steps) * config.training.batch_size, CUTOUTS)
        shards = folder / "shards"
        shards.mkdir()
        write_shards(make_dataset(folder / "dataset", n, 128), shards)
        data = LensDataModule(shards, batch_size=config.training.batch_size)
        for repeat in tqdm(range(repeats), arch, file=sys.stderr):
            for way, run in WAYS.items():
                seconds = run(config, data, steps, folder / f"out{repeat}")
                rates[way].append(steps * config.training.batch_size / seconds)
                tqdm.write(f"{arch}, {way}: {rates[way][-1]:,.0f} cutouts/s", sys.stderr)
    medians = {way: statistics.median(found) for way, found in rates.items()}
    rows: list[Row] = [
        {
            "network": arch,
            "batch": config.training.batch_size,
            "way": way,
            "cutouts/s": medians[way],
            "of the bare step": medians[way] / medians[BARE],
            "spread": f"{min(found):,.1f}-{max(found):,.1f}",
        }
        for way, found in rates.items()
    ]
    return rows, [
        Target(f"{arch}, train / bare step", medians[OURS] / medians[BARE], at_least=0.90),
        Target(f"{arch}, train / plain loop", medians[OURS] / medians[PLAIN], at_least=0.93),
    ]


def measure(arguments: argparse.Namespace) -> tuple[list[Row], list[Target]]:
    rows: list[Row] = []
    targets: list[Target] = []
    for arch in BATCHES:
        found, bars = measured(arch, arguments.n, arguments.repeats)
        rows += found
        targets += bars
    return rows, targets


if __name__ == "__main__":
    arguments = options(__doc__, n=100)
    report(arguments, lambda: measure(arguments))
