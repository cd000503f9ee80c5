"""How fast shards are written: ours against webdataset.ShardWriter and a plain sequential write.

All three write the same tars: float16 NumPy files, labels and ids of 64-pixel, three-band cutouts.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset as wds

from benchmarks._cutouts import make_dataset
from benchmarks._harness import SCRATCH, Row, Target, options, report
from lens_pipeline.catalogue.dataset import open_dataset
from lens_pipeline.shards import write_shards

SHARD_SIZE = 1000


def ours(dataset: Path, out: Path) -> None:
    write_shards(dataset, out, shard_size=SHARD_SIZE)


def shard_writer(dataset: Path, out: Path) -> None:
    source = open_dataset(dataset)
    pattern = str(out / "train-%06d.tar")
    with wds.ShardWriter(pattern, maxcount=SHARD_SIZE, verbose=0, mtime=0) as writer:
        table, images = source.table("train"), source.images("train")
        for row, (name, label) in enumerate(zip(table["id"], table["label"], strict=True)):
            image = images[row].astype(np.float16)
            writer.write(
                {"__key__": f"{row:08d}", "npy": image, "json": {"id": name}, "cls": int(label)}
            )


def plain_write(tars: list[bytes]) -> Callable[[Path, Path], None]:
    def write(dataset: Path, out: Path) -> None:
        for number, content in enumerate(tars):
            (out / f"{number}").write_bytes(content)

    return write


def measure(arguments: argparse.Namespace) -> tuple[list[Row], list[Target]]:
    n = arguments.n
    with tempfile.TemporaryDirectory(dir=SCRATCH) as name:
        folder = Path(name)
        dataset = make_dataset(folder / "dataset", n)
        (folder / "first").mkdir()
        ours(dataset, folder / "first")  # and the source is in the file cache
        tars = [path.read_bytes() for path in sorted(folder.glob("first/*.tar"))]
        writers = {
            "lens_pipeline": ours,
            "webdataset.ShardWriter": shard_writer,
            "plain sequential write": plain_write(tars),
        }
        rates: dict[str, list[float]] = {name: [] for name in writers}
        for _ in range(arguments.repeats):
            for name, write in writers.items():
                out = folder / "out"
                out.mkdir()
                begun = time.perf_counter()
                write(dataset, out)
                rates[name].append(n / (time.perf_counter() - begun))
                shutil.rmtree(out)
    ours_rate = statistics.median(rates["lens_pipeline"])
    rows: list[Row] = [
        {
            "writer": name,
            "samples/s": round(statistics.median(values)),
            "ours/this": ours_rate / statistics.median(values),
            "spread": f"{min(values):.0f}-{max(values):.0f}",
        }
        for name, values in rates.items()
    ]
    ratio = ours_rate / statistics.median(rates["webdataset.ShardWriter"])
    return rows, [Target("our rate / webdataset.ShardWriter's", ratio, at_least=6)]


if __name__ == "__main__":
    arguments = options(__doc__, n=10_000)
    report(arguments, lambda: measure(arguments))
