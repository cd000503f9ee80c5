"""What the pixels are like that an ensemble has learnt from, for others to be compared with."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.catalogue.cutout import central
from lens_pipeline.catalogue.dataset import CutoutFormat, Split
from lens_pipeline.catalogue.drift import standard_errors, statistics_of
from lens_pipeline.evaluation.origins import by_origin

LEARNT_PIXELS = "learnt_pixels"  # in ensemble.json
LOOKED_AT = 2**20  # pixels of a band: 256 cutouts of 64 x 64, and of larger ones
FEWEST = 100  # cutouts: of fewer there is little to tell
SIDE = 128  # pixels: the middle of larger cutouts tells as much


def most(form: CutoutFormat) -> int:
    """How many cutouts are looked at."""
    return max(256, LOOKED_AT // form.image_size**2)


def looked_at(images: NDArray[np.floating]) -> NDArray[np.float32]:
    """The part of images (..., height, width) that is looked at."""
    return central(images, SIDE).astype(np.float32)


def learnt_pixels(
    split: Split, table: pd.DataFrame, form: CutoutFormat, simulation: bool
) -> list[dict[str, Any]]:
    """What the cutouts of a training split are like, for JSON: of each survey, of real and of
    simulated ones, `cutouts` (whose, in words), their `statistics` (see `statistics_of`) and the
    `errors` of these. Of fewer than FEWEST nothing is told.

    table: their rows, in their order; simulation: all are simulated, see `by_origin`.
    """
    found = []
    for origin, rows in by_origin(table, simulation).items():
        survey = rows["survey"].fillna("") if "survey" in rows else pd.Series("", rows.index)
        for name, places in rows.groupby(survey).groups.items():
            if len(places) < FEWEST:
                continue
            # The first of them, which lie in few shards: these hold cutouts in a random order.
            images = looked_at(split.gather(np.asarray(places[: most(form)])))
            whose = f"{origin} cutouts of {name}" if name else f"{origin} cutouts"
            found.append(
                {
                    "cutouts": whose,
                    "statistics": statistics_of(images, form.bands),
                    "errors": standard_errors(images, form.bands),
                }
            )
    return found
