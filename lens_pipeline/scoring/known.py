"""Known lenses in a survey: where they rank among its cutouts."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.catalogue.known import RADIUS, rows_of_known_lenses
from lens_pipeline.evaluation.plots import png_bytes
from lens_pipeline.evaluation.score_plots import known_lenses_figure
from lens_pipeline.scoring.score_files import (
    FINGERPRINT,
    files_of_known,
    keep_others,
    written,
)
from lens_pipeline.scoring.score_tables import LEARNT_FROM
from lens_pipeline.scoring.scored_rows import ScoredRows

FEWEST = 10  # scored cutouts, for ranks to be worth a picture


@dataclass(frozen=True)
class KnownLenses:
    """path: the table that `show_known` writes; names: of known lenses by the row (from 0) that
    shows them; n_listed: how many the list has; n_in_field: how many of them are in the table,
    n_shown: how many of these have a cutout; n_scored: how many cutouts have a score.

    unseen: the ranks, from 1, of those with a cutout that no member has learnt from, which alone
    tell what it finds; infinite of a lens whose cutouts could not be used.
    """

    path: Path
    names: pd.Series
    n_listed: int
    n_in_field: int
    n_shown: int
    n_scored: int
    unseen: NDArray[np.float64]


def show_known(known: pd.DataFrame, rows: ScoredRows, out: Path) -> KnownLenses:
    """Write a table of the known lenses in the field, and a picture, beside a file of scores.

    known: see `read_known_lenses`; out: the file of the scores. Of several cutouts of a lens the
    highest-scored stands for it; what the list has several times, and is shown by one cutout, is
    one lens.

    Columns: `known`, its names; `rank`, the number of cutouts with its score or a higher one;
    `known_separation` (arcsec), from its cutout or else the nearest one; `learnt_from`, of any of
    its cutouts; what the list says, as `known_ra` and so on; then the columns of the scores, where
    there is a cutout. The highest-scored come first.
    """
    lenses, names = _in_field(known, rows)
    shown = lenses[lenses["shown"]]
    said = known.drop(columns="name").iloc[lenses["lens"]].add_prefix("known_")
    table = lenses[["known", "rank", "known_separation", LEARNT_FROM]]
    said = said.drop(columns=[*table], errors="ignore").reset_index(drop=True)
    table = table.join(said).astype({"rank": "Int64"})
    scores = rows.table(shown["row"].to_numpy())
    table = table.join(scores.drop(columns=[*table, FINGERPRINT], errors="ignore"))
    listed, picture = files_of_known(out)
    keep_others(listed, [*table])
    picture.unlink(missing_ok=True)  # of other scores
    with written(listed) as file:
        table.to_csv(file, index=False)
    unseen = shown["rank"].fillna(np.inf).to_numpy()[~shown[LEARNT_FROM].to_numpy()]
    if len(unseen) and rows.n_scored >= FEWEST:
        with written(picture) as file:
            file.write(png_bytes(known_lenses_figure(unseen, rows.n_scored)))
    return KnownLenses(listed, names, len(known), len(lenses), len(shown), rows.n_scored, unseen)


def _in_field(known: pd.DataFrame, rows: ScoredRows) -> tuple[pd.DataFrame, pd.Series]:
    """(the known lenses in the field, those that are `shown` by a cutout first, by their `rank`;
    `lens` and `row`: their places; what each row is known as)"""
    found = rows_of_known_lenses(rows.catalogue.table, known)
    shown = found["known_separation"] <= RADIUS
    ranks = rows.logit.rank(ascending=False, method="max")
    found = found.assign(
        shown=shown,
        known=known["name"].iloc[found["lens"]].to_numpy(),
        rank=ranks.iloc[found["row"]].where(shown.to_numpy()).to_numpy(),
        **{LEARNT_FROM: rows.learnt[found["row"]] & shown},
    )
    found[LEARNT_FROM] = found.groupby("lens")[LEARNT_FROM].transform("any")
    of_rows = found[shown].sort_values("known_separation").groupby("row")["known"].agg(", ".join)
    order = found.sort_values(["shown", "rank", "known_separation"], ascending=[False, True, True])
    lenses = order.drop_duplicates("lens")
    # What the list has twice is shown by one cutout, and is one lens.
    one = lenses.groupby(lenses["row"].where(lenses["shown"], -1 - lenses["lens"]), sort=False)
    lenses = lenses.assign(
        known=one["known"].transform(", ".join), **{LEARNT_FROM: one[LEARNT_FROM].transform("any")}
    )
    return lenses[one.cumcount() == 0].reset_index(drop=True), of_rows
