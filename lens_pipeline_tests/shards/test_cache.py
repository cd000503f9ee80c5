"""What is kept of remote shards: within a bound, whole, and on disks that are full."""

import errno
import gc
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
import pytest
import torch

from lens_pipeline import LensDataModule, LensWebDatasetDataModule
from lens_pipeline.catalogue.dataset import Dataset
from lens_pipeline.errors import InputError
from lens_pipeline.shards import open_shards, publish_shards, write_shards
from lens_pipeline_tests.disks import small_disk
from lens_pipeline_tests.object_stores import S3Server
from lens_pipeline_tests.shards.published import SHARDS, N, Proxies, flipped, gets, numbers


def shard_bytes(shards: Path) -> int:
    return max(path.stat().st_size for path in shards.glob("train-*.tar"))


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """How many bytes of shards lie there, asked again and again."""
    sizes, ended = [0], threading.Event()

    def there() -> dict[Path, int]:
        found = {}
        for path in [*folder.glob("*/*.tar"), *folder.glob("*/*.parquet"), folder / ".incoming"]:
            with suppress(FileNotFoundError):
                found[path] = path.stat().st_size
        return found

    def watch() -> None:
        while not ended.wait(0.005):
            if (found := there()) == there():  # else it changed while it was looked at
                sizes.append(sum(found.values()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize(("room", "workers"), [(1, 0), (6, 2)])
def test_cloud_epochs_keep_within_the_bound(
    small_cutouts: Path,
    published: str,
    s3_server: S3Server,
    tmp_path: Path,
    room: int,
    workers: int,
) -> None:
    """A split that does not fit comes and goes, in every epoch."""
    bound = room * shard_bytes(small_cutouts)
    data = LensDataModule(
        published, batch_size=20, num_workers=workers, cache_dir=tmp_path, cache_gb=bound / 1e9,
        storage_options=s3_server.storage_options(),
    )  # fmt: skip
    loader = data.train_dataloader()
    with watched(tmp_path) as sizes:
        for number in range(2):
            loader.sampler.set_epoch(number)
            seen = numbers(loader)
            assert sorted(seen) == list(range(N))
    assert bound / 2 < max(sizes) <= bound
    assert sorted(numbers(data.val_dataloader())) == list(range(40))


def test_cloud_into_a_cache_whose_disk_is_full(
    published: str, s3_server: S3Server, tmp_path: Path
) -> None:
    def epoch(cache: Path, gb: float) -> set[int] | str:
        data = LensDataModule(
            published, batch_size=20, cache_dir=cache, cache_gb=gb,
            storage_options=s3_server.storage_options(),
        )  # fmt: skip
        try:
            return set(numbers(data.train_dataloader()))
        except InputError as problem:
            return str(problem)

    with small_disk(tmp_path / "disk", 3) as disk:
        full = rf"{disk}/.*{os.strerror(errno.ENOSPC)}.*LENS_CACHE_GB"
        assert re.match(rf"{published}/train-\d*\.tar: .*{full}", str(epoch(disk, 1)))
        until = time.monotonic() + 30
        while (disk / ".incoming").exists():  # others were under way
            assert time.monotonic() < until
            time.sleep(0.1)
        # A cache smaller than the disk goes on from there, once the first epoch's shards are no
        # longer mapped: what is mapped takes room, though it is removed.
        while (found := epoch(disk, 0.001)) != set(range(N)):
            assert time.monotonic() < until, found
            gc.collect()
            time.sleep(0.5)


@pytest.fixture
def in_memory(small_cutouts: Path) -> Iterator[str]:
    """`small_cutouts` at a place that is no local folder."""
    yield publish_shards(small_cutouts, "memory://bucket/lenses").url
    fsspec.filesystem("memory").store.clear()


def test_a_cache_too_small_for_a_shard_is_an_error(
    small_cutouts: Path, in_memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = max(path.stat().st_size for path in small_cutouts.glob("train-*.tar"))
    monkeypatch.setenv("LENS_CACHE_GB", str((least - 1) / 1e9))
    with pytest.raises(InputError, match=rf"\.tar: {least} bytes; .* {least - 1}: .*LENS_CACHE_GB"):
        open_shards(in_memory, cache=tmp_path)
    assert len(open_shards(in_memory, cache=tmp_path, cache_gb=least / 1e9).split("train")) == N


def test_shards_used_least_recently_make_room_first(
    small_cutouts: Path, in_memory: str, tmp_path: Path
) -> None:
    gb = 4.5 * shard_bytes(small_cutouts) / 1e9
    split = open_shards(in_memory, cache=tmp_path, cache_gb=gb).split("train")

    def there() -> set[int]:
        return {int(path.stem.removeprefix("train-")) for path in tmp_path.rglob("train-*.tar")}

    per_shard = N // SHARDS
    for number in (0, 1, 2, 3):
        split.gather([number * per_shard])
    assert there() == {0, 1, 2, 3}
    again = open_shards(in_memory, cache=tmp_path, cache_gb=gb).split("train")
    again.gather([0])  # by another user of the cache
    split.gather([4 * per_shard])
    assert there() == {0, 2, 3, 4}
    other, somebodys = tmp_path / "0123456789abcdef0123456789abcdef", tmp_path / "backups"
    for folder in (other, somebodys):
        folder.mkdir()
        (folder / "old.tar").write_bytes(bytes(10))
        os.utime(folder / "old.tar", (0, 0))
    split.gather([5 * per_shard])
    assert not (other / "old.tar").exists()  # of another dataset
    assert (somebodys / "old.tar").exists()
    # What made room is read on by who had it, and fetched again by who needs it.
    places = [1, 2 * per_shard]
    found = numbers([{"image": torch.from_numpy(again.gather(places))}])
    assert [f"train {number}" for number in found] == again.ids[places].tolist()


def test_damage_in_the_cache_is_mended(small_cutouts: Path, in_memory: str, tmp_path: Path) -> None:
    open_shards(in_memory, cache=tmp_path).split("val").gather([0])
    (path,) = tmp_path.rglob("val-000000.tar")
    whole = path.read_bytes()
    path.write_bytes(flipped(whole))
    (tmp_path / ".incoming").write_bytes(b"of a process that was killed")
    split = open_shards(in_memory, cache=tmp_path).split("val")
    assert len(split.gather(list(range(40)))) == 40
    assert path.read_bytes() == whole
    assert not (tmp_path / ".incoming").exists()


def test_copies_of_tars_without_a_manifest_keep_within_the_bound(
    small_cutouts: Path, in_memory: str, tmp_path: Path
) -> None:
    fsspec.filesystem("memory").rm(f"{in_memory}/manifest.json".removeprefix("memory:/"))
    fsspec.filesystem("memory").rm("/bucket/lenses/latest.json")
    each = shard_bytes(small_cutouts)

    def data(tars: str, room: float) -> LensWebDatasetDataModule:
        return LensWebDatasetDataModule(
            val_urls=f"{in_memory}/{tars}.tar", flux_unit="background_sigma", batch_size=50,
            cache_dir=tmp_path, cache_gb=room * each / 1e9,
        )  # fmt: skip

    with pytest.raises(InputError, match=r"3 tars: \d+ bytes; .*LENS_CACHE_GB"):
        data("train-{000000..000002}", 2.5).val_dataloader()
    first = data("train-{000000..000002}", 3.5)
    loader, ids = first.val_dataloader(), first.split("val").ids
    for tars in ("train-000003", "train-{000004..000005}"):
        data(tars, 3.5).val_dataloader()
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.tar")) <= 3.5 * each
    assert [f"train {number}" for number in numbers(loader)] == ids.tolist()  # though it made room


def test_copies_of_tars_with_signed_urls_keep_within_the_bound(
    small_cutouts: Path, in_memory: str, tmp_path: Path
) -> None:
    """The signature is in no name."""
    filesystem = fsspec.filesystem("memory")
    content = (small_cutouts / "train-000000.tar").read_bytes()
    for number in range(3):
        url = f"memory://tars/{number}/get?sig=s3cret"
        filesystem.pipe_file(url.removeprefix("memory:/"), content)
        data = LensWebDatasetDataModule(
            val_urls=url, flux_unit="background_sigma", batch_size=50,
            cache_dir=tmp_path, cache_gb=1.5 * len(content) / 1e9,
        )  # fmt: skip
        data.val_dataloader()
    held = [path for path in tmp_path.rglob("*") if path.is_file() and ".locks" not in path.parts]
    assert [(path.name, path.stat().st_size) for path in held] == [("get", len(content))]
    assert not list(tmp_path.rglob("*s3cret*"))


def test_cloud_copies_of_tars_without_a_manifest_make_no_room_for_their_own_set(
    small_cutouts: Path, s3_bucket: str, s3_server: S3Server, faulty_proxy: Proxies, tmp_path: Path
) -> None:
    proxy = faulty_proxy(s3_server)
    through = s3_server.storage_options(proxy.url)
    filesystem, place = fsspec.url_to_fs(f"{s3_bucket}/tars", **s3_server.storage_options())
    for path in small_cutouts.glob("train-00000*.tar"):
        filesystem.put_file(str(path), f"{place}/{path.name}")

    def use(tars: str) -> set[int]:
        """Returns which are there then."""
        gb = 3.5 * shard_bytes(small_cutouts) / 1e9
        data = LensWebDatasetDataModule(
            val_urls=f"{s3_bucket}/tars/train-{tars}.tar", flux_unit="background_sigma",
            cache_dir=tmp_path, cache_gb=gb, storage_options=through,
        )  # fmt: skip
        assert len(list(data.val_dataloader()))
        return {int(path.stem.removeprefix("train-")) for path in tmp_path.rglob("*.tar")}

    for number in (1, 8, 9):
        use(f"{number:06d}")
    proxy.delay(0.5, only=r"GET .*train-000002")  # once the other has been found
    assert use("{000001..000002}") == {1, 2, 9}
    assert use("000009") == {1, 2, 9}
    use("{000003..000004}")
    assert use("000009") == {3, 4, 9}  # it was used again, so the others went
    assert len([line for line in gets(proxy) if "train-000009" in line]) == 1


FEW_FILES = """
import os, resource, sys
from contextlib import suppress
from pathlib import Path
from lens_pipeline.catalogue.dataset import Dataset
from lens_pipeline.errors import InputError
from lens_pipeline.shards import open_shards, publish_shards
from lens_pipeline.shards.urls import open_tars

folder, cache = Path(sys.argv[1]), Path(sys.argv[2])
url = publish_shards(folder, "memory://bucket").url
n = len(list(folder.glob("train-*.tar")))
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
here, fetched = open_shards(folder), open_shards(url, cache=cache)
(folder / "manifest.json").unlink()
tars = open_tars(f"{folder}/train-{{000000..{n - 1:06d}}}.tar", "train", flux_unit=sys.argv[3])
for split in (here.split("train"), fetched.split("train"), tars.split):
    print(n > 60, len(split.gather(range(0, 2 * n, 2))) == n)
val = here.split("val"), fetched.split("val")
with suppress(OSError):
    while True:
        os.open(os.devnull, os.O_RDONLY)
for split in val:
    try:
        split.gather([0])
    except InputError as problem:
        print(problem)
"""


def test_more_shards_than_files_may_be_open(dataset: Dataset, tmp_path: Path) -> None:
    """What is mapped keeps no descriptor, of which a process has a thousand; where there is none
    left for a moment, the message says what raises their number."""
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shards(dataset.folder, shards, shard_size=2)
    command = [sys.executable, "-c", FEW_FILES, shards, tmp_path / "cache", "background_sigma"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *read, here, fetched = done.stdout.splitlines()
    assert read == ["True True"] * 3
    assert re.fullmatch(r".*/val-000000\.tar: .*\(Too many open files; raise `ulimit -n`\)", here)
    assert re.fullmatch(
        r".*/val-000000\.tar: .*\(Too many open files; raise `ulimit -n`\)", fetched
    )


def test_what_makes_room_is_let_go_by_who_only_reads_it(
    small_cutouts: Path, in_memory: str, tmp_path: Path
) -> None:
    """A worker that has mapped it would keep it on the disk, though no folder has it any more."""
    bound = 3 * shard_bytes(small_cutouts) / 1e9
    reads, fetches = (
        open_shards(in_memory, cache=tmp_path, cache_gb=bound).split("train") for _ in range(2)
    )
    for start in range(0, N, N // SHARDS):
        fetches.gather([start])
        reads.gather([start])
    mapped = Path("/proc/self/maps").read_text().splitlines()
    gone = [line for line in mapped if f"{tmp_path}/" in line and line.endswith("(deleted)")]
    assert len(gone) <= 3
