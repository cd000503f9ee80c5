"""Tars that another WebDataset writer made: without a manifest, so they are looked through once."""

import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lens_pipeline.catalogue.cutout import (
    COMPOSITE,
    COMPOSITE_BANDS,
    FLUX,
    SIGMA_UNITS,
    Cutout,
    CutoutError,
    usable_cutout,
)
from lens_pipeline.catalogue.dataset import (
    CutoutFormat,
    Empty,
    Split,
    places_of,
    unnamed,
)
from lens_pipeline.catalogue.images import decode_image
from lens_pipeline.errors import InputError
from lens_pipeline.progress import progress_bar
from lens_pipeline.shards.cache import mapped
from lens_pipeline.shards.encoding import Encoding
from lens_pipeline.shards.memory import stacked

Content = bytes | memoryview
IMAGES = ("npy", "png", "jpg", "jpeg")
_NAME = re.compile(r"(?P<key>[A-Za-z0-9_-]+)\.(?P<extension>[a-z0-9]+(?:\.[a-z0-9]+)*)")
_LABELS = {
    **{"": -1, "none": -1, "nan": -1},
    **{"0": 0, "0.0": 0, "false": 0},
    **{"1": 1, "1.0": 1, "true": 1},
}
END = bytes(2 * tarfile.BLOCKSIZE)  # every whole tar ends with it


@dataclass(frozen=True)
class Stored:
    """How a picture of ours is to be read, as the `.json` beside it says: see `Encoding.stated`."""

    encoding: Encoding
    bands: tuple[str, ...]
    shape: tuple[int, ...]

    def cutout(self, content: bytes) -> Cutout:
        """Raises CutoutError where the picture is damaged, or another."""
        try:
            pixels = self.encoding.decode(content, self.shape)
        except Exception as problem:  # noqa: BLE001  (decoders raise anything on a damaged file)
            raise CutoutError(f"the file is not as its .json says ({problem})") from None
        return Cutout(pixels, self.encoding.units, self.bands)


@cache
def _png16(units: str, bands: tuple[str, ...], shape: tuple[int, ...]) -> Stored:
    """One for all samples. Raises ValueError where the parts do not fit together."""
    if units not in (SIGMA_UNITS, COMPOSITE) or len(shape) != 3 or len(bands) != shape[0]:
        raise ValueError
    return Stored(Encoding("png16", units), bands, shape)


@dataclass(frozen=True)
class RawSample:
    """What a tar holds of one cutout, not decoded; label: 1 lens, 0 not, -1 unknown.

    content: of the image file, which begins at `offset` of the tar; stored: how it is to be read,
    where that is said beside it.
    """

    id: str
    label: int
    suffix: str
    content: Content
    offset: int = 0
    stored: Stored | None = None

    def cutout(self, flux_unit: str | None) -> Cutout:
        """Decoded, as it is. Raises CutoutError where it cannot be."""
        content = bytes(self.content)
        if self.stored is not None:
            return self.stored.cutout(content)
        return decode_image(content, self.suffix, flux_unit)


@dataclass(frozen=True)
class ImageDecoder:
    """Reads a sample's image as one of a catalogue; flux_unit: of NumPy files, as there."""

    form: CutoutFormat
    flux_unit: str | None

    def __call__(self, sample: RawSample, shard: str) -> NDArray[np.float32]:
        try:
            cutout = sample.cutout(self.flux_unit)
            return self.form.fitted(usable_cutout(cutout, self.form.image_size)).pixels
        except CutoutError as reason:
            raise InputError(f"{shard}: sample {sample.id}: {reason}") from None

    @classmethod
    def like(
        cls, sample: RawSample, shard: str, image_size: int | None, flux_unit: str | None
    ) -> Self:
        """One for cutouts that are as this one is."""
        try:
            cutout = sample.cutout(flux_unit)
        except CutoutError as reason:
            raise InputError(f"{shard}: sample {sample.id}: {reason}") from None
        n_bands, *sides = cutout.pixels.shape
        units = SIGMA_UNITS if cutout.units == FLUX else cutout.units
        bands = COMPOSITE_BANDS if (n_bands, units) == (3, COMPOSITE) else unnamed(n_bands)
        bands = cutout.bands or bands
        return cls(CutoutFormat(bands, image_size or min(sides), units, None), flux_unit)


def samples_of(files: Iterable[tuple[str, Content, int]], shard: str) -> Iterator[RawSample]:
    """The samples of a tar from the (name, content, offset) of its files, in their order.

    A sample has one image, and its label in `.cls` or as `label` of its `.json`, or none. Raises
    InputError, naming shard and sample, for names that WebDataset's rules do not allow, a sample
    without an image or with two, or a label other than 0 and 1.
    """
    last = ""
    parts: dict[str, tuple[Content, int]] = {}
    for name, content, offset in files:
        match = _NAME.fullmatch(name)
        if match is None:
            raise InputError(f"{shard}: {name!r} is no name of a sample's file, as 000017.npy is")
        if match["key"] != last and parts:
            yield _sample(last, parts, shard)
            parts = {}
        last = match["key"]
        if match["extension"] in parts:
            raise InputError(f"{shard}: {name} is there twice")
        parts[match["extension"]] = content, offset
    if parts:
        yield _sample(last, parts, shard)


def _sample(key: str, parts: dict[str, tuple[Content, int]], shard: str) -> RawSample:
    images = [extension for extension in parts if extension in IMAGES]
    if len(images) != 1:
        raise InputError(
            f"{shard}: sample {key} has {len(images)} images; one of {', '.join(IMAGES)} is needed"
        )
    about: dict[str, Any] = {}
    try:
        if "json" in parts:
            about = dict(json.loads(bytes(parts["json"][0])))
        stated = bytes(parts["cls"][0]).decode() if "cls" in parts else about.get("label")
        stored = None
        if images[0] == "png" and about.get("encoding") == "png16":
            stored = _png16(about["units"], tuple(about["bands"]), tuple(about["shape"]))
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{shard}: sample {key}: its .json or .cls cannot be read") from None
    label = _LABELS.get(str(stated).strip().lower())
    if label is None:
        raise InputError(f"{shard}: sample {key}: label {stated!r} must be 0, 1 or empty")
    return RawSample(str(about.get("id", key)), label, images[0], *parts[images[0]], stored)


@dataclass(frozen=True)
class ForeignSplit(Split):
    """Cutouts in tars without a manifest.

    index: one row a cutout: id, label, shard (its path), offset, bytes, suffix, stored.
    """

    index: pd.DataFrame
    decoder: ImageDecoder

    @cached_property
    def _maps(self) -> dict[str, memoryview]:
        end = (self.index["offset"] + self.index["bytes"]).groupby(self.index["shard"]).max()
        return {str(shard): mapped(Path(str(shard)), int(least)) for shard, least in end.items()}

    def held(self) -> Self:
        """Itself, its tars mapped from now on: others may make room in a cache."""
        _ = self._maps
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_maps"}

    @cached_property
    def _places(self) -> list[tuple[Any, ...]]:
        return list(self.index.itertuples(index=False, name=None))

    def gather(self, indices: ArrayLike, empty: Empty = np.empty) -> NDArray[np.floating]:
        cutouts = []
        for i in places_of(indices, len(self)):
            name, label, shard, offset, size, suffix, stored = self._places[i]
            content = self._maps[shard][offset : offset + size]
            sample = RawSample(name, label, suffix, content, offset, stored)
            cutouts.append(self.decoder(sample, shard))
        return stacked(cutouts, self.decoder.form.shape, empty)


def index_tars(
    paths: Sequence[Path], image_size: int | None = None, flux_unit: str | None = None
) -> ForeignSplit:
    """Look tars through for where their cutouts lie; the first cutout says what all must be.

    image_size: the central square to keep, by default the smaller side of the first. Raises
    InputError as `samples_of` does, and where a tar is missing, cut short or holds nothing.
    """
    rows: list[tuple[Any, ...]] = []
    decoder: ImageDecoder | None = None
    for path in progress_bar(paths, desc="indexing shards", unit="shard"):
        for sample in samples_of(_files(path), str(path)):
            if decoder is None:
                decoder = ImageDecoder.like(sample, str(path), image_size, flux_unit)
            place = sample.offset, len(sample.content)
            how = sample.suffix, sample.stored
            rows.append((sample.id, sample.label, str(path), *place, *how))
    if decoder is None:
        raise InputError(f"{', '.join(map(str, paths[:3]))}: no cutouts")
    columns = ["id", "label", "shard", "offset", "bytes", "suffix", "stored"]
    return ForeignSplit(pd.DataFrame(rows, columns=columns), decoder)


class WholeTarInfo(tarfile.TarInfo):
    """A header that is damaged is an error: to `tarfile` it would be the end of the tar."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as problem:
            if any(buf):
                raise tarfile.ReadError(f"a header is damaged: {problem}") from None
            raise  # an empty block, as at the end


def check_end(rest: bytes | memoryview) -> None:
    """Raises tarfile.ReadError where anything is behind the end of a tar but zeros."""
    if np.frombuffer(rest, np.uint8).any():
        raise tarfile.ReadError("more lies behind its end: a header is empty, or two tars are one")


def _files(path: Path) -> Iterator[tuple[str, memoryview, int]]:
    content = mapped(path, 0)
    try:
        with tarfile.open(path, "r:", tarinfo=WholeTarInfo) as tar:
            for file in tar:
                end = file.offset_data + file.size
                if end > len(content):
                    raise tarfile.ReadError("it is cut short")
                yield file.name, content[file.offset_data : end], file.offset_data
            check_end(content[tar.offset :])
    except tarfile.TarError as problem:
        raise InputError(f"{path}: is no whole tar ({problem})") from None
    if bytes(content[-len(END) :]) != END:
        raise InputError(f"{path}: is no whole tar (its end is missing)")
