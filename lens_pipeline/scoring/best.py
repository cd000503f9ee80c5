"""The highest-scored cutouts of a survey: a table, and a page to grade them on."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from lens_pipeline.catalogue.dataset import CutoutFormat
from lens_pipeline.ensemble.system import LensEnsemble
from lens_pipeline.scoring.score_files import FINGERPRINT, files_of_best, keep_others, written
from lens_pipeline.scoring.score_tables import tell_of_replaced
from lens_pipeline.scoring.scored_rows import ScoredRows
from lens_pipeline.scoring.sources import CutoutSource

SHOWN = 1000  # of the highest-scored: of 64 pixels and three bands the page has 13 MB then
MOST_VALUES = 50_000_000  # of their pixels: browsers open such a page within seconds
# What people look for first, of a table of the highest-scored; `known`: which lens it is already.
FIRST = ["rank", "id", "known", "ra", "dec"]
OURS = ["rank", "known"]


def n_shown(form: CutoutFormat) -> int:
    """How many of the highest-scored cutouts a page shows at most."""
    return min(SHOWN, MOST_VALUES // math.prod(form.shape))


def show_best(
    ensemble: LensEnsemble,
    source: CutoutSource,
    rows: ScoredRows,
    out: Path,
    top: int,
    model: str,
    known: pd.Series | None,
) -> tuple[Path | None, Path | None]:
    """(the table of the highest-scored cutouts, the best first; the page of them). Where both are
    there already, and of the same cutouts and scores, they stay.

    rows: of the source; out: the file of the scores; model: as in `score_to_file`; known: names of
    known lenses, by the row that shows them, where there is a list of them.
    """
    best = rows.logit.dropna().nlargest(top).index
    if best.empty:
        return None, None
    listed, page = files_of_best(out)
    tell_of_replaced(source.catalogue, OURS, "the highest-scored")
    table = rows.table(best.to_numpy()).set_index(best).drop(columns=["reject_reason", FINGERPRINT])
    table = table.drop(columns=OURS, errors="ignore").assign(rank=range(1, len(best) + 1))
    if known is not None:
        table["known"] = known.reindex(best)
    first = [name for name in FIRST if name in table]
    table = table[[*first, *table.columns.difference(first, sort=False)]]
    could_be = [*table, *OURS]
    table = table.dropna(axis=1, how="all")
    content = table.to_csv(index=False).encode()
    if page.is_file() and listed.is_file() and listed.read_bytes() == content:
        return listed, page
    keep_others(listed, could_be)
    page.unlink(missing_ok=True)  # of other cutouts
    with written(listed) as file:
        file.write(content)
    return listed, _write_page(ensemble, source, table, page, f"{out.name} by {model}")


def _write_page(
    ensemble: LensEnsemble, source: CutoutSource, best: pd.DataFrame, out: Path, about: str
) -> Path | None:
    """Of the first cutouts of a table of `show_best`, as many as `n_shown`."""
    from lens_pipeline.evaluation.inspection import inspection_page

    best = best.head(n_shown(ensemble.format))
    read = source.read(ensemble.format, best.index.to_numpy())
    found = {
        row: cutout
        for row, cutout in zip(best.index, read, strict=True)
        if isinstance(cutout, np.ndarray)
    }
    if not found:  # their files have gone since they were scored
        return None
    form = ensemble.format
    if form.pixel_scale is not None:
        about += f"; cutouts are {form.image_size * form.pixel_scale:.1f} arcsec across"
        table = source.catalogue.table
        if "pixel_scale" not in table or table["pixel_scale"].isna().all():
            about += f", if their pixels are of {form.pixel_scale:g} arcsec, as the model's"
    page = inspection_page(
        out.name.removesuffix(".top.html"),
        about,
        best.loc[list(found)].drop(columns=source.catalogue.image_columns, errors="ignore"),
        np.stack(list(found.values())),
        form.units,
        form.bands,
    )
    with written(out) as file:
        file.write(page.encode())
    return out
