"""The ensemble, loaded: members, their calibration, fusion."""

from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import TypeAdapter
from scipy.special import expit

from lens_pipeline.catalogue.dataset import CutoutFormat
from lens_pipeline.ensemble.calibration import Calibration, prior_shift
from lens_pipeline.ensemble.choice import FittedFusion
from lens_pipeline.ensemble.description import (
    read_description,
    read_groups,
)
from lens_pipeline.ensemble.fusion import Fused, Fusion
from lens_pipeline.errors import InputError
from lens_pipeline.evaluation.fractions import real_lens_fraction
from lens_pipeline.models.system import BATCH, LitLensSystem, load_system

Masked = np.ma.MaskedArray[Any, Any]
_CALIBRATION: TypeAdapter[Calibration] = TypeAdapter(Calibration)
_FUSION: TypeAdapter[Fusion] = TypeAdapter(Fusion)


@dataclass(frozen=True)
class LensEnsemble:
    """Trained members and what turns their logits into one calibrated probability.

    format: what the cutouts must be; facts: the rest of `ensemble.json` (the dataset's version);
    groups: those that the members have trained or validated on.
    """

    members: dict[str, LitLensSystem]
    fitted: FittedFusion
    format: CutoutFormat
    facts: dict[str, Any]
    groups: frozenset[str]

    @property
    def columns(self) -> list[str]:
        """What `predict` returns: probability, logit, std, entropy, sky_probability,
        probability_<member>.

        `probability` holds where lenses are as frequent as in the validation set,
        `sky_probability` at the prevalence in `facts`: see `prior_shift`.
        """
        members = [f"probability_{name}" for name in self.members]
        return [*(field.name for field in fields(Fused)), "sky_probability", *members]

    def predict(self, images: ArrayLike) -> pd.DataFrame:
        """Scores of cutouts (n, bands, height, width), in the units of the stored ones.

        One row a cutout, with the columns of `columns`. Raises InputError where the shape is not
        the one that the ensemble was trained on, and for a pixel that is masked, or not finite in
        float32, which `usable_cutout` would have filled in.
        """
        given: Masked = np.ma.asanyarray(images)
        if given.ndim != 4 or given.shape[1:] != self.format.shape:
            raise InputError(
                f"the array has shape {given.shape}; the model takes (n, *{self.format.shape})"
            )
        begins = range(0, len(given), BATCH)
        for begin in begins:
            whole = np.isfinite(_filled(given[begin : begin + BATCH])).all(axis=(1, 2, 3))
            if not whole.all():
                raise InputError(
                    f"cutout {begin + int(np.argmin(whole))} of the array (from 0) has pixels that "
                    "are masked or not finite; fill them in first, as with the median of their band"
                )
        parts = [self._predict(_filled(given[begin : begin + BATCH])) for begin in begins]
        nothing = pd.DataFrame(columns=self.columns, dtype=np.float64)
        return pd.concat(parts, ignore_index=True) if parts else nothing

    def _predict(self, images: NDArray[np.floating]) -> pd.DataFrame:
        logits, draws = [], []
        systems = self.members.values()
        batch = torch.from_numpy(images).to(next(iter(systems)).device)  # once, for all of them
        for system in systems:
            logit, drawn = system.scored(batch)
            logits.append(logit)
            draws.append(drawn)
        fused = self.fitted.fuse(np.stack(logits, axis=1), np.stack(draws, axis=1))
        on_sky = self.sky_probability(fused.logit)
        own = [expit(of(one)) for of, one in zip(self.fitted.members, logits, strict=True)]
        return pd.DataFrame(np.column_stack([*astuple(fused), on_sky, *own]), columns=self.columns)

    def sky_probability(self, logit: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of the ensemble's logits (n,), at the prevalence in `facts`."""
        return expit(logit + prior_shift(self.facts["prevalence"], real_lens_fraction(self.facts)))


def _filled(images: Masked) -> NDArray[np.float32]:
    """As float32; pixels that are masked, or that it cannot hold, are not finite."""
    with np.errstate(over="ignore"):
        pixels: Masked = np.ma.asanyarray(images.astype(np.float32))
    return np.asarray(pixels.filled(np.nan))


def _check_member(name: str, system: LitLensSystem, form: CutoutFormat) -> None:
    for what, theirs, ours in (
        ("bands", system.hparams["bands"], len(form.bands)),
        ("image_size", system.hparams["image_size"], form.image_size),
        ("units", system.hparams["units"], form.units),
    ):
        if theirs != ours:
            raise InputError(
                f"member {name}: takes cutouts of {what} {theirs}, the dataset's have {ours}; "
                "train it on this dataset"
            )


def load_member(checkpoint: Path, **how: Any) -> LitLensSystem:
    """A trained network, to score with: on a GPU where there is one; how: see `load_system`."""
    if torch.cuda.is_available():
        return load_system(checkpoint, map_location="cuda", **how)
    # Whatever it was trained in: on a CPU convolutions are up to twice as fast in this layout.
    return load_system(checkpoint, channels_last=True, **how)


def load_ensemble(folder: str | Path) -> LensEnsemble:
    """The ensemble in a folder, in eval mode, on a GPU where there is one.

    Raises InputError where the folder holds none, or one that another version has made.
    """
    folder = Path(folder)
    facts = read_description(folder)
    augmented = facts.get("test_time_augmentation", False)  # a former version did not know it
    members = {
        name: load_member(folder / "members" / f"{name}.ckpt", test_time_augmentation=augmented)
        for name in facts["members"]
    }
    form = CutoutFormat.from_dict(facts["format"])
    for name, system in members.items():
        _check_member(name, system, form)
    fitted = FittedFusion(
        tuple(_CALIBRATION.validate_python(one) for one in facts["members"].values()),
        _FUSION.validate_python(facts["fusion"]),
        _CALIBRATION.validate_python(facts["calibration"]),
        tuple(of["share"] for of in facts.get("standing", {}).values()),
    )
    return LensEnsemble(members, fitted, form, facts, read_groups(folder))
