"""What a network that was trained on simulated cutouts makes of real lenses.

The real ones are the graded candidates of CFHTLS (More et al. 2016), composites of gri: lenses of
grade 2 and above, and look-alikes that volunteers flagged and experts rejected, which are hard.
Simulated cutouts are drawn as those are: by the stretch of Space Warps (HumVI, after Lupton et al.
2004), in 8 bits, and then moved by a part of a pixel, bilinearly, which the noise of the files
shows. Beside it, in five folds of the real ones: the same network after a fine-tuning on the other
four, and one that has seen those four alone. Each scores the cutouts as they are, and by test-time
augmentation.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from scipy.special import expit
from sklearn.model_selection import StratifiedGroupKFold
from tqdm import tqdm

from benchmarks._harness import SCRATCH, Row, Target, options, report
from lens_pipeline import LensDataModule
from lens_pipeline.evaluation.metrics import lens_metrics
from lens_pipeline.evaluation.tables import metric_text
from lens_pipeline.models.split_scores import split_scores
from lens_pipeline.models.system import load_system
from lens_pipeline.simulation import load_config
from lens_pipeline.simulation.simulate import simulate_catalogue
from lens_pipeline.simulation.surveys import Survey
from lens_pipeline.training.config import TrainConfig
from lens_pipeline.training.train import train

GRADED = Path(__file__).parents[2] / "shared" / "data" / "cfhtls_graded" / "catalogue.csv"
FOLDS = 5
# Of Space Warps: factors of g, r and i, and the stretch's softening and slope.
SCALES, Q, ALPHA = np.array([1.7, 0.6, 0.4]), 1.0, 0.09
ZERO_POINT = 30.0  # AB magnitude of one count in its images


def composite(image: NDArray[np.float64], survey: Survey) -> NDArray[np.float64]:
    """0 to 255 (size, size, 3: i, r, g) of gri in background sigmas (3, size, size)."""
    per_second = np.sqrt(survey.background_variance) / survey.gain / survey.exposure_time
    counts = per_second * 10 ** (0.4 * (ZERO_POINT - np.asarray(survey.zero_point)))
    light = image * (counts * SCALES / SCALES.mean())[:, None, None]
    total = light.sum(axis=0) + 1e-10
    stretched = light * np.arcsinh(ALPHA * Q * total) / (Q * total)
    return np.floor(255 * np.clip(stretched, 0, 1))[::-1].transpose(1, 2, 0)


def moved(image: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.uint8]:
    """By a part of a pixel along both axes, bilinearly."""
    for axis in (0, 1):
        part = random.random()
        image = (1 - part) * image + part * np.roll(image, -1, axis)
    return np.round(image).astype(np.uint8)


def simulated(folder: Path, n: int) -> pd.DataFrame:
    """Rows of n composites, written into the folder."""
    config, random = load_config("cfhtls"), np.random.default_rng(0)
    survey = config.survey
    table = pd.read_parquet(simulate_catalogue(folder / "fluxes", config, n, seed=0))
    stacks = {path.name: np.load(path) for path in folder.glob("fluxes/*.npy")}
    paths = []
    for number, path in enumerate(table["path"]):
        stack, row = path.split("#")
        image = moved(composite(stacks[stack][int(row)].astype(np.float64), survey), random)
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray(image).save(paths[-1])
    table = table[["id", "label", "group", "survey", "pixel_scale"]]
    # A fifth of the source galaxies, by the end of their names, is what epochs are chosen by.
    split = np.where(table["group"].str[-1].isin(["0", "5"]), "val", "train")
    return table.assign(path=paths, split=split)


def scored(rows: pd.DataFrame, folder: Path, **settings: Any) -> tuple[pd.DataFrame, Path]:
    """The rows of the split `test`, with the scores of a network that was trained on `train` (with
    test-time augmentation `augmented`), and its checkpoint."""
    catalogue = folder / "catalogue.csv"
    rows.to_csv(catalogue, index=False)
    model = {"arch": "resnet18", "pretrained": settings.pop("pretrained", "none")}
    config = TrainConfig.parse({"model": model, "training": settings}, "benchmark")
    data = LensDataModule(str(catalogue))
    checkpoint = train(config, data, folder / "training").checkpoint
    test = data.split("test")
    scores = pd.DataFrame({"id": test.ids, "label": test.labels})
    for column, how in {"score": {}, "augmented": {"test_time_augmentation": True}}.items():
        scores[column] = expit(split_scores(load_system(checkpoint, **how), test)["logit"])
    return scores, checkpoint


def folds(real: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The real ones, each fold in turn the split `test`, the next the split `val`."""
    of = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    fold = np.zeros(len(real), int)
    for number, (_, members) in enumerate(of.split(real, real["label"], real["group"])):
        fold[members] = number
    for number in range(FOLDS):
        places = {number: "test", (number + 1) % FOLDS: "val"}
        yield real.assign(split=[places.get(one, "train") for one in fold])


def measured(learned_from: str, scores: pd.DataFrame) -> Row:
    """A row of the table."""
    auroc = {
        title: metric_text(lens_metrics(scores["label"], scores[column])["auroc"])
        for title, column in {"AUROC": "score", "AUROC, augmented": "augmented"}.items()
    }
    lens = scores["label"] == 1
    return {
        "learned from": learned_from,
        **auroc,
        "median score of lenses": scores.loc[lens, "score"].median(),
        "of look-alikes": scores.loc[~lens, "score"].median(),
    }


def measure(arguments: argparse.Namespace) -> tuple[list[Row], list[Target]]:
    if not GRADED.is_file():
        raise SystemExit(f"error: {GRADED}: the graded candidates of CFHTLS are not there")
    real = pd.read_csv(GRADED, dtype={"group": str}).dropna(subset="label")
    real = real.assign(path=[str(GRADED.parent / path) for path in real["path"]])
    with tempfile.TemporaryDirectory(dir=SCRATCH) as name, tqdm(total=11, file=sys.stderr) as bar:
        folder = Path(name, "simulated")
        folder.mkdir()
        both = pd.concat([simulated(folder, arguments.n), real.assign(split="test")])
        scores, checkpoint = scored(both, folder, epochs=8)
        rows = [measured("simulated", scores)]
        bar.update()
        for title, start in {"simulated, then real": str(checkpoint), "real alone": "none"}.items():
            parts = []
            for number, split in enumerate(folds(real)):
                folder = Path(name, f"{title} {number}")
                folder.mkdir()
                how = {"epochs": 15, "learning_rate": 3e-4, "pretrained": start}
                parts.append(scored(split, folder, **how)[0])
                bar.update()
            rows.append(measured(title, pd.concat(parts)))
    return rows, []


if __name__ == "__main__":
    arguments = options(__doc__, n=9000)
    report(arguments, lambda: measure(arguments))
