"""The Lightning system: stretch, augmentation, dropout, checkpoints."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lens_pipeline
from lens_pipeline.models.system import LitLensSystem, load_system, stretch


def test_the_stretch_is_the_same_for_every_image() -> None:
    """Nothing is normalised image by image: a cutout's input does not depend on its neighbours."""
    images = torch.tensor([[1.0, 50.0], [3.0, 3.0]])
    both = stretch(images, "background_sigma")
    torch.testing.assert_close(both, torch.arcsinh(images / 2))
    torch.testing.assert_close(both[:1], stretch(images[:1], "background_sigma"))
    torch.testing.assert_close(
        stretch(torch.tensor([0.0, 0.5, 1.0]), "composite"), torch.tensor([-2.0, 0.0, 2.0])
    )


def test_dropout_is_in_the_head_alone() -> None:
    system = LitLensSystem("resnet18", image_size=32)
    rates = {
        name: module.p
        for name, module in system.named_modules()
        if isinstance(module, torch.nn.Dropout)
    }
    assert rates == {"dropout": 0.3}
    transformer = LitLensSystem("light_transformer", image_size=32)
    inner = [m.p for m in transformer.backbone.modules() if isinstance(m, torch.nn.Dropout)]
    assert not any(inner)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "executed",))  # type: ignore[return-value]

    path = tmp_path / "best.ckpt"
    torch.save({"state_dict": Payload()}, path)
    with pytest.raises(pickle.UnpicklingError):
        load_system(path)
    assert not (tmp_path / "executed").exists()


def test_the_entry_point_of_the_library_makes_a_network_of_an_architecture() -> None:
    assert lens_pipeline.LitLensSystem is LitLensSystem
    system = lens_pipeline.LitLensSystem(
        arch="resnet18", lr=1e-3, weight_decay=1e-4, dropout_rate=0.5
    )
    assert system(torch.from_numpy(np.zeros((2, 3, 64, 64), np.float32))).shape == (2,)


@pytest.mark.parametrize("total", [*range(1, 25), 50, 100])
def test_the_learning_rate_rises_then_falls_for_any_number_of_steps(total: int) -> None:
    system = LitLensSystem("lastro", lr=0.1, warmup=0.1, image_size=32)
    system.trainer = SimpleNamespace(estimated_stepping_batches=total)  # type: ignore[assignment]
    found = system.configure_optimizers()
    optimiser, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(total):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step() if len(rates) < max(4, total) else None
    peak = int(np.argmax(rates))
    assert (np.diff(rates[: peak + 1]) > 0).all()
    assert (np.diff(rates[peak:]) < 0).all()
    if total >= 4:
        assert rates[peak] == pytest.approx(0.1, rel=0.01)
        assert 0 < peak < total - 1
