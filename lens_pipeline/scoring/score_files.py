"""Files of scores, Parquet or CSV: how they are written, what they say of themselves, which scores
they have, and what lies beside them."""

import csv
import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lens_pipeline.errors import FULL, InputError, NoRoomError, first_of
from lens_pipeline.files import file_aside, file_sha256, write_aside

ROW_GROUP = 1 << 16  # of whole batches
SUFFIXES = (".parquet", ".csv")
FINGERPRINT = "fingerprint"  # of all that decides a row's score: see `ScoredRows`
_KEY = b"lens_pipeline"  # of a Parquet file's metadata
_WRITTEN = b"lens_pipeline.written"  # of it, too: a hash of what was written, and of how many bytes
_SHA256 = "sha256"  # of the CSV file, in what lies beside it
_FORMER = "former"  # what described the CSV file that is about to be replaced

log = logging.getLogger(__name__)


def check_out(out: Path) -> None:
    """Raises InputError where scores cannot be written to this file."""
    if out.suffix not in SUFFIXES:
        raise InputError(f"--out {out}: must end in {' or '.join(SUFFIXES)}")
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; name a file")
    if out.is_file() and out.stat().st_size and not _holds_scores(out):
        raise InputError(f"--out {out}: is there, and holds no scores; name another, or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out.parent):
            pass
    except OSError as problem:
        raise InputError(f"--out {out}: cannot be written ({problem.strerror})") from None


def _holds_scores(path: Path) -> bool:
    """Whether a file has the columns of scores, whoever may have edited it."""
    try:
        csv = path.suffix == ".csv"
        names = pd.read_csv(path, nrows=0).columns if csv else pq.read_schema(path).names
    except (OSError, ValueError, pa.ArrowException):
        return False
    return {"id", "probability", "logit"} <= {*names}


def files_of_best(out: Path) -> tuple[Path, Path]:
    """(the table of the highest-scored cutouts, the page of them) beside a file of scores."""
    return out.with_name(f"{out.stem}.top.csv"), out.with_name(f"{out.stem}.top.html")


def files_of_known(out: Path) -> tuple[Path, Path]:
    """(the table of the known lenses, the picture of their ranks) beside a file of scores."""
    return out.with_name(f"{out.stem}.known.csv"), out.with_name(f"{out.stem}.known.png")


def about_scores(file: str | Path) -> dict[str, Any]:
    """Of what the scores in a file of `score_to_file`, or of an evaluation, are: `model` (its URI
    in the registry, or its folder, and a hash), `dataset_version` that it was trained on, the
    `catalogue` or shards, `code_version` and `code_commit`.

    It is kept in the metadata of a Parquet file, and beside a CSV file. Raises InputError where it
    is not there, or there is no such file.
    """
    if not Path(file).is_file():
        raise InputError(f"{file}: there is no such file")
    try:
        about = _about(Path(file))
    except (OSError, ValueError, pa.ArrowException):
        about = None
    if about is None:
        raise InputError(f"{file}: does not say of what its scores are")
    return {name: value for name, value in about.items() if name != _SHA256}


def about_intact(file: Path) -> dict[str, Any] | None:
    """`about_scores`; None where it is not there, or the file is not as it was written."""
    try:
        about = _about(file)
        # Whoever has edited a table has left what lies beside it, and often the metadata in it.
        if about is None or file.suffix == ".parquet":
            return about if _parquet_intact(file) else None
        return about if about.pop(_SHA256, None) == file_sha256(file) else None
    except (OSError, ValueError, pa.ArrowException):
        return None


def _about(path: Path) -> dict[str, Any] | None:
    with path.open("rb") as file:
        parquet = file.read(4) == b"PAR1"
    if not parquet:
        text = _beside(path).read_text() if _beside(path).is_file() else None
    else:
        text = (pq.read_schema(path).metadata or {}).get(_KEY)
    if text is None:
        return None
    about = dict(json.loads(text))
    former = about.pop(_FORMER, None)
    return former if former and former[_SHA256] == file_sha256(path) else about


def _parquet_intact(path: Path) -> bool:
    metadata = pq.read_metadata(path)
    kept = (metadata.metadata or {}).get(_WRITTEN)
    if kept is None:
        return False
    digest, n_bytes = json.loads(kept)
    return bool(digest == _data_sha256(path, n_bytes, metadata.schema.to_arrow_schema().names))


def _data_sha256(path: Path, n_bytes: int, names: list[str]) -> str:
    """sha256 (hex) of the first so many bytes of a Parquet file, which hold the values of all of
    its columns, and of the names of these."""
    found = hashlib.sha256(json.dumps(names).encode())
    with path.open("rb") as file:
        while some := file.read(min(n_bytes, 2**20)):
            found.update(some)
            n_bytes -= len(some)
    return found.hexdigest()


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def stored_scores(path: Path, columns: list[str]) -> Iterator[pd.DataFrame]:
    """`id`, FINGERPRINT, these columns and `reject_reason` of a file, some rows at a time; nothing
    more where it is damaged, or has no such columns."""
    wanted = ["id", FINGERPRINT, *columns, "reject_reason"]
    try:
        if path.suffix == ".csv":
            yield from pd.read_csv(
                path,
                usecols=wanted,
                dtype=dict.fromkeys(columns, float) | {"id": str, FINGERPRINT: np.int64},
                keep_default_na=False,
                na_values={name: [""] for name in (*columns, "reject_reason")},
                float_precision="round_trip",
                chunksize=ROW_GROUP,
            )
        else:
            with pq.ParquetFile(path) as file:
                if {*wanted} <= {*file.schema_arrow.names}:
                    for batch in file.iter_batches(ROW_GROUP, columns=wanted):
                        yield batch.to_pandas()
    except (OSError, ValueError, pa.ArrowException):
        return


def stored_ids(path: Path) -> Iterator[pd.Series]:
    """The ids of a file of scores, of whatever ensemble, some rows at a time."""
    if path.suffix == ".csv":
        how: dict[str, Any] = {"dtype": str, "keep_default_na": False}
        for table in pd.read_csv(path, usecols=["id"], chunksize=ROW_GROUP, **how):
            yield table["id"]
    else:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROW_GROUP, columns=["id"]):
                yield batch.to_pandas()["id"]


def write_scores(
    out: Path, aside: Path, tables: Iterable[pd.DataFrame], schema: pa.Schema, about: dict[str, Any]
) -> None:
    """Write tables, one after another, as one file.

    aside: where it lies until it is whole, on the disk of `out`; about: see `about_scores`.
    """
    if out.suffix == ".csv":
        with written(aside) as file:
            for number, table in enumerate(tables):
                table.to_csv(file, header=number == 0, index=False, mode="wb")
        about = {**about, _SHA256: file_sha256(aside)}
        former = about_intact(out)
        kept = {} if former is None else {_FORMER: {**former, _SHA256: file_sha256(out)}}
        write_aside(_beside(out), json.dumps(about | kept, indent=1))
        aside.replace(out)
        if kept:
            write_aside(_beside(out), json.dumps(about, indent=1))
    else:
        converted = (pa.Table.from_pandas(t, schema, preserve_index=False) for t in tables)
        first = next(converted)
        schema = with_about(schema.with_metadata(first.schema.metadata), about)
        with written(aside) as file, pq.ParquetWriter(file, schema) as writer:
            for table in chain([first], converted):
                writer.write_table(table)
            file.flush()
            n_bytes = file.tell()
            digest = _data_sha256(Path(file.name), n_bytes, schema.names)
            writer.add_key_value_metadata({_WRITTEN: json.dumps([digest, n_bytes]).encode()})
        aside.replace(out)


def with_about(schema: pa.Schema, about: dict[str, Any]) -> pa.Schema:
    """With what a Parquet file says of its scores, see `about_scores`."""
    return schema.with_metadata({**(schema.metadata or {}), _KEY: json.dumps(about).encode()})


def keep(path: Path) -> Path:
    """A copy of a file that is about to be replaced, and holds what is nowhere else: `name.before`,
    or `name.before-2`, ... where there is one; and of what lies beside it. Returns where it is."""
    names = (f"{path.name}.before{'' if n == 1 else f'-{n}'}" for n in count(1))
    copy = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    for mine, its in ((_beside(path), _beside(copy)), (path, copy)):
        if mine.is_file():
            with mine.open("rb") as kept, written(its) as file:
                shutil.copyfileobj(kept, file)
    return copy


def keep_others(listed: Path, columns: Iterable[str]) -> None:
    """Keep a table that is about to be replaced, if it is there, where it has other columns than
    these: somebody may have added them."""
    if not listed.is_file():
        return
    with listed.open(encoding="utf-8", errors="replace", newline="") as file:
        others = [name for name in next(csv.reader(file), []) if name not in {*columns}]
    if others:
        log.warning(
            "%s has columns that it will not have (%s): as it was it is kept as %s",
            listed, first_of(others), keep(listed),
        )  # fmt: skip


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """See `file_aside`. Raises InputError where it cannot be written."""
    try:
        with file_aside(path) as file:
            yield file
    except OSError as problem:
        if problem.errno in FULL:
            raise NoRoomError(
                f"{path}: the disk is full; make room, and the same command goes on"
            ) from None
        raise InputError(f"{path}: cannot be written ({problem.strerror})") from None
