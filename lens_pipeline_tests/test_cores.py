"""How many cores are this process's."""

import os
from pathlib import Path

import pytest

from lens_pipeline import cores


@pytest.mark.parametrize(
    ("quota", "of_many"),
    [("150000 100000", 2), ("10000 100000", 1), ("max 100000", 64), ("800000 100000", 8)],
)
def test_a_container_has_the_cores_that_its_time_is_of(
    quota: str, of_many: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert cores.n_cores() == of_many


def test_a_machine_without_quotas_has_those_that_it_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "absent")
    assert cores.n_cores() == len(os.sched_getaffinity(0))
