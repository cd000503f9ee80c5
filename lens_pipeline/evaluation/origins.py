"""Real and simulated cutouts, kept apart: what a test on the latter says of the sky is limited."""

from collections.abc import Mapping

import pandas as pd

REAL, SIMULATED, BOTH = "real", "simulated", "real and simulated"


def by_origin(table: pd.DataFrame, simulation: bool) -> dict[str, pd.DataFrame]:
    """{`real`, `simulated`: their rows}, real first and without one that has none.

    simulation: all are simulated. Otherwise those are whose column `simulated` says so; without the
    column none is.
    """
    simulated = pd.Series(simulation, index=table.index)
    if not simulation and "simulated" in table:
        simulated = table["simulated"].astype("boolean").fillna(False).astype(bool)
    parts = {REAL: table[~simulated], SIMULATED: table[simulated]}
    return {origin: part for origin, part in parts.items() if len(part)}


def basis(parts: Mapping[str, pd.DataFrame]) -> tuple[str, pd.DataFrame]:
    """(what they are, rows) on which figures should rest: the real ones where both classes are
    among them, else all; parts: of `by_origin`."""
    if len(parts) == 1:
        return next(iter(parts.items()))
    if parts[REAL]["label"].nunique() == 2:
        return REAL, parts[REAL]
    return BOTH, pd.concat(parts.values()).sort_index()


def lens_fraction_among(validated: pd.DataFrame | None, otherwise: float) -> float:
    """Of these cutouts of the validation split; `otherwise` where there are none, or of one class
    alone."""
    share = otherwise if validated is None else float(validated["label"].astype(float).mean())
    return share if 0 < share < 1 else otherwise


def described(table: pd.DataFrame, origin: str) -> str:
    """As `real cutouts: 30 lenses, 500 non-lenses`."""
    n_lens, n_nonlens = ((table["label"] == label).sum() for label in (1, 0))
    return f"{origin} cutouts: {n_lens:,} lenses, {n_nonlens:,} non-lenses"
