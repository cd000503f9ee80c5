"""What the members say of cutouts, and how sure each is."""

import numpy as np
import torch
from numpy.typing import NDArray

from lens_pipeline.models.system import LensClassifier


@torch.inference_mode()
def member_logits(
    system: LensClassifier, images: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(logit (n,) without dropout, logits (n, draws) with it) of one member.

    images: (n, bands, height, width) in the units of the stored cutouts. The system is in eval
    mode: no BatchNorm statistic or other buffer moves.
    """
    if system.training:
        raise ValueError("the system must be in eval mode")
    batch = torch.from_numpy(np.array(images, dtype=np.float32)).to(system.device)
    logit, drawn = system.drawn_logits(batch)
    return logit.cpu().numpy().astype(np.float64), drawn.cpu().numpy().astype(np.float64)
