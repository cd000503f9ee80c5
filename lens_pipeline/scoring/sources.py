"""What an ensemble can score: a table, and the cutouts of its rows, checked against its format."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.catalogue.cutout import CutoutError
from lens_pipeline.catalogue.dataset import CutoutFormat, Split
from lens_pipeline.catalogue.images import file_of, read_image
from lens_pipeline.catalogue.reading import read_cutouts
from lens_pipeline.catalogue.table import Catalogue
from lens_pipeline.errors import InputError, masked
from lens_pipeline.files import digest
from lens_pipeline.storage import known_states

# Of a pixel scale: half a pixel at the edge of a 100-pixel cutout, what centring leaves open, too.
TOLERANCE = 0.01
ROUNDING = 1e-5  # of scales that are the same, one written with fewer digits

log = logging.getLogger(__name__)


class ScoredDataset(Protocol):
    """What is scored: a processed dataset (see `Dataset`), or shards seen as one.

    folder: where it lies, a path or a URL; split: `train`, `val`, `test` or `unlabelled`; table:
    the catalogue's rows of its cutouts, in their order, each with its number `row`.
    """

    @property
    def folder(self) -> Path | str: ...

    @property
    def format(self) -> CutoutFormat: ...

    @property
    def facts(self) -> dict[str, Any]: ...

    def split(self, part: str, /) -> Split: ...

    def table(self, part: str, /) -> pd.DataFrame: ...

    def rejects(self) -> pd.DataFrame: ...


class CutoutSource(Protocol):
    """catalogue: one row a cutout, in the order of the scores."""

    @property
    def catalogue(self) -> Catalogue: ...

    @property
    def identity(self) -> dict[str, Any]:
        """What it is of, and a hash of its rows: whether two readings are of the same."""
        ...

    def row_hashes(self) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """Of each row: a hash of its id and of what its pixels come of, its files as they are now
        and how they are read; and whether its store tells that these have not changed."""
        ...

    @property
    def order(self) -> NDArray[np.integer]:
        """All rows, in an order in which they are cheap to read."""
        ...

    def sample(self, rows: NDArray[np.integer], n: int, /) -> NDArray[np.integer]:
        """Up to n of these rows, always the same, that tell of all and are cheap to read."""
        ...

    def check(self, form: CutoutFormat, /) -> None:
        """Raises InputError where there are no rows, and, naming both, where no cutout can be of
        the format that a model takes: other bands, another pixel scale. Warns of a scale that
        differs by less than `TOLERANCE`."""
        ...

    def read(
        self, form: CutoutFormat, rows: NDArray[np.integer], /
    ) -> Iterator[NDArray[np.float32] | CutoutError]:
        """The pixels (bands, height, width) of these rows, in this order, as the format wants them,
        or the reason against each."""
        ...


@dataclass(frozen=True)
class CatalogueCutouts:
    """The files that a catalogue names.

    options: fsspec's, for its URLs; pad: see `build_dataset`.
    """

    catalogue: Catalogue
    options: dict[str, Any] = field(default_factory=dict)
    pad: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        table = self.catalogue.table
        plain = table.copy(deep=False)
        for name in plain.select_dtypes("object"):
            plain[name] = plain[name].map(repr)  # a column may hold lists
        rows = hashlib.sha256(hashed(plain).tobytes()).hexdigest()
        content = digest([list(table), rows])[:32]
        source = {"source": masked(self.catalogue.source), "content": content}
        return {"catalogue": source, "padding": self.pad}

    def row_hashes(self) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        table, images = self.catalogue.table, self.catalogue.image_columns
        states = known_states({file_of(name) for name in self.catalogue.references}, self.options)
        read = pd.DataFrame({"id": table["id"].to_numpy(), "how": digest([images, self.pad])})
        read["unit"] = table["flux_unit"].to_numpy() if "flux_unit" in table else None
        bands = self.catalogue.bands_of(np.arange(len(table)))
        read["bands"] = [None if names is None else ",".join(names) for names in bands]
        told = np.ones(len(table), dtype=bool)
        for number, name in enumerate(images):
            paths = table[name].astype(str)
            found = paths.map(file_of).map(states)
            told &= found.notna().to_numpy(dtype=bool)
            read[f"path {number}"], read[f"state {number}"] = paths.to_numpy(), found.to_numpy()
        return hashed(read), told

    @property
    def order(self) -> NDArray[np.integer]:
        return np.arange(len(self.catalogue.table))

    def sample(self, rows: NDArray[np.integer], n: int) -> NDArray[np.integer]:
        return np.sort(np.random.default_rng(0).permutation(rows)[:n])

    def check(self, form: CutoutFormat) -> None:
        if self.catalogue.table.empty:
            raise InputError(f"{self.catalogue.source}: has no rows; there is nothing to score")
        check_bands(form, self.catalogue.bands, self.catalogue.source)
        self._tell_of_unnamed_bands(form)
        check_pixel_scale(form, self.catalogue.table, self.catalogue.source)

    def _tell_of_unnamed_bands(self, form: CutoutFormat) -> None:
        """Warns where neither the catalogue nor its first file says which band is which."""
        if self.catalogue.bands is not None or form.named_bands is None:
            return
        try:
            first = read_image(self.catalogue.references[0], options=self.options)
        except CutoutError:
            return  # which its row will tell
        if first.bands is None and len(first.pixels) > 1:
            log.warning(
                "%s: no column bands, and images that do not name theirs; they are taken to be %s, "
                "in this order", self.catalogue.source, ", ".join(form.named_bands),
            )  # fmt: skip

    def read(
        self, form: CutoutFormat, rows: NDArray[np.integer]
    ) -> Iterator[NDArray[np.float32] | CutoutError]:
        stream = read_cutouts(
            self.catalogue,
            form.image_size,
            bands=form.named_bands,
            pad=self.pad,
            options=self.options,
            rows=rows,
            progress=False,
        )
        for _, cutout in stream:
            try:
                if isinstance(cutout, CutoutError):
                    raise cutout
                yield form.fitted(cutout).pixels
            except CutoutError as reason:
                yield reason


def hashed(table: pd.DataFrame) -> NDArray[np.uint64]:
    """A hash of each row."""
    return np.asarray(pd.util.hash_pandas_object(table, index=False), dtype=np.uint64)


def check_bands(form: CutoutFormat, names: Sequence[str] | None, source: str) -> None:
    """Raises InputError where a source names its bands, and lacks one that the model needs."""
    if names is None or form.named_bands is None:
        return
    known = [name.lower() for name in names]
    missing = [band for band in form.named_bands if band.lower() not in known]
    if missing:
        raise InputError(
            f"{source}: has the bands {', '.join(names)}; the model takes "
            f"{', '.join(form.named_bands)}, and there is no {missing[0]}"
        )


def check_pixel_scale(form: CutoutFormat, table: pd.DataFrame, source: str) -> None:
    """Compares the column `pixel_scale` (arcsec/pixel), where there is one, with the model's scale,
    where it has one; see `CutoutSource.check`. Warns of rows that state none, or where the model
    has none: it was trained on cutouts of several, or of none that was stated."""
    stated = table.get("pixel_scale", pd.Series(np.nan, index=table.index))
    scale = pd.to_numeric(stated, errors="coerce").to_numpy(dtype=float)
    if form.pixel_scale is None:
        if np.isfinite(scale).any():
            log.warning(
                "%s: column pixel_scale: %g to %g arcsec; the model has no scale of its own to "
                "compare with: see that it was trained on such cutouts",
                source, np.nanmin(scale), np.nanmax(scale),
            )  # fmt: skip
        return
    if n_unknown := int(np.isnan(scale).sum()):
        log.warning(
            "%s: %d of %d rows state no pixel_scale; the model takes %g arcsec a pixel",
            source, n_unknown, len(scale), form.pixel_scale,
        )  # fmt: skip
    off = np.nan_to_num(np.abs(scale / form.pixel_scale - 1))
    row = int(np.argmax(off > TOLERANCE))
    if off[row] > TOLERANCE:
        raise InputError(
            f"{source}: row {row + 1}, column pixel_scale: {scale[row]:g} arcsec; the model was "
            f"trained on {form.pixel_scale:g} arcsec a pixel, and a galaxy of another size in "
            "pixels is another galaxy to it: resample the cutouts, or take another model"
        )
    if off.max() > ROUNDING:
        log.warning(
            "%s: column pixel_scale: up to %.2g %% from the model's %g arcsec",
            source, 100 * off.max(), form.pixel_scale,
        )  # fmt: skip
