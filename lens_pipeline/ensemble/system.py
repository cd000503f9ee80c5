"""The ensemble on disk and in memory: members, their calibration, fusion."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import TypeAdapter
from scipy.special import expit

from lens_pipeline.catalogue.dataset import CutoutFormat, Split
from lens_pipeline.choices import Choice, Method
from lens_pipeline.ensemble.calibration import Calibration, prior_shift
from lens_pipeline.ensemble.choice import FittedFusion, choose
from lens_pipeline.ensemble.description import (
    DESCRIPTION,
    GROUPS,
    SCHEMA,
    read_description,
    read_groups,
)
from lens_pipeline.ensemble.fusion import Fused, Fusion
from lens_pipeline.errors import InputError
from lens_pipeline.evaluation.fractions import lens_fraction
from lens_pipeline.evaluation.metrics import lens_metrics
from lens_pipeline.models.split_scores import BATCH, split_scores
from lens_pipeline.models.system import LitLensSystem, load_system

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
        for system in self.members.values():
            logit, drawn = system.scored(images)
            logits.append(logit)
            draws.append(drawn)
        fused = self.fitted.fuse(np.stack(logits, axis=1), np.stack(draws, axis=1))
        on_sky = self.sky_probability(fused.logit)
        own = [expit(of(one)) for of, one in zip(self.fitted.members, logits, strict=True)]
        return pd.DataFrame(np.column_stack([*astuple(fused), on_sky, *own]), columns=self.columns)

    def sky_probability(self, logit: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of the ensemble's logits (n,), at the prevalence in `facts`."""
        return expit(logit + prior_shift(self.facts["prevalence"], lens_fraction(self.facts)))


def _filled(images: Masked) -> NDArray[np.float32]:
    """As float32; pixels that are masked, or that it cannot hold, are not finite."""
    with np.errstate(over="ignore"):
        pixels: Masked = np.ma.asanyarray(images.astype(np.float32))
    return np.asarray(pixels.filled(np.nan))


def assemble(
    members: Mapping[str, tuple[str | Path, pd.DataFrame]],
    form: CutoutFormat,
    out: str | Path,
    facts: Mapping[str, Any],
    groups: Iterable[str],
    *,
    fusion: Choice = "best",
    calibration: Method = "platt",
    prevalence: float = 1e-3,
    augmented: Split | None = None,
) -> LensEnsemble:
    """Write an ensemble into `out` and return it.

    members: {name: (checkpoint, validation scores, see `TrainedMember.val_scores`)};
    groups: those of the cutouts that they trained and validated on; fusion: see `choose`;
    calibration: see `fit_calibration`; prevalence: the fraction of lenses among the cutouts of the
    sky, for `sky_probability`; augmented: the validation split, where scores shall be by test-time
    augmentation (see `LitLensSystem`), which those of the trainings are not. In ensemble.json
    `comparison` is what the choice was made by, and `standing` what each member is on the
    validation set: its `auroc`, and its `share` in the score (see `moved_by`).
    Raises InputError where two members were validated on different cutouts, or one takes other
    cutouts than `form`.
    """
    scores = {name: table for name, (_, table) in members.items()}
    if augmented is not None:
        scores = {
            name: split_scores(_member(Path(checkpoint), test_time_augmentation=True), augmented)
            for name, (checkpoint, _) in members.items()
        }
    label, group = _common_labels(scores)
    logits, deviation = (
        np.stack([table[column].to_numpy() for table in scores.values()], axis=1)
        for column in ("logit", "logit_std")
    )
    fitted, comparison = choose(fusion, calibration, logits, deviation, label, group)
    out = Path(out)
    (out / "members").mkdir(parents=True)
    for name, (checkpoint, _) in members.items():
        shutil.copyfile(checkpoint, out / "members" / f"{name}.ckpt")
    n_lens = int(np.count_nonzero(label == 1))
    shares = dict(zip(members, fitted.shares, strict=True))
    ranked = {
        name: lens_metrics(label, expit(own(one)), group=group)["auroc"]
        for name, own, one in zip(members, fitted.members, logits.T, strict=True)
    }
    description = {
        "schema": SCHEMA,
        "asked_for": fusion,
        "fusion": asdict(fitted.fusion),
        "members": {n: asdict(one) for n, one in zip(members, fitted.members, strict=True)},
        "calibration": asdict(fitted.calibration),
        "standing": {n: {"auroc": ranked[n], "share": share} for n, share in shares.items()},
        "comparison": comparison.to_dict("records"),
        "validation": {"n_lens": n_lens, "n_nonlens": len(label) - n_lens},
        "prevalence": prevalence,
        "test_time_augmentation": augmented is not None,
        "format": asdict(form),
        **facts,
    }
    (out / GROUPS).write_text(json.dumps(sorted(set(groups))))
    (out / DESCRIPTION).write_text(json.dumps(description, indent=1))
    return load_ensemble(out)


def _common_labels(
    scores: Mapping[str, pd.DataFrame],
) -> tuple[NDArray[np.int8], NDArray[np.object_]]:
    """(labels, groups) of the validation cutouts, which all members have in one order."""
    (first, reference), *others = scores.items()
    for name, table in scores.items():
        if "group" not in table:
            raise InputError(
                f"member {name}: its validation scores name no groups, as an older version left "
                f"them; train it again (checkpoints/{name})"
            )
    for name, table in others:
        for column in ("id", "label", "group"):
            if table[column].tolist() != reference[column].tolist():
                raise InputError(
                    f"members {first} and {name}: the column {column} of their validation scores "
                    "differs; train both on one dataset"
                )
    return reference["label"].to_numpy(np.int8), reference["group"].to_numpy(object)


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


def _member(checkpoint: Path, **how: Any) -> LitLensSystem:
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
        name: _member(folder / "members" / f"{name}.ckpt", test_time_augmentation=augmented)
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
