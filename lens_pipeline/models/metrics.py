"""Metrics of training and validation, gathered over batches and ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryF1Score,
    BinaryPrecision,
    BinaryRecall,
)
from torchmetrics.utilities import dim_zero_cat

from lens_pipeline.evaluation.metrics import FPRS, lens_metrics

COUNTED = {  # at a probability of one half
    "accuracy": BinaryAccuracy,
    "precision": BinaryPrecision,
    "recall": BinaryRecall,
    "f1": BinaryF1Score,
}
RANKED = ("auroc", "average_precision", "tpr0", "tpr10", *FPRS)


class RankingMetrics(Metric):
    """AUROC, average precision and the low-FPR metrics of `lens_metrics`, over all that was seen.

    update: probability (n,) and target (n,), 1 for a lens. compute: {name: 0-d tensor}, NaN where
    the cutouts cannot resolve one.
    """

    higher_is_better = True
    full_state_update = False
    probability: list[Tensor]
    target: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("probability", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    def update(self, probability: Tensor, target: Tensor) -> None:
        self.probability.append(probability.detach())
        self.target.append(target)

    def compute(self) -> dict[str, Tensor]:
        probability = dim_zero_cat(self.probability)
        found = torch.full((len(RANKED),), torch.nan, device=probability.device)
        if len(probability) and bool(torch.isfinite(probability).all()):
            target = dim_zero_cat(self.target)
            values = lens_metrics(target.cpu().numpy(), probability.cpu().numpy(), bootstrap=0)
            known = [values[name]["value"] for name in RANKED]
            found = found.new_tensor([torch.nan if value is None else value for value in known])
        return dict(zip(RANKED, found.unbind(), strict=True))


class StageMetrics(torch.nn.Module):
    """The metrics of a stage: the mean loss, those at one half and, in evaluation, the ranking."""

    def __init__(self, ranking: bool) -> None:
        super().__init__()
        # What torchmetrics would look at in every batch, a GPU would have to be waited for.
        self.loss = MeanMetric(nan_strategy="disable")
        self.counted = MetricCollection(
            {name: metric(validate_args=False) for name, metric in COUNTED.items()}
        )
        self.ranking = RankingMetrics() if ranking else None

    def update(self, loss: Tensor, logit: Tensor, label: Tensor) -> None:
        """loss: 0-d, the mean over the batch; logit, label (n,)."""
        # In float64 probabilities of large logits differ, too.
        probability = logit.detach().double().sigmoid()
        target = label.int()
        # Once for each cutout: without its check of values torchmetrics forgets weights.
        self.loss.update(loss.detach().expand(len(logit)))
        self.counted.update(probability, target)
        if self.ranking is not None:
            self.ranking.update(probability, target)

    def compute(self) -> dict[str, Tensor]:
        """{name: 0-d tensor} over all ranks."""
        values = {"loss": self.loss.compute(), **self.counted.compute()}
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
        ranking = [] if self.ranking is None else [self.ranking]
        return [self.loss, *self.counted.values(copy_state=False), *ranking]
