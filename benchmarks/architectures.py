"""What the architectures reach on the same cutouts with the same budget.

The simulated set of the preset `quick`: as many epochs, the same settings and the same seed for
each; the epoch that ranks the validation split best is scored on the test split, with bootstrap
intervals; what another seed would give, they leave out. The last columns are by test-time
augmentation, of the same networks.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scipy.special import expit
from tqdm import tqdm

from benchmarks._harness import SCRATCH, Row, Target, options, report
from lens_pipeline import LensDataModule
from lens_pipeline.evaluation.metrics import lens_metrics
from lens_pipeline.evaluation.tables import metric_text
from lens_pipeline.models.names import ARCHITECTURES
from lens_pipeline.models.split_scores import split_scores
from lens_pipeline.models.system import load_system
from lens_pipeline.presets import PRESETS
from lens_pipeline.shards.prepare import prepare_shards
from lens_pipeline.simulation import load_config
from lens_pipeline.simulation.simulate import simulate_catalogue
from lens_pipeline.training.config import TrainConfig
from lens_pipeline.training.train import train

QUICK = PRESETS["quick"]
EPOCHS = 4
SHOWN = {"auroc": "AUROC", "tpr0": "TPR0", "tpr10": "TPR10", "tpr_at_fpr_1e-2": "TPR at FPR 1e-2"}

AUGMENTED = ("auroc", "tpr_at_fpr_1e-2")


def make_shards(folder: Path, n: int) -> Path:
    """The shards of `lens-pipeline run` with n simulated cutouts."""
    catalogue, shards = folder / "catalogue", folder / "shards"
    catalogue.mkdir()
    shards.mkdir()
    table = simulate_catalogue(
        catalogue, load_config("des"), n, seed=0, image_size=QUICK.image_size
    )
    prepare_shards(str(table), shards, image_size=QUICK.image_size)
    return shards


def measured(shards: Path, out: Path, model: dict[str, Any]) -> Row:
    """A row of the table."""
    training = {"epochs": EPOCHS, "batch_size": QUICK.batch_size}
    config = TrainConfig.parse({"model": model, "training": training}, "benchmark")
    data = LensDataModule(shards)
    begun = time.perf_counter()
    trained = train(config, data, out)
    seconds = time.perf_counter() - begun
    systems = [load_system(trained.checkpoint, test_time_augmentation=it) for it in (False, True)]
    test = data.split("test")
    metrics, augmented = (
        lens_metrics(test.labels, expit(split_scores(system, test)["logit"])) for system in systems
    )
    start = ", pretrained" if config.model.pretrained == "published" else ""
    row: Row = {
        "architecture": config.model.arch + start,
        "parameters, 10^6": sum(p.numel() for p in systems[0].parameters()) / 1e6,
        "s": seconds,
    }
    row |= {title: metric_text(metrics[name]) for name, title in SHOWN.items()}
    return row | {f"{SHOWN[name]}, augmented": metric_text(augmented[name]) for name in AUGMENTED}


def measure(arguments: argparse.Namespace) -> tuple[list[Row], list[Target]]:
    models: list[dict[str, Any]] = [{"arch": name} for name in ARCHITECTURES]
    models.append({"arch": "efficientnet_lite0", "pretrained": "published"})
    with tempfile.TemporaryDirectory(dir=SCRATCH) as name:
        folder = Path(name)
        shards = make_shards(folder, arguments.n)
        rows = []
        for number, model in enumerate(tqdm(models, "architectures", file=sys.stderr)):
            rows.append(measured(shards, folder / str(number), model))
            print(rows[-1], file=sys.stderr, flush=True)
    return sorted(rows, key=lambda row: str(row["AUROC"]), reverse=True), []


if __name__ == "__main__":
    arguments = options(__doc__, n=QUICK.n_cutouts)
    report(arguments, lambda: measure(arguments))
