"""The scores of a split, as a trained system gives them."""

import numpy as np
import pandas as pd

from lens_pipeline.catalogue.dataset import Split
from lens_pipeline.models.system import BATCH, LensClassifier
from lens_pipeline.progress import progress_bar


def split_scores(system: LensClassifier, split: Split, batch_size: int = BATCH) -> pd.DataFrame:
    """`id`, `label`, `group`, `logit` and `logit_std` of a split, in its order, on the system's
    device.

    logit_std: the standard deviation of the logit under dropout, see `dropout_draws`.
    """
    system = system.eval()
    logits, deviations = [], []
    with progress_bar(total=len(split), desc="scoring", unit="cutout", delay=2) as bar:
        for images in split.in_order(batch_size):
            logit, drawn = system.scored(images)
            logits.append(logit)
            deviations.append(drawn.std(axis=1))
            bar.update(len(images))
    return pd.DataFrame(
        {
            "id": split.ids,
            "label": split.labels,
            "group": split.groups,
            "logit": np.concatenate(logits),
            "logit_std": np.concatenate(deviations),
        }
    )
