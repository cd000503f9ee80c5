"""What every benchmark shares: its options, its table, its targets."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

Row = dict[str, Any]
# In memory where there is such a folder, so that the pace of a shared disk does not enter.
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None


@dataclass(frozen=True)
class Target:
    """A bar: the value must be at least, or at most, so much."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool:
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)

    def as_json(self) -> Row:
        bounds = {"at_least": self.at_least, "at_most": self.at_most}
        given = {name: bound for name, bound in bounds.items() if bound is not None}
        return {"name": self.name, "value": self.value, **given, "met": self.met}


def options(description: str | None, n: int | None = None) -> argparse.Namespace:
    """The command line of a benchmark; one of a size (n by default) may be made smaller."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write rows and targets to this file")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    if n is not None:
        parser.add_argument("--n", type=int, default=n, help="how many are measured")
        parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def report(
    arguments: argparse.Namespace, measure: Callable[[], tuple[Sequence[Row], Sequence[Target]]]
) -> None:
    """Measure, print the table and the targets, write the JSON file, and exit."""
    rows, targets = measure()
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:,.3g}".format))
    for target in targets:
        bound = f">= {target.at_least}" if target.at_least is not None else f"<= {target.at_most}"
        met = "met" if target.met else "MISSED"
        print(f"{target.name}: {target.value:.3g} (target {bound}): {met}")
    if arguments.json:
        values = {"rows": list(rows), "targets": [target.as_json() for target in targets]}
        arguments.json.write_text(json.dumps(values, indent=1) + "\n")
    sys.exit(1 if arguments.check and not all(target.met for target in targets) else 0)
