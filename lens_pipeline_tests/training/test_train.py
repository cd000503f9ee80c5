"""Training from a configuration: what it leaves, and in which state it leaves its process."""

import math
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.utilities import rank_zero_only
from sklearn.metrics import roc_auc_score

from lens_pipeline import LensDataModule, LitEnsembleSystem, LitLensSystem
from lens_pipeline.ensemble import assemble
from lens_pipeline.errors import InputError
from lens_pipeline.models.system import load_system
from lens_pipeline.scoring import open_cutout_source, score_to_file
from lens_pipeline.shards import open_shards, publish_shards
from lens_pipeline.training import checkpoints, train
from lens_pipeline.training.config import TrainConfig
from lens_pipeline.training.train import build_system
from lens_pipeline_tests.training.small import best_epochs, small_config, train_on


def test_a_step_of_the_batches_that_are_left_in_an_epoch_is_as_large_as_any(
    uneven_shards: Path, tmp_path: Path
) -> None:
    class Descent(LitLensSystem):
        """Whose steps, unlike Adam's, are as large as the gradient."""

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def weights(**how: int) -> dict[str, torch.Tensor]:
        config = small_config("light_transformer", epochs=1, augment=False, **how)
        config = config.with_changes({"model": {"dropout_rate": 0.0}}, "test")
        out = tmp_path / "_".join(how)
        trained = train_on(config, uneven_shards, out, system_type=Descent)
        return torch.load(trained.checkpoint, weights_only=True)["state_dict"]

    alone = weights(limit_train_batches=1)
    torch.testing.assert_close(weights(limit_train_batches=1, accumulate_grad_batches=4), alone)


def test_a_ring_is_learnt_and_its_files_are_left(uneven_shards: Path, tmp_path: Path) -> None:
    config = small_config(epochs=4, save_top_k=2, monitor="val/auroc")
    trained = train_on(config, uneven_shards, tmp_path)
    assert trained.config == config
    curves = trained.curves
    assert curves["epoch"].tolist() == list(range(4))
    assert curves["val/auroc"].max() > 0.9
    assert {"train/loss", "train/f1", "val/tpr0", "val/tpr10", "val/average_precision"} < set(
        curves
    )
    scores = trained.val_scores
    assert len(scores) == 40
    # The best checkpoint is of the epoch with the highest figure, and its scores are its own.
    checkpoint = torch.load(trained.checkpoint, weights_only=True)
    assert checkpoint["epoch"] == best_epochs(curves, "val/auroc")[0]
    assert "optimizer_states" not in checkpoint
    auroc = roc_auc_score(scores["label"], scores["logit"])
    assert curves["val/auroc"].max() == pytest.approx(auroc, abs=1e-6)
    # Over cutouts, of which the last batch has fewer.
    n_nonlens, n_lens = LensDataModule(uneven_shards).class_counts("train")
    sign = np.where(scores["label"] == 1, -1, 1)
    weight = np.where(scores["label"] == 1, n_nonlens / n_lens, 1)
    loss = (weight * np.logaddexp(0, sign * scores["logit"])).mean()
    assert curves["val/loss"][checkpoint["epoch"]] == pytest.approx(loss, rel=1e-5)
    split = LensDataModule(uneven_shards).split("val")
    images = torch.from_numpy(split.gather(list(range(40))).astype(np.float32))
    with torch.inference_mode():
        logit = load_system(trained.checkpoint)(images)
    np.testing.assert_allclose(scores["logit"], logit, rtol=1e-5, atol=1e-5)
    assert len([*(tmp_path / "top").iterdir()]) == 1  # of two that are kept the best is best.ckpt


def test_a_trial_of_one_batch_leaves_the_training_in_its_folder_alone(
    uneven_shards: Path, tmp_path: Path
) -> None:
    train_on(small_config(epochs=1), uneven_shards, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    ran: list[int] = []

    class Count(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            ran.append(1)

    train_on(small_config(epochs=3, fast_dev_run=True), uneven_shards, tmp_path, Count())
    assert len(ran) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_two_seeds_turn_cutouts_and_drop_features_otherwise(
    uneven_shards: Path, tmp_path: Path
) -> None:
    """Members of one architecture (`@1`, `@2`) differ in these, too. A CPU's generator takes 32
    bits of a seed."""

    class Draws(Callback):
        def __init__(self) -> None:
            self.states: list[float] = []

        def on_train_batch_start(self, *_: Any) -> None:
            # What would be drawn: the state itself holds the seed that was given, too.
            copy = torch.Generator()
            copy.set_state(torch.get_rng_state())
            self.states.append(float(torch.rand((), generator=copy, dtype=torch.float64)))

    drawn = []
    for number, seed in enumerate((1, 2, 1, 2**32 - 1)):
        draws = Draws()
        config = small_config(epochs=1, seed=seed, limit_train_batches=3)
        train_on(config, uneven_shards, tmp_path / str(number), draws)
        assert len(set(draws.states)) == len(draws.states)  # each step draws something else
        drawn.append(draws.states)
    assert drawn[0] == drawn[2]
    assert not {*drawn[0]} & {*drawn[1]}
    assert not {*drawn[0]} & {*drawn[3]}


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_what_was_cut_short_counts_in_nothing_else(stage: str, uneven_shards: Path) -> None:
    """Of an interrupted cell of a notebook, say, whose system is used again."""

    class Cut(Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            raise RuntimeError("cut short")

        on_test_batch_end = on_validation_batch_end

    def metrics(system: LitLensSystem, *callbacks: Callback) -> Any:
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
        trainer = Trainer(accelerator="cpu", callbacks=[*callbacks], **quiet)
        return getattr(trainer, stage)(system, LensDataModule(uneven_shards, 16), verbose=False)

    system, fresh = (LitLensSystem("lastro", image_size=32) for _ in range(2))
    fresh.load_state_dict(system.state_dict())
    with pytest.raises(RuntimeError, match="cut short"):
        metrics(system, Cut())
    np.testing.assert_equal(metrics(system), metrics(fresh))


def test_of_several_processes_that_slurm_has_started_each_trains_its_own(
    uneven_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep, say: `--ntasks=2`. Nor is it another's checkpoint that one begins from."""
    tasks = {"NTASKS": "2", "NNODES": "1", "PROCID": "1", "LOCALID": "1"}
    for name, value in {**tasks, "JOB_ID": "7", "JOB_NAME": "sweep", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # as Lightning reads it there
    monkeypatch.chdir(tmp_path)
    alone = train_on(small_config(epochs=1), uneven_shards, tmp_path / "alone")
    shutil.copy(alone.folder / "last.ckpt", "hpc_ckpt_1.ckpt")
    again = train_on(small_config(epochs=1), uneven_shards, tmp_path / "again")
    for trained in (alone, again):
        assert len(trained.curves) == 1
        assert len(trained.val_scores) == 40
        assert [*trained.folder.rglob("metrics.csv")]


def test_callbacks_of_lightnings_own_go_beside_a_trainings(
    uneven_shards: Path, tmp_path: Path
) -> None:
    """Of the same monitor, too; and those that make another plan of the epochs."""
    own = ModelCheckpoint(dirpath=tmp_path / "own", monitor="val/auroc", mode="max")
    others = [EarlyStopping("val/auroc", mode="max"), StochasticWeightAveraging(1e-4)]
    config = small_config(epochs=3, monitor="val/auroc", patience=3)
    trained = train_on(config, uneven_shards, tmp_path / "out", own, *others)
    assert len(trained.curves) >= 2
    assert Path(own.best_model_path).exists()


def test_limits_are_numbers_of_batches_or_fractions_of_them(
    uneven_shards: Path, tmp_path: Path
) -> None:
    steps: dict[float, int] = {}

    class Steps(Callback):
        def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
            steps[limit] = trainer.global_step

    for limit in (2, 0.5, 1.0):
        how = {"limit_train_batches": limit, "limit_val_batches": limit, "monitor": "val/auroc"}
        config = small_config(epochs=1, batch_size=8, **how)
        train_on(config, uneven_shards, tmp_path / str(limit), Steps())
    n = len(LensDataModule(uneven_shards, batch_size=8).train_dataloader())
    assert steps == {2: 2, 0.5: n // 2, 1.0: n}


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_gradients_are_clipped_to_the_norm_that_is_asked_for(
    clip: float, uneven_shards: Path, tmp_path: Path
) -> None:
    norms: list[float] = []

    class Norm(Callback):
        def on_before_zero_grad(self, trainer: Trainer, module: LightningModule, _: Any) -> None:
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            if grads:
                norms.append(float(torch.nn.utils.get_total_norm(grads)))

    train_on(small_config(epochs=1, gradient_clip=clip), uneven_shards, tmp_path, Norm())
    assert norms
    assert (max(norms) <= 1e-3 * (1 + 1e-5)) == bool(clip)


def test_the_rarer_class_weighs_as_much_as_the_other(uneven_shards: Path, tmp_path: Path) -> None:
    rows = pd.DataFrame(
        [
            {"id": f"{split}{k}", "path": f"{split}{k}.npy", "label": k % 5 == 0, "split": split}
            for split, n in (("train", 50), ("val", 20), ("test", 20))
            for k in range(n)
        ]
    )
    random = np.random.default_rng(0)
    for path in rows["path"]:
        np.save(tmp_path / path, random.normal(size=(3, 32, 32)).astype(np.float32))
    rows.astype({"label": int}).to_csv(tmp_path / "catalogue.csv", index=False)
    data = LensDataModule(str(tmp_path / "catalogue.csv"), image_size=32)
    assert build_system(small_config(), data).hparams["pos_weight"] == 40 / 10
    assert build_system(small_config(balance=False), data).hparams["pos_weight"] == 1
    balanced = LensDataModule(uneven_shards)
    assert build_system(small_config(), balanced).hparams["pos_weight"] == 36 / 35


def test_checkpoints_take_little_of_the_time_of_short_epochs(
    uneven_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where writing is slow they are of the first epoch, whose cost tells, and of the end."""

    class SlowDisk(Callback):
        written: ClassVar[list[int]] = []

        def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
            self.written.append(trainer.current_epoch)
            time.sleep(0.5)

    monkeypatch.setattr(checkpoints, "DISK", math.inf)  # before any cost is known
    train_on(small_config(epochs=5), uneven_shards, tmp_path, SlowDisk())
    assert SlowDisk.written == [0, 4]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 4


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_a_training_leaves_its_process_as_it_was(
    strategy: str, uneven_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bootstrap round it draws something else each time."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    def seed() -> None:
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)

    seed()
    expected = draws()
    before = dict(os.environ)
    seed()
    hardware = {"hardware": {"strategy": strategy, "accelerator": "cpu"}}
    train_on(small_config(epochs=1).with_changes(hardware, "test"), uneven_shards, tmp_path)
    assert draws() == expected
    assert not torch.distributed.is_initialized()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert not torch.backends.cudnn.benchmark
    assert dict(os.environ) == before


@pytest.mark.slow
def test_the_rate_falls_at_the_plateaus_of_the_validation_loss(
    uneven_shards: Path, tmp_path: Path
) -> None:
    """As torch's scheduler does, which waits for one epoch more than its patience."""
    how = {"schedule": "plateau", "decay_epochs": 1, "learning_rate": 0.1, "warmup": 0.0}
    trained = train_on(small_config(epochs=16, **how), uneven_shards, tmp_path)
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.1, patience=0)
    for loss in trained.curves["val/loss"]:
        scheduler.step(loss)
    expected = optimiser.param_groups[0]["lr"]
    assert expected < 0.1
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert state["param_groups"][0]["lr"] == pytest.approx(expected)


@pytest.mark.slow
def test_an_ensemble_learns_together_and_predicts(uneven_shards: Path, tmp_path: Path) -> None:
    config = TrainConfig.parse(
        {
            "model": {"model_type": "ensemble", "architectures": ["lastro", "b=lastro@1"]},
            "training": {"epochs": 8, "batch_size": 16},
        },
        "test",
    )
    trained = train_on(config, uneven_shards, tmp_path, system_type=LitEnsembleSystem)
    assert trained.curves["val/auroc"].max() > 0.9
    system = LitEnsembleSystem.load_from_checkpoint(trained.checkpoint)
    data = LensDataModule(uneven_shards)
    table = system.predict(data.test_dataloader())
    assert len(table) == 20
    assert list(table)[-2:] == ["probability_lastro", "probability_b"]
    assert table["probability"].between(0, 1).all()
    assert (table["std"] > 0).all()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"bagging": 0.3}, r"data.bagging 0.3: LensDataModule was made with 1.0; make it with bag"),
        ({"image_size": 24}, "data.image_size 24: LensDataModule was made with 32"),
    ],
)
def test_cutouts_that_are_not_those_of_the_settings_are_refused(
    data: dict[str, Any], said: str, uneven_shards: Path, tmp_path: Path
) -> None:
    """They would be written down with the training, which has not seen them."""
    config = small_config(epochs=1).with_changes({"data": data}, "test")
    with pytest.raises(InputError, match=said):
        train_on(config, uneven_shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_seed_of_the_settings_is_that_of_the_order(uneven_shards: Path, tmp_path: Path) -> None:
    class Seen(Callback):
        def __init__(self) -> None:
            self.order: list[int] = []

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
            self.order += batch["index"].tolist()

    seen = [Seen() for _ in range(3)]
    for number, (one, seed, of_data) in enumerate(zip(seen, (5, 5, 6), (0, 1, 0), strict=True)):
        data = LensDataModule(uneven_shards, seed=of_data)
        out = tmp_path / str(number)
        train(small_config(epochs=1, seed=seed), data, out, callbacks=[one])
    assert seen[0].order == seen[1].order != seen[2].order


@pytest.mark.parametrize("together", [True, False])
def test_a_system_that_is_not_that_of_the_settings_is_named(
    together: bool, uneven_shards: Path, tmp_path: Path
) -> None:
    model = {"model_type": "ensemble", "architectures": ["lastro"]} if together else {}
    config = TrainConfig.parse({"model": model}, "test")
    other = LitLensSystem if together else LitEnsembleSystem
    wanted = "LitEnsembleSystem" if together else "LitLensSystem"
    with pytest.raises(InputError, match=f"with system_type={wanted}, not {other.__name__}"):
        train_on(config, uneven_shards, tmp_path, system_type=other)


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_network_whose_layers_have_versions_goes_on_and_is_used(
    ema: float, uneven_shards: Path, tmp_path: Path
) -> None:
    """MNASNet refuses weights that do not say of which of its two layouts they are."""
    config = small_config("torchvision:mnasnet0_5", ema=ema, save_every_n_steps=1, epochs=1)
    with pytest.raises(ZeroDivisionError):
        train_on(config, uneven_shards, tmp_path, _FailsAt(3))
    assert (tmp_path / "last.ckpt").exists()
    trained = train_on(config, uneven_shards, tmp_path)
    assert len(trained.val_scores) == 40
    system = LitLensSystem.load_from_checkpoint(trained.checkpoint).eval()
    assert system(torch.zeros(2, 3, 32, 32)).isfinite().all()


class _FailsAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError


def test_the_library_takes_paths_as_text(uneven_shards: Path, tmp_path: Path) -> None:
    here = f"{tmp_path}/new"
    trained = train(small_config(epochs=1), LensDataModule(uneven_shards), f"{here}/member")
    assert TrainConfig.read(f"{here}/member/settings.yaml") == trained.config
    published = publish_shards(str(uneven_shards), "memory://text/lenses")
    shards = open_shards(published.url, cache=f"{here}/cache")
    assert len(shards.split("val").gather([0])) == 1
    members = {"lastro": (str(trained.checkpoint), trained.val_scores)}
    facts = {"dataset_version": published.dataset_version}
    model = assemble(members, shards.format, f"{here}/ensemble", facts, groups=[])
    source = open_cutout_source(str(uneven_shards), cache=f"{here}/cache")
    scored = score_to_file(model, source, f"{here}/scores.csv", model="mine")
    assert scored.n_scored == len(pd.read_csv(f"{here}/scores.csv")) == 131
