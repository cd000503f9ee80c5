"""Whether cutouts are like those that an ensemble has learnt from: it has a score for any image."""

import logging
import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.catalogue.cutout import CutoutError
from lens_pipeline.catalogue.drift import changes, standard_errors, statistics_of
from lens_pipeline.ensemble.learnt import FEWEST, LEARNT_PIXELS, looked_at, most
from lens_pipeline.ensemble.system import LensEnsemble
from lens_pipeline.scoring.sources import CutoutSource

Errors = Mapping[str, Mapping[str, float]]  # see `standard_errors`
SURELY = 4.0  # standard errors
NAMED = 3  # differences, the largest first
IN_WORDS = {
    "median": "sky level",
    "sigma": "noise",
    "bright": "brightness",
    "noise_correlation": "correlation of adjacent pixels' noise",
}

log = logging.getLogger(__name__)


def _excess(found: pd.DataFrame, *errors: Errors) -> NDArray[np.float64]:
    """Of `changes`, how many times what is allowed they are; 0 of what chance may have made."""
    names = found[["band", "statistic"]].itertuples(index=False)
    error = [
        math.hypot(*(one[band][name] if band in one else math.inf for one in errors))
        for band, name in names
    ]
    surely = (found["now"] - found["before"]).abs() > SURELY * np.array(error)
    return np.where(surely, found["change"] / found["at_most"], 0.0)


def tell_of_unlike(ensemble: LensEnsemble, source: CutoutSource, rows: NDArray[np.integer]) -> None:
    """Warns where a sample of some rows of a source differs from all that the ensemble has learnt
    from by more than `drift.MOST`, and than by chance: the light of its sky, noise or galaxies,
    band by band."""
    learnt = ensemble.facts.get(LEARNT_PIXELS)  # which an earlier release did not write
    if not learnt or len(rows) < FEWEST:
        return
    form = ensemble.format
    read = source.read(form, source.sample(rows, most(form)))
    usable = [looked_at(pixels) for pixels in read if not isinstance(pixels, CutoutError)]
    if len(usable) < FEWEST:
        return
    images = np.stack(usable)
    now, errors = statistics_of(images, form.bands), standard_errors(images, form.bands)
    differ = [changes(one["statistics"], now) for one in learnt]
    excess = [
        _excess(found, one["errors"], errors) for found, one in zip(differ, learnt, strict=True)
    ]
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
