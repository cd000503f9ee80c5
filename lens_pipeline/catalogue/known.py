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
from lens_pipeline.catalogue.table_files import read_table, reading
from lens_pipeline.errors import InputError

RADIUS = 3.0  # arcsec: some lists give the place of the lens, some that of an image of its source


def read_known_lenses(
    source: str, storage_options: Mapping[str, Any] | None = None
) -> pd.DataFrame:
    """The lenses that a CSV, Parquet, FITS or VOTable file lists, a row each: `name` (text), `ra`,
    `dec` (degrees).

    Their names are in a column `name`, or else `id`; of neither it is the number of the row.
    Raises InputError where the file cannot be read, holds no row, lacks `ra` or `dec`, or where a
    row says no place on the sky.
    """
    with reading(source, "a list of lenses"):
        table = read_table(source, dict(storage_options or {}))
    if table.empty:
        raise InputError(f"{source}: the table has no rows")
    lacking = [name for name in ("ra", "dec") if name not in table]
    if lacking:
        others = positions_by_other_names(table)
        has = ", ".join(map(str, others or table))
        raise InputError(
            f"{source}: column {lacking[0]} (degrees) is missing; it has {has}"
            + ("; rename them" if others else "")
        )
    places = {name: numbers(table, name, source, "degrees") for name in ("ra", "dec")}
    for name, place in places.items():
        refuse(source, table, place.isna(), name, "is empty; a lens needs a place on the sky")
    refuse(source, table, ~places["dec"].between(-90, 90), "dec", "must be from -90 to 90 degrees")
    by_letters = {str(name).lower(): name for name in reversed(table.columns)}
    named = next((by_letters[name] for name in ("name", "id") if name in by_letters), None)
    numbered = pd.Series([f"row {number + 1}" for number in range(len(table))])
    names = numbered if named is None else as_text(table[named]).fillna(numbered)
    return pd.DataFrame({"name": names, **places})


def rows_of_known_lenses(table: pd.DataFrame, known: pd.DataFrame) -> pd.DataFrame:
    """Which rows of a catalogue show which known lenses: those within RADIUS of each other.

    table: of a catalogue; known: see `read_known_lenses`. Columns: lens, row (places, from 0),
    separation (arcsec), in the order of `known`, the closest first. Rows without a position show
    none.
    """
    placed = np.flatnonzero(with_position(table))
    lens, place, separation = pairs_within(known, table.iloc[placed], RADIUS)
    found = pd.DataFrame({"lens": lens, "row": placed[place], "separation": separation})
    return found.sort_values(["lens", "separation"], ignore_index=True)
