"""The optimiser of all systems: what decays, and how its steps are computed."""

from typing import Any

import torch
from torch import nn

FUSED = {"cpu", "cuda"}  # devices


def adamw(system: nn.Module, lr: float, weight_decay: float, fused: bool) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) of all parameters; see `parameter_groups`.

    fused: in one pass over memory, where the device can.
    """
    on = {parameter.device.type for parameter in system.parameters()}
    # None, for False would keep it from taking several parameters at a time, too.
    one_pass = True if fused and on <= FUSED else None
    return torch.optim.AdamW(parameter_groups(system, weight_decay), lr=lr, fused=one_pass)


def parameter_groups(system: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of an optimiser: the weights that a layer multiplies with, which decay, and the
    rest, which do not: biases, scales of norms and layers, tokens, and embeddings of positions.

    What such a parameter is for needs a size that has nothing to do with overfitting.
    """
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in system.named_parameters():
        owner, _, kind = name.rpartition(".")
        embeds = isinstance(system.get_submodule(owner), nn.Embedding)
        multiplies = kind.endswith("weight") and parameter.ndim >= 2 and not embeds
        (decaying if multiplies else others).append(parameter)
    return [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
