"""Several processed datasets, seen as one: those of several surveys."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lens_pipeline.catalogue.dataset import (
    CutoutFormat,
    Dataset,
    DatasetSplit,
    Empty,
    Split,
    places_of,
)
from lens_pipeline.catalogue.splits import PARTS
from lens_pipeline.errors import InputError


def joined_format(formats: Mapping[str, CutoutFormat]) -> CutoutFormat:
    """The format of cutouts that are put together, by the names of the datasets they come from.

    Scales may differ (then it states none): what a galaxy looks like differs by more. Raises
    InputError, naming two of them, where anything else does.
    """
    (first, form), *others = formats.items()
    for name, other in others:
        for what, mine, theirs in form.differences(replace(other, pixel_scale=form.pixel_scale)):
            raise InputError(
                f"{name}: {what}: the cutouts have {theirs}, those of {first} {mine}, and a "
                "network takes one of both; choose bands that all have (LENS_BANDS), or surveys "
                "that are alike"
            )
        if other.pixel_scale != form.pixel_scale:
            form = replace(form, pixel_scale=None)
    return form


def joined_content(contents: Mapping[str, str]) -> str:
    """sha256 of datasets that are put together, from that of each, by their names."""
    listed = "\n".join(f"{name} {content}" for name, content in sorted(contents.items()))
    return hashlib.sha256(listed.encode()).hexdigest()


@dataclass(frozen=True)
class JoinedSplit(Split):
    """The cutouts of a split, float32, of one dataset after the other."""

    index: pd.DataFrame
    parts: tuple[DatasetSplit, ...]

    def gather(self, indices: ArrayLike, empty: Empty = np.empty) -> NDArray[np.float32]:
        places = places_of(indices, len(self))
        found = empty((len(places), *self.parts[0].images.shape[1:]), np.dtype(np.float32))
        begin = 0
        for part in self.parts:
            here = (places >= begin) & (places < begin + len(part))
            found[here] = part.gather(places[here] - begin)
            begin += len(part)
        return found


@dataclass(frozen=True)
class JoinedDataset:
    """See `Dataset`; each split holds the cutouts of one dataset after the other.

    parts: by their names. Of its `facts` there are `content`, `origin` and `splits`.
    """

    parts: Mapping[str, Dataset]

    @property
    def folder(self) -> str:
        return ", ".join(str(part.folder) for part in self.parts.values())

    @cached_property
    def format(self) -> CutoutFormat:
        return joined_format({name: part.format for name, part in self.parts.items()})

    @cached_property
    def facts(self) -> dict[str, Any]:
        facts = {name: part.facts for name, part in self.parts.items()}
        return {
            "content": joined_content({name: of["content"] for name, of in facts.items()}),
            "origin": next(iter(facts.values()))["origin"],
            "splits": {
                part: {"n": sum(of["splits"][part]["n"] for of in facts.values())} for part in PARTS
            },
        }

    def split(self, part: str) -> JoinedSplit:
        return JoinedSplit(self.table(part), tuple(one.split(part) for one in self.parts.values()))

    def table(self, part: str) -> pd.DataFrame:
        tables = [one.table(part) for one in self.parts.values()]
        return pd.concat(tables, ignore_index=True)

    def rejects(self) -> pd.DataFrame:
        return pd.concat([one.rejects() for one in self.parts.values()], ignore_index=True)
