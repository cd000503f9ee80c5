"""Lists of lenses that are known already, and which rows of a catalogue show them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lens_pipeline.catalogue.columns import as_text, numbers, refuse
from lens_pipeline.catalogue.positions import (
    pairs_within,
    positions_by_other_names,
    with_position,
)
from lens_pipeline.catalogue.table import Catalogue
from lens_pipeline.catalogue.table_files import read_table, reading
from lens_pipeline.errors import InputError

RADIUS = 3.0  # arcsec: some lists give the place of the lens, some that of an image of its source
FIELD = 60.0  # arcsec: a lens no further from some cutout lies in the field
PLACE = ["ra", "dec"]


def read_known_lenses(
    source: str, storage_options: Mapping[str, Any] | None = None
) -> pd.DataFrame:
    """The lenses that a CSV, Parquet, FITS or VOTable file lists, a row each: `name` (text), `ra`,
    `dec` (degrees), and the file's other columns.

    Their names are in a column `name`, or else `id`; of neither it is the number of the row.
    Raises InputError where the file cannot be read, holds no row, lacks `ra` or `dec`, or where a
    row says no place on the sky.
    """
    with reading(source, "a list of lenses"):
        table = read_table(source, dict(storage_options or {})).reset_index(drop=True)
    if table.empty:
        raise InputError(f"{source}: the table has no rows")
    _check_place(table, source)
    for name in PLACE:
        table[name] = numbers(table, name, source, "decimal degrees")
        refuse(source, table, table[name].isna(), name, "is empty; a lens needs a place on the sky")
    refuse(source, table, ~table["ra"].between(-180, 360), "ra", "must be from -180 to 360 degrees")
    refuse(source, table, ~table["dec"].between(-90, 90), "dec", "must be from -90 to 90 degrees")
    names = pd.Series([f"row {number + 1}" for number in range(len(table))])
    named_so: list[str] = []
    for column in ("id", "name"):
        named_so = [name for name in map(str, table) if name.lower() == column]
        if len(named_so) > 1:
            raise InputError(
                f"{source}: columns {' and '.join(named_so)}: which has the lenses' names? Drop "
                "the other"
            )
        for name in named_so:
            names = as_text(table[name]).fillna(names)
    others = table.drop(columns=[*PLACE, *named_so])
    return pd.concat([names.rename("name"), table[PLACE], others], axis=1)


def check_placed(catalogue: Catalogue) -> None:
    """Raises InputError where no row of a catalogue says where on the sky it is."""
    _check_place(catalogue.table, catalogue.source)
    if not with_position(catalogue.table).any():
        raise InputError(
            f"{catalogue.source}: columns ra and dec: no row has both; known lenses are found by "
            "them"
        )


def _check_place(table: pd.DataFrame, source: str) -> None:
    lacking = [name for name in PLACE if name not in table]
    if lacking:
        others = positions_by_other_names(table)
        hint = "known lenses are found by it"
        if others:
            hint = f"{', '.join(others)} seem to be meant; rename them"
        raise InputError(f"{source}: column {lacking[0]} (degrees) is missing: {hint}")


def rows_of_known_lenses(table: pd.DataFrame, known: pd.DataFrame) -> pd.DataFrame:
    """Which rows of a catalogue are within FIELD of which known lenses; within RADIUS one shows it.

    table: of a catalogue with `ra` and `dec`; known: see `read_known_lenses`. Columns: lens, row
    (places, from 0), known_separation (arcsec). Rows without a position are near none.
    """
    placed = np.flatnonzero(with_position(table))
    lens, place, separation = pairs_within(known, table[PLACE].iloc[placed], FIELD)
    return pd.DataFrame({"lens": lens, "row": placed[place], "known_separation": separation})
