"""`lens-pipeline prepare`: cutouts to shards, checked and published."""

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import webdataset as wds
from PIL import Image

from lens_pipeline.catalogue.dataset import Dataset
from lens_pipeline.cli import main
from lens_pipeline.shards import open_shards, verify_shards
from lens_pipeline_tests.conftest import LENS_PIPELINE, as_in


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The guide's layout: train|val|test/lens|nonlens, PNG."""
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        for kind in ("lens", "nonlens"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 255, (72, 72, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / kind / f"{number}.png")
    return tmp_path / "data"


def test_the_guides_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, cloud = tmp_path / "shards", tmp_path / "cloud"
    arguments = ["prepare", "--data-root", str(folder), "--output-dir", str(out)]
    settings = ["--shard-size", "10", "--image-size", "64", "--quality", "95", "--validate"]
    assert main([*arguments, *settings, "--cloud-url", str(cloud)]) == 0
    printed = capsys.readouterr().out
    assert verify_shards(out) == []
    version = open_shards(out).manifest.dataset_version
    assert f"dataset version {version}" in printed
    for place in (out, cloud / version):
        pattern = f"{place}/train-{{000000..000002}}.tar"
        assert pattern in printed
        samples = list(wds.WebDataset(pattern, shardshuffle=False).decode("pil"))
        assert len(samples) == 24
        assert {sample["cls"] for sample in samples} == {0, 1}
        assert samples[0]["jpg"].size == (64, 64)
    # Then only the upload, which a second call is told of.
    assert main([*arguments, *settings, "--cloud-url", str(cloud)]) == 2
    said = capsys.readouterr().err
    assert f"{out}: exists already" in said
    assert "--upload-only" in said
    again = ["prepare", "--output-dir", str(out), "--upload-only", "--validate"]
    assert main([*again, "--cloud-url", str(tmp_path / "other")]) == 0
    assert verify_shards(tmp_path / "other" / version) == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_cannot_be_used_is_told_and_listed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = [folder / "train" / "lens" / f"{number}.png" for number in range(2)]
    for path, content in zip(spoilt, (b"", b"no picture"), strict=True):
        path.write_bytes(content)
    out = tmp_path / "shards"
    arguments = ["prepare", "--data-root", str(folder), "--output-dir", str(out), "--validate"]
    assert main([*arguments, "--cloud-url", str(tmp_path / "cloud")]) == 0
    told = f"2 of 40 cutouts cannot be used, see {out / 'rejects.parquet'} (2 times: the file "
    assert told in capsys.readouterr().out
    listed = pd.read_parquet(out / "rejects.parquet")
    assert sorted(listed["file"]) == sorted(str(path) for path in spoilt)
    assert verify_shards(out) == []
    # A network that is trained on the folder learns from as many.
    home = ["--home", str(tmp_path / "home"), "--checkpoint-dir", str(tmp_path / "trained")]
    train = ["train", "--data-root", str(folder), "--arch", "lastro", "--fast-dev-run", *home]
    assert main(train) == 0
    assert "2 of 40 cutouts cannot be used, see " in capsys.readouterr().err


def test_a_processed_dataset_is_taken_as_it_is(dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    arguments = ["--data-root", str(dataset.folder), "--output-dir", str(out)]
    assert main(["prepare", *arguments, "--encoding", "float32"]) == 0
    val = open_shards(out).split("val")
    wanted, _ = as_in(val, dataset, "val")
    np.testing.assert_array_equal(val.gather(np.arange(len(val))), wanted)
    assert len(pd.read_parquet(out / "index.parquet")) == 200


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--data-root"),
        (["--upload-only"], "--cloud-url"),
        (["--upload-only", "--cloud-url", "c"], "manifest.json"),
        (["--upload-only", "--cloud-url", "c", "--shard-size", "9"], "--shard-size: leave it out"),
        (["--upload-only", "--cloud-url", "c", "--encoding", "jpg"], "--encoding: leave it out"),
        (["--data-root", "nowhere.csv"], "nowhere.csv"),
        (["--data-root", "DATA", "--quality", "0"], "quality 0"),
        (["--data-root", "nowhere.csv", "--quality", "0"], "quality 0"),  # before anything is read
        (["--data-root", "nowhere.csv", "--shard-size", "0"], "shard_size 0"),
        (["--data-root", "nowhere.csv", "--encoding", "float61"], "encoding 'float61'"),
        (["--data-root", "DATA", "--image-size", "500"], "500 x 500 are needed"),
        (["--data-root", "DATA", "--image-size", "0"], "image_size 0: must be 16 to 2,048"),
        (["--data-root", "nowhere.csv", "--image-size", "15"], "image_size 15: must be 16"),
        (["--data-root", "DATA", "--cloud-url", "s3://b/x{1,2}y"], "must not hold braces"),
        (["--data-root", "DATA", "--storage-options", "x"], "JSON object"),
        (
            ["--data-root", "DATA", "--storage-options", json.dumps({"a": {"aws_secret": "s3"}})],
            "aws_secret looks secret",
        ),
        (
            ["--data-root", "DATA", "--storage-options", json.dumps({"a": [{"credential": "x"}]})],
            "credential looks secret",
        ),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_left(
    arguments: list[str],
    named: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "shards"
    given = [str(folder) if a == "DATA" else a for a in arguments]
    assert main(["prepare", "--output-dir", str(out), *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    assert named in line
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("at", ["prepare.prepare_shards", "cloud.publish_shards"])
def test_after_an_interruption_what_it_says_works(
    at: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It said of every command that the same one goes on."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out, cloud = tmp_path / "shards", tmp_path / "cloud"
    again = ["prepare", "--output-dir", str(out), "--cloud-url", str(cloud)]
    arguments = [*again, "--data-root", str(folder)]
    with monkeypatch.context() as during:
        during.setattr(f"lens_pipeline.shards.{at}", interrupt)
        assert main(arguments) == 130
    said = capsys.readouterr().err
    assert "error: interrupted; the same command begins again, or" in said
    assert "--upload-only" in said
    assert main([*again, "--upload-only"] if out.exists() else arguments) == 0
    assert out.exists() == cloud.exists()


def test_what_is_asked_to_end_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """As batch systems and containers do: by SIGTERM."""
    out = tmp_path / "there" / "shards"
    out.parent.mkdir()
    many = tmp_path / "many.csv"
    images = sorted(folder.rglob("*.png"))
    rows = [f"{n},{images[n % len(images)]},{n % 2}" for n in range(40_000)]
    many.write_text("id,path,label\n" + "\n".join(rows))
    command = [LENS_PIPELINE, "prepare", "--data-root", str(many), "--output-dir", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    begun = time.monotonic()
    while not any(out.parent.glob(".shards.*.dataset-*/train.npy")):
        assert process.poll() is None
        assert time.monotonic() - begun < 100
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "error: interrupted" in said
    assert list(out.parent.iterdir()) == []
