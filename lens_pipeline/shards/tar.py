"""Whole tar files in memory, with the headers of all samples filled in at once.

The standard library makes a header in some 30 us, which for small cutouts is most of the work; it
makes the first one here, and the others differ in their number, size and checksum alone.
"""

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 512
KEY_DIGITS = 8
RECORD = 20  # blocks: tar files end on a multiple of them

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Member:
    """One file of every sample: `payloads`, each behind the same `prefix`."""

    extension: str
    payloads: Sequence[bytes] | Bytes
    prefix: bytes = b""

    @property
    def sizes(self) -> NDArray[np.int64]:
        return np.array([len(self.prefix) + len(p) for p in self.payloads], dtype=np.int64)


def build_tar(
    first: int, members: Sequence[Member]
) -> tuple[memoryview, dict[str, NDArray[np.int64]]]:
    """A tar of samples `first`, `first + 1`, ..., each with one file of every member.

    Returns its bytes, and for each extension the offsets at which the payloads begin (behind the
    prefix). Modes, owners and times are fixed, so the same samples give the same bytes.
    """
    sizes = np.stack([member.sizes for member in members], axis=1)
    blocks = 1 + -(-sizes // BLOCK)  # a header, and the content rounded up
    ends = np.cumsum(blocks).reshape(blocks.shape)
    starts = ends - blocks
    total = int(ends[-1, -1]) + 2  # two empty blocks end a tar
    tar = np.zeros((-(-total // RECORD) * RECORD, BLOCK), np.uint8)
    flat = tar.reshape(-1)
    numbers = np.arange(first, first + len(sizes))
    keys = _digits(numbers, max(KEY_DIGITS, len(str(numbers[-1]))), 10)
    offsets = {}
    for column, member in enumerate(members):
        tar[starts[:, column]] = _headers(member.extension, keys, sizes[:, column])
        begin = (starts[:, column] + 1) * BLOCK
        prefix = np.frombuffer(member.prefix, np.uint8)
        for at, payload in zip(begin.tolist(), member.payloads, strict=True):
            flat[at : at + len(prefix)] = prefix
            content = np.frombuffer(payload, np.uint8) if isinstance(payload, bytes) else payload
            flat[at + len(prefix) : at + len(prefix) + len(content)] = content
        offsets[member.extension] = begin + len(prefix)
    return flat.data, offsets


def _headers(extension: str, keys: Bytes, sizes: NDArray[np.int64]) -> Bytes:
    """(samples, BLOCK): POSIX ustar headers; see the fields in `man 5 tar`."""
    width = keys.shape[1]
    template = tarfile.TarInfo(f"{'0' * width}.{extension}")
    template.mode = 0o444
    header = np.frombuffer(template.tobuf(tarfile.USTAR_FORMAT), np.uint8)
    headers = np.tile(header, (len(keys), 1))
    headers[:, :width] = keys
    headers[:, 124:135] = _digits(sizes, 11, 8)
    headers[:, 148:156] = ord(" ")  # the checksum is taken with its own field blank
    headers[:, 148:154] = _digits(headers.sum(axis=1, dtype=np.int64), 6, 8)
    headers[:, 154] = 0
    return headers


def _digits(numbers: NDArray[np.int64], width: int, base: int) -> Bytes:
    """ASCII digits (n, width) of whole numbers, zero-padded."""
    powers = base ** np.arange(width - 1, -1, -1)
    return (ord("0") + numbers[:, None] // powers % base).astype(np.uint8)
