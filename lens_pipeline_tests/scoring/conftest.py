"""A survey, and what commands leave of it that were stopped or were not."""

import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lens_pipeline.cli import main
from lens_pipeline.ensemble.learnt import LEARNT_PIXELS
from lens_pipeline.ensemble.system import LensEnsemble, load_ensemble
from lens_pipeline_tests.scoring.scorers import (
    EACH,
    Counting,
    N,
    command,
    killed_after_a_part,
    short_parts,
)
from lens_pipeline_tests.training.killed import forked


@pytest.fixture(scope="package", autouse=True)
def _short_parts() -> Iterator[None]:
    with short_parts():
        yield


@pytest.fixture(scope="session")
def survey(simulated_catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalogue of N rows, some of which are no cutouts; their images come again and again."""
    table = pd.read_parquet(simulated_catalogue)
    table["path"] = [str(simulated_catalogue.parent / path) for path in table["path"]]
    table = pd.concat([table] * (1 + N // len(table)), ignore_index=True)[:N]
    table["id"] = [f"J{number:06d}" for number in range(N)]
    table.loc[::EACH, "path"] = "missing.fits"
    # In the first part this column is empty.
    table["note"] = [None] * (N - 1) + ["the last"]
    table["corner"] = [[number, 2 * number] for number in range(N)]
    path = tmp_path_factory.mktemp("survey") / "survey.parquet"
    table.to_parquet(path, index=False)
    return path


@pytest.fixture(scope="package")
def undisturbed(
    home: Path, survey: Path, tmp_path_factory: pytest.TempPathFactory, _short_parts: None
) -> Path:
    """The scores of a command that nobody stopped."""
    out = tmp_path_factory.mktemp("undisturbed") / "scores.parquet"
    assert main(command(home, survey, out)) == 0
    return out


@pytest.fixture(scope="package")
def of_killed(
    home: Path, survey: Path, tmp_path_factory: pytest.TempPathFactory, _short_parts: None
) -> Path:
    """What a command leaves that was killed after its first part."""
    out = tmp_path_factory.mktemp("killed") / "scores.parquet"
    parts = out.with_name("scores.parquet.parts")
    assert forked(killed_after_a_part, command(home, survey, out)) == -signal.SIGKILL
    assert not out.exists()
    assert [path.name for path in parts.glob("part-*")] == ["part-000000.parquet"]
    return parts


@pytest.fixture
def killed(of_killed: Path, tmp_path: Path) -> Path:
    """A copy of `of_killed`."""
    return Path(shutil.copytree(of_killed, tmp_path / of_killed.name))


@pytest.fixture
def ensemble(home: Path) -> LensEnsemble:
    """As of an earlier release, which compares no pixels before it scores; see test_likeness."""
    found = load_ensemble(next((home / "ensemble").glob("[!.]*/ensemble.json")).parent)
    facts = {name: fact for name, fact in found.facts.items() if name != LEARNT_PIXELS}
    return replace(found, facts=facts)


@pytest.fixture
def counting(ensemble: LensEnsemble) -> Counting:
    return Counting(**vars(ensemble))


@pytest.fixture
def own_images(simulated_catalogue: Path, tmp_path: Path) -> pd.DataFrame:
    """300 rows of three stacks that a test may change; `source` is what reads them."""
    cubes = np.load(simulated_catalogue.parent / "images-00000.npy")
    (tmp_path / "images").mkdir()
    for number in range(3):
        np.save(tmp_path / "images" / f"{number}.npy", cubes[50 * number : 50 * number + 50])
    rows = np.arange(300)
    table = pd.DataFrame({"id": [f"J{row:06d}" for row in rows], "flux_unit": "background_sigma"})
    table["path"] = [f"{tmp_path}/images/{row // 100}.npy#{row % 50}" for row in rows]
    return table.assign(bands="g,r,i", pixel_scale=0.263, label=1)
