"""All that decides how a network is trained. Plain pydantic: importing it is light."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from lens_pipeline.choices import BOUNDS, Loss, Schedule, Together, within
from lens_pipeline.errors import InputError
from lens_pipeline.files import file_sha256
from lens_pipeline.locations import written_down
from lens_pipeline.models.names import parse_members
from lens_pipeline.settings_files import first_wrong, no_such_key, read_yaml

PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}  # what Lightning takes, too
Precision = Annotated[
    Literal["auto", "32-true", "16-mixed", "bf16-mixed"],
    BeforeValidator(lambda said: PRECISIONS.get(str(said), said)),
]
Monitor = Literal[
    "val/loss",
    "val/accuracy",
    "val/precision",
    "val/recall",
    "val/f1",
    "val/auroc",
    "val/average_precision",
    "val/tpr0",
    "val/tpr10",
    "val/tpr_at_fpr_1e-2",
    "val/tpr_at_fpr_1e-3",
    "val/tpr_at_fpr_1e-4",
]
# What decides nothing that a training leaves: another value is no other training.
UNDECIDING = {
    ("data", "num_workers"),
    ("data", "cache_dir"),
    ("hardware", "exclusive"),
    ("training", "save_every_n_steps"),
}
# What decides no weights: like the former, it may change between a training and its going on. The
# cutouts are compared by what they are, and not by where they lie.
BESIDES = {
    *{("training", "loggers"), ("training", "save_top_k")},
    *{("data", name) for name in ("data_root", "train_urls", "val_urls", "test_urls")},
}
ABBREVIATED = {"lr": "learning_rate", "gpus": "devices", "workers": "num_workers"}
NUMBERS = (int, float, int | None)
LoggerName = Literal["csv", "tensorboard", "wandb", "mlflow"]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field and field.annotation in NUMBERS:
                raise ValueError(f"{name}: must be a number, and is {str(value).lower()}")
        return values


def _start(value: Any) -> Any:
    """A file by its absolute path: what names it may be read in another folder."""
    start = {"true": "published", "false": "none"}.get(str(value).lower(), value)
    return written_down(start) if isinstance(start, str) and _is_file(start) else start


def _is_file(start: str) -> bool:
    return start not in ("none", "published") and not start.startswith("models:/")


def _bounded(default: Any, description: str, **bounds: Any) -> Any:
    """A field whose description ends with its bounds, which are as pydantic takes them."""
    return Field(
        default=default, description=f"{description.rstrip('.')} ({within(bounds)}).", **bounds
    )


def _limit(value: Any) -> int | float:
    """As Lightning takes it: a number of batches, or as a float the fraction of all."""
    with suppress(ValueError):
        text = str(value)
        number = float(text) if "." in text else int(text)
        if (0 < number <= 1) if isinstance(number, float) else number >= 1:
            return number
    raise ValueError("must be a whole number from 1 on, or a fraction of all, as 0.25")


Limit = Annotated[int | float, BeforeValidator(_limit)] | None


def limited(n: int, limit: int | float | None) -> int:
    """How many of n batches a limit leaves, as Lightning counts them."""
    if limit is None:
        return n
    return int(n * limit) if isinstance(limit, float) else min(n, limit)


class ModelSection(_Section):
    """The network."""

    arch: str = Field(default="resnet18", description="Architecture, as in LENS_ARCHS.")
    model_type: Literal["single", "ensemble"] = Field(
        default="single", description="`ensemble` trains several architectures together."
    )
    architectures: tuple[str, ...] = Field(
        default=("resnet18", "resnet34", "vit_b_16"),
        description="Members of an ensemble that is trained together.",
    )
    ensemble_strategy: Together = Field(
        default="uncertainty_weighted",
        description="How `LitEnsembleSystem.predict` fuses the members; training and its metrics "
        "take their mean.",
    )
    pretrained: Annotated[str, BeforeValidator(_start)] = Field(
        default="none",
        description="Weights to start from: `none`, `published` (or true), a file, or a registered "
        "model of ours, as `models:/lens_ensemble@champion`.",
    )
    dropout_rate: float = _bounded(
        default=0.3, **BOUNDS["dropout_rate"], description="Dropout in the head."
    )
    compile_model: bool = Field(default=False, description="Compile the network; worth it on GPUs.")


class TrainingSection(_Section):
    """The optimisation."""

    epochs: int = _bounded(default=30, ge=1, le=10_000, description="Passes over the training set.")
    batch_size: int = _bounded(
        default=64, ge=2, le=65_536, description="Cutouts a step, on each device."
    )
    find_batch_size: bool = Field(
        default=False, description="Halve the batch size where memory is short, and begin again."
    )
    learning_rate: float = _bounded(
        default=1e-3, **BOUNDS["learning_rate"], description="Peak of the schedule."
    )
    weight_decay: float = _bounded(
        default=1e-2,
        **BOUNDS["weight_decay"],
        description="AdamW's, of layers' weights; none of biases, norms, tokens and positions.",
    )
    schedule: Schedule = Field(
        default="cosine", description="Of the learning rate, after its warm-up."
    )
    warmup: float = _bounded(
        default=0.1,
        **BOUNDS["warmup"],
        description="Fraction of all steps in which the rate rises.",
    )
    decay: float = _bounded(
        default=0.1, **BOUNDS["decay"], description="Factor of a `step`, or at a `plateau`."
    )
    decay_epochs: int = _bounded(
        default=10,
        **BOUNDS["decay_epochs"],
        description="Epochs of a `step`, or without gain before a `plateau`.",
    )
    loss: Loss = Field(default="bce", description="Binary cross-entropy, or the focal loss.")
    focal_gamma: float = _bounded(
        default=2.0,
        **BOUNDS["focal_gamma"],
        description="How much the focal loss leaves easy cutouts out.",
    )
    balance: bool = Field(
        default=True, description="Weigh lenses by non-lenses / lenses in the training set."
    )
    label_smoothing: float = _bounded(
        default=0.0, **BOUNDS["label_smoothing"], description="Moves labels by half of it."
    )
    augment: bool = Field(default=True, description="Turn and flip cutouts at random.")
    shift: float = _bounded(
        default=0.0, **BOUNDS["shift"], description="Cutouts are moved by up to so many pixels."
    )
    noise: float = _bounded(
        default=0.0, **BOUNDS["noise"], description="And get up to so much more noise, in sigma."
    )
    gradient_clip: float = _bounded(
        default=0.0, ge=0, description="Largest norm of the gradient; 0 does not clip."
    )
    accumulate_grad_batches: int = _bounded(
        default=1, ge=1, le=4096, description="Batches of a step of the optimiser."
    )
    ema: float = _bounded(
        default=0.0,
        ge=0,
        lt=1,
        description="Decay of a moving average of the weights, which is validated and kept in "
        "their place; after t steps no more than (1 + t) / (10 + t). 0: none.",
    )
    monitor: Monitor = Field(
        default="val/tpr_at_fpr_1e-2",
        description="The best epoch is the one where this is highest (or the loss lowest); of "
        "equal ones, that with the lowest val/loss. Where the validation set has too few "
        "non-lenses for a true positive rate at so small a false positive rate, it is the one at "
        "the smallest that allows ten false positives, or else one, or else val/auroc.",
    )
    save_top_k: int = _bounded(
        default=3, ge=1, le=100, description="Checkpoints of so many best epochs are kept."
    )
    patience: int = _bounded(
        default=0, ge=0, description="Stop after so many epochs without gain; 0: never."
    )
    min_delta: float = _bounded(default=1e-4, ge=0, description="What counts as a gain.")
    save_every_n_steps: int = _bounded(
        default=0, ge=0, description="Steps between writings of last.ckpt; 0: every minute."
    )
    fast_dev_run: bool = Field(default=False, description="One batch of each kind, as a trial.")
    limit_train_batches: Limit = Field(
        default=None,
        description="Batches of an epoch, or the fraction of them, as 0.25; by default all.",
    )
    limit_val_batches: Limit = Field(
        default=None,
        description="Batches of a validation, or the fraction of them; by default all.",
    )
    loggers: tuple[LoggerName, ...] = Field(
        default=("csv",), description="csv (always), tensorboard, wandb, mlflow."
    )
    seed: int = _bounded(
        default=0, ge=0, lt=2**32, description="Of weights, order and augmentation."
    )


class HardwareSection(_Section):
    """Where it runs."""

    accelerator: Literal["auto", "cpu", "gpu"] = Field(
        default="auto", description="`auto` takes an NVIDIA or AMD GPU where there is one."
    )
    devices: int = _bounded(default=1, ge=1, le=1024, description="Devices to train on.")
    exclusive: bool = Field(
        default=True,
        description="Wait for GPUs that no other training of this host has which shares its "
        "temporary folder.",
    )
    strategy: Literal["auto", "ddp"] = Field(
        default="auto", description="How devices share the work; `auto` is ddp where there are two."
    )
    precision: Precision = Field(
        default="auto", description="`auto`: bf16 or fp16 on a GPU by what it has, else 32-true."
    )
    deterministic: bool = Field(
        default=False,
        description="The same weights bit for bit on a GPU, too, which is slower so.",
    )
    channels_last: bool = Field(
        default=False, description="The layout of images that convolutions prefer."
    )


class DataSection(_Section):
    """How batches are read, and of which cutouts."""

    data_root: str | None = Field(
        default=None,
        description="Shards, a processed dataset, a catalogue; by default the newest shards.",
    )
    use_webdataset: bool = Field(default=False, description="Read the tars of the URLs instead.")
    train_urls: str | None = Field(default=None, description="Tars, with braces.")
    val_urls: str | None = Field(default=None, description="Tars, with braces.")
    test_urls: str | None = Field(
        default=None, description="Tars, with braces, to test on what was trained."
    )
    image_size: int | None = _bounded(
        default=None,
        **BOUNDS["image_size"],
        description="The central square to keep, in pixels; by default all of shards and datasets, "
        "64 of a catalogue",
    )
    num_workers: int = _bounded(
        default=0, ge=0, le=256, description="Loader processes; 0 reads in the training process."
    )
    cache_dir: str | None = Field(default=None, description="Where remote shards are kept.")
    bagging: float = _bounded(
        default=1.0,
        gt=0,
        le=1,
        description="The fraction of the training groups to train on, drawn by the seed: networks "
        "that shall differ need other seeds",
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
            wrong = first_wrong(problem)
            path = ".".join(wrong.place)
            said = wrong.said
            if wrong.unknown:
                *section, name = wrong.place
                written_out = ".".join([*section, ABBREVIATED.get(name, name)])
                said = no_such_key(written_out, cls._keys())
            raise InputError(": ".join(filter(None, (source, path, said)))) from None

    @classmethod
    def _keys(cls) -> list[str]:
        """The sections, and all keys within them."""
        within = [
            f"{section}.{field}"
            for section, info in cls.model_fields.items()
            for field in info.annotation.model_fields  # type: ignore[union-attr]
        ]
        return [*cls.model_fields, *within]

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.training.find_batch_size and self.hardware.devices > 1:
            raise ValueError("training.find_batch_size: goes with one device alone")
        together, chosen = self.together, self.model
        if not together and chosen.architectures != ModelSection().architectures:
            raise ValueError(
                "model.architectures: is for model.model_type ensemble; one network is model.arch"
            )
        if together and chosen.arch != ModelSection().arch:
            raise ValueError(
                "model.arch: is for model.model_type single; an ensemble's are model.architectures"
            )
        if together and chosen.pretrained.startswith("models:/"):
            raise ValueError("model.pretrained: a registered member is the start of one network")
        if together:
            parse_members(",".join(chosen.architectures), "model.architectures")
        else:
            parse_members(f"one={chosen.arch}", "model.arch")
        return self

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The configuration in a YAML file; a section whose lines are all comments is its defaults.
        Raises InputError, naming the file, as `parse` does."""
        return cls.parse(read_yaml(Path(path)), str(path))

    def with_changes(self, changes: Mapping[str, Mapping[str, Any]], source: str) -> Self:
        """This one with other values, {section: {field: value}}. Raises InputError as `parse`."""
        values = self.model_dump()
        for section, fields in changes.items():
            if isinstance(values.get(section), dict) and isinstance(fields, Mapping):
                values[section] |= fields
            else:
                values[section] = fields
        return self.parse(values, source)

    def _without(self, names: set[tuple[str, str]]) -> dict[str, dict[str, Any]]:
        return {
            section: {name: value for name, value in fields.items() if (section, name) not in names}
            for section, fields in self.model_dump().items()
        }

    def differences(self, now: "TrainConfig") -> list[str]:
        """`section.field (value, now another)` of what decides the weights and is not the same; the
        weights to start from are not compared, see `start`."""
        return [
            f"{section}.{name} ({before!r}, now {value!r})"
            for section, fields in now.of_weights.items()
            for name, value in fields.items()
            # A limit of 1 is one batch, and of 1.0 all of them.
            if ((before := self.of_weights[section][name]), type(before)) != (value, type(value))
            and (section, name) != ("model", "pretrained")
        ]

    @property
    def together(self) -> bool:
        """Whether several networks are trained as one system."""
        return self.model.model_type == "ensemble"

    @property
    def known_before(self) -> dict[str, dict[str, Any]]:
        """The values by section, but for a batch size that training has still to find."""
        found = {"training": {"batch_size"}} if self.training.find_batch_size else None
        return self.model_dump(exclude=found)

    @property
    def of_weights(self) -> dict[str, dict[str, Any]]:
        """The values by section that decide the weights: a training goes on with the same."""
        return self._without(UNDECIDING | BESIDES)

    @property
    def deciding(self) -> dict[str, dict[str, Any]]:
        """The values by section, but for those that decide nothing that a training leaves; in place
        of a file of weights to start from its sha256: it may be another by now."""
        values = self._without(UNDECIDING)
        values["model"] = {**values["model"], "pretrained": self.start}
        return values

    @property
    def starts_from_a_file(self) -> bool:
        return _is_file(self.model.pretrained)

    @property
    def start(self) -> str:
        """The weights to start from: sha256 of a file, else `none`, `published` or the model."""
        file = Path(self.model.pretrained)
        known = self.starts_from_a_file and file.is_file()
        return file_sha256(file) if known else self.model.pretrained

    @property
    def yaml(self) -> str:
        """As `read` takes it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def in_a_line(values: Mapping[str, Any]) -> str:
    """Values as YAML, in one line."""
    text = yaml.safe_dump(
        dict(values), default_flow_style=True, sort_keys=False, width=float("inf")
    )
    return str(text).strip()
