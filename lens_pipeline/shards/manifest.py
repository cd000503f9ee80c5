"""The manifest of a folder of shards: what it holds, to the byte.

It is written last, so that who sees one sees a whole dataset; its sha256 is the dataset's version.
"""

import hashlib
import json
import posixpath
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from lens_pipeline.errors import InputError
from lens_pipeline.files import file_sha256

if TYPE_CHECKING:
    import pandas as pd

MANIFEST = "manifest.json"
INDEX = "index.parquet"
CATALOGUE = "catalogue.parquet"


@dataclass(frozen=True)
class Listed:
    """A file that the manifest lists."""

    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Shard(Listed):
    """A tar of one split. Unlabelled samples are neither `n_lens` nor `n_nonlens`."""

    split: str
    samples: int
    n_lens: int
    n_nonlens: int


@dataclass(frozen=True)
class Manifest:
    """format: the fields of `CutoutFormat`; encoding: `name` and `quality` of `Encoding`; dataset:
    the `content` of the processed dataset that was written; simulated: whether its cutouts are.
    """

    format: dict[str, Any]
    encoding: dict[str, Any]
    dataset: str
    simulated: bool
    index: Listed
    catalogue: Listed
    shards: tuple[Shard, ...]

    @property
    def files(self) -> tuple[Listed, ...]:
        """All files but the manifest itself."""
        return (*self.shards, self.index, self.catalogue)

    def patterns(self, location: str) -> dict[str, str]:
        """{split: path or URL with braces of all its shards, as WebDataset takes it}."""
        counts = Counter(shard.split for shard in self.shards)
        return {
            split: posixpath.join(location, shard_name(split, 0, n - 1))
            for split, n in counts.items()
        }

    @cached_property
    def text(self) -> str:
        """What the file holds: the same for the same content."""
        values = {"schema": 2, **asdict(self)}
        # Without it, a digit changed in the number of samples would go unnoticed.
        checksum = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        return json.dumps(values | {"checksum": checksum}, indent=1, sort_keys=True) + "\n"

    @cached_property
    def dataset_version(self) -> str:
        """sha256 of the manifest, 64 hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @classmethod
    def parse(cls, content: bytes, source: str) -> "Manifest":
        """Raises InputError where the content is no manifest, or not as it was written."""
        try:
            values = json.loads(content)
            if values.pop("schema") != 2:
                raise ValueError("its schema is not 2: another version of this program wrote it")
            manifest = cls(
                format=values["format"],
                encoding=values["encoding"],
                dataset=values["dataset"],
                simulated=values["simulated"],
                index=Listed(**values["index"]),
                catalogue=Listed(**values["catalogue"]),
                shards=tuple(Shard(**shard) for shard in values["shards"]),
            )
            if manifest.text.encode() != content:
                raise ValueError("it was changed after it was written")
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise InputError(f"{source}: is no manifest of shards ({problem})") from None
        return manifest


def check_shard_size(cutouts: int) -> None:
    """Raises InputError where a shard would hold none."""
    if cutouts < 1:
        raise InputError(f"shard_size {cutouts}: at least 1 is needed")


def shard_name(split: str, number: int, last: int | None = None) -> str:
    """Of one tar; with `last`, in braces, of all up to that one."""
    numbers = f"{number:06d}" if last is None else f"{{{number:06d}..{last:06d}}}"
    return f"{split}-{numbers}.tar"


def write_manifest(
    folder: Path, *, index: "pd.DataFrame", catalogue: "pd.DataFrame", **described: Any
) -> Manifest:
    """Write what stands beside the tars in a folder: the index, the catalogue, and last the
    manifest.

    described: what else `Manifest` has.
    """

    def listed(name: str, table: "pd.DataFrame") -> Listed:
        path = folder / name
        table.to_parquet(path, index=False)
        return Listed(name, file_sha256(path), path.stat().st_size)

    manifest = Manifest(
        index=listed(INDEX, index), catalogue=listed(CATALOGUE, catalogue), **described
    )
    (folder / MANIFEST).write_text(manifest.text)
    return manifest


def difference(filesystem: fsspec.AbstractFileSystem, path: str, listed: Listed) -> str | None:
    """How a file differs from what the manifest lists, or None."""
    try:
        size = filesystem.info(path)["size"]
    except FileNotFoundError:
        return "is missing"
    if size != listed.bytes:
        return f"has {size} bytes; the manifest says {listed.bytes}"
    with filesystem.open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != listed.sha256:
        return f"has sha256 {found[:12]}...; the manifest says {listed.sha256[:12]}..."
    return None
