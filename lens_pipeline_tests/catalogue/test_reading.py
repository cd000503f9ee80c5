"""Many cutouts, read in the catalogue's order: here or in other processes."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import psutil
import pytest

from lens_pipeline.catalogue import reading
from lens_pipeline.catalogue.build import build_dataset
from lens_pipeline.catalogue.cutout import Cutout
from lens_pipeline.catalogue.dataset import CutoutFormat
from lens_pipeline.catalogue.reading import read_cutouts
from lens_pipeline.catalogue.table import Catalogue, read_catalogue, source_fingerprint
from lens_pipeline.storage import locate

N = 800


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """Cutouts that say their row; every hundredth is missing."""
    folder = tmp_path_factory.mktemp("many")
    noise = np.random.default_rng(0).normal(size=(N, 1, 32, 32)).astype(np.float32)
    noise[:, 0, 0, 0] = np.arange(N)
    for row in range(N):
        if row % 100:
            np.save(folder / f"{row}.npy", noise[row])
    table = pd.DataFrame({"id": range(N), "path": [f"{row}.npy" for row in range(N)]})
    table["flux_unit"] = "background_sigma"
    table.to_csv(folder / "table.csv", index=False)
    return read_catalogue(folder / "table.csv")


def test_each_row_may_name_its_bands_in_an_order_of_its_own(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).normal(size=(3, 32, 32)).astype(np.float32)
    for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        np.save(tmp_path / f"{name}.npy", pixels[order])
    common = pd.DataFrame({"id": ["b", "other"], "path": "b.npy", "bands": ["i,g,r", None]})
    assert Catalogue(common, "").bands_of(np.array([1])) == [["i", "g", "r"]]
    table = pd.DataFrame(
        {"id": ["a", "b"], "path": ["a.npy", "b.npy"], "bands": ["g,r,i", "i, g,r"]}
    )
    table.assign(flux_unit="background_sigma").to_csv(tmp_path / "table.csv", index=False)
    read = read_cutouts(read_catalogue(tmp_path / "table.csv"), 32)
    form = CutoutFormat(("g", "r", "i"), 32, "background_sigma", None)
    for _, cutout in read:
        assert isinstance(cutout, Cutout)
        np.testing.assert_array_equal(form.fitted(cutout).pixels, pixels)


def test_processes_change_nothing(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    here = list(read_cutouts(catalogue, 32))
    monkeypatch.setattr(reading, "WORTH", 1e-6)
    monkeypatch.setattr(reading, "n_cores", lambda: 2)
    apart, workers = [], set()
    for number, found in enumerate(read_cutouts(catalogue, 32)):
        apart.append(found)
        if number == N // 2:
            workers = {p.pid for p in psutil.Process().children(recursive=True)}
    assert workers, "no process was started"
    assert [row for row, _ in here] == [row for row, _ in apart] == list(range(N))
    for (row, one), (_, other) in zip(here, apart, strict=True):
        if row % 100 == 0:
            assert str(one) == str(other) == "the file is missing"
        else:
            assert isinstance(one, Cutout)
            assert isinstance(other, Cutout)
            assert one.pixels[0, 0, 0] == row
            np.testing.assert_array_equal(one.pixels, other.pixels)


READ_FOR_EVER = """
import sys, time
from lens_pipeline.catalogue import reading
from lens_pipeline.catalogue.table import read_catalogue

if __name__ == "__main__":
    reading.WORTH, reading.n_cores = 1e-6, lambda: 2
    for row, _ in reading.read_cutouts(read_catalogue(sys.argv[1]), 32):
        if row == 500:
            print("reading", flush=True)
            time.sleep(100)
"""


def test_readers_end_with_the_process_that_started_them(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    """However it ends: readers that stay would fill a machine, run after run."""
    script = tmp_path / "read.py"
    script.write_text(READ_FOR_EVER)
    command = [sys.executable, str(script), catalogue.source]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "reading\n"
        workers = psutil.Process(started.pid).children(recursive=True)
        assert len(workers) >= 2
        os.kill(started.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_a_catalogue_and_its_cutouts_in_a_bucket(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bucket, server = (request.getfixturevalue(f"{kind}_{what}") for what in ("bucket", "server"))
    options = server.storage_options()
    filesystem, root = locate(f"{bucket}/survey", options)
    cutouts = np.random.default_rng(0).normal(size=(60, 1, 40, 40)).astype(np.float32)
    for row, cutout in enumerate(cutouts):
        content = io.BytesIO()
        np.save(content, cutout)
        filesystem.pipe_file(f"{root}/cutouts/{row}.npy", content.getvalue())
    filesystem.rm_file(f"{root}/cutouts/7.npy")
    paths = [f"cutouts/{row}.npy" for row in range(60)]
    table = pd.DataFrame({"id": range(60), "path": paths, "label": np.arange(60) % 2})
    filesystem.pipe_file(f"{root}/table.csv", table.to_csv(index=False).encode())
    catalogue = read_catalogue(f"{bucket}/survey/table.csv", options)
    dataset = build_dataset(catalogue, tmp_path, image_size=40, options=options)
    (reject,) = dataset.rejects().itertuples()
    assert (reject.row, reject.reason) == (7, "the file is missing")
    assert reject.file == f"{bucket}/survey/cutouts/7.npy"
    for part in ("train", "val", "test"):
        rows, images = dataset.table(part)["row"], dataset.images(part)
        for row, image in zip(rows, images, strict=True):
            ratio = cutouts[row] / image
            np.testing.assert_allclose(ratio, np.median(ratio), rtol=1e-4)


@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_a_cutout_that_another_client_puts_is_seen(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """A daemon looks at the same folder for months: what it once listed is not what lies there."""
    bucket, server = (request.getfixturevalue(f"{kind}_{what}") for what in ("bucket", "server"))
    options = server.storage_options()
    other, root = fsspec.url_to_fs(f"{bucket}/survey", **options)
    other.pipe_file(f"{root}/train/lens/a.png", b"a")
    before = source_fingerprint(f"{bucket}/survey", options)
    assert read_catalogue(f"{bucket}/survey", options).table["id"].tolist() == ["train/lens/a.png"]
    other.pipe_file(f"{root}/train/lens/b.png", b"b")
    assert source_fingerprint(f"{bucket}/survey", options) != before
    catalogue = read_catalogue(f"{bucket}/survey", options)
    assert catalogue.table["id"].tolist() == ["train/lens/a.png", "train/lens/b.png"]
