"""The ensemble on disk and in memory: members, their calibration, fusion."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.special import expit

from lens_pipeline.catalogue.dataset import CutoutFormat
from lens_pipeline.ensemble.calibration import Platt, fit_platt
from lens_pipeline.ensemble.fusion import Fused, fuse
from lens_pipeline.ensemble.uncertainty import member_logits
from lens_pipeline.errors import InputError
from lens_pipeline.models.system import LitLensSystem, load_system

ENSEMBLE = "ensemble.json"
BATCH = 256


@dataclass(frozen=True)
class LensEnsemble:
    """Trained members and what turns their logits into one calibrated probability.

    format: what the cutouts must be; facts: the rest of `ensemble.json` (the dataset's version).
    """

    members: dict[str, LitLensSystem]
    member_calibration: dict[str, Platt]
    calibration: Platt
    format: CutoutFormat
    facts: dict[str, Any]

    @property
    def columns(self) -> list[str]:
        """What `predict` returns: probability, logit, std, entropy, probability_<member>."""
        members = [f"probability_{name}" for name in self.members]
        return [*(field.name for field in fields(Fused)), *members]

    def predict(self, images: NDArray[np.floating]) -> pd.DataFrame:
        """Scores of cutouts (n, bands, height, width), in the units of the stored ones.

        One row a cutout, with the columns of `columns`. Raises InputError where
        the shape is not the one that the ensemble was trained on.
        """
        size = self.format.image_size
        wanted = (len(self.format.bands), size, size)
        if images.ndim != 4 or images.shape[1:] != wanted:
            raise InputError(f"the array has shape {images.shape}; the model takes (n, *{wanted})")
        parts = [self._predict(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
        return pd.concat(parts, ignore_index=True) if parts else self._predict(images)

    def _predict(self, images: NDArray[np.floating]) -> pd.DataFrame:
        logits, draws = [], []
        for name, system in self.members.items():
            logit, drawn = member_logits(system, images)
            calibrate = self.member_calibration[name]
            logits.append(calibrate(logit))
            draws.append(calibrate(drawn))
        logit = np.stack(logits, axis=1)
        fused = fuse(logit, np.stack(draws, axis=1), self.calibration)
        return pd.DataFrame(np.column_stack([*astuple(fused), expit(logit)]), columns=self.columns)

    def to(self, device: str) -> "LensEnsemble":
        for system in self.members.values():
            system.to(device)
        return self


def assemble(
    members: Mapping[str, tuple[Path, pd.DataFrame]],
    form: CutoutFormat,
    out: Path,
    facts: Mapping[str, Any],
) -> LensEnsemble:
    """Write an ensemble into `out` and return it.

    members: {name: (checkpoint, validation scores with columns id, label, logit)}; all were scored
    on the same validation cutouts, on which the calibration is fitted.
    """
    (out / "members").mkdir()
    calibration, calibrated = {}, []
    label = next(iter(members.values()))[1]["label"].to_numpy()
    for name, (checkpoint, scores) in members.items():
        shutil.copyfile(checkpoint, out / "members" / f"{name}.ckpt")
        calibration[name] = fit_platt(scores["logit"].to_numpy(), label)
        calibrated.append(calibration[name](scores["logit"].to_numpy()))
    fused = np.mean(calibrated, axis=0)
    description = {
        "schema": 1,
        "fusion": "mean of calibrated logits",
        "members": {name: asdict(platt) for name, platt in calibration.items()},
        "calibration": asdict(fit_platt(fused, label)),
        "format": asdict(form),
        **facts,
    }
    (out / ENSEMBLE).write_text(json.dumps(description, indent=1))
    return load_ensemble(out)


def load_ensemble(folder: str | Path) -> LensEnsemble:
    """The ensemble in a folder, in eval mode, on a GPU where there is one.

    Raises InputError where the folder holds none.
    """
    folder = Path(folder)
    path = folder / ENSEMBLE
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; {folder} is not an ensemble")
    facts = json.loads(path.read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Whatever it was trained in: on a CPU convolutions are up to twice as fast in this layout.
    layout = {"channels_last": True} if device == "cpu" else {}
    members = {
        name: load_system(folder / "members" / f"{name}.ckpt", **layout)
        for name in facts["members"]
    }
    ensemble = LensEnsemble(
        members,
        {name: Platt(**platt) for name, platt in facts["members"].items()},
        Platt(**facts["calibration"]),
        CutoutFormat.from_dict(facts["format"]),
        facts,
    )
    return ensemble.to(device)
