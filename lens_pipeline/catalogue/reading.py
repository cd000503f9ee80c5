"""Rows of a catalogue -> cutouts, in their order: here, or in processes where that is worth it."""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lens_pipeline.catalogue.cutout import Cutout, CutoutError
from lens_pipeline.catalogue.fits_images import strict_fits
from lens_pipeline.catalogue.images import read_cutout
from lens_pipeline.catalogue.table import Catalogue
from lens_pipeline.cores import n_cores
from lens_pipeline.locations import protocol_of
from lens_pipeline.progress import progress_bar

CHUNK = 64  # rows that are read at a time
REQUESTS = 16  # that are under way at a time to an object store, for each process
WORTH = 5.0  # seconds of reading for which a process is started

Source = tuple[int, list[str], str | None, list[str] | None]  # row, image files, unit, bands
Read = tuple[int, Cutout | CutoutError]


def read_cutouts(
    catalogue: Catalogue,
    image_size: int,
    *,
    bands: Sequence[str] | None = None,
    pad: bool = False,
    options: dict[str, Any] | None = None,
    rows: NDArray[np.integer] | None = None,
    progress: bool = True,
) -> Iterator[Read]:
    """(row, cutout or the reason against it) for every row, in order; see `read_cutout`.

    rows: which of them, from 0, by default all; progress: show it, see `progress_bar`.

    Where the first rows show that the others will take long, processes read them, one a core at
    most; a few chunks are in memory at a time. (So a script that reads a large catalogue needs the
    `if __name__ == "__main__":` that Python asks of one that starts processes.)
    """
    rows = np.arange(len(catalogue.table)) if rows is None else rows
    table = catalogue.table.iloc[rows]
    paths = table[catalogue.image_columns].to_numpy().tolist()
    unit = table["flux_unit"] if "flux_unit" in table else pd.Series([None] * len(table))
    units = [None if pd.isna(value) else value for value in unit]
    sources = zip(rows.tolist(), paths, units, catalogue.bands_of(rows), strict=True)
    chunks = iter(lambda: list(islice(sources, CHUNK)), [])
    read = partial(
        _read_chunk,
        size=image_size,
        bands=bands,
        pad=pad,
        options=options,
    )
    with progress_bar(
        total=len(table), desc="reading cutouts", unit="cutout", shown=progress
    ) as bar:
        begun = time.perf_counter()
        first = list(map(read, islice(chunks, 2)))
        done = sum(map(len, first))
        left = (time.perf_counter() - begun) / max(1, done) * (len(table) - done)
        for part in chain(first, _mapped(read, chunks, min(n_cores(), int(left / WORTH)))):
            yield from part
            bar.update(len(part))


def _read_chunk(sources: list[Source], **how: Any) -> list[Read]:
    def read(source: Source) -> Read:
        row, paths, unit, names = source
        try:
            return row, read_cutout(paths, flux_unit=unit, names=names, **how)
        except CutoutError as reason:
            return row, reason

    with strict_fits():
        if not any(protocol_of(path) for _, paths, *_ in sources for path in paths):
            return list(map(read, sources))
        with ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(read, sources))


def _mapped(read: Any, chunks: Iterator[list[Source]], processes: int) -> Iterator[list[Read]]:
    if processes < 2:
        yield from map(read, chunks)
        return
    # A fork of a process with threads, as any with fsspec in it is, may hang; a server that forks
    # would stay in memory for good.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin)
    waiting: deque[Future[list[Read]]] = deque()
    try:
        while True:
            waiting.extend(
                pool.submit(read, c) for c in islice(chunks, 2 * processes - len(waiting))
            )
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """A worker ends with the process that started it, however that ends, and not before it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
