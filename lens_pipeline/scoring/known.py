"""Known lenses in a survey: where they rank among its cutouts."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.catalogue.known import rows_of_known_lenses
from lens_pipeline.evaluation.plots import png_bytes
from lens_pipeline.evaluation.score_plots import known_lenses_figure
from lens_pipeline.scoring.score_files import FINGERPRINT, keep_additions, written
from lens_pipeline.scoring.scored_rows import ScoredRows


@dataclass(frozen=True)
class KnownLenses:
    """path: the table of those with a cutout, as `show_known` writes it; names: by the row (from 0)
    that shows one; n_listed: how many the list has; n_shown: how many of them have a cutout;
    n_scored: how many cutouts are ranked.

    unseen: the ranks, from 1, of those that no member has learnt from, which alone tell what it
    finds; infinite of a lens whose cutouts could not be used.
    """

    path: Path
    names: pd.Series
    n_listed: int
    n_shown: int
    n_scored: int
    unseen: NDArray[np.float64]


def files_of_known(out: Path) -> tuple[Path, Path]:
    """(the table of the known lenses, the picture of their ranks) beside a file of scores."""
    listed, picture = (out.with_name(f"{out.stem}.known.{suffix}") for suffix in ("csv", "png"))
    return listed, picture


def show_known(
    known: pd.DataFrame, rows: ScoredRows, seen: frozenset[str], out: Path
) -> KnownLenses:
    """Write a table of the known lenses that have a cutout, and a picture, beside a file of scores.

    known: see `read_known_lenses`; seen: the groups that the members have learnt from; out: the
    file of the scores. Of several cutouts of a lens the highest-scored stands for it.

    Columns: `name`, `ra`, `dec` as listed, `separation` from the cutout's position (arcsec), `rank`
    (1: no cutout has a higher score), `learnt_from` (whether the members have trained or validated
    on its group), then those of the scores; the highest-scored first.
    """
    found = rows_of_known_lenses(rows.catalogue.table, known)
    # Of ties the first row ranks first, as where the best are listed.
    ranks = rows.logit.rank(ascending=False, method="first")
    found = found.assign(rank=ranks.iloc[found["row"]].to_numpy())
    nearest = found.sort_values("separation", kind="stable").drop_duplicates("row")
    names = pd.Series(known["name"].to_numpy()[nearest["lens"]], index=nearest["row"], dtype=object)
    best = found.sort_values(["rank", "separation"], kind="stable").drop_duplicates("lens")
    scores = rows.table(best["row"].to_numpy())
    learnt_from = scores["group"].isin(seen)
    table = known.iloc[best["lens"]].reset_index(drop=True)
    table = table.assign(
        separation=best["separation"].to_numpy(),
        rank=best["rank"].astype("Int64").to_numpy(),
        learnt_from=learnt_from,
    )
    table = table.join(scores.drop(columns=[*table, FINGERPRINT], errors="ignore"))
    listed, picture = files_of_known(out)
    keep_additions(listed, [*table, *rows.catalogue.table])
    picture.unlink(missing_ok=True)  # of other scores
    with written(listed) as file:
        table.to_csv(file, index=False)
    unseen = best["rank"].fillna(np.inf).to_numpy()[~learnt_from.to_numpy()]
    n_scored = int(ranks.notna().sum())
    if len(unseen) and n_scored:
        with written(picture) as file:
            file.write(png_bytes(known_lenses_figure(unseen, n_scored)))
    return KnownLenses(listed, names, len(known), len(table), n_scored, unseen)
