"""Places on the sky: of rows that lie close to each other, and those that two splits share, where
a network is tested on what it has seen."""

from itertools import combinations, repeat

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.catalogue.splits import SPLITS

RADIUS = 2.0  # arcsec: two surveys place one galaxy closer, and cutouts of two galaxies lie apart
# What VizieR, SExtractor, Euclid, Rubin and others call them, in small letters.
_ELSEWHERE = (
    *("raj2000", "ra_j2000", "alpha_j2000", "right_ascension", "coord_ra", "ra_deg", "radeg"),
    *("dej2000", "dec_j2000", "delta_j2000", "declination", "coord_dec", "dec_deg", "decdeg"),
    *("_raj2000", "_dej2000", "ra_icrs", "de_icrs", "dedeg", "ra [deg]", "dec [deg]"),
)


def with_position(table: pd.DataFrame) -> pd.Series:
    """Which rows say where on the sky they are, in columns `ra` and `dec` (degrees)."""
    if not {"ra", "dec"} <= {*table}:
        return pd.Series(False, index=table.index)
    return table["ra"].notna() & table["dec"].between(-90, 90)


def positions_by_other_names(table: pd.DataFrame) -> list[str]:
    """Columns that are not looked at, and seem to be what `ra` and `dec` should be."""
    if {"ra", "dec"} & {*table}:
        return []
    return [str(name) for name in table if str(name).lower() in _ELSEWHERE]


def pairs_within(
    one: pd.DataFrame, other: pd.DataFrame, radius: float
) -> tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.float64]]:
    """(places in one table, places in the other, separations in arcsec) of all pairs of rows that
    are no further apart than a radius (arcsec); both have `ra` and `dec` (degrees) in each row."""
    from astropy import units
    from astropy.coordinates import SkyCoord, search_around_sky

    if one.empty or other.empty:  # which astropy refuses
        none = np.zeros(0, dtype=int)
        return none, none, np.zeros(0)
    here, there = (
        SkyCoord(of["ra"].to_numpy(), of["dec"].to_numpy(), unit="deg") for of in (one, other)
    )
    first, second, separation, _ = search_around_sky(here, there, radius * units.arcsec)
    return first, second, separation.arcsec


def positions_in_two_splits(table: pd.DataFrame, split: pd.Series) -> pd.DataFrame:
    """Pairs of labelled cutouts within RADIUS of each other, in two splits, the closest first.

    table: of a catalogue; split: of its rows. Columns: id, split, other_id, other_split, separation
    (arcsec). Of rows of one split at the very same position the first stands for all; rows without
    a position are in no pair.
    """
    columns = ["id", "split", "other_id", "other_split", "separation"]
    rows = table[with_position(table)]
    if rows.empty:
        return pd.DataFrame(columns=columns)
    rows = rows.assign(split=split)
    places = rows.drop_duplicates(["split", "ra", "dec"])
    of_split = {part: places[places["split"] == part] for part in SPLITS}
    found: list[tuple[str, str, str, str, float]] = []
    for part, other_part in combinations(SPLITS, 2):
        one, other = of_split[part], of_split[other_part]
        here, there, separation = pairs_within(one, other, RADIUS)
        ids, other_ids = one["id"].to_numpy()[here], other["id"].to_numpy()[there]
        found += zip(ids, repeat(part), other_ids, repeat(other_part), separation)
    return pd.DataFrame(found, columns=columns).sort_values("separation", ignore_index=True)
