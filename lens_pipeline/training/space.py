"""What is tuned: settings of a training, and the values that each may take."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lens_pipeline.errors import InputError
from lens_pipeline.settings_files import first_wrong, no_such_key
from lens_pipeline.training.config import TrainConfig

Pruner = Literal["median", "hyperband", "none"]
# What makes trials of one study differ, and lets the same validation compare them.
TUNABLE = {
    "model": ("arch", "pretrained", "dropout_rate"),
    "training": (
        *("batch_size", "learning_rate", "weight_decay", "schedule", "warmup", "decay"),
        *("decay_epochs", "loss", "focal_gamma", "balance", "label_smoothing", "augment", "shift"),
        *("noise", "gradient_clip", "accumulate_grad_batches", "ema"),
    ),
}
OF_THE_LOSS = ("training.loss", "training.focal_gamma", "training.balance")
DEFAULT_SPACE: Mapping[str, Mapping[str, Any]] = {
    "model": {"dropout_rate": {"low": 0.0, "high": 0.5}},
    "training": {
        "learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
        "weight_decay": {"low": 1e-4, "high": 0.3, "log": True},
        "batch_size": [32, 64, 128],
    },
}


class Range(BaseModel):
    """All values from `low` to `high`, both among them; with `log`, evenly by their logarithm."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: Annotated[float, Field(allow_inf_nan=False)]
    high: Annotated[float, Field(allow_inf_nan=False)]
    log: bool = False


@dataclass(frozen=True)
class SearchSpace:
    """settings: {"training.learning_rate": Range(...), "training.batch_size": (32, 64)}; whole:
    those of them whose ranges hold whole numbers."""

    settings: Mapping[str, Range | tuple[Any, ...]]
    whole: frozenset[str]

    @classmethod
    def parse(cls, values: Mapping[str, Any], base: TrainConfig, source: str) -> Self:
        """From {section: {setting: {"low": ..., "high": ..., "log": ...} or [choices]}}.

        `source`, a file or an option, is named in errors; `base` is what the trials change. Raises
        InputError for a setting that is not tuned, and for a value that it cannot take.
        """
        settings: dict[str, Range | tuple[Any, ...]] = {}
        whole = set()
        for section, fields in values.items():
            if not isinstance(fields, Mapping):
                raise InputError(f"{source}: {section}: must hold settings and their values")
            for field, given in fields.items():
                name = f"{section}.{field}"
                _check_tunable(section, field, source)
                how = _values(name, given, source)
                ends = (how.low, how.high) if isinstance(how, Range) else how
                changed = [base.with_changes({section: {field: v}}, source) for v in ends]
                # As the configuration has them: `1e-4` is text for YAML.
                choices = tuple(getattr(getattr(c, section), field) for c in changed)
                settings[name] = how if isinstance(how, Range) else choices
                kind = type(getattr(getattr(base, section), field))
                if kind is bool and isinstance(settings[name], Range):
                    raise InputError(f"{source}: {name}: must list what to choose from")
                if kind is int:
                    whole.add(name)
        if not settings:
            raise InputError(f"{source}: names no setting to tune")
        space = cls(settings, frozenset(whole))
        space._check_judged(base, source)
        return space

    def _check_judged(self, base: TrainConfig, source: str) -> None:
        """Raises InputError where the trials could not be compared."""
        starts = self.settings.get("model.pretrained", ())
        if any(str(start).startswith("models:/") for start in starts):
            raise InputError(
                f"{source}: model.pretrained: a registered model is the start of all trials, or of "
                "none; give it with --pretrained"
            )
        of_the_loss = [name for name in OF_THE_LOSS if name in self.settings]
        if base.training.monitor == "val/loss" and of_the_loss:
            raise InputError(
                f"{source}: {of_the_loss[0]}: with it val/loss means another thing in each trial; "
                "set training.monitor to another metric"
            )
        limit = base.training.limit_val_batches
        all_of_them = limit is None or (isinstance(limit, float) and limit == 1)
        if not all_of_them and "training.batch_size" in self.settings:
            raise InputError(
                f"{source}: training.batch_size: with training.limit_val_batches each trial would "
                "be judged by other cutouts; leave one of them out"
            )

    @property
    def scales(self) -> dict[str, str]:
        """Of each setting: `choice`, or `linear` or `log` for a range."""
        return {
            name: ("log" if how.log else "linear") if isinstance(how, Range) else "choice"
            for name, how in self.settings.items()
        }

    @property
    def yaml(self) -> str:
        """As `--space` takes it."""
        return yaml.safe_dump(self.as_values(), sort_keys=False)

    def as_values(self) -> dict[str, dict[str, Any]]:
        """As `parse` takes it."""
        values: dict[str, dict[str, Any]] = {}
        for name, how in self.settings.items():
            section, field = name.split(".")
            given = how.model_dump() if isinstance(how, Range) else list(how)
            values.setdefault(section, {})[field] = given
        return values


def _check_tunable(section: str, field: str, source: str) -> None:
    if field in TUNABLE.get(section, ()):
        return
    key = f"{section}.{field}"
    tunable = [f"{s}.{f}" for s, fields in TUNABLE.items() for f in fields]
    part = TrainConfig.model_fields.get(section)
    if part is None or field not in part.annotation.model_fields:  # type: ignore[union-attr]
        raise InputError(f"{source}: {key}: {no_such_key(key, tunable)}")
    raise InputError(f"{source}: {key}: is not tuned; these are: {', '.join(tunable)}")


def _values(name: str, given: Any, source: str) -> Range | tuple[Any, ...]:
    if isinstance(given, list | tuple):
        if not given or not all(isinstance(c, str | int | float | bool) for c in given):
            raise InputError(f"{source}: {name}: must list numbers or names to choose from")
        return tuple(given)
    try:
        found = Range.model_validate(given)
    except ValidationError as problem:
        place, said, _ = first_wrong(problem)
        where = ".".join((name, *place))
        raise InputError(
            f"{source}: {where}: {said}; a range is {{low: 1, high: 2}}, with log: true by its "
            "logarithm, and choices are a list"
        ) from None
    if not found.low < found.high or (found.log and found.low <= 0):
        least = "0 < low < high" if found.log else "low < high"
        raise InputError(f"{source}: {name}: {found.low:g} to {found.high:g} is not {least}")
    return found
