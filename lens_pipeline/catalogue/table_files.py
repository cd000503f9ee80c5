"""Files -> tables as they are written; what they must hold is `table`'s matter."""

import csv
import io
import posixpath
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lens_pipeline.catalogue.columns import (
    column_name,
    image_columns,
    is_ours,
    is_text,
    with_column_names,
    with_text,
)
from lens_pipeline.errors import InputError, first_of, words_of
from lens_pipeline.locations import TABLES, names_table, without_query
from lens_pipeline.storage import asking, locate

if TYPE_CHECKING:
    from astropy.table import Table

DEGREES = re.compile(r"deg(ree)?s?", re.IGNORECASE)  # as units are written; astropy knows `deg`
LOOKED_AT = 10_000  # rows, for numbers that are not meant as such


@contextmanager
def reading(source: str, what: str) -> Iterator[None]:
    """Raises InputError for whatever a store or a format raises; what: that it was to be."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{source}: there is no such file or folder") from None
    except Exception as problem:  # noqa: BLE001  (each store and format has errors of its own)
        raise InputError(f"{source}: cannot be read as {what} ({words_of(problem)})") from None


def read_table(source: str, options: dict[str, Any]) -> pd.DataFrame:
    """A CSV, Parquet, FITS or VOTable file, its columns by their names here.

    Raises InputError for another, and where two columns are one; what the store or format raises.
    """
    if not names_table(source):
        raise InputError(
            f"{source}: a table must end in {', '.join(TABLES[:-1])} or {TABLES[-1]}; convert it"
        )
    filesystem, inside = locate(source, options)
    with asking(source):
        content = io.BytesIO(filesystem.cat_file(inside))
    suffix = posixpath.splitext(without_query(source))[1].lower()
    if suffix == ".csv":
        return read_csv(content, source)
    if suffix == ".parquet":
        return named(_with_masks(pd.read_parquet(content)), source)
    from astropy.table import Table

    if suffix.startswith(".fit"):
        _check_only_table(content, source)
        table = Table.read(content, format="fits")
    else:
        # A column's ID is for references within the file.
        table = Table.read(content, format="votable", use_names_over_ids=True)
    wide = [name for name in table.colnames if table[name].ndim > 1]
    if wide:
        raise InputError(f"{source}: column {wide[0]} holds arrays; drop it or split it")
    _to_degrees(table, source)
    return with_text(with_column_names(table.to_pandas(), source))


def _check_only_table(content: io.BytesIO, source: str) -> None:
    """Raises InputError for a FITS file of several tables: astropy would take the first."""
    from astropy.io import fits

    with fits.open(io.BytesIO(content.getvalue())) as hdus:
        kinds = (fits.BinTableHDU, fits.TableHDU)
        names = [
            hdu.name or f"extension {number}"
            for number, hdu in enumerate(hdus)
            if isinstance(hdu, kinds) and not isinstance(hdu, fits.CompImageHDU)
        ]
    if len(names) > 1:
        raise InputError(
            f"{source}: holds {len(names)} tables, {first_of(names)}; write the one that is meant "
            "into a file of its own"
        )


def _to_degrees(table: "Table", source: str) -> None:
    """Positions that are stated in another unit. Raises InputError for one that is no angle."""
    for name in table.colnames:
        if column_name(name) in ("ra", "dec") and table[name].unit is not None:
            if DEGREES.fullmatch(str(table[name].unit)):
                continue
            try:
                # Whole numbers would be converted in place, and cut.
                table[name] = table[name].astype(np.float64)
                table[name].convert_unit_to("deg")
            except (ValueError, TypeError):  # of what is no unit, and of no number
                raise InputError(
                    f"{source}: column {name}: its unit is {table[name].unit}; degrees are needed"
                ) from None


def _with_masks(table: pd.DataFrame) -> pd.DataFrame:
    """astropy writes what is masked into a Parquet file, and which that is into `<name>.mask`."""
    for mask in [str(name) for name in table if str(name).endswith(".mask")]:
        name = mask.removesuffix(".mask")
        if name in table and pd.api.types.is_bool_dtype(table[mask]):
            # Whole numbers as such: ids are longer than floats hold.
            values = table[name].convert_dtypes(convert_string=False, convert_floating=False)
            table = table.assign(**{name: values.mask(table[mask])}).drop(columns=mask)
    return table


def named(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """A DataFrame, its columns by their names here; see `with_column_names`."""
    # A named index is a column that pandas shows apart, or once more.
    own = [name for name in table.index.names if name is not None and name not in table]
    return with_text(with_column_names(table.reset_index(own), source))


def read_csv(content: io.BytesIO, source: str) -> pd.DataFrame:
    try:
        return with_column_names(_csv_as_written(content, source), source)
    except pd.errors.EmptyDataError:
        raise InputError(
            f"{source}: the file is empty; a header with the names of columns is needed"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{source}: is not text in UTF-8; save it as that") from None


def _csv_as_written(content: io.BytesIO, source: str) -> pd.DataFrame:
    header = pd.read_csv(content, nrows=0, skipinitialspace=True).columns
    _check_header(header, source)
    _check_fields(content, source)
    # Only an empty field is a missing one, and NaN, as other libraries write that: an id may be
    # "NA". A comma that ends every row makes no column an index, and whole columns are looked at
    # before they are taken for numbers.
    names = [name for name in header if column_name(name) in ("id", *image_columns([name]))]
    missing = {name: [""] if name in names else ["", "nan", "NaN"] for name in header}
    how: dict[str, Any] = {
        **{"keep_default_na": False, "na_values": missing, "index_col": False},
        **{"low_memory": False, "skipinitialspace": True},
    }
    first = _parsed(content, dtype=str, nrows=LOOKED_AT, **how)
    content.seek(0)
    text = {
        name: str
        for name in header
        if is_text(name) or first[name].str.fullmatch(r"0\d+").any()  # which would lose its zeros
    }
    table = _parsed(content, dtype=text, **how)
    content.seek(0)
    # A column with an empty field is read as floats, which hold 15 digits: other surveys' ids have
    # more.
    floats = table.select_dtypes("float64")
    lossy = [name for name in floats if floats[name].abs().between(2**53, np.inf, "left").any()]
    if lossy:
        exact = _parsed(content, dtype=str, usecols=lossy, **how)
        for name in lossy:
            table[name] = pd.to_numeric(exact[name], dtype_backend="numpy_nullable")
    return table


def _parsed(content: io.BytesIO, **how: Any) -> pd.DataFrame:
    with warnings.catch_warnings():  # of fields beyond the header, which are empty
        warnings.simplefilter("ignore", pd.errors.ParserWarning)
        return pd.read_csv(content, **how)


def _check_header(header: pd.Index, source: str) -> None:
    """Raises InputError for what other programs call CSV."""
    if header[0].startswith("#"):
        raise InputError(
            f"{source}: begins with {header[0]!r}; a CSV begins with the names of its columns, "
            "without #"
        )
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        raise InputError(
            f"{source}: its header is one field, {header[0]!r}; separate fields by commas"
        )


def _check_fields(content: io.BytesIO, source: str) -> None:
    """Leaves the content at its beginning. Raises InputError where two columns have one name of
    ours, of which pandas would rename one, and where rows have more fields than the header, other
    than empty ones, which it would leave out."""
    content.seek(0)
    text = io.TextIOWrapper(content, "utf-8-sig", newline="")
    rows = (row for row in csv.reader(text, skipinitialspace=True) if any(row))
    header = next(rows)
    with_column_names(pd.DataFrame(columns=[name for name in header if is_ours(name)]), source)
    for number, fields in enumerate(rows, 1):
        if len(fields) <= len(header):  # pandas refuses those that are longer than the first
            break
        if any(field.strip() for field in fields[len(header) :]):
            raise InputError(
                f"{source}: row {number} has {len(fields)} fields, the header {len(header)}; name "
                "all columns, and quote fields that hold commas"
            )
    text.detach()
    content.seek(0)
