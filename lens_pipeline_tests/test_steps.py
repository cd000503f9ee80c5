"""Reuse: what makes a step run again, and what a killed one leaves behind."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from uuid import uuid4

import pytest

from lens_pipeline.errors import NoAnswerError
from lens_pipeline.steps import (
    Recipe,
    folder_aside,
    is_taken,
    remove_unused,
    run_step,
    source_hashes,
)

RECIPE = Recipe(stage="test", modules=("lens_pipeline.errors",), settings={"n": 1})


def _write(out: Path) -> None:
    (out / "deep").mkdir()
    (out / "deep" / "data.bin").write_bytes(b"pixels")


def test_second_time_is_reused(tmp_path: Path) -> None:
    first = run_step(RECIPE, tmp_path, _write)
    second = run_step(RECIPE, tmp_path, lambda out: pytest.fail("built again"))
    assert (first.reused, second.reused) == (False, True)
    assert (first.folder, first.content) == (second.folder, second.content)


@pytest.mark.parametrize(
    "changed",
    [
        Recipe("test", ("lens_pipeline.errors",), settings={"n": 2}),
        Recipe("test", ("lens_pipeline.errors",), settings={"n": 1}, inputs={"a": "1"}),
        Recipe("test", ("lens_pipeline.errors",), ("numpy",), settings={"n": 1}),
        Recipe("test", ("lens_pipeline.steps",), settings={"n": 1}),
        Recipe("other", ("lens_pipeline.errors",), settings={"n": 1}),
    ],
)
def test_whatever_decides_the_output_decides_the_key(changed: Recipe) -> None:
    assert changed.key != RECIPE.key


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
from lens_pipeline.steps import source_hashes
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


@pytest.mark.parametrize("change", ["x + x", "x +", None])
def test_what_was_made_while_the_code_changed_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str | None
) -> None:
    """As by `git pull` during a run: the key is of the old code, and some of the new has run."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"pulled_{uuid4().hex}"
    file, code = tmp_path / f"{name}.py", "def twice(x):\n    return {}\n"
    file.write_text(code.format("2 * x"))
    recipe = Recipe("test", (name,))

    def build(out: Path) -> None:
        _write(out)
        if change is None:
            file.unlink()
        else:
            file.write_text(code.format(change))

    for refused in (build, lambda out: pytest.fail("built in vain")):
        with pytest.raises(NoAnswerError, match="test: the code changed while it ran; the same"):
            run_step(recipe, tmp_path / "steps", refused)
    file.write_text("# Why.\n" + code.format("2 * x"))
    assert not run_step(recipe, tmp_path / "steps", _write).reused


def test_content_is_of_the_files_alone(tmp_path: Path) -> None:
    """Other settings that lead to the same files: what is downstream need not run again."""
    other = Recipe("test", ("lens_pipeline.errors",), settings={"n": 2})
    assert run_step(RECIPE, tmp_path, _write).content == run_step(other, tmp_path, _write).content


@pytest.mark.parametrize("damage", ["truncated", "gone", "no complete.json", "torn complete.json"])
def test_a_damaged_folder_is_made_again(tmp_path: Path, damage: str) -> None:
    step = run_step(RECIPE, tmp_path, _write)
    data, complete = step.folder / "deep" / "data.bin", step.folder / "complete.json"
    if damage == "truncated":
        data.write_bytes(b"pix")
    elif damage == "gone":
        data.unlink()
    elif damage == "no complete.json":
        complete.unlink()
    else:
        complete.write_text(complete.read_text()[:40])
    again = run_step(RECIPE, tmp_path, _write)
    assert not again.reused
    assert data.read_bytes() == b"pixels"


def test_verify_finds_altered_bytes(tmp_path: Path) -> None:
    step = run_step(RECIPE, tmp_path, _write)
    (step.folder / "deep" / "data.bin").write_bytes(b"pixelS")
    assert run_step(RECIPE, tmp_path, _write).reused
    assert not run_step(RECIPE, tmp_path, _write, verify=True).reused


def test_a_failure_leaves_nothing_visible(tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        _write(out)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        run_step(RECIPE, tmp_path, fail)
    assert not (tmp_path / RECIPE.key).exists()
    assert run_step(RECIPE, tmp_path, _write).folder.is_dir()


def _hang(root: Path, begun: "multiprocessing.synchronize.Event") -> None:
    def build(out: Path) -> None:
        _write(out)
        begun.set()
        time.sleep(60)

    run_step(RECIPE, root, build)


def test_one_that_was_sealed_and_not_renamed_goes_on_to_a_whole_folder(tmp_path: Path) -> None:
    made = run_step(RECIPE, tmp_path, _write, goes_on=True)
    shutil.copytree(made.folder, made.folder.with_name(f".partial-{made.folder.name}"))
    shutil.rmtree(made.folder)
    again = run_step(RECIPE, tmp_path, lambda out: None, goes_on=True)
    assert (again.reused, again.content) == (False, made.content)
    assert run_step(RECIPE, tmp_path, lambda out: pytest.fail("built again")).reused


def test_a_killed_builder_frees_its_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    process = context.Process(target=_hang, args=(tmp_path, begun))
    process.start()
    assert begun.wait(30)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    step = run_step(RECIPE, tmp_path, _write)
    assert not step.reused
    assert [p.name for p in tmp_path.iterdir() if p.is_dir() and not p.name.startswith(".l")] == [
        RECIPE.key
    ]


def test_of_two_at_once_one_builds(tmp_path: Path) -> None:
    built: list[int] = []

    def build(out: Path) -> None:
        built.append(1)
        time.sleep(0.5)
        _write(out)

    steps = []
    threads = [
        threading.Thread(target=lambda: steps.append(run_step(RECIPE, tmp_path, build)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert sorted(step.reused for step in steps) == [False, True, True]


def _later() -> float:
    """A time by which nothing has been used: a file system's clock may lag behind."""
    return time.time() + 60


def test_what_is_not_used_is_removed_and_made_again(tmp_path: Path) -> None:
    other, third = (Recipe("test", (), settings={"n": n}) for n in (2, 3))
    steps = [run_step(recipe, tmp_path, _write) for recipe in (RECIPE, other, third)]
    for holder in (tmp_path / ".locks").iterdir():
        os.utime(holder, (0, 0))
    run_step(third, tmp_path, _write)  # used once more
    removed = remove_unused(tmp_path, time.time() - 3600, [steps[1].key])
    assert [one.folder for one in removed] == [steps[0].folder]
    assert removed[0].bytes > len(b"pixels")
    reused = [run_step(recipe, tmp_path, _write).reused for recipe in (RECIPE, other, third)]
    assert reused == [False, True, True]


def test_what_a_step_that_was_stopped_has_left_is_removed(tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        _write(out)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        run_step(RECIPE, tmp_path, fail, goes_on=True)
    assert remove_unused(tmp_path, time.time() - 3600) == []
    assert len(remove_unused(tmp_path, _later())) == 1
    assert [path.name for path in tmp_path.iterdir()] == [".locks"]


def test_what_a_step_has_left_is_as_old_as_its_last_file(tmp_path: Path) -> None:
    """A training of several days may have been stopped a minute ago, and goes on from there."""

    two_days_ago = time.time() - 2 * 86400

    def stopped(out: Path) -> None:
        (holder,) = tmp_path.rglob("*.holder")
        os.utime(holder, (two_days_ago, two_days_ago))  # it began then
        (out / "last.ckpt").write_text("of now")
        raise KeyboardInterrupt

    for killed in (False, True):  # whoever is killed says no more when it ends
        with pytest.raises(KeyboardInterrupt):
            run_step(RECIPE, tmp_path, stopped, goes_on=True)
        (holder,) = tmp_path.rglob("*.holder")
        assert time.time() - holder.stat().st_mtime < 60
        if killed:
            os.utime(holder, (two_days_ago, two_days_ago))
        assert remove_unused(tmp_path, time.time() - 86400) == []
    for left in tmp_path.rglob("last.ckpt"):
        os.utime(left, (two_days_ago, two_days_ago))
    assert len(remove_unused(tmp_path, time.time() - 86400)) == 1


def test_what_cannot_be_removed_is_told_and_the_others_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = sorted(
        (run_step(Recipe("test", (), settings={"n": n}), tmp_path, _write) for n in (2, 3)),
        key=lambda step: step.key,
    )
    remove = shutil.rmtree

    def busy(path: Path) -> None:
        if first.key in path.name:
            raise OSError(errno.EBUSY, "is busy", str(path))
        remove(path)

    monkeypatch.setattr("shutil.rmtree", busy)
    assert [one.folder for one in remove_unused(tmp_path, _later())] == [second.folder]
    assert f"{first.folder} cannot be removed" in caplog.text


def test_what_a_process_is_making_is_not_removed(tmp_path: Path) -> None:
    def build(out: Path) -> None:
        _write(out)
        assert remove_unused(tmp_path, _later()) == []

    assert (run_step(RECIPE, tmp_path, build).folder / "deep" / "data.bin").is_file()


def test_a_folder_that_is_half_removed_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = run_step(RECIPE, tmp_path, _write)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            remove_unused(tmp_path, _later())
    assert not step.folder.exists()
    assert len(remove_unused(tmp_path, _later())) == 1
    assert not run_step(RECIPE, tmp_path, _write).reused


FILLS = """
import sys, time
from pathlib import Path
from lens_pipeline.steps import folder_aside

with folder_aside(Path(sys.argv[1])) as aside:
    (aside / "part").touch()
    beside = aside.with_name(f"{aside.name}.dataset-1")
    beside.mkdir()
    (beside / "train.npy").touch()
    time.sleep(100)
"""


def test_an_empty_folder_gives_way_and_a_link_to_one_does_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "file").touch()
    taken = {
        name: is_taken(tmp_path / name) for name in ("new", "empty", "link", "nowhere", "file")
    }
    assert taken == {"new": False, "empty": False, "link": True, "nowhere": True, "file": True}
    assert is_taken(tmp_path)
    assert is_taken(Path("/proc"))
    with folder_aside(tmp_path / "empty") as aside:
        (aside / "data").touch()
    assert (tmp_path / "empty" / "data").exists()


def test_a_folder_aside_of_a_process_that_was_killed_is_removed_by_the_next(tmp_path: Path) -> None:
    """With what lay beside it; those of processes that are at work are not."""

    def begun(n: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", FILLS, str(tmp_path / "shards")])
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob(".shards.*/train.npy"))) < n:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return process

    with begun(1) as killed:
        left = {path.name for path in tmp_path.iterdir()}
        assert len(left) == 3
        with begun(2) as at_work:
            killed.kill()
            killed.wait()
            with folder_aside(tmp_path / "shards") as aside:
                assert not left & {path.name for path in tmp_path.iterdir()}
                (aside / "whole").touch()
            there = {path.name for path in tmp_path.iterdir()}
            assert len(there) == 1 + 3
            at_work.kill()
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["whole"]
