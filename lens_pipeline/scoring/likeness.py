"""Whether cutouts are like those that an ensemble has learnt from: it has a score for any image."""

import logging
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.catalogue.cutout import CutoutError
from lens_pipeline.catalogue.dataset import CutoutFormat
from lens_pipeline.catalogue.drift import changes, statistics_of
from lens_pipeline.ensemble.system import LensEnsemble
from lens_pipeline.evaluation.origins import by_origin
from lens_pipeline.scoring.sources import CutoutSource, ScoredDataset

LOOKED_AT = 2**20  # pixels of a band: 256 cutouts of 64 x 64
FEWEST = 50  # cutouts: of fewer, single galaxies decide
NAMED = 3  # differences, the largest first
IN_WORDS = {
    "median": "sky level",
    "sigma": "noise",
    "bright": "brightness",
    "noise_correlation": "correlation of adjacent pixels' noise",
}

log = logging.getLogger(__name__)


def _most(form: CutoutFormat) -> int:
    return max(FEWEST, LOOKED_AT // form.image_size**2)


def learnt_pixels(dataset: ScoredDataset, simulation: bool) -> list[dict[str, Any]]:
    """What the cutouts of the training split are like, for JSON: of each survey, of real and of
    simulated ones, `cutouts` (whose, in words) and their `statistics` (see `statistics_of`).

    simulation: all are simulated, see `by_origin`.
    """
    split, table = dataset.split("train"), dataset.table("train")
    found = []
    for origin, rows in by_origin(table, simulation).items():
        survey = rows["survey"].fillna("") if "survey" in rows else pd.Series("", rows.index)
        for name, places in rows.groupby(survey).groups.items():
            # Beside each other, and so in few shards, which hold cutouts in a random order.
            images = split.gather(np.asarray(places[: _most(dataset.format)])).astype(np.float32)
            whose = f"{origin} cutouts of {name}" if name else f"{origin} cutouts"
            statistics = statistics_of(images, dataset.format.bands)
            found.append({"cutouts": whose, "statistics": statistics})
    return found


def tell_of_unlike(ensemble: LensEnsemble, source: CutoutSource, rows: NDArray[np.integer]) -> None:
    """Warns where a sample of some rows of a source differs from all that the ensemble has learnt
    from by more than `drift.MOST`: the light of its noise or galaxies, band by band."""
    learnt = ensemble.facts.get("learnt_pixels")  # which an earlier release did not write
    if not learnt or len(rows) < FEWEST:
        return
    form = ensemble.format
    read = source.read(form, source.sample(rows, _most(form)))
    usable = [pixels for pixels in read if not isinstance(pixels, CutoutError)]
    if len(usable) < FEWEST:
        return
    now = statistics_of(np.stack(usable), form.bands)
    differ = [changes(one["statistics"], now) for one in learnt]
    excess = [(found["change"] / found["at_most"]).to_numpy() for found in differ]
    nearest = int(np.argmin([one.max(initial=0) for one in excess]))
    largest = np.argsort(-excess[nearest], kind="stable")
    far = largest[excess[nearest][largest] > 1]
    if not far.size:
        return
    said = [
        f"{IN_WORDS[row['statistic']]} of {row['band']} {row['now']:.3g} ({row['before']:.3g})"
        for _, row in differ[nearest].iloc[far[:NAMED]].iterrows()
    ]
    more = f", and {len(far) - NAMED} more" if len(far) > NAMED else ""
    log.warning(
        "%s: the cutouts are unlike the %s that the model has learnt from (in brackets), and its "
        "probabilities may not hold for them: %s%s",
        *(source.catalogue.source, learnt[nearest]["cutouts"], ", ".join(said), more),
    )
