"""What an ensemble can score: a table, and the cutouts of its rows, checked against its format."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.catalogue.dataset import CutoutFormat
from lens_pipeline.catalogue.images import CutoutError, file_of, read_image
from lens_pipeline.catalogue.reading import read_cutouts
from lens_pipeline.catalogue.table import Catalogue
from lens_pipeline.errors import InputError, masked
from lens_pipeline.steps import digest
from lens_pipeline.storage import changed_since

# Of a pixel scale: half a pixel at the edge of a 100-pixel cutout, what centring leaves open, too.
TOLERANCE = 0.01
ROUNDING = 1e-5  # of scales that are the same, one written with fewer digits

log = logging.getLogger(__name__)


class CutoutSource(Protocol):
    """catalogue: one row a cutout, in the order of the scores."""

    @property
    def catalogue(self) -> Catalogue: ...

    @property
    def identity(self) -> dict[str, Any]:
        """What it is of, and a hash of its rows: whether two readings are of the same."""
        ...

    def changed_since(self, times: NDArray[np.float64], /) -> str | None:
        """An image of the first rows that has changed since their times (seconds since 1970); None
        where none has: see `storage.changed_since`."""
        ...

    def check(self, form: CutoutFormat, /) -> None:
        """Raises InputError, naming both, where no cutout can be of the format that a model takes:
        other bands, another pixel scale. Warns of a scale that differs by less than `TOLERANCE`."""
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
        rows = pd.util.hash_pandas_object(plain, index=False).to_numpy().tobytes()
        content = digest([list(table), hashlib.sha256(rows).hexdigest()])[:32]
        source = {"source": masked(self.catalogue.source), "content": content}
        return {"catalogue": source, "padding": self.pad}

    def changed_since(self, times: NDArray[np.float64]) -> str | None:
        some = Catalogue(self.catalogue.table.iloc[: len(times)], self.catalogue.source)
        of_images = np.repeat(times, len(some.image_columns))
        earliest: dict[str, float] = {}
        for reference, time in zip(some.references, of_images.tolist(), strict=True):
            file = file_of(reference)
            earliest[file] = min(time, earliest.get(file, time))
        return changed_since(earliest, self.options)

    def check(self, form: CutoutFormat) -> None:
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
    where it has one; see `CutoutSource.check`. Warns of rows that state none."""
    if form.pixel_scale is None:
        return
    stated = table.get("pixel_scale", pd.Series(np.nan, index=table.index))
    scale = pd.to_numeric(stated, errors="coerce").to_numpy(dtype=float)
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
