"""Progress is shown to whoever may be looking on, and to nobody else."""

import os
import re
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
from pytorch_lightning.callbacks import TQDMProgressBar

from lens_pipeline import LensDataModule, progress
from lens_pipeline.shards import verify_shards
from lens_pipeline.simulation import simulate
from lens_pipeline.training import TrainConfig, callbacks, train


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a Jupyter kernel's process has imported, as far as it is asked; its standard error is no
    terminal."""
    shell = SimpleNamespace(initialized=lambda: True)
    kernel = SimpleNamespace(ZMQInteractiveShell=shell)
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", kernel)


@pytest.mark.usefixtures("notebook")
def test_a_notebook_shows_progress(
    shards_folder: Path,
    uneven_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert verify_shards(shards_folder) == []
    assert "verifying: 100%" in capsys.readouterr().err
    simulate("des", 32, image_size=64, batch_size=2)  # longer than a bar's tenth of a second
    said = capsys.readouterr().err
    assert re.search(r"simulating: +[1-9]\d?%", said)
    assert "simulating: 100%" in said
    values = {"model": {"arch": "lastro"}, "training": {"epochs": 1, "batch_size": 16}}
    train(TrainConfig.parse(values, "test"), LensDataModule(uneven_shards), tmp_path)
    said = capsys.readouterr()
    assert "epoch 1/1: 100%" in said.err
    assert not said.out  # which may go into a file


@pytest.mark.usefixtures("notebook")
def test_a_bar_is_not_drawn_at_each_step(
    uneven_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whoever reads it sees five a second; a step of a GPU takes milliseconds."""
    monkeypatch.setattr(callbacks, "REDRAWN", 1000.0)  # seconds
    values = {"model": {"arch": "lastro"}, "training": {"epochs": 1, "batch_size": 2}}
    train(TrainConfig.parse(values, "test"), LensDataModule(uneven_shards), tmp_path)
    drawn = re.findall(r"epoch 1/1: [^\r]* (\d+)/35 ", capsys.readouterr().err)
    assert {*drawn} - {"0"} == {"1", "35"}


def test_where_nobody_looks_on_lines_are_logged_of_what_lasts_long(
    shards_folder: Path,
    uneven_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As of a batch job, or a step of Dagster's."""
    caplog.set_level("INFO")
    values = {"model": {"arch": "lastro"}, "training": {"epochs": 2, "batch_size": 16}}
    config = TrainConfig.parse(values, "test")
    train(config, LensDataModule(uneven_shards), tmp_path / "short")
    verify_shards(shards_folder)
    assert "batches" not in caplog.text
    assert "verifying" not in caplog.text
    monkeypatch.setattr(progress, "LINES", 1e-9)  # seconds, of which they last more
    train(config, LensDataModule(uneven_shards), tmp_path / "long")
    lines = re.findall(
        r"epoch (\d)/2, batches: (\d) of (\d) \(\d+ %\), \d\d:\d\d left", caplog.text
    )
    assert lines == [(epoch, str(batch), "5") for epoch in "12" for batch in range(1, 6)]
    assert re.search(r"batches: 5 of 5 .*, loss 0\.\d{3}\n", caplog.text)
    verify_shards(shards_folder)
    assert re.search(r"verifying: [\d.]+M of [\d.]+M \(\d+ %\)", caplog.text)


def test_a_bar_that_was_asked_for_is_shown_to_a_file_too(
    shards_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"model": {"arch": "lastro"}, "training": {"epochs": 1}}
    config = TrainConfig.parse(values, "test")
    train(config, LensDataModule(shards_folder), tmp_path, callbacks=[TQDMProgressBar()])
    assert "Epoch 0: 100%" in capsys.readouterr().out


def test_a_terminal_shows_progress_and_a_file_does_not(shards_folder: Path) -> None:
    program = "import sys; from lens_pipeline.shards import verify_shards as f; f(sys.argv[1])"
    command = [sys.executable, "-c", program, str(shards_folder)]
    assert subprocess.run(command, stderr=subprocess.PIPE, check=True).stderr == b""
    reader, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    subprocess.run(command, stderr=terminal, check=True)
    os.close(terminal)
    assert b"verifying: 100%" in os.read(reader, 2**16)
    os.close(reader)
