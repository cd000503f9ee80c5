"""What a training learns from besides its settings: a folder goes on with the same alone."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from lens_pipeline.errors import InputError
from lens_pipeline.files import digest
from lens_pipeline.shards.datamodule import CutoutModule
from lens_pipeline.training.config import TrainConfig
from lens_pipeline.training.member import INPUTS

START = "weights to start from"


def hashed_inputs(config: TrainConfig, data: CutoutModule) -> dict[str, str]:
    """{what a training is made of, besides its settings: what tells it from another}."""
    return {
        "cutouts": digest([data.content, asdict(data.format)]),
        "order or share of the cutouts": digest([data.seed, data.bagging]),
        START: config.start,
    }


def recorded_inputs(folder: Path) -> dict[str, str]:
    """The `hashed_inputs` that a folder was begun with. Raises InputError where an earlier version
    of this program has begun it."""
    path = folder / INPUTS
    if not path.exists():
        raise InputError(
            f"{folder}: an earlier version of lens_pipeline has begun it; name another folder"
        )
    recorded: dict[str, str] = json.loads(path.read_text())
    return recorded


def other_inputs(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names of those that are not as they were."""
    return [name for name, value in now.items() if before.get(name) != value]
