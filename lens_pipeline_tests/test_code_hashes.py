"""What counts as other code, and what is remembered of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lens_pipeline.code_hashes import source_hashes


def test_code_of_a_stage_is_all_that_it_imports() -> None:
    """A change of a library module reruns the stages that import it, and no other."""
    training = source_hashes(["lens_pipeline.training.train"])
    for module in ("models.deeplens", "shards.reader", "training.config", "models.schedules"):
        assert f"lens_pipeline.{module}" in training
    for module in ("simulation.render", "ensemble.fusion", "cli", "tracking"):
        assert f"lens_pipeline.{module}" not in training


def test_what_is_said_of_code_is_none_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comment, a docstring or another layout of lines trains no network again."""
    monkeypatch.syspath_prepend(tmp_path)
    code = [
        "def twice(x):\n    return 2 * x\n",
        '"""A module."""\n\n# Why.\ndef twice(\n    x,\n):\n    """Twice x."""\n    return 2 * x\n',
        "def twice(x):\n    return x + x\n",
        'def twice(x):\n    return 2 * x\n\n"""no docstring"""\n',
    ]
    found = []
    for number, text in enumerate(code):
        (tmp_path / f"some_code_{number}.py").write_text(text)
        (sha256,) = source_hashes([f"some_code_{number}"]).values()
        found.append(sha256)
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_what_is_remembered_of_code_is_that_of_the_same_code_alone(tmp_path: Path) -> None:
    """It is kept beside what Python compiles, for processes that begin later."""
    code = """
import ast, sys
from lens_pipeline.code_hashes import source_hashes
n, parse = [], ast.parse
ast.parse = lambda source: n.append(source) or parse(source)
print(source_hashes([sys.argv[1]])[sys.argv[1]], len(n))
"""
    other = {"PYTHONPATH": str(tmp_path), "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled")}
    environment = os.environ | other
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def hashed(text: str) -> tuple[str, int]:
        (tmp_path / "kept_code.py").write_text(text)
        command = [sys.executable, "-c", code, "kept_code"]
        said = subprocess.check_output(command, env=environment, text=True)
        sha256, n = said.split()
        return sha256, int(n)

    first, again = (hashed("from lens_pipeline import errors\n") for _ in range(2))
    assert (first[0], first[1] > 1, again[1]) == (again[0], True, 0)
    other_code = hashed("from lens_pipeline import storage\n")
    assert other_code[0] != first[0]
    (kept,) = (tmp_path / "compiled").rglob("lens_pipeline.sources.json")
    kept.write_text(kept.read_text()[:-9])  # damaged
    assert hashed("from lens_pipeline import errors\n")[0] == first[0]
