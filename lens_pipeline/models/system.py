"""The Lightning system of one member: network, loss, optimiser, metrics."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryAveragePrecision,
    BinaryF1Score,
    BinaryPrecision,
    BinaryRecall,
    BinarySensitivityAtSpecificity,
)

from lens_pipeline.catalogue.images import SIGMA_UNITS
from lens_pipeline.errors import InputError
from lens_pipeline.models.architectures import build_backbone
from lens_pipeline.models.augmentation import augment

# Fixed for all images and bands. In background sigma, asinh is linear over the noise and
# logarithmic over galaxies; a composite has been stretched by whoever made it.
SOFTENING_SIGMA = 2.0


def stretch(images: Tensor, units: str) -> Tensor:
    """Stored units -> the network's input, pixel by pixel, the same for every image."""
    if units == SIGMA_UNITS:
        return torch.asinh(images / SOFTENING_SIGMA)
    return (images - 0.5) / 0.25


class LitLensSystem(pl.LightningModule):
    """One network that tells lenses from non-lenses.

    Input: float32 (n, bands, height, width) in the units of the stored cutouts; output: logits
    (n,).
    arch: a name of `lens_pipeline.models.names`; units: `background_sigma` or `composite`;
    dropout_rate: in the head alone, so that Monte Carlo dropout needs the backbone once;
    pos_weight: weight of a lens in the loss, for imbalanced sets; warmup: fraction of all steps in
    which the learning rate rises, before it falls along a cosine; shift, noise: see `augment`.
    Raises InputError for noise on composites.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        dropout_rate: float = 0.3,
        bands: int = 3,
        image_size: int = 64,
        units: str = "background_sigma",
        pos_weight: float = 1.0,
        warmup: float = 0.1,
        shift: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        if noise and units != SIGMA_UNITS:
            raise InputError(f"noise {noise}: goes with flux in background sigma, not {units}")
        self.save_hyperparameters(logger=False)  # the whole configuration is logged elsewhere
        self.backbone, n_features = build_backbone(arch, bands, image_size)
        self.dropout = nn.Dropout(dropout_rate)
        self.head = nn.Linear(n_features, 1)
        self.register_buffer("pos_weight", torch.tensor(float(pos_weight)), persistent=False)
        basic: dict[str, Metric | MetricCollection] = {
            "accuracy": BinaryAccuracy(),
            "precision": BinaryPrecision(),
            "recall": BinaryRecall(),
            "f1": BinaryF1Score(),
        }
        self.train_metrics = MetricCollection(basic, prefix="train/")
        ranking: dict[str, Metric | MetricCollection] = {
            "auroc": BinaryAUROC(),
            "average_precision": BinaryAveragePrecision(),
            # The highest recall at a specificity of at least 0.99 is the TPR at FPR <= 0.01.
            "tpr_at_fpr_1e-2": _Recall(min_specificity=0.99),
        }
        self.val_metrics = MetricCollection(basic | ranking, prefix="val/").clone()
        self.test_metrics = self.val_metrics.clone(prefix="test/")

    def features(self, images: Tensor) -> Tensor:
        """The backbone's output, float32 (n, features)."""
        return self.backbone(stretch(images, self.hparams["units"]))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(images))).squeeze(1)

    def _loss(self, logit: Tensor, label: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            logit, label, pos_weight=self.get_buffer("pos_weight")
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        images = augment(batch["image"], self.hparams["shift"], self.hparams["noise"])
        logit = self(images)
        loss = self._loss(logit, batch["label"])
        self.train_metrics.update(logit.detach().sigmoid(), batch["label"].int())
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(logit))
        self.log_dict(self.train_metrics, on_step=False, on_epoch=True)
        return loss

    def _evaluation_step(self, batch: dict[str, Tensor], stage: str) -> None:
        metrics = self.val_metrics if stage == "val" else self.test_metrics
        logit = self(batch["image"])
        loss = self._loss(logit, batch["label"])
        metrics.update(logit.sigmoid(), batch["label"].int())
        self.log(f"{stage}/loss", loss, batch_size=len(logit), sync_dist=True, prog_bar=True)
        self.log_dict(metrics)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluation_step(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluation_step(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(batch["image"])

    def configure_optimizers(self) -> Any:
        optimiser = torch.optim.AdamW(
            self.parameters(), lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"]
        )
        # The rate rises for two steps at least, and falls for as many.
        total = max(4, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser,
            max_lr=self.hparams["lr"],
            total_steps=total,
            pct_start=min(max(self.hparams["warmup"], 2 / total), 1 - 2 / total),
            cycle_momentum=False,
        )
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def load_system(checkpoint: Path) -> LitLensSystem:
    """A trained system, in eval mode, on the CPU; loading executes no code of the file."""
    system = LitLensSystem.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    return system.eval()


class _Recall(BinarySensitivityAtSpecificity):
    """The recall alone, without the threshold that reaches it."""

    def compute(self) -> Tensor:  # type: ignore[override]
        recall, _ = super().compute()
        return recall
