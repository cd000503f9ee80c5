"""The highest-scored cutouts of a survey: a table, and a page to grade them on."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit

from lens_pipeline.ensemble.system import LensEnsemble
from lens_pipeline.scoring.score_files import keep, written
from lens_pipeline.scoring.sources import CutoutSource

SHOWN = 1000  # of the highest-scored: of 64 pixels and three bands the page has 13 MB then
PLACE = ["id", "ra", "dec"]  # by which a cutout is found again
COLUMNS = ("rank", *PLACE, "probability", "sky_probability", "logit")

log = logging.getLogger(__name__)


def files_of_best(out: Path) -> tuple[Path, Path]:
    """(the table of the highest-scored cutouts, the page of them) beside a file of scores."""
    listed, page = (out.with_name(f"{out.stem}.top.{suffix}") for suffix in ("csv", "html"))
    return listed, page


def show_best(
    ensemble: LensEnsemble,
    source: CutoutSource,
    logit: pd.Series,
    out: Path,
    top: int,
    model: str,
) -> tuple[Path | None, Path | None]:
    """(the table of the highest-scored cutouts, the best first; the page of them). Where both are
    there already, and of the same cutouts and scores, they stay.

    logit: of each row, missing where it has none; out: the file of the scores; model: as in
    `score_to_file`.
    """
    best = logit.dropna().nlargest(top)
    if best.empty:
        return None, None
    listed, page = files_of_best(out)
    named = source.catalogue.table.iloc[best.index].set_axis(best.index).reindex(columns=PLACE)
    table = pd.DataFrame({"rank": range(1, len(best) + 1)}, index=best.index)
    table = table.join(named.dropna(axis=1, how="all"))
    on_sky = ensemble.sky_probability(best.to_numpy())
    table = table.assign(probability=expit(best), sky_probability=on_sky, logit=best)
    content = table.to_csv(index=False).encode()
    if page.is_file() and listed.is_file() and listed.read_bytes() == content:
        return listed, page
    if listed.is_file() and not _is_ours(listed):
        log.warning("%s has columns of yours: as it was it is kept as %s", listed, keep(listed))
    page.unlink(missing_ok=True)  # of other cutouts
    with written(listed) as file:
        file.write(content)
    return listed, _write_page(ensemble, source, table, page, f"{out.name} by {model}")


def _is_ours(listed: Path) -> bool:
    """Whether a table has the columns of `show_best` alone, whatever else it may be."""
    with listed.open("rb") as file:
        names = file.readline().strip().split(b",")
    return {*names} <= {name.encode() for name in COLUMNS}


def _write_page(
    ensemble: LensEnsemble, source: CutoutSource, best: pd.DataFrame, out: Path, about: str
) -> Path | None:
    """Of the first cutouts of a table of `show_best`, up to SHOWN."""
    from lens_pipeline.evaluation.inspection import inspection_page

    best = best.head(SHOWN)
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
    page = inspection_page(
        out.name.removesuffix(".top.html"),
        about,
        best.loc[list(found)].drop(columns="logit"),
        np.stack(list(found.values())),
        form.units,
        form.bands,
    )
    with written(out) as file:
        file.write(page.encode())
    return out
