"""Another ensemble on the current test split, for a comparison on the same cutouts."""

from pathlib import Path

import numpy as np
import pandas as pd

from lens_pipeline.ensemble.predictor import ScoredDataset
from lens_pipeline.ensemble.system import BATCH, LensEnsemble

SCORES = "test_scores.parquet"


def rescore_test_split(ensemble: LensEnsemble, dataset: ScoredDataset, out: Path) -> None:
    """Write test_scores.parquet: `id` and `probability` of the dataset's test split."""
    images, table = dataset.images("test"), dataset.table("test")
    parts = [
        ensemble.predict(np.asarray(images[start : start + BATCH]))["probability"]
        for start in range(0, len(images), BATCH)
    ]
    probability = pd.concat(parts, ignore_index=True)
    pd.DataFrame({"id": table["id"], "probability": probability}).to_parquet(out / SCORES)
