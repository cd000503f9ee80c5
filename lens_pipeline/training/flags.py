"""Every field of a training configuration as a flag of a command line."""

import argparse
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from lens_pipeline.errors import InputError
from lens_pipeline.training.config import Limit, TrainConfig

OTHER_NAMES = {"architectures": "--archs"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """`--batch-size 64`, `--archs resnet18,vit_b_16`, `--compile-model`, ... by section."""
    groups: dict[str, Any] = {}
    for section, name, info in _fields():
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        how: dict[str, Any] = {"dest": f"{section}.{name}", "default": None}
        if info.annotation is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            how["metavar"] = _metavar(info)
        groups[section].add_argument(
            _flag(name), help=f"{info.description} [{_shown(info.default)}]", **how
        )


def changes(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What the flags say, {section: {field: value}}: `none`, where that is the default, sets
    what a file says aside."""
    found: dict[str, dict[str, Any]] = {}
    for section, name, info in _fields():
        value = getattr(options, f"{section}.{name}")
        if value == "":  # as of a variable of the shell that is not set
            raise InputError(f"{_flag(name)}: is given, and empty")
        if value == "none" and info.default is None:
            found.setdefault(section, {})[name] = None
        elif value is not None:
            if get_origin(info.annotation) is tuple:
                value = [part.strip() for part in value.split(",")]
            found.setdefault(section, {})[name] = value
    return found


def _fields() -> Iterator[tuple[str, str, FieldInfo]]:
    for section, info in TrainConfig.model_fields.items():
        for name, field in info.annotation.model_fields.items():  # type: ignore[union-attr]
            yield section, name, field


def _flag(name: str) -> str:
    return OTHER_NAMES.get(name, f"--{name.replace('_', '-')}")


def _metavar(info: FieldInfo) -> str:
    kind = info.annotation
    if get_origin(kind) is tuple:
        return "A,B"
    choices = get_args(kind)
    if choices and all(isinstance(choice, str) for choice in choices) and len(choices) < 5:
        return "|".join(choices)
    return "N" if kind in (int, int | None, Limit) else "X" if kind is float else "NAME"


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    return ",".join(default) if isinstance(default, tuple) else str(default).replace("%", "%%")
