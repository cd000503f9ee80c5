"""All that decides how one member is trained. Plain pydantic: importing it is light."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lens_pipeline.errors import InputError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    """The network."""

    arch: str = Field(default="resnet18", description="Architecture, as in LENS_ARCHS.")
    dropout_rate: float = Field(
        default=0.3, ge=0, lt=1, description="Dropout in the head, 0 to below 1."
    )


class TrainingSection(_Section):
    """The optimisation."""

    epochs: int = Field(default=30, ge=1, le=10_000, description="Passes over the training set.")
    batch_size: int = Field(default=64, ge=2, le=65_536, description="Cutouts a step.")
    learning_rate: float = Field(
        default=1e-3, gt=0, le=1, description="Peak of the schedule: a warm-up, then a cosine."
    )
    weight_decay: float = Field(default=1e-2, ge=0, le=1, description="AdamW's.")
    warmup: float = Field(
        default=0.1, gt=0, lt=1, description="Fraction of all steps in which the rate rises."
    )
    balance: bool = Field(
        default=True, description="Weigh lenses by non-lenses / lenses in the training set."
    )
    shift: float = Field(
        default=0.0, ge=0, le=16, description="Cutouts are moved by up to so many pixels."
    )
    noise: float = Field(
        default=0.0, ge=0, le=2, description="And get up to so much more noise, in sigma."
    )
    monitor: Literal["val/auroc", "val/average_precision", "val/tpr_at_fpr_1e-2"] = Field(
        default="val/tpr_at_fpr_1e-2",
        description="The best epoch is the one where this is highest.",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Of weights, order and augmentation.")


class HardwareSection(_Section):
    """Where it runs."""

    accelerator: Literal["auto", "cpu", "gpu"] = Field(
        default="auto", description="`auto` takes a GPU where there is one."
    )
    devices: int = Field(default=1, ge=1, le=1024, description="Devices to train on.")
    precision: Literal["auto", "32-true", "16-mixed", "bf16-mixed"] = Field(
        default="auto", description="`auto`: bf16-mixed on a GPU that has it, else 32-true."
    )


class DataSection(_Section):
    """How batches are read."""

    num_workers: int = Field(
        default=0, ge=0, le=256, description="Loader processes; 0 reads in the training process."
    )


class TrainConfig(_Section):
    """The four sections of a training configuration."""

    model: ModelSection = ModelSection()
    training: TrainingSection = TrainingSection()
    hardware: HardwareSection = HardwareSection()
    data: DataSection = DataSection()

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str) -> Self:
        """The configuration from nested values; `source` (a file, an option) is named in errors.

        Raises InputError for an unknown key, naming the nearest valid one, or a value out of range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as problem:
            first = problem.errors()[0]
            path = ".".join(str(part) for part in first["loc"])
            hint = ""
            if first["type"] == "extra_forbidden":
                valid = [
                    f"{section}.{field}" if len(first["loc"]) > 1 else section
                    for section, info in cls.model_fields.items()
                    for field in info.annotation.model_fields  # type: ignore[union-attr]
                ]
                near = difflib.get_close_matches(path, valid, n=1, cutoff=0.0)
                hint = f"; did you mean {near[0]}?"
            raise InputError(f"{source}: {path}: {first['msg']}{hint}") from None
