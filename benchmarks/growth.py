"""How time and memory grow with the catalogue: FITS cutouts to shards, each in a new process.

Cutouts of 64 pixels, one band, linear flux, a file each. Memory is the highest sum, over the
process and those it starts, of the memory that each would free by ending (and its part of what it
shares).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from astropy.io import fits

from benchmarks._harness import SCRATCH, Row, Target, options, report

SIZE = 64
SIZES = (1_000, 2_000, 20_000, 100_000)
PREPARE = """
import os, sys
from pathlib import Path

if __name__ == "__main__":
    from lens_pipeline.shards.prepare import prepare_shards

    prepare_shards(sys.argv[1], Path(sys.argv[2]))
    os._exit(0)  # on its way out an interpreter touches the code of every library once more
"""


def make_catalogue(folder: Path, n: int) -> Path:
    """n FITS files and their table."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    source = 50 * np.exp(-(x**2 + y**2) / 40).astype(np.float32)
    images = folder / "images"
    images.mkdir(parents=True)
    first = images / "first.fits"
    fits.PrimaryHDU(source).writeto(first)
    header, padding = (
        first.read_bytes()[part] for part in (slice(2880), slice(2880 + source.nbytes, None))
    )
    first.unlink()
    for row in range(n):
        flux = random.standard_normal((SIZE, SIZE), np.float32) + source
        (images / f"{row:06d}.fits").write_bytes(header + flux.astype(">f4").tobytes() + padding)
    table = pd.DataFrame({"id": range(n), "path": [f"images/{row:06d}.fits" for row in range(n)]})
    table["label"] = np.arange(n) % 2
    table.to_parquet(folder / "catalogue.parquet")
    return folder / "catalogue.parquet"


def prepared(catalogue: Path, out: Path) -> tuple[float, float]:
    """(seconds, most MB) of turning a catalogue into shards."""
    script = out.with_name("prepare.py")
    script.write_text(PREPARE)
    out.mkdir()
    begun = time.perf_counter()
    most = 0.0
    with subprocess.Popen([sys.executable, str(script), str(catalogue), str(out)]) as process:
        while process.poll() is None:
            most = max(most, memory(process.pid))
            time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"ended with {process.returncode}")
    return time.perf_counter() - begun, most / 1e6


def memory(pid: int) -> float:
    """Proportional memory of a process and its children, bytes."""
    total = 0.0
    try:
        for process in (found := psutil.Process(pid), *found.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:
        pass  # it has just ended
    return total


def measure(arguments: argparse.Namespace) -> tuple[list[Row], list[Target]]:
    rows: list[Row] = []
    for n in [size for size in SIZES if size <= arguments.n]:
        with tempfile.TemporaryDirectory(dir=SCRATCH) as name:
            catalogue = make_catalogue(Path(name, "catalogue"), n)
            seconds, most = prepared(catalogue, Path(name, "shards"))
        rows.append({"cutouts": n, "seconds": seconds, "ms/cutout": 1e3 * seconds / n, "MB": most})
    growth = rows[-1]["ms/cutout"] / rows[0]["ms/cutout"]
    targets = [Target("time per cutout, the most / the fewest", growth, at_most=1.2)]
    peak = {row["cutouts"]: row["MB"] for row in rows}
    if 20_000 in peak:
        ratio = peak[20_000] / peak[2_000]
        targets.append(Target("peak memory, 20,000 / 2,000", ratio, at_most=1.2))
    return rows, targets


if __name__ == "__main__":
    arguments = options(__doc__, n=SIZES[-1])
    report(arguments, lambda: measure(arguments))
