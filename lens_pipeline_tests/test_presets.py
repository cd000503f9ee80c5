"""What members are trained with: the preset, and on top of it the file of LENS_TRAINING."""

import sys
from pathlib import Path

import pytest

from lens_pipeline.errors import InputError
from lens_pipeline.presets import chosen_members, member_config
from lens_pipeline.settings import Settings
from lens_pipeline.training.config import TrainConfig


def _configs(file: Path, **settings: str) -> dict[str, TrainConfig]:
    found = Settings.load(training=str(file), **settings)
    return {member.name: member_config(found, member) for member in chosen_members(found)}


def test_a_file_sets_what_all_members_share_and_what_is_one_members_own(tmp_path: Path) -> None:
    file = tmp_path / "training.yaml"
    file.write_text(
        "training: {weight_decay: 3e-3, epochs: 11}\n"
        "b: {training: {epochs: 12}, model: {dropout_rate: 0.1}}\n"
    )
    before = Settings.load(archs="resnet18,b=lastro@3")
    configs = _configs(file, archs="resnet18,b=lastro@3")
    for member in chosen_members(before):
        own = member.name == "b"
        expected = member_config(before, member).with_changes(
            {
                "training": {"weight_decay": 3e-3, "epochs": 12 if own else 11},
                "model": {"dropout_rate": 0.1} if own else {},
            },
            "test",
        )
        assert configs[member.name] == expected


@pytest.mark.parametrize("architecture", ["timm:convnext_atto", "efficientnet_lite0"])
def test_an_extra_that_is_missing_is_told_before_anything_is_made(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    extra = architecture.partition(":")[0].partition("_")[0]
    said = rf"{architecture} needs the package timm; install lens-pipeline\[{extra}\]"
    with pytest.raises(InputError, match=said):
        chosen_members(Settings.load(archs=f"lastro,{architecture}"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training: {epoch: 3}", "training.yaml: training.epoch: .*did you mean training.epochs"),
        ("lastro: {training: {epochs: 0}}", "training.yaml: lastro: training.epochs: .*equal to 1"),
        ("lasto: {training: {epochs: 3}}", "lasto: is neither a section .*lastro"),
        ("lastro: 3", "training.yaml: lastro: must hold sections"),
        ("model: {arch: resnet18}", "training.yaml: model.arch: is decided by the asset graph"),
        ("data: {data_root: here}", "training.yaml: data.data_root: is decided by"),
        ("training: [", "training.yaml: is no YAML"),
        ("training: {epochs: 3}\ntraining: {seed: 1}", "is no YAML .*training is there twice"),
        ("training: {epochs: 2020-99-99}", "training.yaml: is no YAML .*month"),
        (None, "training.yaml: cannot be read"),
    ],
)
def test_a_file_that_cannot_be_followed_is_named(
    text: str | None, said: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "training.yaml").write_text(text)
    with pytest.raises(InputError, match=f"LENS_TRAINING: .*{said}"):
        _configs(tmp_path / "training.yaml", archs="lastro")


def test_sections_of_comments_alone_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "training.yaml"
    file.write_text("model:\nlastro:\n  training:\n    # epochs: 3\n  model: {dropout_rate: 0.1}\n")
    expected = {"model": {"dropout_rate": 0.1}}
    settings = Settings.load(archs="lastro")
    (member,) = chosen_members(settings)
    before = member_config(settings, member)
    assert _configs(file, archs="lastro") == {"lastro": before.with_changes(expected, "test")}


def test_no_member_is_called_as_a_section_of_its_settings() -> None:
    with pytest.raises(InputError, match="no member may be called training"):
        chosen_members(Settings.load(archs="training=lastro"))
