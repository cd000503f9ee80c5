"""Monte Carlo dropout in the head alone: many draws from one pass of the backbone."""

import torch
from torch import Tensor, nn

DRAWS = 20


def dropout_masks(n_features: int, rate: float) -> Tensor:
    """Masks float32 (DRAWS, n_features) of inverted dropout, the same at every call.

    All cutouts share them, so a score never depends on the batch that a cutout was in.
    """
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(DRAWS, n_features, generator=generator) >= rate
    return kept.float() / (1 - rate)


def dropout_draws(features: Tensor, head: nn.Linear, rate: float) -> Tensor:
    """Logits (n, DRAWS) of features (n, n_features), each draw behind a mask of its own."""
    masks = dropout_masks(features.shape[1], rate).to(features.device)
    # Dropout before a linear layer is a draw of its weights.
    return features @ (masks * head.weight).T + head.bias
