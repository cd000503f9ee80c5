"""Monte Carlo dropout in the head alone: many draws from one pass of the backbone."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lens_pipeline.models.system import LitLensSystem

DRAWS = 20


def dropout_masks(n_features: int, rate: float, draws: int = DRAWS) -> Tensor:
    """Masks float32 (draws, n_features) of inverted dropout, the same at every call.

    All cutouts share them, so a score never depends on the batch that a cutout was in.
    """
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(draws, n_features, generator=generator) >= rate
    return kept.float() / (1 - rate)


@torch.inference_mode()
def member_logits(
    system: LitLensSystem, images: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(logit (n,) without dropout, logits (n, draws) with it) of one member.

    images: (n, bands, height, width) in the units of the stored cutouts. The system is in eval
    mode: no BatchNorm statistic or other buffer moves.
    """
    if system.training:
        raise ValueError("the system must be in eval mode")
    batch = torch.from_numpy(np.array(images, dtype=np.float32)).to(system.device)
    features = system.features(batch).float()
    weight, bias = system.head.weight, system.head.bias
    masks = dropout_masks(features.shape[1], system.dropout.p).to(features.device)
    # Dropout before a linear layer is a draw of its weights.
    drawn = features @ (masks * weight).T + bias
    logit = system.head(features).squeeze(1)
    return logit.cpu().numpy().astype(np.float64), drawn.cpu().numpy().astype(np.float64)
