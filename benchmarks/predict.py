"""`lens-pipeline predict` over a survey: killed in the middle and run again, and its memory.

Cutouts of 32 pixels and three bands in units of background sigma, rows of one NPY stack; one small
member. Memory is the highest sum, over the process and those it starts, of the memory that each
would free by ending (and its part of what it shares).
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks._ensemble import make_ensemble
from benchmarks._harness import SCRATCH, Row, Target, options, report
from benchmarks.growth import memory
from lens_pipeline.catalogue.dataset import CutoutFormat
from lens_pipeline.registry import CHALLENGER, Registry
from lens_pipeline.settings import Settings
from lens_pipeline.tracking import Tracking

MEMBER, BANDS, SIZE = "lastro", ("g", "r", "i"), 32
FEW = 10_000


def make_home(home: Path) -> Path:
    """A home in whose registry there is an ensemble of one member."""
    ensemble = home / "made"
    form = CutoutFormat(BANDS, SIZE, "background_sigma", 0.263)
    home.mkdir()
    make_ensemble(ensemble, [MEMBER], form)
    settings = Settings.load(home=str(home))
    run = Tracking(settings).start_run("benchmark", "benchmark", {})
    registry = Registry(settings)
    version = registry.register(ensemble, run, tags={})
    registry.set_alias(CHALLENGER, str(version.version))
    return home


def make_catalogue(folder: Path, n: int) -> Path:
    """n rows of a stack of noise with a source."""
    folder.mkdir()
    random = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    source = 50 * np.exp(-(x**2 + y**2) / 20).astype(np.float32)
    shape = (n, len(BANDS), SIZE, SIZE)
    images = np.lib.format.open_memmap(folder / "cutouts.npy", "w+", "<f4", shape)
    for start in range(0, n, 1000):
        part = images[start : start + 1000]
        part[:] = random.standard_normal(part.shape, np.float32) + source
    images.flush()
    table = pd.DataFrame({"id": [f"J{row:07d}" for row in range(n)]})
    table["path"] = [f"cutouts.npy#{row}" for row in range(n)]
    table["flux_unit"], table["pixel_scale"] = "background_sigma", 0.263
    table.to_parquet(folder / "catalogue.parquet", index=False)
    return folder / "catalogue.parquet"


def predicted(home: Path, catalogue: Path, out: Path, kill_at: int | None) -> tuple[float, float]:
    """(seconds, most MB) of a command; kill_at: end it by force once it has finished that part."""
    program = str(Path(sys.executable).with_name("lens-pipeline"))
    command = [program, "predict", "--home", str(home)]
    command += ["--catalogue", str(catalogue), "--out", str(out)]
    last = out.with_name(f"{out.name}.parts") / f"part-{kill_at or 0:06d}.parquet"
    begun, most, killed = time.perf_counter(), 0.0, False
    with subprocess.Popen(command, start_new_session=True) as process:
        while process.poll() is None:
            most = max(most, memory(process.pid))
            if kill_at is not None and not killed and last.exists():
                os.killpg(process.pid, signal.SIGKILL)
                killed = True
            time.sleep(0.3)
    if process.returncode and not killed:
        raise RuntimeError(f"ended with {process.returncode}")
    return time.perf_counter() - begun, most / 1e6


def measure(arguments: argparse.Namespace) -> tuple[list[Row], list[Target]]:
    from lens_pipeline.scoring.parts import ROWS

    n = arguments.n
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=SCRATCH) as name:
        folder = Path(name)
        home = make_home(folder / "home")
        few = make_catalogue(folder / "few", FEW)
        many = make_catalogue(folder / "many", n)
        out = folder / "scores.parquet"
        for title, catalogue, size, kill_at in (
            (f"{FEW:,}", few, FEW, None),
            (f"{n:,}, killed", many, n, n // ROWS // 2),
            ("run again", many, n, None),
        ):
            seconds, most = predicted(home, catalogue, out, kill_at)
            if title == f"{FEW:,}":
                out.unlink()
            rows.append({"cutouts": title, "of": size, "seconds": seconds, "MB": most})
        ids = pd.read_parquet(out, columns=["id", "probability"]).dropna()["id"]
    whole = len(ids) == n and bool((ids == [f"J{row:07d}" for row in range(n)]).all())
    targets = [
        Target("every row once, in its order, scored", float(whole), at_least=1),
        Target("seconds, of both commands", rows[1]["seconds"] + rows[2]["seconds"], at_most=600),
    ]
    peak = max(rows[1]["MB"], rows[2]["MB"]) / rows[0]["MB"]
    targets.append(Target(f"peak memory, {n:,} / {FEW:,}", peak, at_most=1.2))
    return rows, targets


if __name__ == "__main__":
    arguments = options(__doc__, n=100_000)
    report(arguments, lambda: measure(arguments))
