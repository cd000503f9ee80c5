"""An ensemble that nobody has trained: it scores as fast as one that somebody has."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lens_pipeline.catalogue.dataset import CutoutFormat
from lens_pipeline.ensemble.assembly import assemble
from lens_pipeline.ensemble.system import LensEnsemble
from lens_pipeline.models.system import LitLensSystem


def make_ensemble(folder: Path, members: Sequence[str], form: CutoutFormat) -> LensEnsemble:
    """Members by their architectures, calibrated on noise, in the empty folder that it makes."""
    folder.mkdir()
    random = np.random.default_rng(0)
    label = pd.Series(np.arange(200) % 2, dtype="int8")
    parts = {}
    for arch in members:
        torch.manual_seed(0)
        system = LitLensSystem(arch, bands=len(form.bands), image_size=form.image_size)
        checkpoint = folder.with_name(f"{folder.name}-{arch}.ckpt")
        content = {"state_dict": system.state_dict(), "hyper_parameters": dict(system.hparams)}
        torch.save(content, checkpoint)
        logit = label + random.normal(size=len(label))
        ids = label.index.astype(str)
        scores = pd.DataFrame({"id": ids, "label": label, "group": ids, "logit": logit})
        scores["logit_std"] = 0.1
        parts[arch] = (checkpoint, scores)
    facts = {"dataset": "benchmark", "dataset_version": "benchmark"}
    return assemble(parts, form, folder, facts, groups=[])
