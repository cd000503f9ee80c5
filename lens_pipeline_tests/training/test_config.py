"""The settings of a training."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml

from lens_pipeline.errors import InputError
from lens_pipeline.training.config import TrainConfig
from lens_pipeline.training.flags import add_flags, changes
from lens_pipeline_tests.training.small import small_config


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"training": {"epoch": 3}}, "training.epoch: .*did you mean training.epochs"),
        ({"epochs": 3}, "file: epochs: .*did you mean training.epochs"),
        ({"training": {"lr": 3}}, "training.lr: .*did you mean training.learning_rate"),
        ({"model": {"batchsize": 3}}, "model.batchsize: .*did you mean training.batch_size"),
        ({"trainings": {}}, "file: trainings: .*did you mean training?"),
        ({"training": {"betas": 3}}, "training.betas: there is no such key; there are epochs, "),
        ({"training": {"learning_rate": 2}}, "training.learning_rate: .*less than or equal to 1"),
        ({"training": {"monitor": "auroc"}}, "training.monitor: .*did you mean val/auroc?"),
        ({"training": {"schedule": "cosin"}}, "training.schedule: .*did you mean cosine?"),
        ({"training": {"min_delta": float("inf")}}, "training.min_delta: .*finite number"),
        ({"training": {"epochs": True}}, "training: epochs: must be a number, and is true"),
        ({"data": {"image_size": False}}, "data: image_size: must be a number, and is false"),
        ({"model": {"pretrained": 3}}, "model.pretrained: .*valid string"),
        (
            {"training": {"find_batch_size": True}, "hardware": {"devices": 2}},
            "file: training.find_batch_size: goes with one device alone",
        ),
        (
            {"model": {"model_type": "ensemble", "pretrained": "models:/lens_ensemble@champion"}},
            "file: model.pretrained: a registered member is the start of one network",
        ),
        (
            {"model": {"architectures": ["resnet18", "lastro"]}},
            "file: model.architectures: is for model.model_type ensemble; one network is",
        ),
        (
            {"model": {"model_type": "ensemble", "arch": "lastro"}},
            "file: model.arch: is for model.model_type single; an ensemble's are",
        ),
        ({"model": {"arch": "resnet81"}}, "file: model.arch: 'resnet81' is not .*resnet18"),
        (
            {"model": {"model_type": "ensemble", "architectures": ["lastr"]}},
            "file: model.architectures: 'lastr' is not an architecture; did you mean lastro",
        ),
    ],
)
def test_settings_that_cannot_be_are_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        TrainConfig.parse(values, "file")


def test_each_setting_is_a_flag() -> None:
    """Of every field another value than its default, given by its flag, is that of the setting."""
    told: dict[str, Any] = {
        **{"model.arch": "lastro", "model.model_type": "ensemble", "model.pretrained": "published"},
        **{"model.architectures": "lastro,deeplens", "model.ensemble_strategy": "mean"},
        **{"training.schedule": "step", "training.loss": "focal", "training.monitor": "val/loss"},
        **{"training.limit_train_batches": "0.5", "training.limit_val_batches": "3"},
        **{"training.loggers": "csv,wandb", "hardware.accelerator": "cpu"},
        **{"hardware.strategy": "ddp", "hardware.precision": "bf16-mixed"},
        **{"data.image_size": "48"},
        **{f"data.{name}": f"/{name}" for name in ("data_root", "cache_dir")},
        **{f"data.{name}_urls": f"/{name}.tar" for name in ("train", "val", "test")},
    }
    parser = argparse.ArgumentParser()
    add_flags(parser)
    for section, info in TrainConfig.model_fields.items():
        kind: Any = info.annotation
        for name, field in kind.model_fields.items():
            key, default = f"{section}.{name}", field.default
            flag = "--archs" if name == "architectures" else f"--{name.replace('_', '-')}"
            if isinstance(default, bool):
                words = [f"--no-{flag[2:]}" if default else flag]
            elif key in told:
                words = [flag, told[key]]
            else:
                other = default / 2 or 0.25 if isinstance(default, float) else default + 2
                words = [flag, str(other)]
            found = changes(parser.parse_args(words))
            assert {part: list(said) for part, said in found.items()} == {section: [name]}
            read = getattr(kind.model_validate(found[section]), name)
            assert read != default, key
            shown = ",".join(read) if isinstance(read, tuple) else str(read)
            assert isinstance(default, bool) or shown == words[1], key


def test_each_bound_is_said_where_its_setting_is_described() -> None:
    bounded = 0
    for section in TrainConfig.model_fields.values():
        for name, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            for bound in field.metadata:
                for value in (getattr(bound, side, None) for side in ("ge", "gt", "le", "lt")):
                    bounded += value is not None
                    assert value is None or f"{value:,}" in str(field.description), name
    assert bounded > 40


def test_what_decides_nothing_makes_no_other_training() -> None:
    config = small_config()
    same = {"data": {"num_workers": 3}, "hardware": {"exclusive": False}}
    assert config.with_changes(same, "test").deciding == config.deciding
    assert config.differences(config.with_changes(same, "test")) == []
    other = config.with_changes({"training": {"save_top_k": 5}}, "test")
    assert other.deciding != config.deciding  # other files
    assert config.differences(other) == []  # and the same weights


def test_weights_to_start_from_decide_by_what_they_are(tmp_path: Path) -> None:
    """Not by where they lie: a file may be moved, or be replaced by another."""
    deciding = []
    for name, content in (("a.ckpt", b"one"), ("b.ckpt", b"one"), ("a.ckpt", b"other")):
        (tmp_path / name).write_bytes(content)
        start = {"model": {"pretrained": str(tmp_path / name)}}
        deciding.append(small_config().with_changes(start, "test").deciding)
    assert deciding[0] == deciding[1]
    assert deciding[0] != deciding[2]


def test_a_file_that_is_called_as_no_weights_are_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("none", "published"):
        Path(name).touch()
        changed = small_config().with_changes({"model": {"pretrained": name}}, "test")
        assert changed.start == name


@pytest.mark.parametrize("limit", [0, 0.0, 1.5, -1, True, "many", [1]])
def test_a_limit_is_a_number_of_batches_or_a_fraction(limit: object) -> None:
    said = "file: training.limit_val_batches: must be a whole number from 1 on, or a fraction"
    with pytest.raises(InputError, match=said):
        TrainConfig.parse({"training": {"limit_val_batches": limit}}, "file")


@pytest.mark.parametrize(
    ("said", "meant"), [(32, "32-true"), ("16", "16-mixed"), ("bf16", "bf16-mixed")]
)
def test_a_precision_may_be_said_as_lightning_takes_it(said: object, meant: str) -> None:
    parsed = TrainConfig.parse({"hardware": {"precision": said}}, "file")
    assert parsed.hardware.precision == meant


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        *(("true", "published"), (False, "none"), ("models:/a/1", "models:/a/1")),
        ("w.ckpt", str(Path.cwd() / "w.ckpt")),  # another process may have another folder
    ],
)
def test_pretrained_may_be_said_as_yaml_or_a_flag_says_it(said: object, meant: str) -> None:
    assert TrainConfig.parse({"model": {"pretrained": said}}, "test").model.pretrained == meant


def test_a_section_of_comments_alone_is_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model:\n  arch: lastro\ntraining:\n  # epochs: 3\n")
    assert TrainConfig.read(tmp_path / "a.yaml") == TrainConfig.parse(
        {"model": {"arch": "lastro"}}, "test"
    )


def test_settings_are_plain_yaml(tmp_path: Path) -> None:
    config = small_config(learning_rate=3e-4)
    assert TrainConfig.parse(yaml.safe_load(config.yaml), "test") == config
