"""The shards of several datasets, put together as those of one."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd

from lens_pipeline.catalogue.dataset import CutoutFormat
from lens_pipeline.catalogue.joined import joined_content, joined_format
from lens_pipeline.catalogue.splits import PARTS, check_splits, torn_groups
from lens_pipeline.errors import InputError
from lens_pipeline.shards.manifest import (
    CATALOGUE,
    INDEX,
    Manifest,
    Shard,
    shard_name,
    write_manifest,
)
from lens_pipeline.shards.store import read_manifest


def merge_shards(folders: Mapping[str, Path], out: Path) -> Manifest:
    """Put the shards in several folders together in `out`, an empty folder.

    folders: by the names of the datasets that they were written from, as `JoinedDataset` has them.
    Within a split, the shards of one follow those of the other; each tar is the same file as before
    where the file system has links, else a copy. Raises InputError, naming what is at fault, where
    formats or encodings differ, an id is there twice, a group in two splits, or a split lacks a
    class.
    """
    manifests = {name: read_manifest(folder) for name, folder in folders.items()}
    form = joined_format(
        {name: CutoutFormat.from_dict(one.format) for name, one in manifests.items()}
    )
    (first, manifest), *others = manifests.items()
    for name, other in others:
        if other.encoding != manifest.encoding:
            raise InputError(
                f"{name}: its shards are {other.encoding['name']}, those of {first} "
                f"{manifest.encoding['name']}; write them alike"
            )
    catalogues = {name: pd.read_parquet(folder / CATALOGUE) for name, folder in folders.items()}
    indices = {name: pd.read_parquet(folder / INDEX) for name, folder in folders.items()}
    _check(pd.concat(catalogues.values(), ignore_index=True), ", ".join(folders))
    shards: list[Shard] = []
    index, rows = [], []
    for split in PARTS:
        number = 0
        for name, folder in folders.items():
            renamed = {}
            for shard in manifests[name].shards:
                if shard.split == split:
                    renamed[shard.name] = shard_name(split, number)
                    shards.append(replace(shard, name=renamed[shard.name]))
                    _link(folder / shard.name, out / renamed[shard.name])
                    number += 1
            of_split = indices[name][indices[name]["split"] == split]
            index.append(of_split.assign(shard=of_split["shard"].map(renamed)))
            rows.append(catalogues[name][catalogues[name]["split"] == split])
    return write_manifest(
        out,
        format=asdict(form),
        encoding=manifest.encoding,
        dataset=joined_content({name: one.dataset for name, one in manifests.items()}),
        simulated=all(one.simulated for one in manifests.values()),
        shards=tuple(shards),
        index=pd.concat(index, ignore_index=True),
        catalogue=pd.concat(rows, ignore_index=True),
    )


def _check(rows: pd.DataFrame, source: str) -> None:
    """Of datasets that were each looked at alone: what only shows when they are together."""
    twice = rows["id"].duplicated()
    if twice.any():
        raise InputError(f"{source}: id {rows.loc[twice, 'id'].iloc[0]!r} is there twice")
    if torn := torn_groups(rows):
        raise InputError(
            f"{source}: group {torn[0]!r} is in two splits; make the datasets from one catalogue, "
            "with one seed"
        )
    check_splits(rows["split"], rows["label"], source)


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError:  # no links there, or another file system
        shutil.copyfile(path, to)
