"""Batches from wherever their cutouts lie in memory."""

import ctypes
import mmap

import numpy as np
import pytest

from lens_pipeline.shards.memory import copy_from

LOW = 1 << 33  # an address far below those that a process is given
FIXED_NOREPLACE = 0x100000  # of Linux: there, or not at all


@pytest.mark.parametrize("far", [False, True])
def test_cutouts_are_copied_however_far_apart_they_lie(far: bool) -> None:
    """As between the heap and what is mapped: no array may say to have so many bytes."""
    wanted = np.random.default_rng(0).normal(size=(4, 5, 224, 224)).astype(np.float16)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    how = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (FIXED_NOREPLACE if far else 0)
    size = wanted[0].nbytes
    begin = libc.mmap(LOW if far else None, size, mmap.PROT_READ | mmap.PROT_WRITE, how, -1, 0)
    assert (begin == LOW) == far
    ctypes.memmove(begin, wanted[0].ctypes.data, size)
    try:
        addresses = [begin, *(one.ctypes.data for one in wanted[1:])]
        out = np.zeros_like(wanted)
        copy_from(np.array(addresses, dtype=np.int64), out)
    finally:
        libc.munmap(begin, size)
    np.testing.assert_array_equal(out, wanted)
