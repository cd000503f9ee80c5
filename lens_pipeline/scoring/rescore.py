"""Another ensemble on the current test split, for a comparison on the same cutouts."""

from pathlib import Path

import pandas as pd

from lens_pipeline.ensemble.system import LensEnsemble
from lens_pipeline.models.system import BATCH
from lens_pipeline.scoring.sources import ScoredDataset

SCORES = "test_scores.parquet"


def rescore_test_split(ensemble: LensEnsemble, dataset: ScoredDataset, out: Path) -> None:
    """Write test_scores.parquet: `id` and `probability` of the dataset's test split."""
    split = dataset.split("test")
    parts = [ensemble.predict(images)["probability"] for images in split.in_order(BATCH)]
    probability = pd.concat(parts, ignore_index=True)
    pd.DataFrame({"id": split.ids, "probability": probability}).to_parquet(out / SCORES)
