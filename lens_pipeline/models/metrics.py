"""Metrics of training and validation, gathered over batches and ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lens_pipeline.evaluation.metrics import FPRS, by_rank, lens_metrics

RANKED = ("auroc", "average_precision", "tpr0", "tpr10", *FPRS)


class CountedMetrics(Metric):
    """The mean loss, and accuracy, precision, recall and F1 at a probability of one half.

    update: loss (0-d, the mean over the batch), logit (n,) and label (n,), 1 for a lens. compute:
    {name: 0-d tensor}, 0 where nothing was found or there is nothing to find. One tensor for all:
    torchmetrics' own five take a multiple of the host's time, in each step.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Cutouts, their losses, lenses, found ones, lenses among these.
        self.add_state("sums", torch.zeros(5, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, logit: Tensor, label: Tensor) -> None:
        lens, found = label == 1, logit.detach() > 0
        each = loss.detach().double().expand(len(logit))
        rows = [torch.ones_like(each), each, lens, found, lens & found]
        # Not in place: Lightning's true half precision makes them of 16 bits, where they would end.
        self.sums = self.sums + torch.stack([row.double() for row in rows]).sum(dim=1)

    def compute(self) -> dict[str, Tensor]:
        n, loss, lenses, found, right = self.sums
        return {
            "loss": loss / n,
            "accuracy": (n - lenses - found + 2 * right) / n,
            "precision": right / found.clamp(min=1),
            "recall": right / lenses.clamp(min=1),
            "f1": 2 * right / (lenses + found).clamp(min=1),
        }


class RankingMetrics(Metric):
    """AUROC, average precision and the low-FPR metrics of `lens_metrics`, over all that was seen.

    update: score (n,), as a logit, and target (n,), 1 for a lens. compute: {name: 0-d tensor}, NaN
    where the cutouts cannot resolve one.
    """

    full_state_update = False
    score: list[Tensor]
    target: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("score", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    def update(self, score: Tensor, target: Tensor) -> None:
        self.score.append(score.detach())
        self.target.append(target)

    def compute(self) -> dict[str, Tensor]:
        score = dim_zero_cat(self.score)
        found = torch.full((len(RANKED),), torch.nan, device=score.device, dtype=torch.float64)
        if len(score) and bool(torch.isfinite(score).all()):
            target = dim_zero_cat(self.target)
            ranks = by_rank(score.double().cpu().numpy())
            values = lens_metrics(target.cpu().numpy(), ranks, bootstrap=0)
            known = [values[name]["value"] for name in RANKED]
            found = found.new_tensor([torch.nan if value is None else value for value in known])
        return dict(zip(RANKED, found.unbind(), strict=True))


class StageMetrics(torch.nn.Module):
    """The metrics of a stage: the mean loss, those at one half and, in evaluation, the ranking."""

    def __init__(self, ranking: bool) -> None:
        super().__init__()
        self.counted = CountedMetrics()
        self.ranking = RankingMetrics() if ranking else None

    def update(self, loss: Tensor, logit: Tensor, label: Tensor) -> None:
        """loss: 0-d, the mean over the batch; logit, label (n,)."""
        self.counted.update(loss, logit, label)
        if self.ranking is not None:
            self.ranking.update(logit, label.int())

    def compute(self) -> dict[str, Tensor]:
        """{name: 0-d tensor} over all ranks."""
        values = self.counted.compute()
        return values | (self.ranking.compute() if self.ranking is not None else {})

    def reset(self) -> None:
        for metric in self._metrics():
            metric.reset()

    def saved(self, total: Callable[[Tensor], Tensor]) -> list[dict[str, Any]]:
        """What all ranks have gathered so far, for a checkpoint in the middle of an epoch: one of
        them goes on with it. total: the sum over ranks of a tensor, which it may change."""
        states = [(m._update_count, dict(m.metric_state)) for m in self._metrics()]
        return [
            {"n": n}
            | {name: total(torch.as_tensor(value).clone()).cpu() for name, value in state.items()}
            for n, state in states
        ]

    def restore(self, saved: list[dict[str, Any]]) -> None:
        for metric, state in zip(self._metrics(), saved, strict=True):
            for name, value in state.items():
                if name != "n":
                    setattr(metric, name, value.to(metric.device))
            metric._update_count = state["n"]

    def _metrics(self) -> list[Metric]:
        return [self.counted] if self.ranking is None else [self.counted, self.ranking]
