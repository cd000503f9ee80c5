"""Folders that become visible whole, and what a killed process leaves of them."""

import subprocess
import sys
import time
from pathlib import Path

from lens_pipeline.files import folder_aside, is_taken

FILLS = """
import sys, time
from pathlib import Path
from lens_pipeline.files import folder_aside

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
