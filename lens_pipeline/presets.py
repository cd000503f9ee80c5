"""The three sizes of the main job, and the settings that each member is trained with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lens_pipeline.errors import InputError
from lens_pipeline.models.names import Member, check_installed, parse_members
from lens_pipeline.settings import Settings
from lens_pipeline.settings_files import read_yaml
from lens_pipeline.training.config import TrainConfig

# What the asset graph decides, no file or form: that a member is one network, and which; and which
# cutouts it sees.
DECIDED = {
    "model": ("arch", "model_type", "architectures", "ensemble_strategy"),
    "training": ("loggers", "fast_dev_run"),
    "data": (
        *("data_root", "use_webdataset", "train_urls", "val_urls", "test_urls"),
        *("image_size", "cache_dir"),
    ),
}


@dataclass(frozen=True)
class Preset:
    """members: as in LENS_ARCHS; epochs: by architecture, else `epochs_else`."""

    n_cutouts: int
    image_size: int
    members: str
    batch_size: int
    epochs_else: int
    epochs: Mapping[str, int] = field(default_factory=dict)


PRESETS: Mapping[str, Preset] = {
    "tiny": Preset(200, 32, "light_transformer,lastro", 32, 1),
    "quick": Preset(
        4800,
        64,
        "resnet18,light_transformer,lastro",
        64,
        4,
        {"light_transformer": 8, "lastro": 8},
    ),
    "full": Preset(100_000, 64, "resnet18,resnet34,vit_b_16", 128, 30),
}


def chosen(settings: Settings) -> Preset:
    return PRESETS[settings.preset]


def chosen_members(settings: Settings) -> tuple[Member, ...]:
    """Raises InputError where LENS_ARCHS is not valid, or needs what is not installed."""
    members = parse_members(settings.archs or chosen(settings).members)
    check_installed(member.architecture for member in members)
    taken = [member.name for member in members if member.name in TrainConfig.model_fields]
    if taken:
        raise InputError(
            f"LENS_ARCHS: no member may be called {taken[0]}: settings have such a section"
        )
    return members


def image_size(settings: Settings) -> int:
    return settings.image_size or chosen(settings).image_size


def member_config(settings: Settings, member: Member) -> TrainConfig:
    """What a member is trained with unless its run says otherwise: as the preset, and then the file
    of LENS_TRAINING, say. Raises InputError where that is not valid."""
    preset = chosen(settings)
    config = TrainConfig.model_validate(
        {
            "model": {"arch": member.architecture},
            "training": {
                "epochs": preset.epochs.get(member.architecture, preset.epochs_else),
                "batch_size": preset.batch_size,
                "save_top_k": 1,  # the ensemble takes the best
                "seed": (settings.seed + member.seed) % 2**32,
            },
        }
    )
    if settings.training is None:
        return config
    try:
        values = read_yaml(Path(settings.training))
        shared = {name: value for name, value in values.items() if name in TrainConfig.model_fields}
        own = {name: value for name, value in values.items() if name not in shared}
        members = [one.name for one in chosen_members(settings)]
        for name in own.keys() - set(members):
            raise InputError(
                f"{settings.training}: {name}: is neither a section "
                f"({', '.join(TrainConfig.model_fields)}) nor a member ({', '.join(members)})"
            )
        for changes, source in (
            (shared, settings.training),
            (own.get(member.name) or {}, f"{settings.training}: {member.name}"),
        ):
            config = config.with_changes(left_open(changes, source), source)
    except InputError as problem:
        raise InputError(f"LENS_TRAINING: {problem}") from None
    return config


def left_open(changes: Any, source: str) -> Mapping[str, Mapping[str, Any]]:
    """The changes, {section: {field: value}}, as they are, without empty sections. Raises
    InputError, naming `source`, for what is no such mapping, and for what the asset graph
    decides."""
    if not isinstance(changes, Mapping):
        raise InputError(f"{source}: must hold sections ({', '.join(TrainConfig.model_fields)})")
    for section, fields in changes.items():
        for name in fields if isinstance(fields, Mapping) else ():
            if name in DECIDED.get(section, ()):
                raise InputError(
                    f"{source}: {section}.{name}: is decided by the asset graph (LENS_ARCHS, the "
                    "cutouts, MLflow); leave it out"
                )
    return {section: fields for section, fields in changes.items() if fields is not None}
