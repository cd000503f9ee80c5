"""Catalogues of cutouts: reading, schema and validation.

A catalogue is a CSV, Parquet, FITS or VOTable file, or a folder laid out `{split}/{lens,nonlens}/`
or with `{split}.csv` (columns `filepath,label`), or of images alone, which have no label.
"""

import hashlib
import io
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.catalogue.splits import assign_splits
from lens_pipeline.errors import InputError
from lens_pipeline.storage import TABLES, asking, locate

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = (
    *(".fits", ".fit", ".fz", ".fits.gz", ".fit.gz", ".npy", ".npz"),
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff"),
)
LOOKED_AT = 10_000  # rows, for numbers that are not meant as such
TEXT_COLUMNS = ("id", "path", "label", "group", "split", "survey", "flux_unit")
CLASS_FOLDERS = {"lens": "1", "nonlens": "0"}


@dataclass(frozen=True)
class Catalogue:
    """A validated table, one row a cutout, in the user's order.

    table: its index the number of the row at its source, from 0; `id` (text, unique), the image
    columns (`path`, or `path_<band>` for each band; absolute paths or URLs), `label` (nullable
    Int8: 1 lens, 0 not, missing unknown), `group` (text), `split` (text or missing), `survey` where
    it is given (text or missing), `simulated` likewise (nullable boolean: missing is not), and the
    user's further columns as they were.
    """

    table: pd.DataFrame
    source: str

    @property
    def image_columns(self) -> list[str]:
        return _image_columns(self.table)

    @property
    def references(self) -> list[str]:
        """Every image path, in row order."""
        return [str(path) for path in self.table[self.image_columns].to_numpy().ravel()]

    @property
    def bands(self) -> list[str] | None:
        """Names of the bands where the columns tell them, else None.

        By `path_<band>`, or by one value of a column `bands`, as `g,r,i`.
        """
        columns = self.image_columns
        if columns != ["path"]:
            return [name.removeprefix("path_") for name in columns]
        stated = set(self.table["bands"].dropna()) if "bands" in self.table else set()
        return _split_names(stated.pop()) if len(stated) == 1 else None

    def bands_of(self, rows: NDArray[np.integer]) -> list[list[str] | None]:
        """Those of each of some rows (from 0), which need not be the same, nor in one order; where
        a row says nothing, those that all others say."""
        common = self.bands
        if self.image_columns != ["path"] or "bands" not in self.table:
            return [common] * len(rows)
        stated = self.table["bands"].iloc[rows]
        return [common if pd.isna(names) else _split_names(names) for names in stated]

    def of_surveys(self, names: Sequence[str], split_seed: int) -> "Catalogue":
        """The rows of these surveys, each in the split that it has among all: a group may show one
        galaxy in several surveys.

        Raises InputError where a survey has no rows.
        """
        if "survey" not in self.table:
            raise InputError(
                f"{self.source}: column survey is missing, which would tell the rows of "
                f"{', '.join(names)}"
            )
        survey = self.table["survey"]
        for name in names:
            if not (survey == name).any():
                known = ", ".join(map(repr, sorted(survey.dropna().unique()))) or "nothing"
                raise InputError(
                    f"{self.source}: column survey: no row is of {name!r}; it names {known}"
                )
        split = assign_splits(self.table, split_seed)
        whole = self.table.assign(split=split.where(self.table["label"].notna(), None))
        return Catalogue(whole[survey.isin(names)], f"{self.source} ({', '.join(names)})")


def _split_names(text: Any) -> list[str]:
    return [name.strip() for name in str(text).split(",")]


def read_catalogue(path: str | Path, storage_options: Mapping[str, Any] | None = None) -> Catalogue:
    """Read and validate a catalogue from a local path or an fsspec URL.

    Raises InputError, naming file, row and column, for: a missing or unreadable source, an empty
    table, no `id` or image column, a duplicate or missing id, a missing path, a label other than 1,
    0 or empty, an unknown split, a group with two splits, a `simulated` that is neither true nor
    false; NoAnswerError where its store fails.
    """
    source = str(path)
    options = dict(storage_options or {})
    try:
        filesystem, inside = locate(source, options)
        with asking(source):
            is_folder = filesystem.isdir(inside)
        if is_folder:
            with asking(source):
                table, folder = _read_folder(source, filesystem, inside), source
        else:
            table, folder = _read_table(source, options), posixpath.dirname(source)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{source}: there is no such file or folder") from None
    except Exception as problem:  # noqa: BLE001  (each store and format has errors of its own)
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise InputError(f"{source}: cannot be read as a catalogue ({reason})") from None
    return Catalogue(_validated(table, source, folder or "."), source)


def source_fingerprint(source: str, storage_options: Mapping[str, Any] | None = None) -> str:
    """sha256 of a catalogue file; of the listing and the split tables where it is a folder.

    Raises InputError where there is no such file or folder, NoAnswerError where its store fails.
    """
    try:
        with asking(source):
            return _fingerprint(source, storage_options)
    except FileNotFoundError:
        raise InputError(f"{source}: there is no such file or folder") from None
    except InputError:
        raise
    except Exception as problem:  # noqa: BLE001  (each store has errors of its own)
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise InputError(f"{source}: cannot be read ({reason})") from None


def _fingerprint(source: str, storage_options: Mapping[str, Any] | None) -> str:
    filesystem, inside = locate(source, storage_options)
    if not filesystem.isdir(inside):
        return hashlib.sha256(filesystem.cat_file(inside)).hexdigest()
    # What `_read_folder` looks at: other things may lie there, LENS_HOME among them.
    listings = [posixpath.join(inside, f"{split}.csv") for split in SPLITS]
    tables = [filesystem.cat_file(name) for name in listings if filesystem.exists(name)]
    folders = [posixpath.join(inside, split) for split in SPLITS]
    names = sorted(name for part in folders for name in filesystem.find(part))
    if not names and not tables:
        names = _images_in(filesystem, inside)
    return hashlib.sha256(b"\0".join([*(n.encode() for n in names), *tables])).hexdigest()


def _read_table(source: str, options: dict[str, Any]) -> pd.DataFrame:
    suffix = posixpath.splitext(source)[1].lower()
    if suffix not in TABLES:
        raise InputError(
            f"{source}: a catalogue is a folder or one of {', '.join(TABLES)}; convert it"
        )
    filesystem, inside = locate(source, options)
    with asking(source):
        content = io.BytesIO(filesystem.cat_file(inside))
    if suffix == ".csv":
        return _read_csv(content, source)
    if suffix == ".parquet":
        return pd.read_parquet(content)
    from astropy.table import Table

    table = Table.read(content, format="fits" if suffix.startswith(".fit") else "votable")
    wide = [name for name in table.colnames if table[name].ndim > 1]
    if wide:
        raise InputError(f"{source}: column {wide[0]} holds arrays; drop it or split it")
    frame = table.to_pandas()
    for name in frame.select_dtypes("object"):
        frame[name] = frame[name].map(lambda v: v.decode() if isinstance(v, bytes) else v)
    return frame


def _read_csv(content: io.BytesIO, source: str) -> pd.DataFrame:
    try:
        header = pd.read_csv(content, nrows=0).columns
    except pd.errors.EmptyDataError:
        raise InputError(f"{source}: the file is empty; a header with `id` is needed") from None
    content.seek(0)
    # Only an empty field is a missing one: an id may be "NA". A comma that ends every row makes no
    # column an index, and whole columns are looked at before they are taken for numbers.
    how: dict[str, Any] = {
        **{"keep_default_na": False, "na_values": [""], "index_col": False, "low_memory": False},
    }
    first = pd.read_csv(content, dtype=str, nrows=LOOKED_AT, **how)
    content.seek(0)
    text = {
        name: str
        for name in header
        if name in TEXT_COLUMNS
        or name.startswith("path_")
        or first[name]
        .astype("string")
        .str.fullmatch(r"0\d+")
        .any()  # a number would lose its zeros
    }
    table = pd.read_csv(content, dtype=text, **how)
    content.seek(0)
    # A column with an empty field is read as floats, which hold 15 digits: other surveys' ids have
    # more.
    floats = table.select_dtypes("float64")
    lossy = [name for name in floats if (floats[name].abs() >= 2**53).any()]
    if lossy:
        exact = pd.read_csv(content, dtype=str, usecols=lossy, **how)
        for name in lossy:
            table[name] = pd.to_numeric(exact[name], dtype_backend="numpy_nullable")
    return table


def _read_folder(source: str, filesystem: fsspec.AbstractFileSystem, inside: str) -> pd.DataFrame:
    rows: list[dict[str, str]] = []
    tables: list[pd.DataFrame] = []
    for split in SPLITS:
        listing = posixpath.join(inside, f"{split}.csv")
        if filesystem.exists(listing):
            with filesystem.open(listing, "rb") as file:
                table = _read_csv(io.BytesIO(file.read()), listing)
            missing = {"filepath", "label"} - set(table)
            if missing:
                raise InputError(f"{listing}: column {sorted(missing)[0]} is missing")
            paths = _text(table["filepath"])
            table = table.assign(path=paths, split=split, label=_labels(table, listing))
            tables.append(table.drop(columns="filepath"))
            continue  # the listing says what of the split's folders belongs to it
        for kind, label in CLASS_FOLDERS.items():
            folder = posixpath.join(inside, split, kind)
            if filesystem.isdir(folder):
                for name in _images_in(filesystem, folder):
                    path = f"{split}/{kind}/{name}"
                    rows.append({"id": path, "path": path, "label": label, "split": split})
    if not rows and not tables:
        rows = [{"id": name, "path": name} for name in _images_in(filesystem, inside)]
    if rows:
        tables.append(pd.DataFrame(rows))
    if not tables:
        raise InputError(
            f"{source}: no cutouts; a folder holds images, or train|val|test/lens|nonlens/ with "
            "them, or train.csv ..."
        )
    found = pd.concat(tables, ignore_index=True)
    # Of listings that number their rows each for itself, paths are the ids.
    own = _text(found["id"]) if "id" in found else pd.Series(None, index=found.index, dtype=object)
    told_apart = own.notna().all() and own.is_unique
    return found.assign(id=own if told_apart else found["path"])


def _images_in(filesystem: fsspec.AbstractFileSystem, folder: str) -> list[str]:
    names = (posixpath.basename(name) for name in filesystem.ls(folder, False))
    return sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES))


def _validated(table: pd.DataFrame, source: str, folder: str) -> pd.DataFrame:
    if table.empty:
        raise InputError(f"{source}: the table has no rows")
    images = _image_columns(table)
    if "id" not in table:
        raise InputError(f"{source}: column id is missing; it has {', '.join(map(str, table))}")
    if not images:
        raise InputError(f"{source}: column path (or path_<band> for each band) is missing")
    table = table.reset_index(drop=True)
    for name in ("id", *images):
        table[name] = _text(table[name])
        _refuse(source, table, table[name].isna(), name, "is empty")
    _refuse(source, table, table["id"].duplicated(), "id", "is there twice; ids must be unique")
    table["label"] = _labels(table, source)
    if "survey" in table:
        survey = _text(table["survey"]).map(str.strip, na_action="ignore")
        table["survey"] = survey.replace("", None)
    if "simulated" in table:
        table["simulated"] = _zero_or_one(table, "simulated", source).astype("boolean")
    for name in images:
        table[name] = [_join(folder, path) for path in table[name]]
    table["split"] = _text(table["split"]) if "split" in table else pd.array([None] * len(table))
    unknown = table["split"].notna() & ~table["split"].isin(SPLITS)
    _refuse(source, table, unknown, "split", "must be train, val, test or empty")
    # A cutout of no group is a group of its own.
    group = _text(table["group"]) if "group" in table else table["id"]
    table["group"] = group.fillna(table["id"])
    given = table[table["split"].notna() & table["label"].notna()]
    split_of_group = given.groupby("group")["split"].transform("first")
    torn = (given["split"] != split_of_group).reindex(table.index, fill_value=False)
    _refuse(source, table, torn, "split", "differs from that of another row of its group")
    return table


def _image_columns(table: pd.DataFrame) -> list[str]:
    names = [str(name) for name in table]
    return ["path"] if "path" in names else [n for n in names if n.startswith("path_")]


def _text(column: pd.Series) -> pd.Series:
    """As text, with empty and missing alike missing; whole numbers without a decimal point."""
    if pd.api.types.is_float_dtype(column) and (column.dropna() % 1 == 0).all():
        column = column.astype("Int64")
    text = column.astype("object").map(lambda v: None if pd.isna(v) or str(v) == "" else str(v))
    return text.astype("object").where(text.notna(), None)


def _labels(table: pd.DataFrame, source: str) -> pd.Series:
    if "label" not in table:
        return pd.Series(pd.array([pd.NA] * len(table), dtype="Int8"))
    return _zero_or_one(table, "label", source)


def _zero_or_one(table: pd.DataFrame, column: str, source: str) -> pd.Series:
    known = {"1": 1, "0": 0, "1.0": 1, "0.0": 0, "True": 1, "False": 0}
    text = _text(table[column]).str.strip().replace("", None)
    value = text.map(known)
    _refuse(source, table, text.notna() & value.isna(), column, "must be 1, 0 or empty")
    return value.astype("Int8")


def _join(folder: str, path: str) -> str:
    if "://" in path or path.startswith("/"):
        return path
    return posixpath.join(folder, path)


def _refuse(source: str, table: pd.DataFrame, bad: pd.Series, column: str, what: str) -> None:
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        value = table[column].iloc[row]
        more = f" (and {int(bad.sum()) - 1} more)" if bad.sum() > 1 else ""
        shown = "" if pd.isna(value) else f" {str(value)!r}"
        raise InputError(f"{source}: row {row + 1}, column {column}:{shown} {what}{more}")
