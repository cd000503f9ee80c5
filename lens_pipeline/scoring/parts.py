"""Scores of a survey in a file, part by part, each row once: a command that was killed goes on from
the parts that it has finished, and one whose catalogue has grown from the file of the last.

Beside `scores.parquet` lies `scores.parquet.parts` meanwhile, with `part-000000.parquet`, ... of up
to `ROWS` rows each, whichever they are, and `parts.json`, which says of what they are.
"""

import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lens_pipeline.catalogue.columns import parquet_schema
from lens_pipeline.catalogue.cutout import CutoutError
from lens_pipeline.catalogue.dataset import counted_reasons
from lens_pipeline.catalogue.known import check_placed
from lens_pipeline.catalogue.table import Catalogue
from lens_pipeline.ensemble.system import LensEnsemble
from lens_pipeline.errors import InputError
from lens_pipeline.locations import meant_as_url
from lens_pipeline.models.system import BATCH
from lens_pipeline.scoring.best import show_best
from lens_pipeline.scoring.claim import LOCK, Share, claimed
from lens_pipeline.scoring.known import KnownLenses, show_known
from lens_pipeline.scoring.likeness import tell_of_unlike
from lens_pipeline.scoring.score_files import (
    FINGERPRINT,
    about_intact,
    check_out,
    keep,
    stored_ids,
    stored_scores,
    write_scores,
    written,
)
from lens_pipeline.scoring.score_tables import (
    LEARNT_FROM,
    score_batches,
    scoring,
    tell_of_replaced,
)
from lens_pipeline.scoring.scored_rows import (
    OF_ROWS,
    ScoredRows,
    made_by,
    model_hash,
    scoring_program,
)
from lens_pipeline.scoring.sources import CutoutSource
from lens_pipeline.storage import FEW

ROWS = 4 * BATCH  # of a part: what a kill costs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredFile:
    """n_scored: of the n_rows, how many have a score; n_left: how many were left to other shares,
    and are not done yet; n_learnt: how many the model was trained or validated on; rejects: how
    many cutouts could not be used, by reason.

    written: whether the file was: not where it is all that it would be, nor of a share. top: the
    table of those with the highest scores, page: shows them; both, and the known lenses, where they
    were asked for.
    """

    path: Path
    n_rows: int
    n_scored: int
    n_left: int
    n_learnt: int
    rejects: Counter[str]
    written: bool
    top: Path | None
    page: Path | None
    known: KnownLenses | None


def score_to_file(
    ensemble: LensEnsemble,
    source: CutoutSource,
    out: str | Path,
    *,
    model: str,
    top: int = 0,
    known: pd.DataFrame | None = None,
    max_reject_fraction: float = 1.0,
    share: Share | None = None,
) -> ScoredFile:
    """Write the score table of a source to a .parquet or .csv file; see `score_catalogue`.

    model: where the ensemble comes from, for people; top: how many of the highest-scored cutouts a
    table and a page beside the file show; known: lenses (see `read_known_lenses`) whose ranks a
    table and a picture beside it show; max_reject_fraction: of cutouts that cannot be used; share:
    score these rows alone, and leave the file, and what lies beside it, to a call without one.

    Rows that the file has already, and those of a call that did not end, are not scored again: the
    same cutout, as it was, by the same model and program. Its column `fingerprint` is a hash of all
    that, `learnt_from` whether the model was trained or validated on the cutout's group; of what
    the scores are, `about_scores` tells.

    Raises InputError where the file cannot be written, where the source disagrees with the format
    of the ensemble, or says no places to find known lenses at, where the parts are of another model
    or source, or another process is writing them; and where more cutouts than that, or all, cannot
    be used: a file that was there before is as it was, and what could not be read is tried again.
    NoRoomError: the disk is full.
    """
    # Of a link: what it leads to is replaced, not the link, and lies on the disk of the parts.
    if meant_as_url(str(out)):
        raise InputError(f"{out}: must be a file on this machine; upload it afterwards")
    out = Path(out).resolve()
    check_out(out)
    source.check(ensemble.format)
    catalogue = source.catalogue
    if known is not None:
        check_placed(catalogue)
    tell_of_replaced(catalogue, [*ensemble.columns, *OF_ROWS])
    n = len(catalogue.table)
    schema = _schema(catalogue, ensemble.columns)
    about = {
        "schema": 3,
        "model": {"uri": model, "content": model_hash(ensemble)},
        **source.identity,
        "n_rows": n,
        "program": scoring_program(ensemble),
    }
    folder = out.with_name(f"{out.name}.parts")
    with claimed(folder, _of_parts(about), share):
        rows = ScoredRows(ensemble, source)
        before = about_intact(out) if out.exists() else None
        in_file, n_others = np.zeros(n, dtype=bool), 0
        if before is not None:
            if (former := before["model"]["uri"]) != model:
                log.info("%s: scores of %s give way to those of %s", out, former, model)
            elif before["model"] != about["model"]:  # as of two homes, whose versions are counted
                log.warning(
                    "%s: scores of another model that is called %s, too, give way", out, model
                )
            taken, unknown = _take_file(rows, out, source, ensemble.columns)
            in_file[taken] = True
            # Of another catalogue the scores of other rows than here are nowhere else. It may have
            # taken the former's place, under the same name.
            another = before["catalogue"]["source"] != about["catalogue"]["source"]
            if another or unknown > before["n_rows"] / 2:
                n_others = unknown
            elif unknown:
                log.info("%s: %d of its rows are no more in the catalogue, and go", out, unknown)
        in_parts, n_gone = _take_parts(rows, folder, ensemble.columns)
        in_file[in_parts] = False
        if n_gone and not share:
            log.info(
                "%s: %d scores are of cutouts that have changed or gone, or of other copies of "
                "their image files", folder, n_gone,
            )  # fmt: skip
        order = source.order
        mine = order[share.rows(n, ROWS)] if share else order
        _forget_what_passes(ensemble, source, rows, np.intersect1d(rows.may_pass, mine))
        in_file &= rows.known
        may_fail = min(n - 1, int(max_reject_fraction * n))
        rejects = _score(ensemble, source, rows, mine, _names(folder, share), may_fail)
        if rejects.total() > may_fail:
            if not share and not rows.n_scored:
                _remove(folder)
            _refuse_rejects(rows, source, max_reject_fraction, may_fail)
        if share:
            _take_parts(rows, folder, ensemble.columns)
            listed, page, lenses, stays = None, None, None, True
        else:
            stays = before is not None and bool(in_file.all()) and about.items() <= before.items()
            if not stays:
                if out.exists() and (before is None or n_others):
                    what = f"{n_others} scores of other rows" if n_others else "other values"
                    log.warning("%s holds %s: as it was it is kept as %s", out, what, keep(out))
                aside = folder / f"whole{out.suffix}"
                write_scores(out, aside, rows.tables(), schema, about | made_by(ensemble))
            lenses = None if known is None else show_known(known, rows, out)
            names = None if lenses is None else lenses.names
            listed, page = (
                show_best(ensemble, source, rows, out, top, model, names) if top else (None,) * 2
            )
            _remove(folder)
    n_left = int((~rows.known).sum())
    of_rows = (n, rows.n_scored, n_left, int(rows.learnt.sum()), rows.reasons)
    return ScoredFile(out, *of_rows, not stays, listed, page, lenses)


def _take_file(
    rows: ScoredRows, out: Path, source: CutoutSource, columns: list[str]
) -> tuple[NDArray[np.integer], int]:
    """(the rows that a file of scores has; how many of its own are none of the source's)."""
    if rows.n_untold:
        log.info(
            "%s: of %d of %d rows it is not known whether their images have changed, and they are "
            "scored again: their store does not tell, or is a server that would have to be asked "
            "for more than %d files", source.catalogue.source, rows.n_untold, len(rows.known), FEW,
        )  # fmt: skip
    taken = [np.zeros(0, int)]
    for stored in stored_scores(out, columns):
        taken.append(rows.take(stored, of_a_stopped_command=False))
    return np.concatenate(taken), sum(rows.n_unknown(ids) for ids in stored_ids(out))


def _of_parts(about: dict[str, Any]) -> dict[str, Any]:
    """What the parts in a folder have in common, however their catalogue grows. The padding is in
    the fingerprint of each row: who was refused for small cutouts asks again with it. schema: of
    parts, which are other tables than what they become."""
    common = {name: value for name, value in about.items() if name not in ("n_rows", "padding")}
    return {**common, "schema": 2, "catalogue": {"source": about["catalogue"]["source"]}}


def _take_parts(
    rows: ScoredRows, folder: Path, columns: list[str]
) -> tuple[NDArray[np.integer], int]:
    """(the rows that they have; how many of their scores are of no row)."""
    taken, n_scores = [np.zeros(0, int)], 0
    for part in sorted(folder.glob("part-*.parquet")):
        for stored in stored_scores(part, columns):
            taken.append(rows.take(stored, of_a_stopped_command=True))
            n_scores += int(stored["reject_reason"].isna().sum())
    found = np.unique(np.concatenate(taken))
    return found, max(0, n_scores - int((~rows.rejected[found]).sum()))


def _forget_what_passes(
    ensemble: LensEnsemble, source: CutoutSource, rows: ScoredRows, tried: NDArray[np.integer]
) -> None:
    """Try again to read what could not be read, and forget what was said of it where it can, or
    fails for another reason."""
    if not len(tried):
        return
    others = []
    with scoring(len(tried), what="trying again") as progress:
        for row, cutout in zip(tried, source.read(ensemble.format, tried), strict=True):
            if not isinstance(cutout, CutoutError) or str(cutout) != rows.reason(row):
                others.append(row)
            progress.update()
    rows.forget(np.array(others, dtype=int))


def _score(
    ensemble: LensEnsemble,
    source: CutoutSource,
    rows: ScoredRows,
    mine: NDArray[np.integer],
    names: Iterable[Path],
    may_fail: int,
) -> Counter[str]:
    """Score what is left of some rows, each part into a file of the next name, until more than
    `may_fail` of all cannot be used. Returns why how many cannot."""
    left = mine[~rows.known[mine]]
    tell_of_unlike(ensemble, source, left)
    whole, others = _whole_batches(left, source.order)
    done = len(mine) - len(left)
    if 0 < done < len(mine):
        log.info("%s: goes on, %d of %d rows are done", source.catalogue.source, done, len(mine))
    rejects = rows.reasons
    ids = source.catalogue.table["id"].to_numpy()
    pieces = [piece for piece in (whole, others) if len(piece)]
    batches = itertools.chain.from_iterable(score_batches(ensemble, source, p) for p in pieces)
    parts = (
        piece[begin : begin + ROWS] for piece in pieces for begin in range(0, len(piece), ROWS)
    )
    with scoring(len(mine), done) as progress:
        for some, name in zip(parts, names, strict=False):
            if rejects.total() > may_fail:
                break
            tables = []
            for batch in itertools.islice(batches, math.ceil(len(some) / BATCH)):
                tables.append(batch)
                progress.update(len(batch))
            scores = pd.concat(tables)
            own = pd.DataFrame({"id": ids[some], FINGERPRINT: rows.fingerprint[some]}, index=some)
            types = {"id": pa.string(), FINGERPRINT: pa.int64()} | _types(ensemble.columns)
            with written(name) as file:
                part = pd.concat([own, scores], axis=1).reset_index(drop=True)
                pq.write_table(pa.Table.from_pandas(part, pa.schema(types)), file)
            rows.put(some, scores)
            rejects.update(scores["reject_reason"].dropna())
    return rejects


def _whole_batches(
    left: NDArray[np.integer], order: NDArray[np.integer]
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """(these of the rows in an order whose batch is left as a whole, and is as it would be in an
    undisturbed command, and so, to the bit, their scores; the others)"""
    batch_of = np.empty(len(order), int)
    batch_of[order] = np.arange(len(order)) // BATCH
    sizes, batch = np.bincount(batch_of), batch_of[left]
    whole = (np.bincount(batch, minlength=len(sizes)) == sizes)[batch]
    return left[whole], left[~whole]


def _names(folder: Path, share: Share | None) -> Iterator[Path]:
    """Of parts that are not there yet."""
    prefix = f"part-{share.name}-" if share else "part-"
    names = (folder / f"{prefix}{number:06d}.parquet" for number in itertools.count())
    return itertools.dropwhile(Path.exists, names)


def _refuse_rejects(
    rows: ScoredRows, source: CutoutSource, fraction: float, may_fail: int
) -> NoReturn:
    """Raises InputError; what was scored is kept, and what could not be read is tried again."""
    ids, reasons = source.catalogue.table["id"], rows.reasons
    n, first = len(ids), int(np.argmax(rows.rejected))
    why = (
        f"{counted_reasons(reasons.elements())}; the first is row {first + 1}, id {ids.iloc[first]}"
    )
    if reasons.total() == n:
        raise InputError(f"{source.catalogue.source}: none of its {n} cutouts can be used: {why}")
    raise InputError(
        f"{source.catalogue.source}: at least {reasons.total()} of {n} cutouts cannot be used, and "
        f"LENS_MAX_REJECT_FRACTION={fraction:g} allows {may_fail}: {why}. With "
        "LENS_MAX_REJECT_FRACTION=1 the scores list all of them, with their reject_reason"
    )


def _schema(catalogue: Catalogue, columns: list[str]) -> pa.Schema:
    """Of the whole table, by all of its rows: of some of them a column may be empty."""
    own = catalogue.table.drop(columns=[*columns, *OF_ROWS], errors="ignore")
    types = parquet_schema(own, catalogue.source)
    known = dict(zip(types.names, types.types, strict=True))
    first = {name: known.pop(name) for name in ("id", "label")}
    of_rows = {LEARNT_FROM: pa.bool_(), FINGERPRINT: pa.int64()}
    return pa.schema(first | _types(columns) | of_rows | known)


def _types(columns: list[str]) -> dict[str, pa.DataType]:
    return dict.fromkeys(columns, pa.float64()) | {"reject_reason": pa.string()}


def _remove(folder: Path) -> None:
    """Remove what is in a folder; `claimed` removes the folder itself."""

    def order(path: Path) -> int:
        # What says of what the parts are goes after them, for a kill to leave no riddle; and last
        # the lock, for who takes it next to be alone.
        return 2 if path.name == LOCK else 0 if path.name.startswith("part-") else 1

    for path in sorted(folder.iterdir(), key=order):
        with suppress(OSError):  # NFS keeps what is open under another name until it is closed
            path.unlink()
