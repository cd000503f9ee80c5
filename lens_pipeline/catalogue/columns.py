"""Columns of a catalogue: what they are called, and values that must be of one kind."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lens_pipeline.errors import InputError

TEXT_COLUMNS = ("id", "path", "label", "group", "split", "survey", "flux_unit", "bands")
# What may be known of a galaxy, for the selection function and for arcs on real galaxies.
_KNOWN = (
    *("kind", "einstein_radius", "arc_snr", "arc_contrast", "source_magnitude", "z_source"),
    *("z_lens", "redshift", "velocity_dispersion", "axis_ratio", "position_angle"),
)
_NAMES = (*TEXT_COLUMNS, "pixel_scale", "simulated", "ra", "dec", *_KNOWN)
_IMAGE = "path_"  # and a band
NUMBERS = {"pixel_scale": "arcsec/pixel", "ra": "degrees", "dec": "degrees"}
ALIKE = 0.85  # names, by difflib: `groups` and `group`


def column_name(name: Any) -> str:
    """The name that a column has here: `Group` is `group`, as FITS tables write all in capitals;
    what is not ours keeps its letters."""
    given = str(name).strip()
    lower = given.lower()
    if lower.startswith(_IMAGE):
        return _IMAGE + given[len(_IMAGE) :]  # of a band letters may matter
    return lower if lower in _NAMES else given


def with_column_names(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """The table, its columns called by `column_name`; beside one that is called so already others
    keep their letters. Raises InputError where two are one, and where some paths of bands are
    called so and others are not."""
    given = [str(name) for name in table]
    paths = image_columns(given)
    names = []
    for name in given:
        ours = column_name(name)
        taken = ours in given or (bool(paths) and ours.startswith(_IMAGE))
        if name != ours and ours not in given and taken and paths != ["path"]:
            raise InputError(
                f"{source}: columns {paths[0]} and {name}: write {_IMAGE} alike, or rename the "
                "second if it holds no image of a band"
            )
        names.append(name if name != ours and taken else ours)
    for place, name in enumerate(names):
        if name in names[:place]:
            both = f"{given[names.index(name)]!r} and {given[place]!r}"
            raise InputError(f"{source}: columns {both} are both {name}; drop or rename one")
    return table.set_axis(names, axis=1)


def parquet_schema(table: pd.DataFrame, source: str) -> pa.Schema:
    """Of a file of the table. Raises InputError where a column's values cannot be in one."""
    try:
        return pa.Schema.from_pandas(table, preserve_index=False)
    except pa.ArrowException as problem:
        raise InputError(
            f"{source}: a column holds what Parquet does not, as complex numbers or values of "
            f"several kinds ({' '.join(str(problem).split())})"
        ) from None


def with_text(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """The table, its bytes as the text that FITS tables hold in them, text of any length letter by
    letter. Where they are none a column stays as it is; of one that must be text, see `is_text`,
    raises InputError."""
    for name in table.select_dtypes("object"):
        letters = table[name].map(lambda v: isinstance(v, np.ndarray) and v.dtype.kind in "SU")
        if letters.any():
            joined = table[name][letters].map(lambda v: "".join(v.astype(str)))
            table = table.assign(**{str(name): table[name].mask(letters, joined)})
        if any(isinstance(value, bytes) for value in table[name]):
            bad = ~table[name].map(_decodes)
            if is_text(name):
                refuse(source, table, bad, str(name), "is not text in UTF-8")
            if not bad.any():
                text = table[name].map(lambda v: v.decode() if isinstance(v, bytes) else v)
                table = table.assign(**{str(name): text})
    return table


def _decodes(value: Any) -> bool:
    """Whether it is no bytes, or text in UTF-8."""
    try:
        str(value, "utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return False
    return True


def misspelt(names: Iterable[Any]) -> dict[str, str]:
    """{column: what it seems to be}, of those that mean nothing here."""
    given = [str(name) for name in names]
    plain = {name.replace("_", ""): name for name in _NAMES if name not in given}
    found: dict[str, str] = {}
    for name in given:
        letters = re.sub(r"[^a-z0-9]", "", name.lower())
        near = [] if is_ours(name) else difflib.get_close_matches(letters, plain, 1, ALIKE)
        if near:
            found[name] = plain[near[0]]
    return found


def is_ours(name: Any) -> bool:
    """Whether a column of this name means something here."""
    return column_name(name) in _NAMES or column_name(name).startswith(_IMAGE)


def is_text(name: Any) -> bool:
    """Whether a column holds text whatever it looks like: `0012` is not 12."""
    return column_name(name) in TEXT_COLUMNS or column_name(name).startswith(_IMAGE)


def image_columns(names: Iterable[Any]) -> list[str]:
    """`path`, or `path_<band>` for each band; empty where there is neither."""
    known = [str(name) for name in names]
    return ["path"] if "path" in known else [name for name in known if name.startswith(_IMAGE)]


def as_text(column: pd.Series) -> pd.Series:
    """As text, with empty and missing alike missing; whole numbers without a decimal point, each
    for itself: what else a column holds must change no id, and no group."""
    text = column.astype("object").map(_text)
    return text.astype("object").where(text.notna(), None)


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, list | tuple | np.ndarray):
        return ",".join(map(str, value)) or None
    if isinstance(value, float | np.floating):
        whole = float(value)
        if whole.is_integer() and abs(whole) < 2**63:
            return str(int(whole))
    return None if pd.isna(value) or str(value) == "" else str(value)


def stripped(column: pd.Series) -> pd.Series:
    """`as_text`, without blanks around it."""
    return as_text(as_text(column).map(str.strip, na_action="ignore"))


def zero_or_one(table: pd.DataFrame, column: str, source: str) -> pd.Series:
    """Int8, missing where the column is. Raises InputError for all that is neither."""
    known = {"1": 1, "0": 0, "1.0": 1, "0.0": 0, "true": 1, "false": 0}
    text = stripped(table[column])
    value = text.map(lambda said: known.get(said.lower()), na_action="ignore")
    refuse(source, table, text.notna() & value.isna(), column, "must be 1, 0 or empty")
    return value.astype("Int8")


def numbers(table: pd.DataFrame, column: str, source: str, what: str = "a number") -> pd.Series:
    """float64, NaN where it is empty, or where there is no such column. Raises InputError for what
    is neither, and infinite."""
    if column not in table:
        return pd.Series(np.nan, table.index)
    stated = table[column]
    if not pd.api.types.is_numeric_dtype(stated):
        stated = stripped(stated)
    found = pd.to_numeric(stated, errors="coerce").astype("float64")
    bad = stated.notna() & ~np.isfinite(found)
    refuse(source, table, bad, column, f"must be {what}, or empty")
    return found


def refuse(source: str, table: pd.DataFrame, bad: pd.Series, column: str, what: str) -> None:
    """Raises InputError where any row is bad, naming the first."""
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        value = table[column].iloc[row]
        more = f" (and {int(bad.sum()) - 1} more)" if bad.sum() > 1 else ""
        shown = "" if pd.isna(value) else f" {str(value)!r}"
        raise InputError(f"{source}: row {row + 1}, column {column}:{shown} {what}{more}")
