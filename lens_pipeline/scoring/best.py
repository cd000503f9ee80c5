"""The highest-scored cutouts of a survey: a table and a picture beside its scores."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit

from lens_pipeline.ensemble.system import LensEnsemble
from lens_pipeline.scoring.score_files import keep, written
from lens_pipeline.scoring.sources import CutoutSource

DRAWN = 1000  # of the highest-scored: a JPEG is no higher than 65,500 pixels
CAPTION = 17  # characters of an id that fit over a cutout
PLACE = ["id", "ra", "dec"]  # by which a cutout is found again
COLUMNS = ("rank", *PLACE, "probability", "sky_probability", "logit")

log = logging.getLogger(__name__)


def files_of_best(out: Path) -> tuple[Path, Path]:
    """(the table of the highest-scored cutouts, their picture) beside a file of scores."""
    listed, gallery = (out.with_name(f"{out.stem}.top.{suffix}") for suffix in ("csv", "jpg"))
    return listed, gallery


def show_best(
    ensemble: LensEnsemble, source: CutoutSource, logit: pd.Series, out: Path, top: int
) -> tuple[Path | None, Path | None]:
    """(the table of the highest-scored cutouts, the best first; their picture). Where both are
    there already, and of the same cutouts and scores, they stay.

    logit: of each row, missing where it has none; out: the file of the scores.
    """
    best = logit.dropna().nlargest(top)
    if best.empty:
        return None, None
    listed, gallery = files_of_best(out)
    named = source.catalogue.table.iloc[best.index].set_axis(best.index).reindex(columns=PLACE)
    table = pd.DataFrame({"rank": range(1, len(best) + 1)}, index=best.index)
    table = table.join(named.dropna(axis=1, how="all"))
    on_sky = ensemble.sky_probability(best.to_numpy())
    table = table.assign(probability=expit(best), sky_probability=on_sky, logit=best)
    content = table.to_csv(index=False).encode()
    if gallery.is_file() and listed.is_file() and listed.read_bytes() == content:
        return listed, gallery
    if listed.is_file() and not _is_ours(listed):
        log.warning("%s has columns of yours: as it was it is kept as %s", listed, keep(listed))
    gallery.unlink(missing_ok=True)  # of other cutouts
    with written(listed) as file:
        file.write(content)
    return listed, _draw_gallery(ensemble, source, table, gallery)


def _is_ours(listed: Path) -> bool:
    """Whether a table has the columns of `show_best` alone, whatever else it may be."""
    with listed.open("rb") as file:
        names = file.readline().strip().split(b",")
    return {*names} <= {name.encode() for name in COLUMNS}


def _draw_gallery(
    ensemble: LensEnsemble, source: CutoutSource, best: pd.DataFrame, out: Path
) -> Path | None:
    """The first cutouts of a table of `show_best`, up to DRAWN, with their ranks, probabilities
    (on the sky below) and ids."""
    from lens_pipeline.evaluation.plots import jpeg_bytes
    from lens_pipeline.evaluation.sheets import contact_sheet

    images, captions = [], []
    best = best.head(DRAWN)
    read = source.read(ensemble.format, best.index.to_numpy())
    for cutout, row in zip(read, best.itertuples(), strict=True):
        if isinstance(cutout, np.ndarray):  # else its file has gone since it was scored
            images.append(cutout)
            captions.append(
                f"#{row.rank}  {row.probability:.3f}\nsky {row.sky_probability:.2g}\n"
                f"{_short(str(row.id))}"
            )
    if not images:
        return None
    figure = contact_sheet(np.stack(images), captions, ensemble.format.units)
    with written(out) as file:
        file.write(jpeg_bytes(figure))
    return out


def _short(name: str) -> str:
    """An id that fits over a cutout: of a long one the ends, where ids differ."""
    half = CAPTION // 2
    return name if len(name) <= CAPTION else f"{name[:half]}…{name[-half:]}"
