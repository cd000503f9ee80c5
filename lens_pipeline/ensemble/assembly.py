"""Trained members -> an ensemble on disk."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from lens_pipeline.catalogue.dataset import CutoutFormat, Split
from lens_pipeline.choices import Choice, Method
from lens_pipeline.ensemble.choice import choose
from lens_pipeline.ensemble.description import DESCRIPTION, GROUPS, SCHEMA
from lens_pipeline.ensemble.system import LensEnsemble, load_ensemble, load_member
from lens_pipeline.errors import InputError
from lens_pipeline.evaluation.metrics import lens_metrics
from lens_pipeline.models.split_scores import split_scores


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
            name: split_scores(
                load_member(Path(checkpoint), test_time_augmentation=True), augmented
            )
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
        "validation": classes(label),
        "prevalence": prevalence,
        "test_time_augmentation": augmented is not None,
        "format": asdict(form),
        **facts,
    }
    (out / GROUPS).write_text(json.dumps(sorted(set(groups))))
    (out / DESCRIPTION).write_text(json.dumps(description, indent=1))
    return load_ensemble(out)


def classes(label: ArrayLike) -> dict[str, int]:
    """How many of labels (n,), 1 or 0, are of either class, as `ensemble.json` has it."""
    labels = np.asarray(label)
    return {"n_lens": int((labels == 1).sum()), "n_nonlens": int((labels == 0).sum())}


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
