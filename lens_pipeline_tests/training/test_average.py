"""The moving average of the weights."""

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from lens_pipeline_tests.training.small import small_config, train_on


class _Weights(Callback):
    """Those before the first step and after each."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._look(module)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == len(self.seen):
            self._look(module)

    def _look(self, module: LightningModule) -> None:
        self.seen.append({name: v.double().clone() for name, v in module.state_dict().items()})


def test_an_average_of_the_weights_soon_forgets_the_untrained_ones(
    uneven_shards: Path, tmp_path: Path
) -> None:
    """By the formula of TensorFlow's ExponentialMovingAverage with its `num_updates`."""
    weights = _Weights()
    config = small_config(epochs=2, ema=0.999, accumulate_grad_batches=2)
    trained = train_on(config, uneven_shards, tmp_path, weights)
    average, *steps = weights.seen
    assert len(steps) == 2 * 3
    for t, now in enumerate(steps):
        decay = min(0.999, (1 + t) / (10 + t))
        average = {name: decay * average[name] + (1 - decay) * now[name] for name in now}
    kept = torch.load(trained.folder / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in kept.items():
        expected = average[name] if value.is_floating_point() else steps[-1][name]
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)


def test_an_average_of_the_weights_asks_for_no_number(uneven_shards: Path, tmp_path: Path) -> None:
    """For which the host would wait until a GPU has done all it was given."""

    class Asked(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            self.n += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    class Watch(Callback):
        def __init__(self) -> None:
            self.asked = Asked()

        def on_train_start(self, *_: Any) -> None:
            self.asked.__enter__()

        def on_train_epoch_end(self, *_: Any) -> None:
            self.asked.__exit__(None, None, None)

    found = []
    for ema in (0.0, 0.9):
        watch = Watch()
        config = small_config(epochs=1, ema=ema, limit_val_batches=1, monitor="val/loss")
        train_on(config, uneven_shards, tmp_path / str(ema), watch)
        found.append(watch.asked.n)
    assert found[0] == found[1] > 0
