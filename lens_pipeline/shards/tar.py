"""Parts of tar files, with the headers of many samples filled in at once.

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
    """One file of every sample: `payloads` (n, bytes) or n of any length, behind one `prefix`."""

    extension: str
    payloads: Sequence[bytes] | Bytes
    prefix: bytes = b""

    @property
    def sizes(self) -> NDArray[np.int64]:
        return len(self.prefix) + np.array([len(payload) for payload in self.payloads])


def tar_part(first: int, members: Sequence[Member]) -> tuple[Bytes, dict[str, NDArray[np.int64]]]:
    """The part of a tar with samples `first`, `first + 1`, ..., each with one file of every member.

    Returns its bytes, and for each extension the offsets in it at which the payloads begin (behind
    the prefix). Modes, owners and times are fixed: the same samples give the same bytes.
    """
    sizes = np.stack([member.sizes for member in members], axis=1)
    blocks = 1 + -(-sizes // BLOCK)  # a header, and the content rounded up
    ends = np.cumsum(blocks).reshape(blocks.shape)
    starts = ends - blocks
    part = np.zeros((int(ends[-1, -1]), BLOCK), np.uint8)
    flat = part.reshape(-1)
    numbers = np.arange(first, first + len(sizes))
    keys = _digits(numbers, max(KEY_DIGITS, len(str(numbers[-1]))), 10)
    alike = len(set(blocks.sum(axis=1).tolist())) == 1
    offsets = {}
    for column, member in enumerate(members):
        part[starts[:, column]] = _headers(member.extension, keys, sizes[:, column])
        begin = (starts[:, column] + 1) * BLOCK
        offsets[member.extension] = begin + len(member.prefix)
        prefix = np.frombuffer(member.prefix, np.uint8)
        if alike and isinstance(member.payloads, np.ndarray):
            behind = part.reshape(len(sizes), -1)[:, begin[0] :]
            behind[:, : len(prefix)] = prefix
            behind[:, len(prefix) : sizes[0, column]] = member.payloads
            continue
        for at, payload in zip(begin.tolist(), member.payloads, strict=True):
            content = np.frombuffer(payload, np.uint8)
            flat[at : at + len(prefix)] = prefix
            flat[at + len(prefix) : at + len(prefix) + len(content)] = content
    return flat, offsets


def tar_end(size: int) -> bytes:
    """What ends a tar of parts with `size` bytes: two empty blocks, and up to a whole record."""
    blocks = size // BLOCK + 2
    return bytes((-(-blocks // RECORD) * RECORD) * BLOCK - size)


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
