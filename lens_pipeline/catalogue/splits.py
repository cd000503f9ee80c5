"""Which split a cutout belongs to: a function of (split seed, group) alone."""

import hashlib
from collections.abc import Mapping

import pandas as pd

from lens_pipeline.errors import InputError

FRACTIONS: Mapping[str, float] = {"train": 0.65, "val": 0.15, "test": 0.20}


def split_of_group(group: str, seed: int, fractions: Mapping[str, float] = FRACTIONS) -> str:
    """The split of a group: it never changes as a catalogue grows."""
    number = hashlib.sha256(f"{seed}:{group}".encode()).digest()[:8]
    left = int.from_bytes(number) / 2**64
    *others, last = fractions
    for split in others:
        left -= fractions[split]
        if left < 0:
            return split
    return last


def assign_splits(table: pd.DataFrame, seed: int) -> pd.Series:
    """The split of each row: `train`, `val`, `test`, or `unlabelled` where there is no label.

    A split that the catalogue states is kept, and holds for all rows of its group.
    """
    stated = table[table["split"].notna() & table["label"].notna()]
    of_group = dict(zip(stated["group"], stated["split"], strict=True))
    for group in table["group"].unique():
        of_group.setdefault(group, split_of_group(group, seed))
    split = table["group"].map(of_group)
    return split.where(table["label"].notna(), "unlabelled")


def check_splits(split: pd.Series, label: pd.Series, source: str) -> None:
    """Raises InputError, naming the class and the split, where a split lacks a class."""
    if label.isna().all():
        raise InputError(f"{source}: column label is empty everywhere; training needs 1s and 0s")
    for value, name in ((1, "lenses"), (0, "non-lenses")):
        if not (label == value).any():
            raise InputError(
                f"{source}: column label has no {value}: training needs lenses and non-lenses"
            )
        for part in FRACTIONS:
            if not ((split == part) & (label == value)).any():
                raise InputError(
                    f"{source}: split {part} has no {name} among {int((label == value).sum())}; "
                    "add more, another LENS_SEED, or state a column split"
                )
