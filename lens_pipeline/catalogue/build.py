"""A catalogue -> the processed dataset: every cutout is read, and what cannot be used is listed."""

import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.catalogue.columns import image_columns, misspelt
from lens_pipeline.catalogue.cutout import (
    COMPOSITE,
    COMPOSITE_BANDS,
    SIGMA_UNITS,
    Cutout,
    CutoutError,
)
from lens_pipeline.catalogue.dataset import (
    NEAR_DUPLICATES,
    REJECT_COLUMNS,
    REJECTS,
    CutoutFormat,
    Dataset,
    counted_reasons,
    open_dataset,
    unnamed,
)
from lens_pipeline.catalogue.duplicates import find_near_duplicates
from lens_pipeline.catalogue.images import file_of
from lens_pipeline.catalogue.positions import positions_by_other_names
from lens_pipeline.catalogue.reading import read_cutouts
from lens_pipeline.catalogue.splits import PARTS, assign_splits, check_splits, class_counts
from lens_pipeline.catalogue.stack import Stack
from lens_pipeline.catalogue.table import Catalogue
from lens_pipeline.errors import InputError
from lens_pipeline.storage import filling

# What decides on the pixels, beside this package.
LIBRARIES = (
    "numpy", "pandas", "pyarrow", "astropy", "scipy", "pillow", "tifffile", "pypng",
)  # fmt: skip
SCALE_SPREAD = 0.01  # of pixel scales that are one, as each image's own astrometry tells it
SAMPLE = 256  # cutouts that decide on the bands and units of all

log = logging.getLogger(__name__)


class _Collected:
    """What is kept of the cutouts of a catalogue, by their places in it; split: of each of these.

    kept: the places of a split's cutouts, in the order of its stack; rejects: places, and why.
    """

    def __init__(self, folder: Path, form: CutoutFormat, split: pd.Series) -> None:
        self.form, self.split = form, split
        self.kept: dict[str, list[int]] = {part: [] for part in PARTS}
        self.rejects: list[tuple[int, CutoutError]] = []
        self._stacks = {part: Stack(folder / f"{part}.npy", form.shape) for part in PARTS}
        self._nan_fraction = np.zeros(len(split), dtype=np.float32)
        self._padded_fraction = np.zeros(len(split), dtype=np.float32)
        self._background = np.full((len(split), len(form.bands)), np.nan, dtype=np.float32)

    def put(self, place: int, cutout: Cutout | CutoutError) -> None:
        try:
            if isinstance(cutout, CutoutError):
                raise cutout
            cutout = self.form.fitted(cutout)
        except CutoutError as reason:
            self.rejects.append((place, reason))
            return
        part = self.split.iloc[place]
        self._stacks[part].append(cutout.pixels)
        self.kept[part].append(place)
        self._nan_fraction[place] = cutout.nan_fraction
        self._padded_fraction[place] = cutout.padded_fraction
        if cutout.zero_point and cutout.units == SIGMA_UNITS:
            self._background[place] = cutout.background_magnitude

    def close(self) -> None:
        for stack in self._stacks.values():
            stack.close()

    def measured(self, pad: bool) -> dict[str, NDArray[np.float32]]:
        """Columns of the tables: a value for each place."""
        columns = {"nan_fraction": self._nan_fraction}
        if pad:
            columns["padded_fraction"] = self._padded_fraction
        for band, magnitudes in zip(self.form.bands, self._background.T, strict=True):
            if np.isfinite(magnitudes).any():
                columns[f"background_magnitude_{band}"] = magnitudes
        return columns


def build_dataset(
    catalogue: Catalogue,
    out: str | Path,
    *,
    image_size: int,
    bands: Sequence[str] | None = None,
    pad: bool = False,
    split_seed: int = 0,
    max_reject_fraction: float = 0.1,
    origin: str = "catalogue",
    whole: bool = True,
    options: dict[str, Any] | None = None,
) -> Dataset:
    """Read every cutout of a catalogue and write the processed dataset into `out`, a folder that
    holds nothing, or is made.

    image_size: side in pixels of the central square that is kept; bands: which to keep, by name, by
    default all; pad: keep smaller images, too, with each band's median around them, the share of
    which the tables say (`padded_fraction`); origin: where the cutouts come from (`simulation` or
    the catalogue's name), which the report states first; whole: false where it is joined with
    others, which may hold the classes that its splits lack. Unusable cutouts are listed in
    `rejects.parquet`, cutouts of the same sky in two splits in `near_duplicates.parquet`. Where
    zero points are known, the tables say which AB magnitude one background sigma is,
    `background_magnitude_<band>`.
    Raises InputError where `out` holds anything, for an image_size below 1, where there are more
    than `max_reject_fraction` of unusable cutouts, and where a split of a whole one lacks a class;
    it leaves nothing in `out` then.
    """
    if image_size < 1:
        raise InputError(f"image_size {image_size}: at least 1 is needed")
    with filling(out) as folder:
        table, source = catalogue.table, catalogue.source
        split = assign_splits(table, split_seed)
        if whole:
            check_splits(split, table["label"], source)
        stream = read_cutouts(catalogue, image_size, bands=bands, pad=pad, options=options)
        first = _first(stream, int(max_reject_fraction * len(table)))
        form = _common_format(catalogue, first, image_size, bands)
        collected = _Collected(folder, form, split)
        for place, cutout in chain(first, stream):
            collected.put(place, cutout)
        collected.close()

        listed = _rejects(catalogue, collected.rejects)
        check_rejects(listed, len(table), max_reject_fraction, source)
        if whole:
            _check_without(listed, split, table["label"], source)
        listed.to_parquet(folder / REJECTS, index=False)
        measured: dict[str, Any] = {"row": table.index, **collected.measured(pad)}
        _tell_of_columns(table, measured, source)
        table = table.assign(split=split, **measured)
        for part, places in collected.kept.items():
            table.iloc[places].to_parquet(folder / f"{part}.parquet", index=False)
        duplicates, not_compared = find_near_duplicates(Dataset(folder, form, {}))
        duplicates.to_parquet(folder / NEAR_DUPLICATES, index=False)
        facts = {
            "schema": 1,
            "origin": origin,
            **asdict(form),
            "split_seed": split_seed,
            "n_rows": len(table),
            "n_rejects": len(listed),
            "n_near_duplicates": len(duplicates),
            "n_alike_not_compared": not_compared,
            "splits": {
                part: class_counts(table["label"].iloc[places])
                for part, places in collected.kept.items()
            },
            "content": _content(folder),
        }
        (folder / "dataset.json").write_text(json.dumps(facts, indent=1, sort_keys=True))
    return open_dataset(out)


def _check_without(rejects: pd.DataFrame, split: pd.Series, label: pd.Series, source: str) -> None:
    """Raises InputError where a split lacks a class without the cutouts that were rejected."""
    try:
        check_splits(split.drop(rejects["row"]), label.drop(rejects["row"]), source)
    except InputError as problem:
        if rejects.empty:
            raise
        why = counted_reasons(rejects["reason"])
        raise InputError(f"{problem}; {len(rejects)} cannot be used: {why}") from None


def _tell_of_columns(table: pd.DataFrame, measured: Mapping[str, Any], source: str) -> None:
    """Warns of what becomes of a catalogue's columns: of those that give way to what is measured,
    and of positions and others that nobody looks for under their names."""
    if replaced := [name for name in measured if name in table]:
        log.warning(
            "%s: a dataset has columns of its own named %s, and those of the catalogue are not "
            "carried along; rename them to keep them", source, ", ".join(replaced),
        )  # fmt: skip
    if other_names := positions_by_other_names(table):
        log.warning(
            "%s: no column ra or dec tells where the cutouts lie; if %s do, in degrees, call them "
            "so", source, ", ".join(other_names),
        )  # fmt: skip
    for given, meant in misspelt(table).items():
        log.warning(
            "%s: column %s means nothing here; if it is what %s should be, call it so",
            source, given, meant,
        )  # fmt: skip


def _content(folder: Path) -> str:
    """sha256 over the splits' cutouts and tables: shards and ensembles name it as their origin.

    Not over where the images lay: a catalogue that is moved is the same one.
    """
    digest = hashlib.sha256()
    for part in PARTS:
        with (folder / f"{part}.npy").open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        table = pd.read_parquet(folder / f"{part}.parquet")
        without = io.BytesIO()
        table.drop(columns=image_columns(table)).to_parquet(without, index=False)
        digest.update(hashlib.sha256(without.getbuffer()).digest())
    return digest.hexdigest()


def _first(
    stream: Iterator[tuple[int, Cutout | CutoutError]], may_fail: int
) -> list[tuple[int, Cutout | CutoutError]]:
    """SAMPLE of a stream; where none of these can be used, as many more as are needed for one that
    can, or to know that more fail than may."""
    first, enough = [], False
    for read in stream:
        first.append(read)
        enough |= isinstance(read[1], Cutout) or len(first) > may_fail
        if enough and len(first) >= SAMPLE:
            break
    return first


def _common_format(
    catalogue: Catalogue,
    sample: list[tuple[int, Cutout | CutoutError]],
    image_size: int,
    bands: Sequence[str] | None,
) -> CutoutFormat:
    """The bands and units that most of the first cutouts have."""
    good = [cutout for _, cutout in sample if isinstance(cutout, Cutout)]
    if not good:
        place, reason = sample[0]
        assert isinstance(reason, CutoutError)
        column = catalogue.image_columns[reason.image]
        row = catalogue.table.index[place]
        raise InputError(
            f"{catalogue.source}: none of the first {len(sample)} cutouts can be used with "
            f"image_size {image_size}; row {row + 1}, column {column}, "
            f"{catalogue.table.loc[row, column]}: {reason}"
        )
    (n_bands, units), _ = Counter((len(c.pixels), c.units) for c in good).most_common(1)[0]
    names = Counter(
        c.bands for c in good if c.bands and len(c.pixels) == n_bands and c.units == units
    )
    named = names.most_common(1)[0][0] if names else None
    if named is None and n_bands == 3 and units == COMPOSITE:
        named = COMPOSITE_BANDS
    form_bands = named or unnamed(n_bands)
    return CutoutFormat(form_bands, image_size, units, _pixel_scale(catalogue.table))


def _pixel_scale(table: pd.DataFrame) -> float | None:
    if "pixel_scale" not in table:
        return None
    values = table["pixel_scale"].dropna().to_numpy(float)
    if not len(values):
        return None
    if values.max() > values.min() * (1 + SCALE_SPREAD):
        log.warning(
            "  pixel scales from %g to %g arcsec: galaxies of one size differ in pixels, and the "
            "model will not tell which scale it takes",
            values.min(), values.max(),
        )  # fmt: skip
        return None
    return float(np.median(values))


def _rejects(catalogue: Catalogue, rejects: list[tuple[int, CutoutError]]) -> pd.DataFrame:
    rows = []
    for place, reason in rejects:
        row, entry = catalogue.table.index[place], catalogue.table.iloc[place]
        column = catalogue.image_columns[reason.image]
        rows.append((entry["id"], row, file_of(entry[column]), column, str(reason)))
    return pd.DataFrame(rows, columns=REJECT_COLUMNS).astype({"row": "int64"})


def check_rejects(rejects: pd.DataFrame, n_rows: int, limit: float, source: str) -> None:
    """Raises InputError, naming the first, where more than a fraction `limit` was rejected."""
    if len(rejects) > limit * n_rows:
        first = rejects.iloc[0]
        raise InputError(
            f"{source}: {len(rejects)} of {n_rows} cutouts cannot be used, more than "
            f"LENS_MAX_REJECT_FRACTION={limit:g} allows: {counted_reasons(rejects['reason'])}; the "
            f"first is row {first['row'] + 1}, "
            f"column {first['column']}, {first['file']}: {first['reason']}. With "
            "LENS_MAX_REJECT_FRACTION=1 the dataset lists all of them in rejects.parquet"
        )
