"""The processed dataset: memory-mappable arrays per split, with tables beside them."""

import hashlib
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.lib import format as npy
from numpy.typing import NDArray

from lens_pipeline.catalogue.columns import image_columns
from lens_pipeline.catalogue.duplicates import find_near_duplicates
from lens_pipeline.catalogue.images import (
    COMPOSITE,
    COMPOSITE_BANDS,
    SIGMA_UNITS,
    Cutout,
    CutoutError,
    file_of,
)
from lens_pipeline.catalogue.reading import read_cutouts
from lens_pipeline.catalogue.splits import (
    FRACTIONS,
    assign_splits,
    check_splits,
    class_counts,
)
from lens_pipeline.catalogue.table import Catalogue
from lens_pipeline.errors import InputError

PARTS = (*FRACTIONS, "unlabelled")
# What decides on the pixels, beside this package.
LIBRARIES = (
    "numpy", "pandas", "pyarrow", "astropy", "scipy", "pillow", "tifffile", "pypng",
)  # fmt: skip
SCALE_SPREAD = 0.01  # of pixel scales that are one, as each image's own astrometry tells it
SAMPLE = 256  # cutouts that decide on the bands and units of all
REJECT_COLUMNS = ["id", "row", "file", "column", "reason"]


log = logging.getLogger(__name__)


def unnamed(n_bands: int) -> tuple[str, ...]:
    """Names for bands that nobody has named."""
    return tuple(f"band{number}" for number in range(n_bands))


@dataclass(frozen=True)
class CutoutFormat:
    """What all cutouts of a dataset share, and a model needs of its input.

    pixel_scale: arcsec/pixel, None where the catalogue gives none or several.
    """

    bands: tuple[str, ...]
    image_size: int
    units: str
    pixel_scale: float | None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(
            tuple(values["bands"]), values["image_size"], values["units"], values["pixel_scale"]
        )

    @property
    def named_bands(self) -> tuple[str, ...] | None:
        """The bands where the catalogue or its files named them, else None."""
        made_up = (COMPOSITE_BANDS, unnamed(len(self.bands)))
        return None if self.bands in made_up else self.bands

    def fitted(self, cutout: Cutout) -> Cutout:
        """A cutout, its bands in this order. Raises CutoutError where it cannot be.

        Bands are compared by name (in any case of letters) where both sides have names.
        """
        if self.named_bands and cutout.bands:
            cutout = cutout.with_bands(self.named_bands)
        if len(cutout.pixels) != len(self.bands):
            raise CutoutError(f"{len(cutout.pixels)} bands; {len(self.bands)} are needed")
        if cutout.units != self.units:
            raise CutoutError(f"the pixels are {cutout.units}; {self.units} is needed")
        return cutout


@dataclass(frozen=True)
class Dataset:
    """A processed dataset on disk."""

    folder: Path
    format: CutoutFormat
    facts: dict[str, Any]

    def images(self, part: str) -> NDArray[np.float32]:
        """float32 (n, bands, height, width) of a split, memory-mapped.

        What is written to it stays in memory, and the file as it is. Raises InputError where the
        file is not whole.
        """
        path = self.folder / f"{part}.npy"
        try:
            return np.load(path, mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError) as problem:
            raise InputError(f"{path}: is not whole ({problem}); make the dataset again") from None

    def open_images(self, part: str) -> "ImageFile":
        """The same, to be read in blocks: unlike pages of a file that is mapped, they do not add
        up in memory."""
        return ImageFile(self.folder / f"{part}.npy")

    def table(self, part: str) -> pd.DataFrame:
        """One row an image, in their order; `row` is the row of the catalogue, from 0."""
        return pd.read_parquet(self.folder / f"{part}.parquet")

    def split(self, part: str) -> "DatasetSplit":
        """`train`, `val`, `test` or `unlabelled`, for reading batches."""
        images, table = self.images(part), self.table(part)
        if len(images) != len(table):
            raise InputError(
                f"{self.folder}: {part}.npy has {len(images)} cutouts, {part}.parquet "
                f"{len(table)}; make the dataset again"
            )
        return DatasetSplit(table, images)

    def rejects(self) -> pd.DataFrame:
        """Cutouts that could not be used: id, row (from 0), file, column, reason."""
        return pd.read_parquet(self.folder / "rejects.parquet")

    def near_duplicates(self) -> pd.DataFrame:
        """Pairs of cutouts of the same sky in two splits, the most alike first.

        id, split, other_id, other_split, correlation, mirrored, rotated (see `duplicates`).
        """
        return pd.read_parquet(self.folder / "near_duplicates.parquet")

    def groups_in_two_splits(self) -> list[str]:
        """Groups of which two splits hold a labelled cutout: none, if the splits are sound."""
        tables = pd.concat([self.table(part)[["group", "split"]] for part in FRACTIONS])
        splits = tables.groupby("group")["split"].nunique()
        return [str(group) for group in splits.index[splits > 1]]


class ImageFile:
    """The images of a split in their file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        npy.read_magic(self._file)
        npy.read_array_header_1_0(self._file)
        self._begin = self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def blocks(
        self, start: int, n: int, block: NDArray[np.float32]
    ) -> Iterator[NDArray[np.float32]]:
        """n images from `start` on, as many at a time as the memory `block` holds.

        Raises InputError where the file is shorter.
        """
        while n > 0:
            images = block[:n]
            self._read(images, start)
            yield images
            start, n = start + len(images), n - len(images)

    def gather(
        self, places: NDArray[np.integer], block: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """The images at these places, in the memory `block`, which holds as many.

        Read in the order in which they lie in the file. Raises InputError where it is shorter.
        """
        images = block[: len(places)]
        for at in np.argsort(places):
            self._read(images[at : at + 1], int(places[at]))
        return images

    def _read(self, images: NDArray[np.float32], start: int) -> None:
        """Fill the array with the images from `start` on."""
        content = images.data.cast("B")
        at = self._begin + start * images[0].nbytes
        while content:
            got = os.preadv(self._file.fileno(), [content], at)
            if not got:
                raise InputError(
                    f"{self._file.name}: is shorter than its table; make the dataset again"
                )
            content, at = content[got:], at + got


Empty = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]  # as np.empty


class CutoutRows:
    """The ids and labels of cutouts, from a table with a row each."""

    index: pd.DataFrame

    def __len__(self) -> int:
        return len(self.index)

    @property
    def ids(self) -> NDArray[np.object_]:
        return self.index["id"].to_numpy(dtype=object)

    @property
    def labels(self) -> NDArray[np.int8]:
        """int8 (n,): 1 lens, 0 not, -1 unknown."""
        return self.index["label"].fillna(-1).to_numpy(dtype=np.int8)

    @property
    def groups(self) -> NDArray[np.object_]:
        """What falls into one split together; each cutout by itself where nothing is known."""
        column = "group" if "group" in self.index else "id"
        return self.index[column].to_numpy(dtype=object)


@dataclass(frozen=True)
class DatasetSplit(CutoutRows):
    """The cutouts of one split, in the order of its table."""

    index: pd.DataFrame
    images: NDArray[np.float32]

    def gather(
        self, indices: NDArray[np.integer] | list[int], empty: Empty = np.empty
    ) -> NDArray[np.float32]:
        """The cutouts float32 (n, bands, height, width) at these places of the split.

        empty: makes the array that they are put into.
        """
        out = empty((len(indices), *self.images.shape[1:]), self.images.dtype)
        return np.take(self.images, indices, axis=0, out=out)


def open_dataset(folder: str | Path) -> Dataset:
    """Raises InputError where the folder holds no dataset."""
    path = Path(folder) / "dataset.json"
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; {folder} is not a processed dataset")
    facts = json.loads(path.read_text())
    return Dataset(Path(folder), CutoutFormat.from_dict(facts), facts)


class _Stack:
    """An .npy file that grows cutout by cutout, so that memory does not grow with the catalogue."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.file = path.open("wb")
        self.shape = shape
        self.n = 0
        self._header()

    def _header(self) -> None:
        # NumPy leaves room in the header for a longer first axis, so its length does not change.
        shape = (self.n, *self.shape)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(self.file, header)

    def append(self, pixels: NDArray[np.float32]) -> None:
        self.file.write(np.ascontiguousarray(pixels, dtype="<f4").tobytes())
        self.n += 1

    def close(self) -> None:
        self.file.seek(0)
        self._header()
        self.file.close()


def build_dataset(
    catalogue: Catalogue,
    out: Path,
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
    """Read every cutout of a catalogue and write the processed dataset into `out`.

    image_size: side in pixels of the central square that is kept; bands: which to keep, by name, by
    default all; pad: keep smaller images, too, with each band's median around them, the share of
    which the tables say (`padded_fraction`); origin: where the cutouts come from (`simulation` or
    the catalogue's name), which the report states first; whole: false where it is joined with
    others, which may hold the classes that its splits lack. Unusable cutouts are listed in
    `rejects.parquet`, cutouts of the same sky in two splits in `near_duplicates.parquet`. Where
    zero points are known, the tables say which AB magnitude one background sigma is,
    `background_magnitude_<band>`.
    Raises InputError where there are more than `max_reject_fraction` of unusable cutouts, and where
    a split of a whole one lacks a class.
    """
    table = catalogue.table
    split = assign_splits(table, split_seed)
    if whole:
        check_splits(split, table["label"], catalogue.source)
    stream = read_cutouts(catalogue, image_size, bands=bands, pad=pad, options=options)
    first = _first(stream, int(max_reject_fraction * len(table)))
    form = _common_format(catalogue, first, image_size, bands)
    shape = (len(form.bands), image_size, image_size)
    stacks = {part: _Stack(out / f"{part}.npy", shape) for part in PARTS}
    kept: dict[str, list[int]] = {part: [] for part in PARTS}
    nan_fraction = np.zeros(len(table), dtype=np.float32)
    padded_fraction = np.zeros(len(table), dtype=np.float32)
    background = np.full((len(table), len(form.bands)), np.nan, dtype=np.float32)
    rejects: list[tuple[int, CutoutError]] = []
    for place, cutout in chain(first, stream):
        try:
            if isinstance(cutout, CutoutError):
                raise cutout
            cutout = form.fitted(cutout)
        except CutoutError as reason:
            rejects.append((place, reason))
            continue
        part = split.iloc[place]
        stacks[part].append(cutout.pixels)
        kept[part].append(place)
        nan_fraction[place] = cutout.nan_fraction
        padded_fraction[place] = cutout.padded_fraction
        if cutout.zero_point and cutout.units == SIGMA_UNITS:
            background[place] = cutout.background_magnitude
    for stack in stacks.values():
        stack.close()

    listed = _rejects(catalogue, rejects)
    check_rejects(listed, len(table), max_reject_fraction, catalogue.source)
    used = table.drop(listed["row"])
    if whole:
        check_splits(split[used.index], used["label"], catalogue.source)
    listed.to_parquet(out / "rejects.parquet", index=False)
    table = table.assign(row=table.index, split=split, nan_fraction=nan_fraction)
    if pad:
        table["padded_fraction"] = padded_fraction
    for band, magnitudes in zip(form.bands, background.T, strict=True):
        if np.isfinite(magnitudes).any():
            table[f"background_magnitude_{band}"] = magnitudes
    for part, places in kept.items():
        table.iloc[places].to_parquet(out / f"{part}.parquet", index=False)
    duplicates, not_compared = find_near_duplicates(Dataset(out, form, {}))
    duplicates.to_parquet(out / "near_duplicates.parquet", index=False)
    facts = {
        "schema": 1,
        "origin": origin,
        **asdict(form),
        "split_seed": split_seed,
        "n_rows": len(table),
        "n_rejects": len(listed),
        "n_near_duplicates": len(duplicates),
        "n_alike_not_compared": not_compared,
        "splits": {part: class_counts(table["label"].iloc[kept[part]]) for part in PARTS},
        "content": _content(out),
    }
    (out / "dataset.json").write_text(json.dumps(facts, indent=1, sort_keys=True))
    return open_dataset(out)


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
            f"{catalogue.source}: none of the first {len(sample)} cutouts can be used; row "
            f"{row + 1}, column {column}, {catalogue.table.loc[row, column]}: {reason}"
        )
    (n_bands, units), _ = Counter((len(c.pixels), c.units) for c in good).most_common(1)[0]
    names = Counter(
        c.bands for c in good if c.bands and len(c.pixels) == n_bands and c.units == units
    )
    named = names.most_common(1)[0][0] if names else None
    if named is None and n_bands == 3 and units == COMPOSITE:
        named = COMPOSITE_BANDS
    if bands is None and catalogue.bands and len(catalogue.bands) != n_bands:
        raise InputError(
            f"{catalogue.source}: column bands: names {len(catalogue.bands)}; the cutouts have "
            f"{n_bands}"
        )
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


def counted_reasons(reasons: Iterable[str]) -> str:
    """Why cutouts could not be used, the three most frequent reasons: `2 times: too small; ...`."""
    most: list[tuple[str, int]] = Counter(reasons).most_common(3)
    return "; ".join(f"{n} times: {why}" for why, n in most)


def check_rejects(rejects: pd.DataFrame, n_rows: int, limit: float, source: str) -> None:
    """Raises InputError, naming the first, where more than a fraction `limit` was rejected."""
    if len(rejects) > limit * n_rows:
        first = rejects.iloc[0]
        raise InputError(
            f"{source}: {len(rejects)} of {n_rows} cutouts cannot be used, more than "
            f"LENS_MAX_REJECT_FRACTION={limit:g} allows; the first is row {first['row'] + 1}, "
            f"column {first['column']}, {first['file']}: {first['reason']}"
        )
