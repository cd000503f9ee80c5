"""How fast an ensemble scores shards, against the bare networks and against a plain loop.

64-pixel, three-band cutouts, the members of the default job, all cores. *Bare*: each member's
forward passes over cutouts that are in memory, in the layout that scoring uses. *Plain loop*: for
each member the same shards once more through WebDataset and torch's DataLoader with two workers,
the network as it was trained, from the first batch on (starting workers is apart). It gives what
ours gives, a score and its uncertainty, by a pass for each draw with dropout switched on; or the
score alone, by one pass. Calibration and fusion are ours alone.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import DataLoader

from benchmarks._cutouts import BANDS, SIZE, make_dataset
from benchmarks._ensemble import make_ensemble
from benchmarks._harness import SCRATCH, Row, Target, options, report
from lens_pipeline.catalogue.dataset import CutoutFormat, open_dataset
from lens_pipeline.ensemble.system import LensEnsemble
from lens_pipeline.models.system import BATCH, LitLensSystem, load_system
from lens_pipeline.models.uncertainty import DRAWS
from lens_pipeline.scoring.score_tables import score_batches
from lens_pipeline.scoring.shard_cutouts import open_cutout_source
from lens_pipeline.shards import write_shards

MEMBERS = ("resnet18", "light_transformer", "lastro")
OURS, BARE = "lens_pipeline", "bare forward passes"
PLAIN, SCORE_ALONE = "plain loop", "plain loop, the score alone"
BATCHES = 2  # that the plain loop draws for: minutes for all of them
ONE_PASS = {"resnet18": 64, "vit_b_16": 16}  # cutouts that are scored at a time
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Measured = Callable[[], float]  # cutouts a second


def ours(ensemble: LensEnsemble, shards: Path, cache: Path) -> Measured:
    def measured() -> float:
        begun = time.perf_counter()
        source = open_cutout_source(str(shards), cache=cache)
        rows = np.arange(len(source.catalogue.table))
        n = sum(len(table) for table in score_batches(ensemble, source, rows))
        return n / (time.perf_counter() - begun)

    return measured


@torch.inference_mode()
def _pass(system: LitLensSystem, images: np.ndarray | torch.Tensor) -> float:
    logit = system(torch.as_tensor(images).float().to(system.device))
    return float(logit.sum())  # waits for the device


def bare(ensemble: LensEnsemble, images: np.ndarray) -> Measured:
    def measured() -> float:
        begun = time.perf_counter()
        for start in range(0, len(images), BATCH):
            for system in ensemble.members.values():
                _pass(system, images[start : start + BATCH])
        return len(images) / (time.perf_counter() - begun)

    return measured


def plain(
    systems: list[LitLensSystem], shards: Path, draws: int = 0, at_most: int | None = None
) -> Measured:
    """draws: passes of each batch with dropout, beside the one without; at_most: batches."""
    urls = sorted(str(path) for path in shards.glob("*.tar"))

    def batches() -> Iterator[torch.Tensor]:
        data = wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode()
        loader = DataLoader(
            data.to_tuple("npy").batched(64, collation_fn=_stacked), batch_size=None, num_workers=2
        )
        return iter(loader)

    def measured() -> float:
        seconds, seen = 0.0, 0
        for system in systems:
            stream = batches()
            next(stream)
            begun = time.perf_counter()
            for images in islice(stream, at_most):
                _pass(system, images)
                system.dropout.train()
                for _ in range(draws):
                    _pass(system, images)
                system.dropout.eval()
                seen += len(images)
            seconds += time.perf_counter() - begun
        return seen / len(systems) / seconds

    return measured


def _stacked(samples: list[tuple[np.ndarray]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([pixels for (pixels,) in samples]))


def draws_over_pass(arch: str, n: int, repeats: int) -> float:
    """How many times as long a pass with its draws takes as one without."""
    system = LitLensSystem(arch, image_size=SIZE).eval().to(DEVICE)
    images = np.random.default_rng(0).standard_normal((n, len(BANDS), SIZE, SIZE), np.float32)
    ratios = []
    _pass(system, images)
    for _ in range(repeats):
        begun = time.perf_counter()
        _pass(system, images)
        middle = time.perf_counter()
        system.scored(images)
        ratios.append((time.perf_counter() - middle) / (middle - begun))
    return statistics.median(ratios)


def measure(arguments: argparse.Namespace) -> tuple[list[Row], list[Target]]:
    n = arguments.n
    form = CutoutFormat(BANDS, SIZE, "background_sigma", None)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as name:
        folder = Path(name)
        dataset = make_dataset(folder / "dataset", n - 3)  # and one in each other split
        (folder / "shards").mkdir()
        write_shards(dataset, folder / "shards", shard_size=max(64, n // 4))
        ensemble = make_ensemble(folder / "ensemble", MEMBERS, form)
        images = np.asarray(open_dataset(dataset).images("train"))
        checkpoints = sorted((folder / "ensemble" / "members").iterdir())
        trained = [load_system(checkpoint).to(DEVICE) for checkpoint in checkpoints]
        ways = {
            OURS: ours(ensemble, folder / "shards", folder / "cache"),
            BARE: bare(ensemble, images),
            PLAIN: plain(trained, folder / "shards", DRAWS, BATCHES),
            SCORE_ALONE: plain(trained, folder / "shards"),
        }
        rates: dict[str, list[float]] = {title: [] for title in ways}
        for _ in range(arguments.repeats):
            for title, measured in ways.items():
                rates[title].append(measured())
    median = {title: statistics.median(values) for title, values in rates.items()}
    rows: list[Row] = [
        {
            "scoring": title,
            "cutouts/s": median[title],
            "ours/this": statistics.median(
                mine / other for mine, other in zip(rates[OURS], values, strict=True)
            ),
            "spread": f"{min(values):.0f}-{max(values):.0f}",
        }
        for title, values in rates.items()
    ]
    ratio = {row["scoring"]: row["ours/this"] for row in rows}
    targets = [
        Target(f"ours / {PLAIN}", ratio[PLAIN], at_least=3),
        Target(f"ours / {BARE}", ratio[BARE], at_least=0.9),
    ]
    for arch, at_a_time in ONE_PASS.items():
        value = draws_over_pass(arch, at_a_time, arguments.repeats)
        targets.append(
            Target(f"{arch}: a pass with {DRAWS} draws / one without", value, at_most=1.3)
        )
    return rows, targets


if __name__ == "__main__":
    arguments = options(__doc__, n=1024)
    report(arguments, lambda: measure(arguments))
