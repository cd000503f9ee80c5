"""One simulation, which tests in several files only look at."""

import pickle
from pathlib import Path

import pytest
from filelock import FileLock

from lens_pipeline.simulation import Simulation, simulate


@pytest.fixture(scope="session")
def simulation(of_all_workers: Path) -> Simulation:
    """600 cutouts of DES, of 64 pixels. Only to look at."""
    file = of_all_workers / "simulation.pickle"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            file.write_bytes(pickle.dumps(simulate("des", 600, seed=1)))
        return pickle.loads(file.read_bytes())
