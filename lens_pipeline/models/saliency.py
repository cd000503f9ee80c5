"""Where a network looks: what its logit owes to each pixel of a cutout."""

import numpy as np
import torch
from numpy.typing import NDArray

from lens_pipeline.catalogue.cutout import SIGMA_UNITS
from lens_pipeline.models.system import LitLensSystem, stretch

DRAWS = 8
BATCH = 16
# Of the stored units: as much again as the background has, or a tenth of a composite's range.
NOISE = {SIGMA_UNITS: 1.0}
COMPOSITE_NOISE = 0.1


def smooth_grad(
    system: LitLensSystem,
    images: NDArray[np.floating],
    *,
    draws: int = DRAWS,
    noise: float | None = None,
) -> NDArray[np.float32]:
    """Saliency maps (n, height, width) of cutouts (n, bands, height, width), in the stored units.

    How much the logit changes with the network's input, the stretched flux, in a pixel: the
    gradient, averaged over `draws` copies with noise of that standard deviation, so that what hangs
    on one pixel's noise cancels (SmoothGrad; Smilkov et al. 2017, arXiv:1706.03825), and its
    absolute value, summed over bands. (By the stored flux instead, every map would first of all
    show the stretch: no galaxy, only its sky.) Needs no layer of a certain kind, and so is the same
    for convolutions and transformers. It is of the cutout as it lies, also where scores are by
    test-time augmentation, which would take eight times as long. It says where a network is
    sensitive, not what it takes for an arc.

    The system is in eval mode; no weight, gradient of a weight or buffer of it changes.
    """
    if system.training:
        raise ValueError("the system must be in eval mode")
    units = system.hparams["units"]
    if noise is None:
        noise = NOISE.get(units, COMPOSITE_NOISE)
    # The same noise for every cutout: a map does not depend on the batch that it was in.
    shape = (draws, *images.shape[1:])
    deviates = torch.from_numpy(np.random.default_rng(0).standard_normal(shape, np.float32))
    maps = []
    for start in range(0, len(images), BATCH):
        batch = torch.from_numpy(np.array(images[start : start + BATCH], dtype=np.float32))
        total = torch.zeros_like(batch)
        for deviate in deviates:
            noisy = (batch + noise * deviate).to(system.device)
            stretched = stretch(noisy, units).requires_grad_()
            with torch.enable_grad():
                logit = system.head(system.of_stretched(stretched)).sum()
            total += torch.autograd.grad(logit, stretched)[0].cpu()
        maps.append((total / draws).abs().sum(dim=1).numpy())
    return np.concatenate(maps) if maps else np.zeros((0, *images.shape[2:]), np.float32)
