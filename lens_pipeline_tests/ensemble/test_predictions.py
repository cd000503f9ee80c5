"""What ensembles say of cutouts, by formulas of one's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit

from lens_pipeline import LitEnsembleSystem, LitLensSystem
from lens_pipeline.catalogue.cutout import SIGMA_UNITS
from lens_pipeline.catalogue.dataset import CutoutFormat
from lens_pipeline.ensemble.assembly import assemble

IMAGES = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("strategy", ["mean", "uncertainty_weighted"])
def test_networks_that_were_trained_together_are_fused_as_was_asked(strategy: str) -> None:
    torch.manual_seed(0)
    system = LitEnsembleSystem(["lastro", "trans_enc_s"], strategy, image_size=32).eval()
    logits, variance = [], []
    for member in system.members.values():
        torch.manual_seed(1)
        logit, draws = member.scored(IMAGES)
        logits.append(logit)
        variance.append(draws.var(axis=1))
    found = np.array(logits)
    torch.manual_seed(1)
    table = system.predict([{"image": part} for part in IMAGES.split(12)])
    for name, own in zip(system.members, found, strict=True):
        np.testing.assert_allclose(table[f"probability_{name}"], expit(own), rtol=1e-5)
    if strategy == "mean":
        fused = found.mean(axis=0)
    else:  # DerSimonian & Laird 1986
        weight = 1 / (np.array(variance) + found.var(axis=0))
        fused = (weight * found).sum(axis=0) / weight.sum(axis=0)
    np.testing.assert_allclose(table["logit"], fused, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(table["probability"], expit(table["logit"]))


@pytest.mark.parametrize("of_real", [False, True], ids=["all", "real ones among them"])
def test_the_probability_of_the_sky_is_that_at_its_prevalence(
    of_real: bool, tmp_path: Path
) -> None:
    """By Bayes' theorem, from the share of lenses among the validation split's real cutouts."""
    torch.manual_seed(0)
    label = np.repeat([1, 0], [10, 30])
    logit = np.random.default_rng(0).normal(label)
    scores = pd.DataFrame(
        {"id": np.arange(40).astype(str), "label": label, "group": np.arange(40).astype(str)}
        | {"logit": logit, "logit_std": 0.3}
    )
    system = LitLensSystem("lastro", image_size=32)
    checkpoint = tmp_path / "checkpoint.ckpt"
    weights = {"state_dict": system.state_dict(), "hyper_parameters": dict(system.hparams)}
    torch.save(weights, checkpoint)
    facts: dict[str, Any] = {"dataset": "pixels", "dataset_version": "1"}
    if of_real:
        facts["validation_of_real"] = {"n_lens": 4, "n_nonlens": 16}
    form = CutoutFormat(("g", "r", "i"), 32, SIGMA_UNITS, 0.2)
    ensemble = assemble(
        {"lastro": (checkpoint, scores)}, form, tmp_path / "out", facts, [], prevalence=0.004
    )
    table = ensemble.predict(IMAGES.numpy())
    share = 0.2 if of_real else 0.25
    odds = table["probability"] / (1 - table["probability"])
    odds *= (0.004 / 0.996) / (share / (1 - share))
    np.testing.assert_allclose(table["sky_probability"], odds / (1 + odds), rtol=1e-9)
