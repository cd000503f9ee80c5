"""The manifest of a folder of shards: what it holds, to the byte.

It is written last, so that who sees one sees a whole dataset; its sha256 is the dataset's version.
"""

import hashlib
import json
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np

from lens_pipeline.errors import InputError
from lens_pipeline.progress import progress_bar
from lens_pipeline.steps import file_sha256
from lens_pipeline.storage import locate

if TYPE_CHECKING:
    import pandas as pd

MANIFEST = "manifest.json"
INDEX = "index.parquet"
CATALOGUE = "catalogue.parquet"
BLOCK = 2**20


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
        found: dict[str, list[str]] = {}
        for shard in self.shards:
            found.setdefault(shard.split, []).append(shard.name)
        return {
            split: posixpath.join(location, f"{split}-{{{0:06d}..{len(names) - 1:06d}}}.tar")
            for split, names in found.items()
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


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


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


def read_manifest(
    location: str | Path, storage_options: Mapping[str, Any] | None = None
) -> Manifest:
    """The manifest in a folder or at an fsspec URL. Raises InputError where there is none."""
    path = posixpath.join(str(location), MANIFEST)
    try:
        filesystem, inside = locate(path, storage_options)
        content = filesystem.cat_file(inside)
    except FileNotFoundError:
        raise InputError(
            f"{path}: there is no such file; shards are whole once their manifest is there"
        ) from None
    except PermissionError as problem:
        raise InputError(f"{path}: may not be read ({' '.join(str(problem).split())})") from None
    return Manifest.parse(content, path)


def verify_shards(
    location: str | Path, storage_options: Mapping[str, Any] | None = None
) -> list[str]:
    """What is wrong with the shards in a folder or at a URL; nothing when they are whole.

    Each problem names its file. Every byte is read back and checked against the manifest.
    """
    try:
        manifest = read_manifest(location, storage_options)
    except InputError as problem:
        return [str(problem)]
    filesystem, root = locate(str(location), storage_options)
    return list(_problems(filesystem, root, manifest))


def _problems(
    filesystem: fsspec.AbstractFileSystem, root: str, manifest: Manifest
) -> Iterator[str]:
    total = sum(listed.bytes for listed in manifest.files)
    index_is_whole = False
    with progress_bar(total=total, desc="verifying", unit="B", unit_scale=True) as progress:
        for listed in (manifest.index, manifest.catalogue, *manifest.shards):
            path = posixpath.join(root, listed.name)
            wrong = difference(filesystem, path, listed)
            if listed is manifest.index:
                index_is_whole = wrong is None
            elif wrong and isinstance(listed, Shard) and index_is_whole and filesystem.exists(path):
                index_path = posixpath.join(root, INDEX)
                wrong += f"; {_damage(filesystem, path, listed.name, index_path)}"
            if wrong:
                yield f"{path}: {wrong}"
            progress.update(listed.bytes)


def _damage(
    filesystem: fsspec.AbstractFileSystem, path: str, shard: str, index_path: str, most: int = 5
) -> str:
    """Which samples of a damaged shard have other pixels than were written."""
    import pandas as pd

    with filesystem.open(index_path, "rb") as file:
        index = pd.read_parquet(file, filters=[("shard", "==", shard)])
    damaged = []
    with filesystem.open(path, "rb") as file:
        for sample in index.itertuples():
            file.seek(sample.offset)
            content = file.read(sample.bytes)
            found = np.frombuffer(content + bytes(-len(content) % 8), "<u8").sum()
            if found != sample.word_sum:
                damaged.append(str(sample.id))
    if not damaged:
        return "the pixels of every sample are whole, a header or label is not"
    more = f" and {len(damaged) - most} more" if len(damaged) > most else ""
    return f"damaged samples: {', '.join(damaged[:most])}{more}"


def difference(filesystem: fsspec.AbstractFileSystem, path: str, listed: Listed) -> str | None:
    """How a file differs from what the manifest lists, or None."""
    try:
        size = filesystem.info(path)["size"]
    except FileNotFoundError:
        return "is missing"
    if size != listed.bytes:
        return f"has {size} bytes; the manifest says {listed.bytes}"
    found = hashlib.sha256()
    with filesystem.open(path, "rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    if found.hexdigest() != listed.sha256:
        return f"has sha256 {found.hexdigest()[:12]}...; the manifest says {listed.sha256[:12]}..."
    return None
