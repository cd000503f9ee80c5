"""How fast batches are read, shuffled: ours from tar shards against the peers and the limit.

The same 64-pixel, three-band float16 cutouts for all; 128 a batch; the limit is a NumPy gather from
an array in memory. LitData and MosaicML Streaming are measured where they are installed:
`pip install -r benchmarks/requirements.txt`.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds

from benchmarks._cutouts import BANDS, SIZE, make_dataset
from benchmarks._harness import SCRATCH, Row, Target, options, report
from lens_pipeline.catalogue.dataset import open_dataset
from lens_pipeline.shards import write_shards
from lens_pipeline.shards.datamodule import LensDataModule

BATCH = 128
OURS, LIMIT = "lens_pipeline", "NumPy gather from memory"
Epoch = Callable[[], Iterator[Any]]


def ours(shards: Path) -> Epoch:
    data = LensDataModule(shards, batch_size=BATCH)
    return lambda: (batch["image"] for batch in data.train_dataloader())


def stock_webdataset(shards: Path, n: int) -> Epoch:
    urls = sorted(str(path) for path in shards.glob("train-*.tar"))

    def epoch() -> Iterator[Any]:
        data = (
            wds.WebDataset(urls, shardshuffle=100, nodesplitter=wds.split_by_node)
            .shuffle(1000)
            .decode()
            .to_tuple("npy", "cls")
            .batched(BATCH)
        )
        return (batch[0] for batch in wds.WebLoader(data, batch_size=None, num_workers=2))

    return epoch


def gather(images: np.ndarray) -> Epoch:
    def epoch() -> Iterator[Any]:
        order = np.random.default_rng(0).permutation(len(images))
        for start in range(0, len(order), BATCH):
            yield images[order[start : start + BATCH]]

    return epoch


def litdata(images: np.ndarray, folder: Path) -> Epoch:
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    optimize(
        fn=_Sample(images), inputs=list(range(len(images))), output_dir=str(folder),
        chunk_bytes="32MB", num_workers=2, verbose=False,
    )  # fmt: skip

    def epoch() -> Iterator[Any]:
        data = StreamingDataset(str(folder), shuffle=True)
        return (b["image"] for b in StreamingDataLoader(data, batch_size=BATCH, num_workers=2))

    return epoch


class _Sample:
    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __call__(self, index: int) -> dict[str, Any]:
        return {"image": torch.from_numpy(self.images[index]), "label": index % 2}


def mosaicml(images: np.ndarray, folder: Path) -> Epoch:
    from streaming import MDSWriter, StreamingDataset

    shape = ",".join(map(str, images.shape[1:]))
    columns = {"image": f"ndarray:float16:{shape}", "label": "int"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for index, image in enumerate(images):
            writer.write({"image": image, "label": index % 2})

    def epoch() -> Iterator[Any]:
        data = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
        loader = torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=2)
        return (batch["image"] for batch in loader)

    return epoch


def rate(epoch: Epoch, n: int) -> float:
    """Cutouts a second of one epoch, from its first batch on: starting workers is apart.

    Each batch is looked at.
    """
    batches = epoch()
    first = len(next(batches))
    seen, begun = first, time.perf_counter()
    for batch in batches:
        seen += len(batch)
        _ = float(batch[-1, 0, 0, 0])
    seconds = time.perf_counter() - begun
    if seen != n:
        raise RuntimeError(f"{seen} cutouts of {n} in an epoch")
    return (seen - first) / seconds


def measure(arguments: argparse.Namespace) -> tuple[list[Row], list[Target]]:
    n = arguments.n
    with tempfile.TemporaryDirectory(dir=SCRATCH) as name:
        folder = Path(name)
        dataset = make_dataset(folder / "dataset", n)
        (folder / "shards").mkdir()
        write_shards(dataset, folder / "shards")
        images = np.asarray(open_dataset(dataset).images("train")).astype(np.float16)
        assert images.shape == (n, len(BANDS), SIZE, SIZE)
        epochs = {
            OURS: ours(folder / "shards"),
            "WebDataset, two workers": stock_webdataset(folder / "shards", n),
            LIMIT: gather(images),
        }
        for title, module, make in (
            ("LitData, two workers", "litdata", litdata),
            ("MosaicML Streaming, two workers", "streaming", mosaicml),
        ):
            if importlib.util.find_spec(module):
                epochs[title] = make(images, folder / module)
        first = {title: rate(epoch, n) for title, epoch in epochs.items()}
        later: dict[str, list[float]] = {title: [] for title in epochs}
        for _ in range(arguments.repeats):
            for title, epoch in epochs.items():
                later[title].append(rate(epoch, n))
    median = {title: statistics.median(values) for title, values in later.items()}
    rows: list[Row] = [
        {
            "loader": title,
            "first epoch/s": round(first[title]),
            "later epochs/s": round(median[title]),
            "ours/this": median[OURS] / median[title],
            "spread": f"{min(later[title]):.0f}-{max(later[title]):.0f}",
        }
        for title in epochs
    ]
    bars = {"WebDataset": 20.0, "LitData": 4.0, "MosaicML": 4.0}
    targets = [Target(f"ours / {LIMIT}", median[OURS] / median[LIMIT], at_least=0.5)]
    for title in epochs:
        for peer, least in bars.items():
            if title.startswith(peer):
                targets.append(Target(f"ours / {title}", median[OURS] / median[title], least))
    return rows, targets


if __name__ == "__main__":
    arguments = options(__doc__, n=10_000)
    report(arguments, lambda: measure(arguments))
