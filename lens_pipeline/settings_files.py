"""Settings that people write into YAML files, and what is wrong with them."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError
from yaml.constructor import ConstructorError

from lens_pipeline.errors import InputError, words_of

# What pydantic calls the kinds that a value may be of, among the keys that lead to it.
KIND = re.compile(r"(constrained-)?(str|int|float|bool|none)|(tuple|list|dict|literal)\[.*\]")
MERGE = "tag:yaml.org,2002:merge"  # `<<`, of which there may be several
SHAPES = {
    **dict.fromkeys(("tuple_type", "list_type"), "must be a list"),
    **dict.fromkeys(
        ("dict_type", "model_type", "model_attributes_type"), "must hold keys and their values"
    ),
}


class Wrong(NamedTuple):
    """place: the keys that lead to it; said: what is wrong; unknown: there is no such key."""

    place: tuple[str, ...]
    said: str
    unknown: bool


class _Loader(yaml.SafeLoader):
    """As YAML has it, and unlike PyYAML, a key stands once in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                if key.value in seen:
                    raise ConstructorError(
                        None, None, f"{key.value} is there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """What a text says. Raises ValueError, with what is wrong, for one that is no YAML."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as problem:  # the latter of a 31st of June
        raise ValueError(words_of(problem)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, without keys that have nothing behind them, as a section does
    whose lines are all comments. Raises InputError, naming the file, where there is none."""
    try:
        values = parse_yaml(path.read_text())
    except OSError as problem:
        raise InputError(f"{path}: cannot be read ({problem.strerror})") from None
    except ValueError as problem:
        raise InputError(f"{path}: is no YAML ({words_of(problem)})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold keys and their values")
    return {key: value for key, value in values.items() if value is not None}


def no_such_key(key: str, known: Iterable[str]) -> str:
    """What to say of a key that is none of the known ones, all with their sections: the one that is
    most like it by its name, wherever it stands, or those beside it where none is like it."""
    section, _, name = key.rpartition(".")
    names = {one: one.rpartition(".")[2] for one in known}
    near = difflib.get_close_matches(name, names.values(), n=1)
    beside = [one for one in names if one.rpartition(".")[0] == section]
    if near:
        same = [one for one in names if names[one] == near[0]]
        meant = next((one for one in same if one in beside), same[0])
        return f"there is no such key; did you mean {meant}?"
    return f"there is no such key; there are {', '.join(names[one] for one in beside)}"


def first_wrong(problem: ValidationError) -> Wrong:
    """The first of what pydantic found. Of what may be of several kinds it finds something wrong
    with each: what it says of the one that was gone into furthest was meant."""
    found = problem.errors()
    first = found[0]
    for depth, step in enumerate(first["loc"]):
        if KIND.fullmatch(str(step)):
            alike = [one for one in found if one["loc"][:depth] == first["loc"][:depth]]
            first = max(alike, key=lambda one: len(one["loc"]))
            break
    place = tuple(str(step) for step in first["loc"] if not KIND.fullmatch(str(step)))
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "literal_error":
        names = {one.rpartition("/")[2]: one for one in re.findall("'(.*?)'", said)}
        if near := difflib.get_close_matches(str(first["input"]).rpartition("/")[2], names, n=1):
            said += f"; did you mean {names[near[0]]}?"
    if first["type"] == "union_tag_not_found":
        said = f"must hold keys and their values, {first['ctx']['discriminator']} among them"
    return Wrong(place, SHAPES.get(first["type"], said), first["type"] == "extra_forbidden")
