"""How the learning rate moves over a training: a warm-up, and what comes after it."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau

WARM_START = 0.04  # of the peak, for a plateau's warm-up


def schedule(
    optimiser: Optimizer,
    name: str,
    *,
    steps: float,
    per_epoch: float,
    warmup: float,
    decay: float,
    decay_epochs: int,
) -> list[dict[str, Any]]:
    """Lightning's schedulers for a rate that rises for `warmup` of all steps, to the optimiser's.

    steps: of the training; per_epoch: of an epoch; infinite where that is not known, which a cosine
    and a warm-up need, and a `step`.
    name: `cosine` then falls to zero (Loshchilov & Hutter 2017); `step` falls by the factor `decay`
    every `decay_epochs` epochs from then on, `plateau` when the validation loss has not fallen for
    as many; `constant` stays.
    """
    rising = max(1, round(warmup * steps)) if warmup else 0
    if name == "plateau":
        warm = LinearLR(optimiser, WARM_START, total_iters=rising) if rising else None
        # torch waits for one more than its patience.
        falling = ReduceLROnPlateau(optimiser, factor=decay, patience=decay_epochs - 1)
        by_step = [{"scheduler": warm, "interval": "step"}] if warm else []
        # Not strict: of an epoch that is not validated there is none.
        by_epoch = {"interval": "epoch", "monitor": "val/loss", "strict": False}
        return [*by_step, {"scheduler": falling, **by_epoch}]

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        if name == "cosine":
            done = min(1.0, (step - rising) / max(1, steps - rising))
            return (1 + math.cos(math.pi * done)) / 2
        if name == "step":
            return decay ** ((step - rising) // max(1, math.ceil(per_epoch)) // decay_epochs)
        return 1.0

    return [{"scheduler": LambdaLR(optimiser, factor), "interval": "step"}]
