"""What may be chosen by name, and between which bounds numbers are, in settings and in the library
alike. Knowing it needs nothing."""

import operator
from collections.abc import Mapping
from typing import Literal

from lens_pipeline.errors import InputError

Schedule = Literal["cosine", "step", "plateau", "constant"]  # of the learning rate
Loss = Literal["bce", "focal"]
Together = Literal["mean", "uncertainty_weighted"]  # the fusion of what is trained together
Strategy = Literal["mean", "uncertainty_weighted", "stacking", "bayesian", "single"]  # of fusion
Choice = Literal["best", Strategy]
Method = Literal["platt", "temperature", "isotonic"]  # of calibration

BOUNDS: Mapping[str, Mapping[str, float]] = {  # as pydantic names them
    "dropout_rate": {"ge": 0, "lt": 1},
    "learning_rate": {"gt": 0, "le": 1},
    "weight_decay": {"ge": 0, "le": 1},
    "warmup": {"ge": 0, "lt": 1},
    "decay": {"gt": 0, "lt": 1},
    "decay_epochs": {"ge": 1},
    "pos_weight": {"gt": 0},
    "focal_gamma": {"ge": 0, "le": 10},
    "label_smoothing": {"ge": 0, "lt": 0.5},
    "shift": {"ge": 0, "le": 16},
    "noise": {"ge": 0, "le": 2},
    "image_size": {"ge": 16, "le": 2048},  # of what a network takes
}


def within(bounds: Mapping[str, float]) -> str:
    """`0 to below 1`, `at least 1`."""
    words = {"gt": "above {:,}", "ge": "{:,}", "lt": "below {:,}", "le": "{:,}"}
    said = [words[name].format(bound) for name, bound in bounds.items()]
    return f"at least {said[0]}" if [*bounds] == ["ge"] else " to ".join(said)


def check_bounds(name: str, value: float, known_as: str | None = None) -> None:
    """Raises InputError for a number outside of its bounds; known_as: its name in BOUNDS, if it is
    another."""
    bounds = BOUNDS[known_as or name]
    if not all(getattr(operator, how)(value, bound) for how, bound in bounds.items()):
        raise InputError(f"{name} {value!r}: must be {within(bounds)}")
