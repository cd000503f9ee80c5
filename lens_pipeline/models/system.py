"""The Lightning system of one member: network, loss, optimiser, metrics."""

import inspect
import logging
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import IterableDataset

from lens_pipeline.catalogue.cutout import PIXELS, SIGMA_UNITS
from lens_pipeline.choices import BOUNDS, Loss, Schedule, check_bounds
from lens_pipeline.errors import InputError
from lens_pipeline.models.architectures import build_backbone
from lens_pipeline.models.augmentation import all_dihedral, augment
from lens_pipeline.models.metrics import StageMetrics
from lens_pipeline.models.optimiser import adamw, parameter_groups
from lens_pipeline.models.pretrained import read_checkpoint, read_head
from lens_pipeline.models.schedules import schedule
from lens_pipeline.models.uncertainty import dropout_draws

# Fixed for all images and bands. In background sigma, asinh is linear over the noise and
# logarithmic over galaxies; a composite has been stretched by whoever made it.
SOFTENING_SIGMA = 2.0
METRIC_STATE = "train_metrics"  # in a checkpoint
BATCH = 256  # cutouts that networks score at a time
COMPILED = 64  # codes of one network that torch may keep, for all in a process: it has 8 by default

log = logging.getLogger(__name__)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises InputError for a value that is no choice."""
    if value not in choices:
        raise InputError(f"{name} {value!r}: is none of {', '.join(choices)}")


def stretch(images: Tensor, units: str) -> Tensor:
    """Stored units -> the network's input, pixel by pixel, the same for every image."""
    if units == SIGMA_UNITS:
        return torch.asinh(images / SOFTENING_SIGMA)
    return (images - 0.5) / 0.25


class LensClassifier(pl.LightningModule):
    """What all systems share: `member_logits` is theirs, their settings are in `hparams`.

    hparams: as described at `LitLensSystem`. Metrics are logged by epoch, as `train/loss`,
    `val/auroc`, `test/tpr0`: see `StageMetrics`.
    """

    validated = -1  # the last epoch that was

    def __init__(self) -> None:
        super().__init__()
        self.metrics = nn.ModuleDict(
            {"train_": StageMetrics(False), "val_": StageMetrics(True), "test_": StageMetrics(True)}
        )

    def member_logits(self, images: Tensor) -> Tensor:
        """Logits (n, members) of images (n, bands, height, width)."""
        raise NotImplementedError

    def drawn_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(logit (n,) without dropout, logits (n, draws) with it): see `dropout_draws`."""
        raise NotImplementedError

    @torch.inference_mode()
    def scored(
        self, images: NDArray[np.floating] | Tensor
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """`drawn_logits` of stored cutouts, on the system's device, where they may be already.

        Raises ValueError unless it is in eval mode, where no statistic of BatchNorm moves.
        """
        if self.training:
            raise ValueError("the system must be in eval mode")
        batch = images if isinstance(images, Tensor) else torch.from_numpy(np.array(images))
        logit, drawn = self.drawn_logits(batch.to(self.device))
        return logit.double().cpu().numpy(), drawn.double().cpu().numpy()

    def forward(self, images: Tensor) -> Tensor:
        return self.member_logits(images).mean(dim=1)

    def loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """The mean over members (n, members) and cutouts, label (n,).

        Binary cross-entropy, lenses weighing `pos_weight`; or the focal loss (Lin et al. 2017), its
        alpha giving lenses the same weight, for labels between 0 and 1 as Li et al. 2020
        (arXiv:2006.04388) have it: lowest at the label. Labels move by half of `label_smoothing`
        towards each other in training; what a cutout weighs is by what it is.
        """
        smoothing = self.hparams["label_smoothing"] if self.training else 0.0
        target = (label * (1 - smoothing) + smoothing / 2)[:, None].expand_as(logits)
        weight = torch.where(label == 1, self.hparams["pos_weight"], 1.0)[:, None]
        if self.hparams["loss"] == "focal":
            away = (target - logits.sigmoid()).abs()
            # At 0 a power below 1 has no slope that is a number.
            away = away.clamp_min(torch.finfo(away.dtype).eps) ** self.hparams["focal_gamma"]
            found = away * functional.binary_cross_entropy_with_logits(
                logits, target, reduction="none"
            )
            return (found * weight).mean() / (1 + self.hparams["pos_weight"])
        return functional.binary_cross_entropy_with_logits(
            logits, target, weight=weight.expand_as(logits)
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """loss: what Lightning is to follow; mean_loss: of the batch's cutouts."""
        how = self.hparams
        images = batch["image"].to(self.dtype)  # shards hold 16 bits
        images = augment(images, how["shift"], how["noise"], turn=how["augment"])
        loss = mean_loss = self._step("train", images, batch["label"])
        if self.trainer.world_size > 1 and self.trainer.is_last_batch:
            # Of a last batch that does not divide evenly, each rank has another number of cutouts,
            # and DDP takes the mean over ranks.
            mine = torch.tensor(float(len(images)), device=loss.device)
            loss = loss * mine / self.trainer.strategy.reduce(mine.clone(), reduce_op="mean")
        scaled = loss * self._scale_of_a_part_step(batch_idx)
        return {"loss": scaled, "mean_loss": mean_loss.detach()}

    def _scale_of_a_part_step(self, batch_idx: int) -> float:
        """Lightning divides the loss by how many batches make a step; at the end of an epoch there
        may be fewer, and it takes a step with these. Batches of one step weigh the same, also the
        last one of an epoch, which may be smaller."""
        batches, together = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        left = batches % together if math.isfinite(batches) else 0
        return together / left if left and batch_idx >= batches - left else 1.0

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._step("val", batch["image"], batch["label"])

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._step("test", batch["image"], batch["label"])

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(batch["image"])

    def _step(self, stage: str, images: Tensor, label: Tensor) -> Tensor:
        logits = self.member_logits(images)
        loss = self.loss(logits, label)
        self._metrics(stage).update(loss, logits.mean(dim=1), label)
        return loss

    def _metrics(self, stage: str) -> StageMetrics:
        metrics = self.metrics[f"{stage}_"]  # a module has an attribute `train` of its own
        assert isinstance(metrics, StageMetrics)
        return metrics

    def _tell(self, stage: str) -> None:
        values = {f"{stage}/{k}": v.float() for k, v in self._metrics(stage).compute().items()}
        self.log_dict(values)
        self._metrics(stage).reset()

    def on_train_start(self) -> None:
        # Where the loader was, in a training that goes on. Lightning looks when it makes one;
        # where a schedule asks for the number of steps, that is before it reads the checkpoint.
        self.trainer.fit_loop._load_combined_loader_states()

    # Of an epoch that was cut short, by an interruption, say. One that goes on begins with none of
    # these, and keeps what its checkpoint has brought.
    def on_train_epoch_start(self) -> None:
        self._metrics("train").reset()

    def on_validation_epoch_start(self) -> None:
        self._metrics("val").reset()

    def on_test_epoch_start(self) -> None:
        self._metrics("test").reset()

    def on_train_epoch_end(self) -> None:
        self._check_all_batches_came()
        self._tell("train")
        # Before the epoch's checkpoint is written; Lightning would do it after, and a training that
        # goes on from there would miss it.
        schedulers = self.lr_schedulers() or []
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            if isinstance(scheduler, ReduceLROnPlateau) and self.validated == self.current_epoch:
                scheduler.step(self.trainer.callback_metrics["val/loss"])

    def _check_all_batches_came(self) -> None:
        """Raises InputError where an epoch of a stream was shorter than it was said to be:
        Lightning would wait for its last batch to validate, and never do."""
        data = getattr(self.trainer.train_dataloader, "dataset", None)
        if not isinstance(data, IterableDataset):  # the end of others is known
            return
        loop, wanted = self.trainer.fit_loop, self.trainer.num_training_batches
        came = loop.epoch_loop.batch_progress.current.completed
        ended = self.trainer.should_stop or self.trainer.global_step == self.trainer.max_steps
        if came < wanted and not math.isinf(wanted) and not ended:
            raise InputError(
                f"limit_train_batches {wanted}: an epoch of the tars has {came} batches; give "
                f"{came}, or name a cache_dir"
            )

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    def on_validation_epoch_end(self) -> None:
        self._tell("val")
        if not self.trainer.sanity_checking:
            self.validated = self.current_epoch

    def on_test_epoch_end(self) -> None:
        self._tell("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        def total(value: Tensor) -> Tensor:
            if self._trainer is None:
                return value
            summed = self._trainer.strategy.reduce(value, reduce_op="sum")
            assert isinstance(summed, Tensor)
            return summed

        checkpoint[METRIC_STATE] = self._metrics("train").saved(total)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        fitting = self._trainer is not None and self._trainer.state.fn == "fit"
        ours = type(self).configure_optimizers is LensClassifier.configure_optimizers
        for state in checkpoint.get("optimizer_states", ()) if fitting and ours else ():
            if len(state["param_groups"]) != len(parameter_groups(self, 0.0)):
                raise InputError(
                    "the checkpoint holds the optimiser of an earlier version of lens_pipeline; "
                    "begin a new training, which may start from its weights"
                )
        if METRIC_STATE in checkpoint and fitting and self.global_rank == 0:
            self._metrics("train").restore(checkpoint[METRIC_STATE])

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch does. Weights that do not say which versions their layers are of, as those of a
        checkpoint, count as of the versions of this system's."""
        versioned = OrderedDict(state_dict)
        own = self.state_dict()._metadata  # type: ignore[attr-defined]
        versioned._metadata = getattr(state_dict, "_metadata", own)  # type: ignore[attr-defined]
        return super().load_state_dict(versioned, strict, assign)

    def setup(self, stage: str) -> None:
        data = getattr(self._trainer, "datamodule", None)
        form = getattr(data, "format", None)
        if form is not None:
            for name, mine, theirs in (
                ("bands", self.hparams["bands"], len(form.bands)),
                ("units", self.hparams["units"], form.units),
            ):
                if mine != theirs:
                    raise InputError(
                        f"{name}: the network was made for {mine!r}, and the cutouts have "
                        f"{theirs!r}; make it with {name}={theirs!r}"
                    )
            if (mine := self.hparams["image_size"]) != form.image_size:
                log.warning(
                    "image_size: the network was made for cutouts of %d pixels, and these have %d; "
                    "no ensemble of such cutouts takes it: make it with image_size=%d",
                    *(mine, form.image_size, form.image_size),
                )

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = "cpu",
        *,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **changes: Any,
    ) -> Self:
        """A trained system; `changes` of its arguments. Executes no code of the file, and so
        `weights_only` is always true; strict: whether it must hold all weights, and no others, as
        by default.

        Raises InputError, naming the file, where it is no checkpoint of such a system, or carries
        more than numbers and settings; and for a change of what is no argument.
        """
        if weights_only is False:
            raise InputError(
                "weights_only=False: no code of a checkpoint is executed; leave it out"
            )
        found = read_checkpoint(Path(checkpoint_path))
        if not isinstance(found, dict) or "state_dict" not in found:
            raise InputError(f"{checkpoint_path}: is no checkpoint of a {cls.__name__}")
        try:
            system = cls(**(found.get("hyper_parameters", {}) | changes))
        except TypeError as problem:
            if unknown := changes.keys() - cls._arguments():
                raise InputError(f"{min(unknown)}: {cls.__name__} has no such argument") from None
            # Settings of another kind of system.
            raise InputError(
                f"{checkpoint_path}: is no checkpoint of a {cls.__name__} ({problem})"
            ) from None
        try:
            system.load_state_dict(found["state_dict"], strict=strict is not False)
        except RuntimeError as problem:
            first = str(problem).splitlines()[1].strip()
            raise InputError(
                f"{checkpoint_path}: is no checkpoint of this {cls.__name__} ({first})"
            ) from None
        return system.to(map_location)

    @classmethod
    def _arguments(cls) -> set[str]:
        """Those of its own, and the members' where it has some."""
        own = inspect.signature(cls).parameters
        variable = any(one.kind is one.VAR_KEYWORD for one in own.values())
        return {*own, *(inspect.signature(LitLensSystem).parameters if variable else ())}

    def configure_optimizers(self) -> Any:
        wanted = self.hparams
        # In mixed precision Lightning clips no gradients of a fused step, which might unscale them.
        mixed = str(self.trainer.precision).endswith("-mixed")
        fused = not (mixed and self.trainer.gradient_clip_val)
        optimiser = adamw(self, wanted["lr"], wanted["weight_decay"], fused)
        self.trainer.fit_loop.setup_data()  # one that ends by steps or time has not looked yet
        steps = self.trainer.estimated_stepping_batches
        n_batches = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        if math.isinf(steps) and (wanted["warmup"] or wanted["schedule"] == "cosine"):
            what, give = (
                ("batches the tars hold", "limit_train_batches or max_steps, or name a cache_dir")
                if math.isinf(n_batches)
                else ("epochs there will be", "max_epochs or max_steps, beside max_time")
            )
            raise InputError(
                f"how many {what} is not known, and so no schedule of the learning rate; give "
                f"{give}, or take another schedule than cosine, with warmup 0"
            )
        if wanted["schedule"] == "step" and math.isinf(min(n_batches, steps)):
            raise InputError(
                "how many batches the tars hold is not known, and so not when a schedule in steps "
                "of epochs falls; give limit_train_batches or max_steps, or name a cache_dir"
            )
        if wanted["schedule"] == "plateau" and not self.trainer.limit_val_batches:
            raise InputError("schedule plateau: follows val/loss, and nothing is validated")
        schedulers = schedule(
            optimiser,
            wanted["schedule"],
            steps=steps,
            per_epoch=min(n_batches, steps),
            **{name: wanted[name] for name in ("warmup", "decay", "decay_epochs")},
        )
        return [optimiser], schedulers


NAMED_STARTS = {"none": False, "published": True}  # as configurations say them


class LitLensSystem(LensClassifier):
    """One network that tells lenses from non-lenses.

    Input: float32 (n, bands, height, width) in the units of the stored cutouts; output: logits
    (n,).

    arch: a name of `lens_pipeline.models.names`; lr, weight_decay: as for `adamw`; dropout_rate: in
    the head alone, so that Monte Carlo dropout needs the backbone once; pretrained: `none`,
    `published`, or what `build_backbone` takes (of a checkpoint of ours the head, too);
    compile_model: by `torch.compile`; channels_last: the layout that convolutions prefer; units:
    `background_sigma` or `composite`; pos_weight, loss, focal_gamma, label_smoothing: see
    `LensClassifier.loss`; schedule, warmup, decay, decay_epochs: see `schedule`; augment: turn and
    flip in training; shift and noise: see `augment`; test_time_augmentation: in eval mode the
    features are the mean over a cutout's eight turns and flips, so that its logit, by a head that
    is linear, is the mean of theirs, and the same however it is turned; eight times the work.
    Raises InputError for noise on composites, for a loss or schedule that there is not, and for a
    number out of its BOUNDS.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        dropout_rate: float = 0.3,
        pretrained: bool | str | Path = False,
        compile_model: bool = False,
        channels_last: bool = False,
        bands: int = 3,
        image_size: int = 64,
        units: str = SIGMA_UNITS,
        pos_weight: float = 1.0,
        loss: str = "bce",
        focal_gamma: float = 2.0,
        label_smoothing: float = 0.0,
        schedule: str = "cosine",
        warmup: float = 0.1,
        decay: float = 0.1,
        decay_epochs: int = 10,
        augment: bool = True,
        shift: float = 0.0,
        noise: float = 0.0,
        test_time_augmentation: bool = False,
    ) -> None:
        super().__init__()
        check_choice("units", units, [*PIXELS])
        check_choice("loss", loss, get_args(Loss))
        check_choice("schedule", schedule, get_args(Schedule))
        if noise and units != SIGMA_UNITS:
            raise InputError(f"noise {noise}: goes with flux in background sigma, not {units}")
        # Of a trained network only its own weights count; the whole configuration is logged
        # elsewhere.
        self.save_hyperparameters(ignore=["pretrained"], logger=False)
        for name, value in self.hparams.items():
            if isinstance(value, np.generic):  # which a checkpoint could not be read with
                self.hparams[name] = value.item()
        check_bounds("lr", lr, "learning_rate")
        for name in BOUNDS.keys() & self.hparams.keys():
            check_bounds(name, self.hparams[name])
        start = NAMED_STARTS.get(str(pretrained), pretrained)
        self.backbone, n_features = build_backbone(arch, bands, image_size, start)
        self.dropout = nn.Dropout(dropout_rate)
        self.head = nn.Linear(n_features, 1)
        if not isinstance(start, bool) and (trained := read_head(Path(start))):
            self.head.load_state_dict(trained)
        if channels_last:
            self.backbone.to(memory_format=torch.channels_last)
        if compile_model:
            # In place: the names of the weights stay. A last batch that is smaller gets code of its
            # own: made for any size, the code of all others would be slower after it.
            self.backbone.compile(dynamic=False)
            kept = torch._dynamo.config
            kept.recompile_limit = max(COMPILED, kept.recompile_limit)

    def features(self, images: Tensor) -> Tensor:
        """The backbone's output (n, features), float32 or what autocast makes of it."""
        images = stretch(images.to(self.dtype), self.hparams["units"])
        if self.training or not self.hparams["test_time_augmentation"]:
            return self.of_stretched(images)
        found = [self.of_stretched(turned).float() for turned in all_dihedral(images)]
        return torch.stack(found).mean(dim=0)

    def of_stretched(self, stretched: Tensor) -> Tensor:
        """The backbone's output for images in its own units (see `stretch`), as they lie."""
        if self.hparams["channels_last"]:
            stretched = stretched.contiguous(memory_format=torch.channels_last)
        return self.backbone(stretched)

    def member_logits(self, images: Tensor) -> Tensor:
        features = self.features(images)
        # In 16 bits the best candidates' logits would be equal, which decide TPR at small FPR.
        with torch.autocast(features.device.type, enabled=False):
            return self.head(self.dropout(features.to(self.head.weight.dtype)))

    def drawn_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images).float()
        drawn = dropout_draws(features, self.head, self.dropout.p)
        return self.head(features).squeeze(1), drawn


def load_system(checkpoint: Path, **changes: Any) -> LitLensSystem:
    """A trained system, in eval mode, on the CPU unless `map_location` is among the changes; these
    and the errors: see `load_from_checkpoint`."""
    return LitLensSystem.load_from_checkpoint(checkpoint, compile_model=False, **changes).eval()
