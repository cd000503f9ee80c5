"""Reuse: what makes a step run again, and what a killed one leaves behind."""

import errno
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from uuid import uuid4

import pytest

from lens_pipeline.errors import NoAnswerError
from lens_pipeline.steps import Recipe, remove_unused, run_step

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
