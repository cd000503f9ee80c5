"""Tars of other writers."""

import io
import json
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from lens_pipeline import LensWebDatasetDataModule
from lens_pipeline.errors import InputError
from lens_pipeline.shards import open_shards, streaming
from lens_pipeline_tests.shards.tars import (
    CUTOUTS,
    LABELS,
    RNG,
    N,
    picture,
    read,
    upload,
    write_tars,
)


def as_png(code: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(code).save(content, "png")
    return content.getvalue()


STATED = json.dumps(
    {"encoding": "png16", "units": "composite", "bands": ["g", "r"], "shape": [2, 32, 32]}
).encode()


@pytest.mark.parametrize("kind", ["npy", "png", "jpg"])
@pytest.mark.parametrize("where", ["local", "streamed", "cached"])
def test_tars_of_another_writer(kind: str, where: str, tmp_path: Path, remote: str) -> None:
    pattern = write_tars(tmp_path / "tars", kind)
    more: dict[str, Any] = {}
    if where != "local":
        upload(tmp_path / "tars", remote)
        pattern = pattern.replace(str(tmp_path / "tars"), remote)
    if where == "cached":
        more["cache_dir"] = tmp_path / "cache"
    data = LensWebDatasetDataModule(
        pattern, pattern, batch_size=8, flux_unit="background_sigma", **more
    )
    images, labels = read(data, "val")
    if kind == "npy":
        np.testing.assert_array_equal(images, CUTOUTS)
    elif kind == "png":
        wanted = np.stack([picture(row) for row in range(N)]).transpose(0, 3, 1, 2) / 255
        np.testing.assert_allclose(images, wanted, atol=1e-6)
    np.testing.assert_array_equal(labels, LABELS)
    assert data.units == ("background_sigma" if kind == "npy" else "composite")
    if where != "streamed":
        wanted_ids = [f"{row:05d}" if kind == "npy" else f"galaxy {row}" for row in range(N)]
        assert data.split("val").ids.tolist() == wanted_ids

    shuffled, labels = read(data, "train")
    assert len(shuffled) == N
    if kind == "npy":
        order = shuffled[:, 0, 0, 0].astype(int)
        assert sorted(order) == list(range(N))
        assert order.tolist() != sorted(order)
        np.testing.assert_array_equal(labels, LABELS[order])


def test_linear_flux_of_others_is_brought_to_background_sigma(tmp_path: Path) -> None:
    pattern = write_tars(tmp_path, "npy")
    data = LensWebDatasetDataModule(val_urls=pattern, image_size=20)
    images, _ = read(data, "val")
    assert images.shape == (N, 3, 20, 20)
    ratio = CUTOUTS[:, :, 6:26, 6:26] / images
    np.testing.assert_allclose(ratio.min(axis=(2, 3)), ratio.max(axis=(2, 3)), rtol=1e-5)


def test_every_truncation_of_a_foreign_tar_is_found(tmp_path: Path, remote: str) -> None:
    """Stock WebDataset gives fewer samples, without a word, for half of them."""
    pattern = write_tars(tmp_path / "tars", "npy")
    whole = (tmp_path / "tars" / "part-0001.tar").read_bytes()
    short = tmp_path / "short.tar"
    for n, length in enumerate(RNG.integers(0, len(whole), 100)):
        short.write_bytes(whole[:length])
        url = str(short)
        if n % 3 == 0:
            url = f"{remote}/short.tar"
            with fsspec.open(url, "wb") as file:
                file.write(whole[:length])
        data = LensWebDatasetDataModule(val_urls=url)
        if len(whole) - len(whole.rstrip(b"\0")) - 2048 > len(whole) - length:
            assert len(read(data, "val")[0]) == 20  # only of what fills up its last record
        else:
            with pytest.raises(InputError, match=r"short\.tar"):
                list(data.val_dataloader())
    assert len(read(LensWebDatasetDataModule(val_urls=pattern), "val")[0]) == N


def test_every_damaged_header_of_a_foreign_tar_is_found(tmp_path: Path, remote: str) -> None:
    """To Python's tarfile the first that is, or is empty, is the end; and so is that of a tar to
    which another was appended."""
    write_tars(tmp_path / "tars", "npy")
    path = tmp_path / "tars" / "part-0001.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [file.offset for file in tar]
    damaged = []
    for number, at in enumerate(headers):
        flipped, emptied = bytearray(whole), bytearray(whole)
        flipped[at + int(RNG.integers(100))] ^= 1
        emptied[at : at + 512] = bytes(512)
        damaged += [flipped] if number % 2 else [emptied]
    damaged.append(bytearray(whole + whole))
    bad = tmp_path / "bad.tar"
    for n, content in enumerate(damaged):
        bad.write_bytes(content)
        url = str(bad)
        if n % 5 == 0 or n == len(damaged) - 1:
            url = f"{remote}/bad.tar"
            with fsspec.open(url, "wb") as file:
                file.write(content)
        with pytest.raises(InputError, match=r"bad\.tar: (is no whole tar|.*no name)"):
            list(LensWebDatasetDataModule(val_urls=url).val_dataloader())


def test_labels_and_axes_as_others_write_them(tmp_path: Path) -> None:
    labels = ["1", "0.0", "True", "false", " 1\n", "1.0"]
    samples: dict[str, Any] = {}
    for number, label in enumerate(labels):
        samples[f"{number}.npy"] = np.moveaxis(CUTOUTS[number], 0, -1)  # bands last
        if number % 2:
            samples[f"{number}.cls"] = label.encode()
        else:
            text = label.strip().lower()
            samples[f"{number}.json"] = f'{{"label": {text}}}'.encode()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in samples.items():
            written = io.BytesIO()
            np.save(written, content) if name.endswith("npy") else written.write(content)
            about = tarfile.TarInfo(name)
            about.size = written.tell()
            tar.addfile(about, io.BytesIO(written.getvalue()))
    data = LensWebDatasetDataModule(val_urls=str(tmp_path / "a.tar"))
    images, found = read(data, "val")
    assert images.shape[1:] == CUTOUTS[0].shape
    assert found.tolist() == [1, 0, 1, 0, 1, 1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.npy": CUTOUTS[0], "0.png": b"", "0.cls": b"1"}, "sample 0 has 2 images"),
        ({"0.cls": b"1"}, "sample 0 has 0 images"),
        ({"0.npy": CUTOUTS[0], "0.cls": b"2"}, "sample 0: label '2' must be 0, 1 or empty"),
        ({"0.npy": CUTOUTS[0], "0.json": b"{"}, "sample 0: its .json or .cls cannot be read"),
        ({"0.npy": CUTOUTS[0]}, "cutout 0 has no label"),
        ({"a/0.npy": CUTOUTS[0]}, "'a/0.npy' is no name of a sample's file"),
        ({"0.npy": np.array([{}]), "0.cls": b"1"}, "sample 0: the file cannot be read"),
        ({"0.pkl": b"cos\nsystem\n", "0.cls": b"1"}, "sample 0 has 0 images"),
        ({"0.npy": CUTOUTS[0], "0.cls": b"0", "1.npy": CUTOUTS[0, :2], "1.cls": b"1"},
         "sample 1: 2 bands; 3 are needed"),
        ({"0.png": b"", "0.cls": b"1", "0.json": b'{"encoding": "png16"}'},
         "sample 0: its .json or .cls cannot be read"),
        ({"0.png": as_png(np.zeros((32, 32), np.uint16)), "0.cls": b"1", "0.json": STATED},
         "sample 0: the file is not as its .json says .*reshape"),
    ],
)  # fmt: skip
def test_bad_samples_are_named(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for name, content in files.items():
            if isinstance(content, np.ndarray):
                encoded = io.BytesIO()
                np.save(encoded, content, allow_pickle=True)
                content = encoded.getvalue()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(InputError, match=message):
        list(LensWebDatasetDataModule(val_urls=str(tmp_path / "bad.tar")).val_dataloader())


def test_a_bad_sample_is_named_when_streamed_and_by_a_worker_too(
    tmp_path: Path, remote: str
) -> None:
    with wds.TarWriter(str(tmp_path / "bare.tar")) as writer:
        for row in range(4):
            writer.write({"__key__": str(row), "npy": CUTOUTS[row]})
    upload(tmp_path, remote)
    url = f"{remote}/bare.tar"
    for workers in (0, 1):
        data = LensWebDatasetDataModule(val_urls=url, num_workers=workers)
        with pytest.raises(InputError, match=r"^memory://bucket/bare.tar: sample 0 has no label$"):
            list(data.val_dataloader())
    with pytest.raises(InputError, match=r"none\.tar: there is no such file"):
        LensWebDatasetDataModule(f"{remote}/none.tar").train_dataloader()
    with pytest.raises(InputError, match="foo://x: cannot be used"):
        LensWebDatasetDataModule("foo://x/a.tar").train_dataloader()


def test_splits_of_different_cutouts_are_refused(tmp_path: Path) -> None:
    flux, pictures = write_tars(tmp_path / "a", "npy"), write_tars(tmp_path / "b", "png")
    data = LensWebDatasetDataModule(flux, pictures)
    data.train_dataloader()
    with pytest.raises(
        InputError, match="val_urls: units: the cutouts have composite, those of tr"
    ):
        data.val_dataloader()


def test_our_own_shards_are_validated_on_tars_of_others(
    shards_folder: Path, tmp_path: Path
) -> None:
    """Which state neither a pixel scale nor the bands' names."""
    shards = open_shards(shards_folder)
    has = shards.format
    assert (has.pixel_scale, has.named_bands) == (0.263, ("g", "r", "i"))
    ours = shards.manifest.patterns(str(shards_folder))["train"]
    data = LensWebDatasetDataModule(
        ours, write_tars(tmp_path / "others", "npy"), flux_unit="background_sigma"
    )
    assert len(data.train_dataloader()) > 0
    images, _ = read(data, "val")
    np.testing.assert_array_equal(images, CUTOUTS)
    assert data.bands == has.bands


def test_a_server_that_gives_files_whole_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own, as many small ones, knows of no parts: each would be the whole tar again."""
    pattern = write_tars(tmp_path / "tars", "npy")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "tars"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = f"http://127.0.0.1:{server.server_port}/{Path(pattern).name}"
        assert len(read(LensWebDatasetDataModule(urls, urls), "val")[0]) == N
        monkeypatch.setattr(streaming, "BLOCK", 2**16)
        with pytest.raises(InputError, match=r"/part-0000.tar: its server gives files only whole"):
            read(LensWebDatasetDataModule(urls, urls), "val")
        kept = LensWebDatasetDataModule(urls, urls, cache_dir=tmp_path / "cache")
        assert len(read(kept, "val")[0]) == N
        server.shutdown()
