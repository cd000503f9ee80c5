"""AdamW of the systems, and the learning rates of each schedule."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader
from torchvision.models import VisionTransformer

import lens_pipeline
from lens_pipeline.models.system import LitLensSystem


def test_a_plateau_counts_the_epochs_that_are_validated(
    uneven_shards: Path, tmp_path: Path
) -> None:
    system = LitLensSystem("lastro", image_size=32, schedule="plateau", warmup=0.0)
    trainer = Trainer(
        max_epochs=3, check_val_every_n_epoch=2, accelerator="cpu", logger=False,
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(system, lens_pipeline.LensDataModule(uneven_shards))
    (plateau,) = trainer.lr_scheduler_configs
    assert plateau.scheduler.last_epoch == 1


def _rates(total: int, **how: object) -> list[float]:
    """The learning rate of each step, in epochs of ten steps with a flat validation loss."""
    system = LitLensSystem("lastro", lr=0.1, image_size=32, **how)  # type: ignore[arg-type]
    system.trainer = SimpleNamespace(  # type: ignore[assignment]
        estimated_stepping_batches=total,
        num_training_batches=min(10, total),
        limit_val_batches=1.0,
        accumulate_grad_batches=1,
        precision="32-true",
        fit_loop=SimpleNamespace(setup_data=lambda: None),
    )
    (optimiser,), schedules = system.configure_optimizers()
    rates = []
    for step in range(total):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        for entry in schedules:
            if entry["interval"] == "step":
                entry["scheduler"].step()
            elif step % 10 == 9:
                entry["scheduler"].step(1.0)
    return rates


@pytest.mark.parametrize("total", [*range(1, 25), 50, 100])
def test_the_learning_rate_rises_then_falls_for_any_number_of_steps(total: int) -> None:
    rates = _rates(total, warmup=0.1)
    peak = int(np.argmax(rates))
    assert (np.diff(rates[: peak + 1]) > 0).all()
    assert (np.diff(rates[peak:]) < 0).all()
    if total >= 4:
        assert rates[peak] == pytest.approx(0.1, rel=0.01)
        assert 0 < peak < total - 1


def test_the_cosine_is_that_of_its_formula() -> None:
    rates = _rates(100, warmup=0.1)
    assert rates[:11] == pytest.approx([0.1 * (k + 1) / 11 for k in range(11)])
    assert rates[10:] == pytest.approx([0.05 * (1 + np.cos(np.pi * k / 90)) for k in range(90)])


def test_steps_are_of_epochs() -> None:
    rates = _rates(60, schedule="step", warmup=0.0, decay=0.5, decay_epochs=2)
    assert rates == pytest.approx([0.1 * 0.5 ** (k // 20) for k in range(60)])


def test_steps_begin_when_the_rate_is_warm() -> None:
    rates = _rates(60, schedule="step", warmup=0.4, decay=0.5, decay_epochs=1)
    assert (np.diff(rates[:25]) > 0).all()
    assert rates[24:] == pytest.approx([0.1 * 0.5 ** (k // 10) for k in range(36)])


def test_a_plateau_is_warmed_up_and_falls_when_the_loss_does_not() -> None:
    rates = _rates(60, schedule="plateau", warmup=0.1, decay=0.5, decay_epochs=2)
    assert (np.diff(rates[:7]) > 0).all()
    assert rates[6:30] == pytest.approx([0.1] * 24)  # no gain in the second and third epoch
    assert rates[30:50] == pytest.approx([0.05] * 20)
    assert rates[50:] == pytest.approx([0.025] * 10)


def test_a_constant_rate_is_warmed_up() -> None:
    rates = _rates(20, schedule="constant", warmup=0.1)
    assert rates[0] < rates[1] < rates[2]
    assert rates[2:] == pytest.approx([0.1] * 18)


def _optimiser(system: LitLensSystem) -> torch.optim.Optimizer:
    """As a Trainer has it."""
    system.trainer = SimpleNamespace(  # type: ignore[assignment]
        estimated_stepping_batches=10,
        num_training_batches=10,
        accumulate_grad_batches=1,
        precision="32-true",
        fit_loop=SimpleNamespace(setup_data=lambda: None),
        gradient_clip_val=None,
    )
    (optimiser,), _ = system.configure_optimizers()
    assert isinstance(optimiser, torch.optim.Optimizer)
    return optimiser


def test_only_what_a_layer_multiplies_with_decays() -> None:
    """No biases, norms, tokens and positions: without gradients AdamW leaves those as they are."""
    system = LitLensSystem("light_transformer", image_size=32, lr=0.1, weight_decay=0.5, warmup=0.0)
    system.backbone = VisionTransformer(32, 8, 1, 2, 16, 32)
    system.register_module("names", torch.nn.Embedding(3, 4))
    before = {name: value.detach().clone() for name, value in system.named_parameters()}
    for parameter in system.parameters():
        parameter.data += 1
        parameter.grad = torch.zeros_like(parameter)
    optimiser = _optimiser(system)
    optimiser.step()
    decayed = {
        name
        for name, value in system.named_parameters()
        if not torch.equal(value.detach(), before[name] + 1)
    }
    layer = "backbone.encoder.layers.encoder_layer_0"
    assert decayed == {
        *("backbone.conv_proj.weight", "backbone.heads.head.weight", "head.weight"),
        *(f"{layer}.self_attention.{kind}" for kind in ("in_proj_weight", "out_proj.weight")),
        *(f"{layer}.mlp.{place}.weight" for place in (0, 3)),
    }
    for name, value in system.named_parameters():
        factor = 1 - 0.1 * 0.5 if name in decayed else 1
        torch.testing.assert_close(value.detach(), factor * (before[name] + 1))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_a_step_is_fused_where_lightning_can_clip_its_gradients(
    precision: str, clip: float | None
) -> None:
    system = LitLensSystem("lastro", image_size=32, schedule="constant")
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        precision=precision,  # type: ignore[arg-type]
        gradient_clip_val=clip,
        enable_progress_bar=False,
        enable_checkpointing=False,
        logger=False,
    )
    cutouts: Any = [{"image": torch.randn(3, 32, 32), "label": float(i % 2)} for i in range(4)]
    trainer.fit(system, DataLoader(cutouts, batch_size=4))
    (optimiser,) = trainer.optimizers
    assert bool(optimiser.defaults["fused"]) == (precision == "32-true" or clip is None)
