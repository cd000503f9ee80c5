"""Places on the sky that two splits share: what a network is tested on, it has then seen."""

from itertools import combinations, repeat

import pandas as pd

from lens_pipeline.catalogue.splits import FRACTIONS

RADIUS = 2.0  # arcsec: two surveys place one galaxy closer, and cutouts of two galaxies lie apart


def with_position(table: pd.DataFrame) -> pd.Series:
    """Which rows say where on the sky they are, in columns `ra` and `dec` (degrees)."""
    if not {"ra", "dec"} <= {*table}:
        return pd.Series(False, index=table.index)
    return table["ra"].notna() & table["dec"].between(-90, 90)


def positions_in_two_splits(table: pd.DataFrame, split: pd.Series) -> pd.DataFrame:
    """Pairs of labelled cutouts within RADIUS of each other, in two splits, the closest first.

    table: of a catalogue; split: of its rows. Columns: id, split, other_id, other_split, separation
    (arcsec). Of rows of one split at the very same position the first stands for all; rows without
    a position are in no pair.
    """
    from astropy import units
    from astropy.coordinates import SkyCoord, search_around_sky

    columns = ["id", "split", "other_id", "other_split", "separation"]
    rows = table[with_position(table)]
    if rows.empty:
        return pd.DataFrame(columns=columns)
    rows = rows.assign(split=split)
    places = rows.drop_duplicates(["split", "ra", "dec"])
    of_split = {part: places[places["split"] == part] for part in FRACTIONS}
    found: list[tuple[str, str, str, str, float]] = []
    for part, other_part in combinations(FRACTIONS, 2):
        one, other = of_split[part], of_split[other_part]
        if one.empty or other.empty:
            continue
        places_of, others = (
            SkyCoord(of["ra"].to_numpy(), of["dec"].to_numpy(), unit="deg") for of in (one, other)
        )
        here, there, separation, _ = search_around_sky(places_of, others, RADIUS * units.arcsec)
        ids, other_ids = one["id"].to_numpy()[here], other["id"].to_numpy()[there]
        found += zip(ids, repeat(part), other_ids, repeat(other_part), separation.arcsec)
    return pd.DataFrame(found, columns=columns).sort_values("separation", ignore_index=True)
