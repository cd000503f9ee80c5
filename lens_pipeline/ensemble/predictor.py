"""Score tables: one row per catalogue row, in its order."""

from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from tqdm import tqdm

from lens_pipeline.catalogue.dataset import PARTS, CutoutFormat
from lens_pipeline.catalogue.images import CutoutError
from lens_pipeline.catalogue.reading import read_cutouts
from lens_pipeline.catalogue.table import Catalogue
from lens_pipeline.ensemble.system import BATCH, LensEnsemble
from lens_pipeline.errors import InputError


class ScoredDataset(Protocol):
    """What is scored: a processed dataset (see `Dataset`), or shards seen as one.

    folder: where it lies, a path or a URL; images: float32 (n, bands, height, width) of a split, by
    slices and arrays of places; table: their rows.
    """

    @property
    def folder(self) -> Path | str: ...

    @property
    def format(self) -> CutoutFormat: ...

    @property
    def facts(self) -> dict[str, Any]: ...

    def images(self, part: str, /) -> Any: ...

    def table(self, part: str, /) -> pd.DataFrame: ...

    def rejects(self) -> pd.DataFrame: ...


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
    scores, splits = [], []
    with _progress(len(catalogue.table)) as progress:
        for part in PARTS:
            images, rows = dataset.images(part), dataset.table(part)["row"]
            for start in range(0, len(images), BATCH):
                batch = np.asarray(images[start : start + BATCH])
                scores.append(ensemble.predict(batch).set_index(rows[start : start + BATCH]))
                progress.update(len(batch))
            splits.append(pd.Series(part, index=rows, dtype=str))
    rejects = dataset.rejects().set_index("row")["reason"]
    table = _score_table(catalogue, ensemble.columns, scores, rejects)
    table["split"] = pd.concat(splits).reindex(table.index)
    return table


def score_catalogue(
    ensemble: LensEnsemble,
    catalogue: Catalogue,
    options: dict[str, Any] | None = None,
    *,
    pad: bool = False,
) -> pd.DataFrame:
    """Scores of a catalogue, read as the training set was; pad: see `build_dataset`.

    Columns: id, label, probability, logit, std, entropy, probability_<member>, reject_reason, then
    the catalogue's own. A cutout that cannot be used has null scores and a reject_reason.
    """
    form = ensemble.format
    scores: list[pd.DataFrame] = []
    rejects: dict[int, str] = {}
    stream = read_cutouts(
        catalogue, form.image_size, bands=form.named_bands, pad=pad, options=options
    )
    while batch := list(islice(stream, BATCH)):
        good: dict[int, Any] = {}
        for row, cutout in batch:
            try:
                if isinstance(cutout, CutoutError):
                    raise cutout
                good[row] = form.fitted(cutout).pixels
            except CutoutError as reason:
                rejects[row] = str(reason)
        if good:
            scores.append(ensemble.predict(np.stack(list(good.values()))).set_index(pd.Index(good)))
    return _score_table(catalogue, ensemble.columns, scores, pd.Series(rejects, dtype=str))


def _score_table(
    catalogue: Catalogue, columns: list[str], scores: list[pd.DataFrame], rejects: pd.Series
) -> pd.DataFrame:
    own = catalogue.table
    all_scores = pd.concat(scores) if scores else pd.DataFrame(columns=columns, dtype=float)
    table = pd.concat([own[["id", "label"]], all_scores.reindex(own.index)], axis=1)
    table["reject_reason"] = rejects.reindex(own.index)
    return pd.concat([table, own.drop(columns=[c for c in table if c in own])], axis=1)


def _progress(total: int) -> Any:
    return tqdm(total=total, desc="scoring", unit="cutout", disable=None)
