"""The noise of an image's background, which is the unit that flux is stored in."""

from typing import Any

import numpy as np
from astropy.stats import mad_std, sigma_clip
from numpy.typing import NDArray

LAG = 3  # pixels


def background_sigma(band: NDArray[Any]) -> float:
    """Standard deviation of the background of one image, its unit that of the pixels.

    1.4826 times the median absolute deviation, after three rounds of clipping at 3 sigma, of mixed
    second differences, I(x, y) - I(x + d, y) - I(x, y + d) + I(x + d, y + d), over 2: of the smooth
    light of a galaxy, which may fill the cutout, they leave little. d is LAG: nearer pixels of a
    resampled image have noise in common.
    """
    values = band.astype(np.float64)
    rows = values[LAG:] - values[:-LAG]
    differences = (rows[:, LAG:] - rows[:, :-LAG]) / 2
    differences = differences[np.isfinite(differences)]
    kept = sigma_clip(differences, sigma=3, maxiters=3, stdfunc="mad_std", masked=False)
    return float(mad_std(kept))
