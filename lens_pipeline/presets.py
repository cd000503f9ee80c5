"""The three sizes of the main job, and the training settings that each gives a member."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lens_pipeline.models.names import Member, parse_members
from lens_pipeline.settings import Settings
from lens_pipeline.training.config import TrainConfig


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
    """Raises InputError where LENS_ARCHS is not valid."""
    return parse_members(settings.archs or chosen(settings).members)


def image_size(settings: Settings) -> int:
    return settings.image_size or chosen(settings).image_size


def member_config(settings: Settings, member: Member) -> TrainConfig:
    """What a member is trained with unless its run says otherwise."""
    preset = chosen(settings)
    return TrainConfig.model_validate(
        {
            "model": {"arch": member.architecture},
            "training": {
                "epochs": preset.epochs.get(member.architecture, preset.epochs_else),
                "batch_size": preset.batch_size,
                "seed": (settings.seed + member.seed) % 2**32,
            },
        }
    )
