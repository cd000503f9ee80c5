"""Several networks trained together, as one Lightning system."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, fields
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from scipy.special import expit
from torch import Tensor, nn

from lens_pipeline.choices import Together
from lens_pipeline.ensemble.fusion import Fused, InverseVariance, Mean, fuse
from lens_pipeline.errors import InputError
from lens_pipeline.models.names import Member, parse_members
from lens_pipeline.models.system import LensClassifier, LitLensSystem, check_choice


class LitEnsembleSystem(LensClassifier):
    """Networks that see the same batches; the loss is the mean of theirs, and so each learns as it
    would alone (but for `training.gradient_clip`, which bounds the gradient of all together).

    Input and output: as of `LitLensSystem`; the logit is the mean of the members'.
    architectures: members as in LENS_ARCHS; ensemble_strategy: `mean` or
    `uncertainty_weighted`, of logits that are not calibrated (see `InverseVariance`); the rest: of
    each member, see `LitLensSystem`. Raises InputError for a strategy that there is not, or a name
    that no member may have.
    """

    def __init__(
        self,
        architectures: Sequence[str] = ("resnet18", "resnet34", "vit_b_16"),
        ensemble_strategy: str = "uncertainty_weighted",
        **shared: Any,
    ) -> None:
        super().__init__()
        check_choice("ensemble_strategy", ensemble_strategy, get_args(Together))
        if isinstance(architectures, str):
            raise InputError(f"architectures {architectures!r}: must be a list, as ['resnet18']")
        named = parse_members(",".join(architectures), "architectures")
        for member in named:
            if hasattr(nn.ModuleDict(), member.name):  # torch has a method of that name
                raise InputError(f"architectures: no member may be called {member.name}")
        members = {member.name: _untrained(member, shared) for member in named}
        self.members = nn.ModuleDict(members)
        common = dict(next(iter(members.values())).hparams)
        del common["arch"]
        own = {"architectures": list(architectures), "ensemble_strategy": ensemble_strategy}
        self.save_hyperparameters(common | own, logger=False)

    def member_logits(self, images: Tensor) -> Tensor:
        systems = map(_system, self.members.values())
        return torch.cat([system.member_logits(images) for system in systems], dim=1)

    def drawn_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(mean logit (n,), logits (n, members x draws)): see `dropout_draws`."""
        logits, draws = zip(
            *(_system(member).drawn_logits(images) for member in self.members.values()), strict=True
        )
        return torch.stack(logits).mean(dim=0), torch.cat(draws, dim=1)

    @torch.inference_mode()
    def predict(self, loader: Iterable[dict[str, Tensor]]) -> pd.DataFrame:
        """Scores of the batches of a loader, in their order, one row a cutout.

        Columns: probability, logit, std, entropy (see `Fused`), probability_<member>. They are not
        calibrated. The system is put into eval mode.
        """
        self.eval()
        unfitted = self.hparams["ensemble_strategy"] == "uncertainty_weighted"
        fusion = InverseVariance() if unfitted else Mean()
        rows = []
        for batch in loader:
            images = batch["image"].to(self.device)
            found = [_system(member).scored(images) for member in self.members.values()]
            logit = np.stack([of_one for of_one, _ in found], axis=1)
            draws = np.stack([drawn for _, drawn in found], axis=1)
            fused = fuse(logit, draws, fusion)
            rows.append(np.column_stack([*astuple(fused), expit(logit)]))
        names = [f"probability_{name}" for name in self.members]
        columns = [*(field.name for field in fields(Fused)), *names]
        nothing = np.empty((0, len(columns)))
        return pd.DataFrame(np.concatenate([nothing, *rows]), columns=columns)


def _untrained(member: Member, shared: Mapping[str, Any]) -> LitLensSystem:
    """Other weights for another seed; those of the others stay as they are without it."""
    if not member.seed:
        return LitLensSystem(member.architecture, **shared)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed((torch.initial_seed() + member.seed) % 2**64)
        return LitLensSystem(member.architecture, **shared)


def _system(member: nn.Module) -> LitLensSystem:
    assert isinstance(member, LitLensSystem)
    return member
