"""From whatever holds cutouts to shards, in one call."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lens_pipeline.catalogue.build import build_dataset
from lens_pipeline.catalogue.cutout import COMPOSITE
from lens_pipeline.catalogue.dataset import REJECTS, open_dataset
from lens_pipeline.catalogue.table import read_catalogue
from lens_pipeline.choices import check_bounds
from lens_pipeline.errors import InputError
from lens_pipeline.files import file_aside
from lens_pipeline.shards.encoding import Encoding
from lens_pipeline.shards.manifest import Manifest, check_shard_size

IMAGE_SIZE = 64


def prepare_shards(
    data_root: str,
    out: Path,
    *,
    shard_size: int = 1000,
    encoding: str = "float16",
    quality: int | None = None,
    image_size: int | None = None,
    bands: Sequence[str] | None = None,
    surveys: Sequence[str] | None = None,
    pad: bool = False,
    split_seed: int = 0,
    max_reject_fraction: float = 0.1,
    options: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write shards into `out`, an empty folder.

    data_root: a catalogue, a folder of cutouts, or a processed dataset, which is taken as it is;
    else see `build_dataset` and `write_shards`. image_size: 64 by default; surveys: whose rows are
    taken, by default all. Cutouts that cannot be used are listed beside the shards, in
    `rejects.parquet`, where there are any. Raises InputError as they do, and where a processed
    dataset has another image_size than the one asked for.
    """

    def write(dataset: str) -> Manifest:
        # Torch, which it needs, shall not take memory while cutouts are read.
        from lens_pipeline.shards.writer import write_shards

        return write_shards(dataset, out, shard_size=shard_size, encoding=encoding, quality=quality)

    if Path(data_root, "dataset.json").is_file():
        has = open_dataset(data_root).format.image_size
        if image_size not in (None, has):
            raise InputError(f"image_size {image_size}: the cutouts of {data_root} have {has}")
        return write(data_root)
    check_shard_size(shard_size)
    if image_size is not None:
        check_bounds("image_size", image_size)
    Encoding(encoding, COMPOSITE, quality)  # known to be good before hours of reading
    storage = dict(options or {})
    hidden = f".{out.name.removeprefix('.')}.dataset-"
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=hidden) as folder:
        catalogue = read_catalogue(data_root, storage)
        dataset = build_dataset(
            catalogue.of_surveys(surveys, split_seed) if surveys else catalogue,
            Path(folder),
            image_size=IMAGE_SIZE if image_size is None else image_size,
            bands=bands,
            pad=pad,
            split_seed=split_seed,
            max_reject_fraction=max_reject_fraction,
            origin=data_root,
            options=storage,
        )
        manifest = write(folder)
        if dataset.facts["n_rejects"]:
            with file_aside(out / REJECTS) as file:
                dataset.rejects().to_parquet(file, index=False)
        return manifest
