"""Score tables: one row per catalogue row, in its order. What is here, and what it imports, decides
on scores: a row is scored again where any of it has changed."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.catalogue.cutout import CutoutError
from lens_pipeline.catalogue.table import Catalogue
from lens_pipeline.ensemble.system import LensEnsemble
from lens_pipeline.errors import InputError
from lens_pipeline.models.system import BATCH
from lens_pipeline.progress import progress_bar
from lens_pipeline.scoring.sources import CutoutSource

LEARNT_FROM = "learnt_from"  # whether the members have trained or validated on the row's group

log = logging.getLogger(__name__)


def score_batches(
    ensemble: LensEnsemble, source: CutoutSource, rows: NDArray[np.integer]
) -> Iterator[pd.DataFrame]:
    """Scores of some rows of a source (from 0), BATCH at a time and in this order: the columns of
    the ensemble and `reject_reason`, indexed by row.

    What else is in its batch may move the last digits of a score.
    """
    cutouts = source.read(ensemble.format, rows)
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH].tolist()
        good: dict[int, NDArray[np.float32]] = {}
        rejects: dict[int, str] = {}
        for row, cutout in zip(some, cutouts, strict=False):
            if isinstance(cutout, CutoutError):
                rejects[row] = str(cutout)
            else:
                good[row] = cutout
        scores = (
            ensemble.predict(np.stack(list(good.values()))).set_index(pd.Index(good))
            if good
            else pd.DataFrame(columns=ensemble.columns, dtype=float)
        )
        without = scores.index[~np.isfinite(scores["logit"].to_numpy())]
        if len(without):
            raise InputError(
                f"the model gives no number for {len(without)} of {len(good)} cutouts, the first "
                f"is {source.catalogue.table['id'].iloc[without[0]]}; train its members again"
            )
        reasons = pd.Series(rejects, dtype=object).reindex(some)
        yield scores.reindex(some).assign(reject_reason=reasons)


def has_learnt_from(ensemble: LensEnsemble, catalogue: Catalogue) -> NDArray[np.bool_]:
    """Whether its members have trained or validated on the group of each row (n,)."""
    return catalogue.table["group"].isin(ensemble.groups).to_numpy()


def score_table(
    catalogue: Catalogue, scores: pd.DataFrame, rejects: pd.Series, learnt: NDArray[np.bool_]
) -> pd.DataFrame:
    """The table of `predictor.score_catalogue`. scores (the columns of the ensemble alone) and
    rejects are indexed as the catalogue; learnt: see `has_learnt_from`."""
    own = catalogue.table
    tell_of_replaced(catalogue, [*scores, "reject_reason", LEARNT_FROM])
    table = pd.concat([own[["id", "label"]], scores.reindex(own.index)], axis=1)
    table["reject_reason"] = rejects.reindex(own.index)
    table[LEARNT_FROM] = learnt
    return pd.concat([table, own.drop(columns=table.columns, errors="ignore")], axis=1)


def tell_of_replaced(catalogue: Catalogue, ours: list[str], what: str = "the scores") -> None:
    """Warns of columns of a catalogue that its scores have, too, unless it is a score file: of one,
    of the members of another model, which are carried along."""
    replaced = [name for name in ours if name in catalogue.table]
    if {"probability", "reject_reason"} <= {*replaced}:
        found = [str(name) for name in catalogue.table]
        others = {name for name in found if name.startswith("probability_")} - {*ours}
        if others:
            log.warning(
                "%s: holds scores of another model, whose columns %s are carried along as they "
                "are", catalogue.source, ", ".join(sorted(others)),
            )  # fmt: skip
    elif replaced:
        log.warning(
            "%s: %s have columns of their own named %s, and those of the catalogue are not carried "
            "along; rename them to keep them", catalogue.source, what, ", ".join(replaced),
        )  # fmt: skip


def scoring(total: int, done: int = 0, what: str = "scoring") -> Any:
    """See `progress_bar`."""
    return progress_bar(total=total, initial=done, desc=what, unit="cutout")
