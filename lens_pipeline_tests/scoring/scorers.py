"""How surveys are scored in tests, and by what."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lens_pipeline.catalogue.cutout import CutoutError
from lens_pipeline.catalogue.dataset import CutoutFormat
from lens_pipeline.catalogue.table import read_catalogue
from lens_pipeline.cli import main
from lens_pipeline.ensemble.system import LensEnsemble
from lens_pipeline.scoring import parts
from lens_pipeline.scoring.parts import ScoredFile, score_to_file
from lens_pipeline.scoring.sources import CatalogueCutouts

BATCH, ROWS = 32, 128
N = 2 * ROWS + 44  # the last batch is not a whole one
EACH = 31  # row of a survey, from the first on, is no cutout


@contextmanager
def short_parts() -> Iterator[None]:
    """An eighth of the size that they have else, so that a survey of several is scored at once."""
    assert parts.ROWS / parts.BATCH == ROWS / BATCH
    with pytest.MonkeyPatch.context() as patch:
        for user in (
            *("ensemble.system", "scoring.parts", "scoring.score_tables"),
            "scoring.shard_cutouts",
        ):
            patch.setattr(f"lens_pipeline.{user}.BATCH", BATCH)
        patch.setattr(parts, "ROWS", ROWS)
        yield


def killed_after_a_part(arguments: list[str]) -> None:
    """A command that is killed when its first part is in place; in a process of its own."""
    parts.ScoredRows.put = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    with short_parts():
        main(arguments)


def interrupt(*_: object) -> None:
    """In the place of what a command is to be killed in."""
    raise KeyboardInterrupt


def command(home: Path, survey: Path, out: Path) -> list[str]:
    return ["predict", "--home", str(home), "--catalogue", str(survey), "--out", str(out)]


class Counting(LensEnsemble):
    """The same scores; `scored` has the number of cutouts of each batch."""

    @cached_property
    def scored(self) -> list[int]:
        return []

    def predict(self, images: np.ndarray) -> pd.DataFrame:
        self.scored.append(len(images))
        return super().predict(images)


class Stuttering(CatalogueCutouts):
    """A disk that fails for some rows; `asked` has the rows that were read."""

    fails: tuple[int, ...] = ()

    @cached_property
    def asked(self) -> list[int]:
        return []

    def read(self, form: CutoutFormat, rows: np.ndarray) -> Iterator[np.ndarray | CutoutError]:
        self.asked.extend(rows.tolist())
        for row, cutout in zip(rows.tolist(), super().read(form, rows), strict=True):
            fails = row in type(self).fails
            yield CutoutError("the file cannot be read (Input/output error)") if fails else cutout


def scored(
    ensemble: LensEnsemble, table: pd.DataFrame, out: Path, **how: Any
) -> tuple[ScoredFile, int]:
    """(what `score_to_file` says, how many cutouts went through the ensemble)"""
    before = sum(ensemble.scored) if isinstance(ensemble, Counting) else 0
    catalogue = out.parent / "catalogue.parquet"
    table.to_parquet(catalogue)
    source = CatalogueCutouts(read_catalogue(catalogue), pad=how.pop("pad", False))
    found = score_to_file(ensemble, source, out, model="mine", **how)
    return found, sum(ensemble.scored) - before if isinstance(ensemble, Counting) else 0
