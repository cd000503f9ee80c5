"""The scores of a dataset, or of a catalogue that memory holds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lens_pipeline.catalogue.splits import PARTS
from lens_pipeline.catalogue.table import Catalogue, read_catalogue
from lens_pipeline.ensemble.system import LensEnsemble
from lens_pipeline.errors import InputError
from lens_pipeline.models.system import BATCH
from lens_pipeline.scoring.likeness import tell_of_unlike
from lens_pipeline.scoring.score_tables import has_learnt_from, score_batches, score_table, scoring
from lens_pipeline.scoring.sources import CatalogueCutouts, ScoredDataset


def score_dataset(
    ensemble: LensEnsemble, dataset: ScoredDataset, catalogue: Catalogue
) -> pd.DataFrame:
    """Scores of every cutout of a dataset, labelled or not, with its `split`.

    See `score_catalogue` for the columns. Raises InputError where the dataset is of other rows.
    """
    tables = [dataset.table(part) for part in PARTS]
    listed = pd.concat([*(t[["id", "row"]] for t in tables), dataset.rejects()[["id", "row"]]])
    if listed.sort_values("row")["id"].tolist() != catalogue.table["id"].tolist():
        raise InputError(
            f"{catalogue.source}: the catalogue has changed since the dataset was made; "
            "make processed_dataset again"
        )
    scores = []
    with scoring(len(catalogue.table)) as progress:
        for part in PARTS:
            for images in dataset.split(part).in_order(BATCH):
                scores.append(ensemble.predict(images))
                progress.update(len(images))
    rows = pd.concat([t["row"] for t in tables])
    rejects = dataset.rejects().set_index("row")["reason"]
    learnt = has_learnt_from(ensemble, catalogue)
    table = score_table(catalogue, pd.concat(scores).set_axis(rows), rejects, learnt)
    splits = np.repeat(PARTS, [len(t) for t in tables]).astype(object)
    table["split"] = pd.Series(splits, index=rows).reindex(table.index)
    return table


def score_catalogue(
    ensemble: LensEnsemble,
    catalogue: Catalogue | pd.DataFrame | str | Path,
    options: dict[str, Any] | None = None,
    *,
    pad: bool = False,
) -> pd.DataFrame:
    """Scores of a catalogue, or of what `read_catalogue` takes, read as the training set was.

    options: fsspec's, for its URLs; pad: see `build_dataset`.

    Columns: id, label, those of `ensemble.columns`, reject_reason, learnt_from (whether the members
    have trained or validated on the row's group), then the catalogue's own; the index is that of
    its table. A cutout that cannot be used has null scores and a reject_reason.
    Raises InputError where the catalogue has no rows or disagrees with the format of the ensemble.
    Of more rows than memory holds the scores: `score_to_file`.
    """
    if not isinstance(catalogue, Catalogue):
        catalogue = read_catalogue(catalogue, options)
    source = CatalogueCutouts(catalogue, options or {}, pad)
    source.check(ensemble.format)
    rows = np.arange(len(catalogue.table))
    tell_of_unlike(ensemble, source, rows)
    with scoring(len(rows)) as progress:
        batches = []
        for batch in score_batches(ensemble, source, rows):
            batches.append(batch)
            progress.update(len(batch))
    scores = pd.concat(batches)
    own = replace(catalogue, table=catalogue.table.reset_index(drop=True))
    rejects = scores.pop("reject_reason")
    table = score_table(own, scores, rejects, has_learnt_from(ensemble, own))
    return table.set_axis(catalogue.table.index)
