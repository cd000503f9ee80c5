"""What an ensemble's folder says of it. Reading it needs no torch."""

import json
from pathlib import Path
from typing import Any

from lens_pipeline.errors import InputError

DESCRIPTION = "ensemble.json"
GROUPS = "groups.json"
SCHEMA = 2


def read_description(folder: Path) -> dict[str, Any]:
    """`ensemble.json`, see `assemble`.

    Raises InputError where the folder holds none, or one that another version has made.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; {folder} is not an ensemble")
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        schema = facts["schema"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: is damaged; make the ensemble again") from None
    if schema != SCHEMA:
        raise InputError(
            f"{path}: has schema {schema}, this version reads {SCHEMA}; make the ensemble again "
            "with `lens-pipeline run`"
        )
    return facts


def read_groups(folder: Path) -> frozenset[str]:
    """The groups that the members of the ensemble in a folder have trained or validated on."""
    return frozenset(json.loads((folder / GROUPS).read_text()))


def groups_behind(weights: str) -> frozenset[str]:
    """The groups that weights which a training started from have learnt from: where they are a
    member of an ensemble, its own; else none are known."""
    folder = Path(weights).parent.parent
    return read_groups(folder) if (folder / GROUPS).is_file() else frozenset()
