"""The cutouts that the data benchmarks share: 64 pixels, three bands, noise with a source. The same
thousand, over and over."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

BANDS, SIZE = ("g", "r", "i"), 64


def make_dataset(folder: Path, n: int, n_others: int = 1) -> Path:
    """A processed dataset of n labelled training cutouts (and `n_others` in each other split)."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    source = 50 * np.exp(-(x**2 + y**2) / 40).astype(np.float32)
    splits = {}
    row = 0
    for split, count in (
        ("train", n),
        *((name, n_others) for name in ("val", "test", "unlabelled")),
    ):
        shape = (count, len(BANDS), SIZE, SIZE)
        images = np.lib.format.open_memmap(folder / f"{split}.npy", "w+", "<f4", shape)
        some = random.standard_normal((min(count, 1000), *shape[1:]), np.float32) + source
        for start in range(0, count, 1000):
            part = images[start : start + 1000]
            part[:] = some[: len(part)]
        images.flush()
        label = pd.array(np.arange(count) % 2, dtype="Int8")
        if split == "unlabelled":
            label[:] = pd.NA
        ids = [f"{split}-{number:08d}" for number in range(count)]
        table = pd.DataFrame({"id": ids, "label": label, "group": ids, "split": split})
        table["row"] = np.arange(row, row := row + count)
        table.to_parquet(folder / f"{split}.parquet")
        splits[split] = {"n": count, "n_lens": count // 2, "n_nonlens": count - count // 2}
    pd.DataFrame({"id": []}).to_parquet(folder / "rejects.parquet")
    facts = {
        "schema": 1,
        "origin": "benchmark",
        "bands": BANDS,
        "image_size": SIZE,
        "units": "background_sigma",
        "pixel_scale": None,
        "splits": splits,
        "content": "benchmark",
    }
    (folder / "dataset.json").write_text(json.dumps(facts))
    return folder
