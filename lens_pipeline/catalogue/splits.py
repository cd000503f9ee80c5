"""Which split a cutout belongs to: a function of (split seed, group) alone."""

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.errors import InputError

FRACTIONS: Mapping[str, float] = {"train": 0.65, "val": 0.15, "test": 0.20}
SPLITS = tuple(FRACTIONS)
UNLABELLED = "unlabelled"
PARTS = (*SPLITS, UNLABELLED)


def check_part(name: str) -> None:
    """Raises InputError where no split is called so."""
    if name not in PARTS:
        raise InputError(f"there is no split {name!r}; there are {', '.join(PARTS)}")


def split_of_group(group: str, seed: int) -> str:
    """The split of a group: it never changes as a catalogue grows."""
    left = _uniform(f"{seed}:{group}")
    *others, last = FRACTIONS
    for split in others:
        left -= FRACTIONS[split]
        if left < 0:
            return split
    return last


def drawn_groups(groups: Iterable[str], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which rows are of groups that a draw of a fraction of them takes: a function of (seed, group)
    alone, as the split is."""
    drawn = {group: _uniform(f"bag:{seed}:{group}") < fraction for group in set(groups)}
    return np.array([drawn[group] for group in groups], dtype=bool)


def _uniform(text: str) -> float:
    """From 0 to below 1, by the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def assign_splits(table: pd.DataFrame, seed: int) -> pd.Series:
    """The split of each row: `train`, `val`, `test`, or `unlabelled` where there is no label.

    A split that the catalogue states is kept, and holds for all rows of its group.
    """
    stated = table[table["split"].notna() & table["label"].notna()]
    of_group = dict(zip(stated["group"], stated["split"], strict=True))
    for group in table["group"].unique():
        of_group.setdefault(group, split_of_group(group, seed))
    split = table["group"].map(of_group)
    return split.where(table["label"].notna(), UNLABELLED)


def class_counts(label: pd.Series) -> dict[str, int]:
    """How many cutouts there are, and of these how many of each class."""
    return {
        "n": len(label),
        "n_lens": int((label == 1).sum()),
        "n_nonlens": int((label == 0).sum()),
    }


def torn_groups(rows: pd.DataFrame) -> list[str]:
    """Groups of which two splits hold a labelled row: none, if the splits are sound."""
    splits = rows[rows["label"].notna()].groupby("group")["split"].nunique()
    return [str(group) for group in splits.index[splits > 1]]


def check_splits(split: pd.Series, label: pd.Series, source: str) -> None:
    """Raises InputError, naming the class and the split, where a split lacks a class."""
    if label.isna().all():
        raise InputError(
            f"{source}: no row has a label; training needs a column called label, of 1s and 0s"
        )
    for value, name in ((1, "lenses"), (0, "non-lenses")):
        if not (label == value).any():
            raise InputError(
                f"{source}: no {name} (label {value}); training needs lenses and non-lenses"
            )
        for part in SPLITS:
            if not ((split == part) & (label == value)).any():
                raise InputError(
                    f"{source}: split {part} has no {name} among {int((label == value).sum())}; "
                    "add more, name some in the column split, or try another LENS_SEED"
                )
