"""Batches put together from where their cutouts lie in memory, at the pace of memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lens_pipeline.catalogue.dataset import Empty


@dataclass(frozen=True)
class ShardContent:
    """The bytes of a shard, mapped or in memory."""

    view: memoryview

    @cached_property
    def address(self) -> int:
        """Of the first byte. It holds as long as `view` does."""
        return np.frombuffer(self.view, np.uint8).ctypes.data


MOST = 2**62  # bytes that an array may say to have


@dataclass(frozen=True)
class _Memory:
    """Memory as an array, by NumPy's array interface: nothing is checked, or kept."""

    __array_interface__: dict[str, Any]


def copy_from(addresses: NDArray[np.int64], out: NDArray[Any]) -> None:
    """Copy what lies at each address, aligned to `out`'s dtype, into a row of `out` (n, ...).

    As rows of one array that begins at the lowest address, each a number after the one before:
    torch gathers them in one call, on all threads and without Python's lock. Copying one after the
    other takes twice as long, and a GPU would wait meanwhile for whoever launches its work.
    """
    if not len(out):
        return
    first, step = int(addresses.min()), out.itemsize
    number = (addresses - first) // step
    width, n_numbers = out[0].size, int(number.max()) + 1

    def rows(begin: int, n: int) -> NDArray[Any]:
        about = {
            "data": (begin, False),
            "shape": (n, width),
            "strides": (step, step),
            "typestr": out.dtype.str,
            "version": 3,
        }
        return np.asarray(_Memory(about))

    if n_numbers * width * step >= MOST:  # between the heap and what is mapped lies most of all
        for begin, row in zip(addresses.tolist(), out.reshape(len(out), width), strict=True):
            row[:] = rows(begin, 1)[0]
        return
    torch.index_select(
        torch.from_numpy(rows(first, n_numbers)),
        0,
        torch.from_numpy(number),
        out=torch.from_numpy(out).view(len(out), width),
    )


def stacked(cutouts: Sequence[NDArray[Any]], shape: tuple[int, ...], empty: Empty) -> NDArray[Any]:
    """The cutouts, each of this shape, in one array; float32 where there are none."""
    if not cutouts:
        return empty((0, *shape), np.dtype(np.float32))
    return np.stack(cutouts, out=empty((len(cutouts), *shape), cutouts[0].dtype))
