"""The processed dataset: memory-mappable arrays per split, with tables beside them."""

import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.lib import format as npy
from numpy.typing import ArrayLike, NDArray

from lens_pipeline.catalogue.cutout import COMPOSITE_BANDS, PIXELS, Cutout, CutoutError
from lens_pipeline.catalogue.splits import SPLITS, check_part, torn_groups
from lens_pipeline.errors import InputError

REJECTS = "rejects.parquet"
NEAR_DUPLICATES = "near_duplicates.parquet"  # of cutouts in two splits
REJECT_COLUMNS = ["id", "row", "file", "column", "reason"]


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
    def shape(self) -> tuple[int, int, int]:
        """(bands, height, width) of a cutout."""
        return len(self.bands), self.image_size, self.image_size

    @property
    def named_bands(self) -> tuple[str, ...] | None:
        """The bands where the catalogue or its files named them, else None."""
        made_up = (COMPOSITE_BANDS, unnamed(len(self.bands)))
        return None if self.bands in made_up else self.bands

    def differences(self, other: Self) -> list[tuple[str, str, str]]:
        """Of each field in which another format differs: its name, and what both have, in words."""

        def said(value: Any) -> str:
            return ", ".join(value) if isinstance(value, tuple) else str(value)

        mine, theirs = asdict(self), asdict(other)
        return [
            (name, said(mine[name]), said(theirs[name]))
            for name in mine
            if mine[name] != theirs[name]
        ]

    def fitted(self, cutout: Cutout) -> Cutout:
        """A cutout, its bands in this order. Raises CutoutError where it cannot be.

        Bands are compared by name (in any case of letters) where both sides have names, as they do
        where they are the same.
        """
        if cutout.bands and (self.named_bands or {*cutout.bands} == {*self.bands}):
            cutout = cutout.with_bands(self.bands)
        if len(cutout.pixels) != len(self.bands):
            raise CutoutError(f"{len(cutout.pixels)} bands; {len(self.bands)} are needed")
        if cutout.units != self.units:
            found, needed = PIXELS[cutout.units], PIXELS[self.units]
            raise CutoutError(f"the image is {found}; {needed} is needed")
        return cutout


@dataclass(frozen=True)
class Dataset:
    """A processed dataset on disk."""

    folder: Path
    format: CutoutFormat
    facts: dict[str, Any]

    @property
    def content(self) -> str:
        """sha256 over the splits' cutouts and tables."""
        return str(self.facts["content"])

    def images(self, part: str) -> NDArray[np.float32]:
        """float32 (n, bands, height, width) of a split, memory-mapped.

        What is written to it stays in memory, and the file as it is. Raises InputError where there
        is no such split, or its file is not whole.
        """
        check_part(part)
        with _whole(self.folder / f"{part}.npy") as path:
            return np.load(path, mmap_mode="c", allow_pickle=False)

    def open_images(self, part: str) -> "ImageFile":
        """The same, to be read in blocks: unlike pages of a file that is mapped, they do not add
        up in memory. Raises InputError as `images`."""
        check_part(part)
        with _whole(self.folder / f"{part}.npy") as path:
            return ImageFile(path)

    def table(self, part: str) -> pd.DataFrame:
        """One row an image, in their order; `row` is the row of the catalogue, from 0. Raises
        InputError as `images`."""
        check_part(part)
        with _whole(self.folder / f"{part}.parquet") as path:
            return pd.read_parquet(path)

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
        with _whole(self.folder / REJECTS) as path:
            return pd.read_parquet(path)

    def near_duplicates(self) -> pd.DataFrame:
        """Pairs of cutouts of the same sky in two splits, the most alike first.

        id, split, other_id, other_split, correlation, mirrored, rotated (see `duplicates`).
        """
        with _whole(self.folder / NEAR_DUPLICATES) as path:
            return pd.read_parquet(path)

    def groups_in_two_splits(self) -> list[str]:
        """Groups of which two splits hold a labelled cutout: none, if the splits are sound."""
        tables = [self.table(part)[["group", "split", "label"]] for part in SPLITS]
        return torn_groups(pd.concat(tables))


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file of a dataset, to be opened. Raises InputError where it cannot be."""
    try:
        yield path
    except (OSError, ValueError) as problem:
        raise InputError(f"{path}: is not whole ({problem}); make the dataset again") from None


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


def places_of(indices: ArrayLike, n: int) -> NDArray[np.intp]:
    """Which of n cutouts are meant, from 0: by whole numbers (negative ones from the end), or by a
    mask, true or false for each of the n.

    Raises IndexError for a number that there is not, InputError for anything else, a mask of
    another length among it.
    """
    found = np.asarray(indices)
    if found.dtype == object:  # of pandas's columns that know missing values
        found = pd.Series(found).infer_objects().to_numpy()
    if found.dtype == bool:
        if found.shape != (n,):
            raise InputError(f"the mask has the shape {found.shape}; there are {n} cutouts")
        return np.flatnonzero(found)
    if found.ndim != 1 or (found.size and not np.issubdtype(found.dtype, np.integer)):
        raise InputError(
            f"cutouts are chosen by whole numbers (k,) or by true and false ({n},); this is "
            f"{found.dtype} {found.shape}"
        )
    places = found.astype(np.intp, copy=False)
    if places.size and not -n <= places.min() <= places.max() < n:
        raise IndexError(f"cutouts {places.min()} to {places.max()} are chosen; there are {n}")
    return np.where(places < 0, places + n, places)


class Split(ABC):
    """The cutouts of one split, each at its place.

    index: a row for each, with at least `id` and `label`.
    """

    index: pd.DataFrame

    @abstractmethod
    def gather(self, indices: ArrayLike, empty: Empty = np.empty) -> NDArray[np.floating]:
        """The cutouts (n, bands, height, width) at these places, in the units of the format.

        indices: see `places_of`; empty: makes the array that they are put into.
        """

    def in_order(self, size: int) -> Iterator[NDArray[np.floating]]:
        """All of them, up to `size` at a time."""
        for start in range(0, len(self), size):
            yield self.gather(np.arange(start, min(start + size, len(self))))

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
class DatasetSplit(Split):
    """The cutouts of one split, float32, in the order of its table."""

    index: pd.DataFrame
    images: NDArray[np.float32]

    def gather(self, indices: ArrayLike, empty: Empty = np.empty) -> NDArray[np.float32]:
        places = places_of(indices, len(self))
        out = empty((len(places), *self.images.shape[1:]), self.images.dtype)
        # `raise`, the default, would write to a buffer first, which takes three times as long.
        return np.take(self.images, places, axis=0, out=out, mode="clip")


def open_dataset(folder: str | Path) -> Dataset:
    """Raises InputError where the folder holds no dataset."""
    path = Path(folder) / "dataset.json"
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; {folder} is not a processed dataset")
    try:
        facts = json.loads(path.read_text())
        return Dataset(Path(folder), CutoutFormat.from_dict(facts), facts)
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path}: is damaged; make the dataset again") from None


def counted_reasons(reasons: Iterable[str]) -> str:
    """Why cutouts could not be used, the three most frequent reasons: `2 times: too small; ...`."""
    counts = Counter(reasons)
    most: list[tuple[str, int]] = counts.most_common(3)
    others = counts.total() - sum(n for _, n in most)
    said = [f"{'once' if n == 1 else f'{n} times'}: {why}" for why, n in most]
    return "; ".join([*said, f"{others} for other reasons"] if others else said)


def rejects_in_words(rejects: pd.DataFrame, n_rows: int, file: Path) -> str:
    """What is told of `Dataset.rejects` of so many rows, which lie in a file."""
    why = counted_reasons(rejects["reason"])
    return f"{len(rejects)} of {n_rows} cutouts cannot be used, see {file} ({why})"
