"""Places on the sky that two splits share: what a network is tested on, it has then seen."""

import numpy as np
import pandas as pd

from lens_pipeline.catalogue.splits import FRACTIONS

RADIUS = 2.0  # arcsec: two surveys place one galaxy closer, and cutouts of two galaxies lie apart


def with_position(table: pd.DataFrame) -> pd.Series:
    """Which rows say where on the sky they are, in columns `ra` and `dec` (degrees)."""
    if not {"ra", "dec"} <= set(table):
        return pd.Series(False, index=table.index)
    ra, dec = (pd.to_numeric(table[name], errors="coerce") for name in ("ra", "dec"))
    return ra.notna() & np.isfinite(ra) & dec.between(-90, 90)


def positions_in_two_splits(table: pd.DataFrame, split: pd.Series) -> pd.DataFrame:
    """Pairs of labelled cutouts within RADIUS of each other, in two splits, the closest first.

    table: of a catalogue; split: of its rows. Columns: id, split, other_id, other_split, separation
    (arcsec). Rows without a position are in no pair.
    """
    from astropy import units
    from astropy.coordinates import SkyCoord, search_around_sky

    used = table[with_position(table) & split.isin(list(FRACTIONS))]
    found = pd.DataFrame(columns=["id", "split", "other_id", "other_split", "separation"])
    if used.empty:
        return found
    ra, dec = (pd.to_numeric(used[name]).to_numpy(float) for name in ("ra", "dec"))
    sky = SkyCoord(ra, dec, unit="deg")
    one, other, separation, _ = search_around_sky(sky, sky, RADIUS * units.arcsec)
    ids, splits = used["id"].to_numpy(), split[used.index].to_numpy()
    torn = (one < other) & (splits[one] != splits[other])
    pairs = zip(
        ids[one[torn]], splits[one[torn]], ids[other[torn]], splits[other[torn]],
        separation[torn].arcsec, strict=True,
    )  # fmt: skip
    return pd.DataFrame(pairs, columns=found.columns).sort_values("separation", ignore_index=True)
