"""Tars as the stock library writes them, and what a data module reads from them."""

import io
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import webdataset as wds
from PIL import Image

from lens_pipeline import LensWebDatasetDataModule

N = 47
RNG = np.random.default_rng(0)
CUTOUTS = RNG.normal(0, 1, (N, 3, 32, 32)).astype(np.float32)
CUTOUTS[:, 0, 0, 0] = np.arange(N)
LABELS = RNG.integers(0, 2, N)


def write_tars(folder: Path, kind: str, name: str = "part") -> str:
    """N cutouts in tars of twenty, as the stock library writes them; the pattern of their names."""
    folder.mkdir(exist_ok=True)
    pattern = str(folder / f"{name}-%04d.tar")
    with wds.ShardWriter(pattern, maxcount=20, verbose=0) as writer:
        for row in range(N):
            sample: dict[str, Any] = {"__key__": f"{row:05d}"}
            if kind == "npy":
                sample |= {"npy": CUTOUTS[row], "cls": int(LABELS[row])}
            else:
                content = io.BytesIO()
                Image.fromarray(picture(row)).save(content, "png" if kind == "png" else "jpeg")
                label = {"label": int(LABELS[row]), "id": f"galaxy {row}"}
                sample |= {kind: content.getvalue(), "json": label}
            writer.write(sample)
    return str(folder / f"{name}-{{0000..0002}}.tar")


def picture(row: int) -> np.ndarray:
    code = np.full((32, 32, 3), row, np.uint8)
    code[8:24, 8:24] = 5 * row + 1
    return code


def read(data: LensWebDatasetDataModule, name: str) -> tuple[np.ndarray, np.ndarray]:
    loader = data.train_dataloader() if name == "train" else data.val_dataloader()
    batches = list(loader)
    images = np.concatenate([batch["image"].float().numpy() for batch in batches])
    return images, np.concatenate([batch["label"].numpy() for batch in batches])


def upload(folder: Path, url: str) -> None:
    for path in folder.iterdir():
        with fsspec.open(f"{url}/{path.name}", "wb") as file:
            file.write(path.read_bytes())
