"""Settings that people write into YAML files, and what is wrong with them."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from lens_pipeline.errors import InputError, words_of


class Wrong(NamedTuple):
    """place: the keys that lead to it; said: what is wrong; unknown: there is no such key."""

    place: tuple[str, ...]
    said: str
    unknown: bool


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, without keys that have nothing behind them, as a section does
    whose lines are all comments. Raises InputError, naming the file, where there is none."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as problem:
        raise InputError(f"{path}: cannot be read ({problem.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise InputError(f"{path}: is no YAML ({words_of(problem)})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold keys and their values")
    return {key: value for key, value in values.items() if value is not None}


def first_wrong(problem: ValidationError) -> Wrong:
    """The first of what pydantic found."""
    first = problem.errors()[0]
    place = tuple(map(str, first["loc"]))
    said = first["msg"].removeprefix("Value error, ")
    return Wrong(place, said, first["type"] == "extra_forbidden")
