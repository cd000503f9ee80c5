"""Files -> tables as they are written; what they must hold is `table`'s matter."""

import csv
import io
import posixpath
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

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

# What positions and scales are in, as astropy writes it: units, and what they are in words.
UNITS = {
    "ra": (["deg"], "degrees are"),
    "dec": (["deg"], "degrees are"),
    "pixel_scale": (["arcsec", "arcsec / pix"], "arcsec is"),
}
DEGREES = re.compile(r"deg(ree)?s?", re.IGNORECASE)
INTEGERS = {kind: pd.Int64Dtype() for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64())}
INTEGERS |= {kind: pd.UInt64Dtype() for kind in (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())}
LEADING_ZERO = re.compile(rb"(^|[\s,\"])0\d", re.MULTILINE)
LOOKED_AT = 100_000  # rows at a time, for numbers that are not meant as such


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
        return named(_with_masks(_parquet(content)), source)
    if suffix.startswith(".fit"):
        table = _fits_table(content, source)
    else:
        from astropy.table import Table

        # A column's ID is for references within the file.
        table = Table.read(content, format="votable", use_names_over_ids=True)
    wide = [name for name in table.colnames if table[name].ndim > 1]
    if wide:
        raise InputError(f"{source}: column {wide[0]} holds arrays; drop it or split it")
    _convert_units(table, source)
    return with_text(with_column_names(table.to_pandas(), source), source)


def _parquet(content: io.BytesIO) -> pd.DataFrame:
    """Whole numbers as such beside missing ones, too: ids are longer than floats hold."""
    written = pq.read_table(content)
    table = written.to_pandas()
    for name in table.select_dtypes("float"):
        column = written[str(name)]
        if pa.types.is_integer(column.type):
            table[name] = column.to_pandas(types_mapper=INTEGERS.get).array
    return table


def _fits_table(content: io.BytesIO, source: str) -> "Table":
    """Raises InputError for a file of several tables: astropy would take the first."""
    from astropy.io import fits
    from astropy.table import MaskedColumn, Table

    # Of true, false and unknown astropy would take the third for false.
    with fits.open(content, logical_as_bytes=True) as hdus:
        kinds = (fits.BinTableHDU, fits.TableHDU)
        found = {
            number: hdu
            for number, hdu in enumerate(hdus)
            if isinstance(hdu, kinds) and not isinstance(hdu, fits.CompImageHDU)
        }
        if len(found) > 1:
            names = [hdu.name or f"extension {number}" for number, hdu in found.items()]
            raise InputError(
                f"{source}: holds {len(names)} tables, {first_of(names)}; write the one that is "
                "meant into a file of its own"
            )
        table = Table.read(hdus, format="fits")
        for column in next(iter(found.values())).columns:
            if column.format.lstrip("1") == "L":
                said = np.asarray(table[column.name])
                unknown = ~np.isin(said, [b"T", b"F"])
                table[column.name] = MaskedColumn(said == b"T", mask=unknown)
    return table


def _convert_units(table: "Table", source: str) -> None:
    """Of positions and scales that are stated in another unit. Raises InputError for one that is no
    angle."""
    for name in table.colnames:
        units, in_words = UNITS.get(column_name(name), ([], ""))
        stated = table[name].unit
        if stated is None or ("deg" in units and DEGREES.fullmatch(str(stated))):
            continue
        for unit in units:
            with suppress(ValueError, TypeError):  # of what is no unit, no angle, no number
                # Whole numbers would be converted in place, and cut.
                table[name] = table[name].astype(np.float64)
                table[name].convert_unit_to(unit)
                break
        else:
            if units:
                raise InputError(
                    f"{source}: column {name}: its unit is {stated}; {in_words} needed"
                )


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
    return with_text(with_column_names(table.reset_index(own), source), source)


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
    text = {name: str for name in header if is_text(name)}
    others = [name for name in header if name not in text]
    if others and LEADING_ZERO.search(content.getvalue()):  # which numbers would lose
        for part in _parsed(content, dtype=str, usecols=others, chunksize=LOOKED_AT, **how):
            zeros = [name for name in others if part[name].str.fullmatch(r"0\d+").any()]
            text |= dict.fromkeys(zeros, str)
        content.seek(0)
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


def _parsed(content: io.BytesIO, **how: Any) -> Any:
    """A DataFrame, or those of a `chunksize` of rows each."""
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
    ours, of which pandas would rename one, and where a row has more fields than the header, other
    than empty ones, which it would leave out, or fewer, which it would fill up."""
    content.seek(0)
    text = io.TextIOWrapper(content, "utf-8-sig", newline="")
    rows = (row for row in csv.reader(text, skipinitialspace=True) if any(row))
    header = next(rows)
    with_column_names(pd.DataFrame(columns=[name for name in header if is_ours(name)]), source)
    n_named = len(header) - next((n for n, name in enumerate(reversed(header)) if name.strip()), 0)
    for number, fields in enumerate(rows, 1):
        if len(fields) < n_named or any(field.strip() for field in fields[len(header) :]):
            raise InputError(
                f"{source}: row {number} has {len(fields)} fields, the header {len(header)}; name "
                "all columns, quote fields that hold commas, and leave none out"
            )
    text.detach()
    content.seek(0)
