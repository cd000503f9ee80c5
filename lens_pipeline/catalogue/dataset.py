"""The processed dataset: memory-mappable arrays per split, with tables beside them."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import pandas as pd
from numpy.lib import format as npy
from numpy.typing import NDArray
from tqdm import tqdm

from lens_pipeline.catalogue.images import COMPOSITE, Cutout, CutoutError, file_of, read_cutout
from lens_pipeline.catalogue.splits import FRACTIONS, assign_splits, check_splits
from lens_pipeline.catalogue.table import Catalogue
from lens_pipeline.errors import InputError

PARTS = (*FRACTIONS, "unlabelled")
CHUNK = 256
REJECT_COLUMNS = ["id", "row", "file", "column", "reason"]


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

    def refusal(self, cutout: Cutout) -> str | None:
        """Why a cutout does not fit this format; None where it does."""
        if len(cutout.pixels) != len(self.bands):
            return f"{len(cutout.pixels)} bands; {len(self.bands)} are needed"
        if cutout.units != self.units:
            return f"the pixels are {cutout.units}; {self.units} is needed"
        return None


@dataclass(frozen=True)
class Dataset:
    """A processed dataset on disk."""

    folder: Path
    format: CutoutFormat
    facts: dict[str, Any]

    def images(self, part: str) -> NDArray[np.float32]:
        """float32 (n, bands, height, width) of a split, memory-mapped.

        What is written to it stays in memory, and the file as it is.
        """
        return np.load(self.folder / f"{part}.npy", mmap_mode="c", allow_pickle=False)

    def table(self, part: str) -> pd.DataFrame:
        """One row an image, in their order; `row` is the row of the catalogue, from 0."""
        return pd.read_parquet(self.folder / f"{part}.parquet")

    def rejects(self) -> pd.DataFrame:
        """Cutouts that could not be used: id, row (from 0), file, column, reason."""
        return pd.read_parquet(self.folder / "rejects.parquet")

    def groups_in_two_splits(self) -> list[str]:
        """Groups of which two splits hold a labelled cutout: none, if the splits are sound."""
        tables = pd.concat([self.table(part)[["group", "split"]] for part in FRACTIONS])
        splits = tables.groupby("group")["split"].nunique()
        return [str(group) for group in splits.index[splits > 1]]


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


def read_cutouts(
    catalogue: Catalogue,
    image_size: int,
    *,
    options: dict[str, Any] | None = None,
    workers: int = 4,
) -> Iterator[tuple[int, Cutout | CutoutError]]:
    """(row, cutout or the reason against it) for every row, in order, CHUNK rows at a time."""
    table = catalogue.table
    paths = table[catalogue.image_columns].to_numpy().tolist()
    no_unit = pd.Series([None] * len(table))
    units = table["flux_unit"].tolist() if "flux_unit" in table else no_unit.tolist()

    def read(row: int) -> Cutout | CutoutError:
        try:
            return read_cutout(paths[row], image_size, units[row], options)
        except CutoutError as reason:
            return reason

    with ThreadPoolExecutor(workers) as pool:
        rows = iter(tqdm(range(len(table)), desc="reading cutouts", unit="cutout", disable=None))
        while chunk := list(islice(rows, CHUNK)):
            yield from zip(chunk, pool.map(read, chunk), strict=True)


def build_dataset(
    catalogue: Catalogue,
    out: Path,
    *,
    image_size: int,
    split_seed: int = 0,
    max_reject_fraction: float = 0.1,
    origin: str = "catalogue",
    options: dict[str, Any] | None = None,
) -> Dataset:
    """Read every cutout of a catalogue and write the processed dataset into `out`.

    image_size: side in pixels of the central square that is kept; origin: where the cutouts come
    from (`simulation` or the catalogue's name), which the report states first. Unusable cutouts are
    listed in `rejects.parquet`. Raises InputError where there are more than `max_reject_fraction`
    of them, and where a split lacks a class.
    """
    table = catalogue.table
    split = assign_splits(table, split_seed)
    check_splits(split, table["label"], catalogue.source)
    stream = read_cutouts(catalogue, image_size, options=options)
    first = list(islice(stream, CHUNK))
    form = _common_format(catalogue, first, image_size)
    shape = (len(form.bands), image_size, image_size)
    stacks = {part: _Stack(out / f"{part}.npy", shape) for part in PARTS}
    kept: dict[str, list[int]] = {part: [] for part in PARTS}
    nan_fraction = np.zeros(len(table), dtype=np.float32)
    rejects: list[tuple[int, str]] = []
    for row, cutout in chain(first, stream):
        reason = str(cutout) if isinstance(cutout, CutoutError) else form.refusal(cutout)
        if reason is not None:
            rejects.append((row, reason))
        elif isinstance(cutout, Cutout):
            part = split.iloc[row]
            stacks[part].append(cutout.pixels)
            kept[part].append(row)
            nan_fraction[row] = cutout.nan_fraction
    for stack in stacks.values():
        stack.close()

    listed = _rejects(catalogue, rejects)
    if len(listed) > max_reject_fraction * len(table):
        _too_many(catalogue, listed, max_reject_fraction)
    used = table.drop([row for row, _ in rejects])
    check_splits(split[used.index], used["label"], catalogue.source)
    listed.to_parquet(out / "rejects.parquet", index=False)
    table = table.assign(row=np.arange(len(table)), split=split, nan_fraction=nan_fraction)
    for part, rows in kept.items():
        table.iloc[rows].to_parquet(out / f"{part}.parquet", index=False)
    facts = {
        "schema": 1,
        "origin": origin,
        **asdict(form),
        "split_seed": split_seed,
        "n_rows": len(table),
        "n_rejects": len(listed),
        "splits": {part: _counts(table["label"].iloc[rows]) for part, rows in kept.items()},
    }
    (out / "dataset.json").write_text(json.dumps(facts, indent=1, sort_keys=True))
    return open_dataset(out)


def _common_format(
    catalogue: Catalogue, sample: list[tuple[int, Cutout | CutoutError]], image_size: int
) -> CutoutFormat:
    """The bands and units that most of the first cutouts have."""
    good = [cutout for _, cutout in sample if isinstance(cutout, Cutout)]
    if not good:
        row, reason = sample[0]
        path = catalogue.table[catalogue.image_columns[0]].iloc[row]
        raise InputError(
            f"{catalogue.source}: none of the first {len(sample)} cutouts can be used; "
            f"row {row + 1}, {path}: {reason}"
        )
    (n_bands, units), _ = Counter((len(c.pixels), c.units) for c in good).most_common(1)[0]
    named = next((c.bands for c in good if c.bands and len(c.bands) == n_bands), None)
    if n_bands == 3 and units == COMPOSITE:
        named = ("red", "green", "blue")
    bands = catalogue.bands or named or tuple(f"band{i}" for i in range(n_bands))
    if len(bands) != n_bands:
        raise InputError(
            f"{catalogue.source}: column bands: names {len(bands)}; the cutouts have {n_bands}"
        )
    return CutoutFormat(tuple(bands), image_size, units, _pixel_scale(catalogue.table))


def _pixel_scale(table: pd.DataFrame) -> float | None:
    if "pixel_scale" not in table:
        return None
    values = table["pixel_scale"].dropna().unique()
    return float(values[0]) if len(values) == 1 else None


def _rejects(catalogue: Catalogue, rejects: list[tuple[int, str]]) -> pd.DataFrame:
    rows = []
    for row, reason in rejects:
        entry = catalogue.table.iloc[row]
        # With a file a band, a reason that concerns one of them stands at the first column.
        column = catalogue.image_columns[0]
        rows.append((entry["id"], row, file_of(entry[column]), column, reason))
    return pd.DataFrame(rows, columns=REJECT_COLUMNS).astype({"row": "int64"})


def _too_many(catalogue: Catalogue, rejects: pd.DataFrame, limit: float) -> NoReturn:
    first = rejects.iloc[0]
    raise InputError(
        f"{catalogue.source}: {len(rejects)} of {len(catalogue.table)} cutouts cannot be used, "
        f"more than LENS_MAX_REJECT_FRACTION={limit:g} allows; the first is "
        f"row {first['row'] + 1}, column {first['column']}, {first['file']}: {first['reason']}"
    )


def _counts(label: pd.Series) -> dict[str, int]:
    return {
        "n": len(label),
        "n_lens": int((label == 1).sum()),
        "n_nonlens": int((label == 0).sum()),
    }
