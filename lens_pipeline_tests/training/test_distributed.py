"""Several processes train what one would."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from dagster import DagsterEventType, DagsterInstance
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from lens_pipeline import LensDataModule
from lens_pipeline.cli import main
from lens_pipeline.errors import InputError
from lens_pipeline.evaluation.metrics import lens_metrics
from lens_pipeline.settings import Settings
from lens_pipeline.shards import read_manifest
from lens_pipeline.tracking import Tracking
from lens_pipeline.training import TrainedMember, train
from lens_pipeline.training.config import TrainConfig
from lens_pipeline.training.launch import launch
from lens_pipeline_tests.conftest import LENS_PIPELINE
from lens_pipeline_tests.training.killed import run


def _trained(
    shards: Path, out: Path, devices: int, arch: str, global_batch: int = 16, **flags: Any
) -> TrainedMember:
    batch = {"batch_size": global_batch // devices}
    flags = {"epochs": 1, "dropout_rate": 0.0, "seed": 0} | batch | flags
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    status = main(
        [
            *("train", "--data-root", str(shards), "--checkpoint-dir", str(out)),
            *("--arch", arch, "--devices", str(devices), "--accelerator", "cpu", "--no-augment"),
            *arguments,
        ]
    )
    assert status == 0
    return TrainedMember(out)


def _uneven(shards: Path, batch: int) -> None:
    n = sum(s.samples for s in read_manifest(shards).shards if s.split == "train")
    assert n % batch % 2 == 1  # the last batch does not divide evenly over two


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "how"),
    [
        ("trans_enc_s", {"epochs": 4, "learning_rate": 3e-4}),
        ("light_transformer", {"epochs": 4, "learning_rate": 3e-4}),
        pytest.param(
            "vit_b_16",
            # Where nothing is left to learn, gradients are rounding, and AdamW's steps are, too.
            {"epochs": 2, "learning_rate": 3e-5, "label_smoothing": 0.1, "global_batch": 6},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["trans_enc_s", "light_transformer", "vit_b_16"],
)
def test_two_processes_end_with_the_weights_of_one(
    arch: str,
    how: dict[str, Any],
    uneven_shards: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Over twenty steps, in batches that do not divide evenly, of a network without batch
    statistics."""
    _uneven(uneven_shards, how.get("global_batch", 16))
    one = _trained(uneven_shards, tmp_path / "one", 1, arch, **how)
    capfd.readouterr()
    two = _trained(uneven_shards, tmp_path / "two", 2, arch, **how)
    assert capfd.readouterr().err.count(f"epoch 2/{how['epochs']}: loss") == 1
    ours, theirs = (torch.load(m.folder / "last.ckpt", weights_only=True) for m in (one, two))
    assert ours["global_step"] == theirs["global_step"] >= 20
    for name, value in ours["state_dict"].items():
        other = theirs["state_dict"][name]
        if name.endswith("in_proj_bias"):
            # No output depends on a key's bias: its gradient is what rounding leaves, and AdamW
            # makes a step of any gradient.
            value, other = (torch.cat([b.chunk(3)[0], b.chunk(3)[2]]) for b in (value, other))
        torch.testing.assert_close(value, other, rtol=0, atol=1e-5)
    for name in ("train/loss", "val/loss", "train/accuracy", "val/auroc"):
        np.testing.assert_allclose(
            one.curves[name].to_numpy(), two.curves[name].to_numpy(), atol=0.01, err_msg=name
        )
    assert one.val_scores["id"].tolist() == two.val_scores["id"].tolist()


@pytest.mark.slow
def test_an_error_of_one_process_is_told_once(
    uneven_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--data-root", str(uneven_shards), "--checkpoint-dir", str(tmp_path)]
    arguments += ["--devices", "2", "--accelerator", "cpu", "--image-size", "512"]
    assert main(arguments) == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert "image_size 512" in told[0]


@pytest.mark.slow
def test_a_step_of_dagster_trains_in_two_processes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They are torchrun's, and tell the step's log and the member's MLflow run."""
    home = tmp_path / "home"
    chosen = ["--archs", "light_transformer", "--preset", "tiny", "--home", str(home)]
    hardware = ["--set", "hardware.devices=2", "--set", "hardware.accelerator=cpu"]
    assert main(["run", *chosen, *hardware]) == 0
    (folder,) = (home / "checkpoints" / "light_transformer").glob("[!.]*")
    trained = TrainedMember(folder)
    assert trained.config.hardware.devices == 2
    with DagsterInstance.from_config(str(home / "dagster")) as instance:
        (run,) = instance.get_runs()
        told = [entry.user_message for entry in instance.all_logs(run.run_id)]
    assert any("epoch 1/1: loss" in line for line in told)
    tracking = Tracking(Settings.load(home=str(home)))
    (recorded,) = [
        run
        for run in tracking.client.search_runs([tracking.experiment_id])
        if run.data.tags.get("lens.member") == "light_transformer"
    ]
    assert recorded.info.status == "FINISHED"
    assert "val/auroc" in recorded.data.metrics


@pytest.mark.slow
def test_batch_statistics_of_two_processes_are_worth_those_of_one(
    uneven_shards: Path, tmp_path: Path
) -> None:
    """BatchNorm sees half a batch in each: AUROC differs by no more than between seeds, or by what
    a few cutouts are."""

    def auroc(name: str, devices: int, seed: int) -> float:
        scores = _trained(
            uneven_shards, tmp_path / name, devices, "lastro", epochs=6, seed=seed
        ).val_scores
        probability = 1 / (1 + np.exp(-scores["logit"]))
        return float(lens_metrics(scores["label"], probability, bootstrap=0)["auroc"]["value"])

    alone = [auroc(f"one{seed}", 1, seed) for seed in range(3)]
    together = auroc("two", 2, 0)
    assert min(alone) > 0.8
    assert abs(together - alone[0]) <= max(0.02, max(alone) - min(alone))


@pytest.mark.slow
def test_the_metrics_of_all_processes_outlive_a_kill(uneven_shards: Path, tmp_path: Path) -> None:
    config = TrainConfig.parse(
        {
            "model": {"arch": "trans_enc_s", "dropout_rate": 0.0},
            "training": {"epochs": 2, "batch_size": 8, "save_every_n_steps": 1},
            "hardware": {"devices": 2, "accelerator": "cpu"},
        },
        "test",
    )

    def curves(out: Path, *kill_at: int | None) -> pd.DataFrame:
        for at in kill_at:
            with nullcontext() if at is None else pytest.raises(ChildFailedError):
                launch(run, (config, uneven_shards, out, at), 2)
        return TrainedMember(out).curves

    undisturbed = curves(tmp_path / "undisturbed", None)
    killed = curves(tmp_path / "killed", 7, None)
    pd.testing.assert_frame_equal(killed, undisturbed)


class _SpoilOne(Callback):
    """The pixels of a cutout of one process alone are no numbers, at one batch."""

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, number: int
    ) -> None:
        if trainer.global_rank == 1 and trainer.fit_loop.total_batch_idx == 3:
            batch["image"][2, 0, 3, 4] = torch.nan


def _spoilt(config: TrainConfig, shards: Path, out: Path) -> None:
    try:
        train(config, LensDataModule(shards), out, callbacks=[_SpoilOne()])
    except InputError as problem:
        out.with_name(f"said by {os.environ['RANK']}").write_text(str(problem))
        raise


@pytest.mark.slow
def test_of_a_loss_that_is_no_number_the_process_tells_that_knows_the_cutouts(
    uneven_shards: Path, tmp_path: Path
) -> None:
    """The others have its weights, which are no numbers by then, and know of no cutout."""
    config = TrainConfig.parse(
        {
            "model": {"arch": "trans_enc_s"},
            "training": {"epochs": 1, "batch_size": 8, "save_every_n_steps": 1},
            "hardware": {"devices": 2, "accelerator": "cpu"},
        },
        "test",
    )
    with pytest.raises(ChildFailedError):
        launch(_spoilt, (config, uneven_shards, tmp_path / "out"), 2)
    (said,) = tmp_path.glob("said by *")
    assert said.name == "said by 1"
    assert re.match(
        r"epoch 0, batch 3: the loss is nan.* the cutouts train\d\d, ", said.read_text()
    )
    kept = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 3
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_the_same_command_goes_on(
    uneven_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [
        *(LENS_PIPELINE, "train", "--data-root", str(uneven_shards), "--home", str(tmp_path)),
        *("--checkpoint-dir", str(out), "--arch", "lastro", "--devices", "2"),
        *("--accelerator", "cpu", "--save-every-n-steps", "1", "--epochs", "4"),
    ]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while not (out / "last.ckpt").exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith("error: interrupted")
    assert "death signal" not in said
    subprocess.run(command, check=True)
    assert TrainedMember(out).curves["epoch"].tolist() == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_killed_process_of_a_step_is_tried_again_from_its_checkpoint(own_home: Path) -> None:
    """By Dagster's retry policy, in a run of the multiprocess executor."""
    settings = Settings.load(home=str(own_home), preset="tiny")
    settings.export()
    config = {
        # Long enough to be found alive, with a checkpoint behind it.
        "training": {"epochs": 20, "save_every_n_steps": 1},
        "hardware": {"devices": 2, "accelerator": "cpu"},
    }
    command = [
        *(sys.executable, "-m", "dagster", "asset", "materialize"),
        *("--module-name", "lens_pipeline.definitions", "--select", "checkpoints/lastro"),
        *("--config-json", json.dumps({"ops": {"checkpoints__lastro": {"config": config}}})),
    ]
    known = set((own_home / "checkpoints" / "lastro").glob("[!.]*"))
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        _kill_a_training(own_home, process)
    assert process.returncode == 0
    (folder,) = set((own_home / "checkpoints" / "lastro").glob("[!.]*")) - known
    assert TrainedMember(folder).curves["epoch"].tolist() == list(range(20))
    with DagsterInstance.from_config(str(own_home / "dagster")) as instance:
        entries = instance.all_logs(instance.get_runs(limit=1)[0].run_id)
    assert DagsterEventType.STEP_RESTARTED in [entry.dagster_event_type for entry in entries]
    assert any("goes on from" in entry.user_message for entry in entries)


def _kill_a_training(home: Path, of: subprocess.Popen[bytes]) -> None:
    """kill -9 one of the processes of a training that has written a checkpoint."""
    while not list(home.glob("checkpoints/lastro/.partial-*/last.ckpt")):
        assert of.poll() is None
        time.sleep(0.05)
    (launcher,) = [
        process
        for process in psutil.Process(of.pid).children(recursive=True)
        if process.cmdline()[1:4] == ["-m", "lens_pipeline.cli", "train"]
    ]
    workers = [p for p in launcher.children() if any("spawn_main" in part for part in p.cmdline())]
    workers[0].kill()
