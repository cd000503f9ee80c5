"""Scores of a survey in a file, part by part: a command that was killed goes on from the parts that
it has finished, and memory holds one of them.

Beside `scores.parquet` lies `scores.parquet.parts` meanwhile, with `part-000000.parquet`, ... of
`ROWS` rows each, and `parts.json`, which says of what they are.
"""

import errno
import importlib.metadata
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, NoReturn

import filelock
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.special import expit

from lens_pipeline.catalogue.dataset import counted_reasons
from lens_pipeline.catalogue.images import CutoutError
from lens_pipeline.catalogue.table import Catalogue
from lens_pipeline.commit import code_commit
from lens_pipeline.ensemble.cutouts import CutoutSource
from lens_pipeline.ensemble.predictor import score_batches, scoring
from lens_pipeline.ensemble.system import BATCH, LensEnsemble
from lens_pipeline.errors import InputError, NoRoomError, masked
from lens_pipeline.steps import digest, file_aside, source_hashes, write_aside

ROWS = 4 * BATCH  # of a part: what a kill costs
TOGETHER = 64  # parts in a row group of the whole
ABOUT = "parts.json"
_KEY = b"lens_pipeline"  # of a Parquet file's metadata
SUFFIXES = (".parquet", ".csv")
CAPTION = 17  # characters of an id that fit over a cutout
PLACE = ["id", "ra", "dec"]  # by which a cutout is found again

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredFile:
    """rejects: how many cutouts could not be used, by reason; top: the table of those with the
    highest scores, gallery: their picture; both where they were asked for."""

    path: Path
    n_rows: int
    n_scored: int
    rejects: Counter[str]
    top: Path | None
    gallery: Path | None


def check_out(out: Path) -> None:
    """Raises InputError where scores cannot be written to this file."""
    if out.parts[0].endswith(":"):  # of a URL, `s3://`, as a path writes it
        raise InputError(f"--out {out}: must be a file on this machine; upload it afterwards")
    if out.suffix not in SUFFIXES:
        raise InputError(f"--out {out}: must end in {' or '.join(SUFFIXES)}")
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; name a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out.parent):
            pass
    except OSError as problem:
        raise InputError(f"--out {out}: cannot be written ({problem.strerror})") from None


def score_to_file(
    ensemble: LensEnsemble,
    source: CutoutSource,
    out: str | Path,
    *,
    model: str,
    top: int = 0,
    max_reject_fraction: float = 1.0,
) -> ScoredFile:
    """Write the score table of a source to a .parquet or .csv file; see `score_catalogue`.

    model: where the ensemble comes from, for people; top: how many of the highest-scored cutouts a
    table and a picture beside the file show; max_reject_fraction: of cutouts that cannot be used.
    Parts of a call that did not end are gone on from. Of what the scores are, `about_scores` tells.
    Raises InputError where the file cannot be written, where the source disagrees with the format
    of the ensemble, where the parts are of another model or source, or another process is writing
    them; and where more cutouts than that, or all, cannot be used: a file that was there before is
    as it was, and what could not be read is tried again. NoRoomError: the disk is full.
    """
    out = Path(out)
    check_out(out)
    source.check(ensemble.format)
    n = len(source.catalogue.table)
    types = _types(source.catalogue, ensemble.columns)
    content = {"uri": model, "content": digest(ensemble.facts)[:32]}
    about = {
        "schema": 1,
        "model": content,
        **source.identity,
        "n_rows": n,
        "rows_of_a_part": ROWS,
        "program": digest(source_hashes([__name__]))[:32],
    }
    may_fail = min(n - 1, int(max_reject_fraction * n))
    with _claimed(out.with_name(f"{out.name}.parts"), about) as (folder, begun):
        parts = [folder / f"part-{number:06d}.parquet" for number in range(-(-n // ROWS))]
        _check_still_true(source, parts, begun)
        rejects = _score_parts(ensemble, source, parts, types, may_fail)
        logit = pd.concat([_column(part, "logit") for part in parts], ignore_index=True)
        listed, gallery = _show_best(ensemble, source, logit, out, top) if top else (None, None)
        whole = folder / f"whole{out.suffix}"
        made = {
            "dataset_version": ensemble.facts["dataset_version"],
            "code_version": importlib.metadata.version("lens-pipeline"),
            "code_commit": code_commit(),
        }
        _put_together(parts, whole, json.dumps(about | made))
        if out.suffix == ".csv":
            write_aside(_beside(out), json.dumps(about | made, indent=1))
        whole.replace(out)
        n_scored = int(logit.notna().sum())
        for part in parts:  # before what says of what they are: a kill leaves no riddle
            part.unlink()
        shutil.rmtree(folder)
    return ScoredFile(out, n, n_scored, rejects, listed, gallery)


def about_scores(file: str | Path) -> dict[str, Any]:
    """Of what the scores in a file of `score_to_file` are: `model` (its URI in the registry, and a
    hash), `dataset_version` that it was trained on, the `catalogue` or shards, `code_version`
    and `code_commit`.

    It is kept in the metadata of a Parquet file, and beside a CSV file. Raises InputError where it
    is not there.
    """
    path = Path(file)
    if path.suffix == ".csv":
        text = _beside(path).read_text() if _beside(path).is_file() else None
    else:
        text = (pq.read_schema(path).metadata or {}).get(_KEY)
    if text is None:
        raise InputError(f"{path}: does not say of what its scores are")
    return dict(json.loads(text))


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


@contextmanager
def _claimed(folder: Path, about: dict[str, Any]) -> Iterator[tuple[Path, float]]:
    """(the folder of the parts, for this process alone, and when the last command there began).
    Raises InputError where it is another's."""
    folder.mkdir(exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"{folder}: another process is scoring into it; wait for it") from None
    try:
        path = folder / ABOUT
        if not path.exists() and any(folder.glob("part-*")):
            raise InputError(f"{folder}: has parts, and no {ABOUT} to say of what; remove it")
        found = _read(path) if path.exists() else about
        for name in sorted(about.keys() | found.keys()):
            if found.get(name) != about.get(name):
                raise InputError(
                    f"{folder}: has parts of another {name.replace('_', ' ')} "
                    f"({_shown(found.get(name))}; now {_shown(about.get(name))}); go on with that, "
                    "name another --out, or remove the folder to begin again"
                )
        begun = path.stat().st_mtime if path.exists() else 0.0
        write_aside(path, json.dumps(about, indent=1))
        yield folder, begun
    finally:
        lock.release()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path}: cannot be read; remove {path.parent} to begin again")
    return found


def _shown(value: Any) -> str:
    return ", ".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def _score_parts(
    ensemble: LensEnsemble,
    source: CutoutSource,
    parts: list[Path],
    types: dict[str, pa.DataType],
    may_fail: int,
) -> Counter[str]:
    """Returns why how many could not be scored."""
    n = len(source.catalogue.table)
    finished = _finished(ensemble, source, parts)
    left = [number for number in range(len(parts)) if number not in finished]
    reasons = Counter(
        reason for number in finished for reason in _column(parts[number], "reject_reason").dropna()
    )
    done = n - sum(min(ROWS, n - number * ROWS) for number in left)
    if done:
        log.info("%s: goes on, %d of %d rows are done", parts[0].parent, done, n)
    with scoring(n, done) as progress:
        for some in np.split(left, np.flatnonzero(np.diff(left) > 1) + 1) if left else []:
            begin, end = some[0] * ROWS, min(n, (some[-1] + 1) * ROWS)
            batches = score_batches(ensemble, source, begin, end)
            for number in some:
                tables = []
                for batch in islice(batches, ROWS // BATCH):
                    tables.append(batch)
                    progress.update(len(batch))
                table = pd.concat(tables)
                schema = pa.schema([(str(name), types[str(name)]) for name in table])
                with _written(parts[number]) as file:
                    pq.write_table(pa.Table.from_pandas(table, schema, preserve_index=False), file)
                reasons.update(table["reject_reason"].dropna())
                if reasons.total() > may_fail:
                    _refuse_rejects(reasons, source, parts, may_fail)
    if reasons.total() > may_fail:
        _refuse_rejects(reasons, source, parts, may_fail)
    return reasons


def _finished(ensemble: LensEnsemble, source: CutoutSource, parts: list[Path]) -> set[int]:
    """The numbers of the parts that are whole, and of which nothing that could not be used then can
    be now, as where a disk was away."""
    n = len(source.catalogue.table)
    whole = [k for k, part in enumerate(parts) if _is_whole(part, min(ROWS, n - k * ROWS))]
    rejected = [k * ROWS + np.flatnonzero(_rejected(parts[k])) for k in whole]
    rows = np.concatenate([*rejected, np.zeros(0, int)])
    read = source.read(ensemble.format, rows) if len(rows) else ()
    again = {
        int(row) // ROWS
        for row, cutout in zip(rows, read, strict=False)
        if not isinstance(cutout, CutoutError)
    }
    return {*whole} - again


def _refuse_rejects(
    reasons: Counter[str], source: CutoutSource, parts: list[Path], may_fail: int
) -> NoReturn:
    """Raises InputError; what was scored is kept, and what could not be is tried again."""
    n = len(source.catalogue.table)
    if all(_rejected(part).all() for part in parts if part.exists()):
        shutil.rmtree(parts[0].parent)
    why = counted_reasons(reasons.elements())
    if reasons.total() == n:
        raise InputError(f"{source.catalogue.source}: none of its {n} cutouts can be used: {why}")
    raise InputError(
        f"{source.catalogue.source}: {reasons.total()} of {n} cutouts cannot be used, or more; "
        f"LENS_MAX_REJECT_FRACTION allows {may_fail}: {why}"
    )


def _rejected(part: Path) -> NDArray[np.bool_]:
    """Which rows of a part could not be used."""
    return _column(part, "reject_reason").notna().to_numpy()


def _check_still_true(source: CutoutSource, parts: list[Path], begun: float) -> None:
    """Raises InputError where an image has changed since its part was made.

    begun: when the command that wrote the last parts did; images are read ahead of their part. What
    could not be used then is tried again, and may have changed.
    """
    times = np.full(len(source.catalogue.table), np.inf)
    for number, part in enumerate(parts):
        if part.exists():
            times[number * ROWS : (number + 1) * ROWS] = min(part.stat().st_mtime, begun)
        if _is_whole(part, len(times[number * ROWS : (number + 1) * ROWS])):
            times[number * ROWS + np.flatnonzero(_rejected(part))] = np.inf
    changed = source.changed_since(times) if np.isfinite(times).any() else None
    if changed is not None:
        raise InputError(
            f"{parts[0].parent}: has scores of {masked(changed)} as it was before it changed; "
            "remove the folder to begin again"
        )


def _is_whole(part: Path, n_rows: int) -> bool:
    try:
        return bool(pq.read_metadata(part).num_rows == n_rows)
    except (OSError, pa.ArrowException):
        return False


def _types(catalogue: Catalogue, columns: list[str]) -> dict[str, pa.DataType]:
    """Of every column, as all rows have it: in a part a column may be empty."""
    try:
        own = pa.Schema.from_pandas(catalogue.table, preserve_index=False)
    except pa.ArrowException as problem:
        raise InputError(
            f"{catalogue.source}: a column holds values of several kinds "
            f"({' '.join(str(problem).split())})"
        ) from None
    scores = dict.fromkeys(columns, pa.float64())
    return dict(zip(own.names, own.types, strict=True)) | scores | {"reject_reason": pa.string()}


def _column(part: Path, name: str) -> pd.Series:
    return pq.ParquetFile(part).read(columns=[name]).to_pandas()[name]


def _put_together(parts: list[Path], out: Path, about: str) -> None:
    with _written(out) as file:
        if out.suffix == ".csv":
            for part in parts:
                table = pq.ParquetFile(part).read().to_pandas()
                table.to_csv(file, header=part is parts[0], index=False, mode="wb")
        else:
            schema = pq.read_schema(parts[0])
            schema = schema.with_metadata({**(schema.metadata or {}), _KEY: about.encode()})
            with pq.ParquetWriter(file, schema) as writer:
                for begin in range(0, len(parts), TOGETHER):
                    some = parts[begin : begin + TOGETHER]
                    tables = [pq.ParquetFile(part).read() for part in some]
                    writer.write_table(pa.concat_tables(tables).cast(schema))


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """See `file_aside`. Raises InputError where it cannot be written."""
    try:
        with file_aside(path) as file:
            yield file
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoRoomError(
                f"{path}: the disk is full; make room, and the same command goes on"
            ) from None
        raise InputError(f"{path}: cannot be written ({problem.strerror})") from None


def _show_best(
    ensemble: LensEnsemble, source: CutoutSource, logit: pd.Series, out: Path, top: int
) -> tuple[Path | None, Path | None]:
    """(the table of the highest-scored cutouts, the best first; their picture)."""
    best = logit.dropna().nlargest(top)
    if best.empty:
        return None, None
    listed = out.with_name(f"{out.stem}.top.csv")
    named = source.catalogue.table.iloc[best.index].reindex(columns=PLACE)
    table = pd.DataFrame({"rank": range(1, len(best) + 1)}, index=best.index)
    table = table.join(named.dropna(axis=1, how="all"))
    table = table.assign(probability=expit(best), logit=best)
    with _written(listed) as file:
        table.to_csv(file, index=False, mode="wb")
    return listed, _draw_gallery(ensemble, source, table, out)


def _draw_gallery(
    ensemble: LensEnsemble, source: CutoutSource, best: pd.DataFrame, out: Path
) -> Path | None:
    """The cutouts of a table of `_show_best` with their ranks, probabilities and ids."""
    from lens_pipeline.evaluation.plots import contact_sheet, jpeg_bytes

    images, captions = [], []
    read = source.read(ensemble.format, best.index.to_numpy())
    for cutout, row in zip(read, best.itertuples(), strict=True):
        if isinstance(cutout, np.ndarray):  # else its file has gone since it was scored
            images.append(cutout)
            captions.append(f"#{row.rank}  {row.probability:.3f}\n{_short(str(row.id))}")
    if not images:
        return None
    gallery = out.with_name(f"{out.stem}.top.jpg")
    figure = contact_sheet(np.stack(images), captions, ensemble.format.units)
    with _written(gallery) as file:
        file.write(jpeg_bytes(figure))
    return gallery


def _short(name: str) -> str:
    """An id that fits over a cutout: of a long one the ends, where ids differ."""
    half = CAPTION // 2
    return name if len(name) <= CAPTION else f"{name[:half]}…{name[-half:]}"
