"""Parts of tar files, with the headers of many samples filled in at once.

The standard library makes a header in some 30 us, which for small cutouts is most of the work; it
makes the first one here, and the others differ in their number, size and checksum alone.
"""

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

KEY_DIGITS = 8

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Member:
    """One file of every sample, behind one `prefix`: n payloads of any length, or the length that
    all have, where the caller fills them in."""

    extension: str
    payloads: Sequence[bytes] | int
    prefix: bytes = b""

    def part(self, rows: slice) -> "Member":
        """The files of some of the samples."""
        payloads = self.payloads if isinstance(self.payloads, int) else self.payloads[rows]
        return replace(self, payloads=payloads)

    def sizes(self, n: int) -> NDArray[np.int64]:
        if isinstance(self.payloads, int):
            return np.full(n, len(self.prefix) + self.payloads)
        return len(self.prefix) + np.array([len(payload) for payload in self.payloads])


def tar_part(
    first: int, n: int, members: Sequence[Member], scratch: Bytes | None = None
) -> tuple[Bytes, dict[str, NDArray[np.int64]]]:
    """The part of a tar with samples `first`, `first + 1`, ..., each with one file of every member.

    Returns its bytes, and for each extension the offsets in it at which the payloads begin (behind
    the prefix). Modes, owners and times are fixed: the same samples give the same bytes.
    scratch: memory for the bytes, used where it is large enough.
    """
    sizes = np.stack([member.sizes(n) for member in members], axis=1)
    blocks = 1 + -(-sizes // tarfile.BLOCKSIZE)  # a header, and the content rounded up
    ends = np.cumsum(blocks).reshape(blocks.shape)
    starts = ends - blocks
    length = int(ends[-1, -1]) * tarfile.BLOCKSIZE
    if scratch is None or len(scratch) < length:
        scratch = np.empty(length, np.uint8)
    flat = scratch[:length]
    flat[:] = 0
    part = flat.reshape(-1, tarfile.BLOCKSIZE)
    numbers = np.arange(first, first + n)
    keys = _digits(numbers, max(KEY_DIGITS, len(str(numbers[-1]))), 10)
    alike = bool((blocks == blocks[0]).all())
    offsets = {}
    for column, member in enumerate(members):
        part[starts[:, column]] = _headers(member.extension, keys, sizes[:, column])
        begin = (starts[:, column] + 1) * tarfile.BLOCKSIZE
        offsets[member.extension] = begin + len(member.prefix)
        prefix = np.frombuffer(member.prefix, np.uint8)
        if alike:
            behind = flat.reshape(n, -1)[:, begin[0] :]
            behind[:, : len(prefix)] = prefix
            if not isinstance(member.payloads, int):
                # A NumPy text is padded with zeros, as a file in a tar is.
                payloads = np.array(member.payloads)
                width = payloads.itemsize
                behind[:, len(prefix) : len(prefix) + width] = payloads.view(np.uint8).reshape(
                    n, width
                )
            continue
        for row, at in enumerate(begin.tolist()):
            payload = b"" if isinstance(member.payloads, int) else member.payloads[row]
            content = np.frombuffer(member.prefix + payload, np.uint8)
            flat[at : at + len(content)] = content
    return flat, offsets


def word_sums(
    part: Bytes, begin: NDArray[np.int64], length: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """The sum of each payload's 64-bit words, zero-padded, modulo 2^64; none ends with the part.

    It tells which samples of a damaged shard are damaged. That a shard is, its sha256 tells.
    """
    ends = np.stack([begin, begin + -(-length // 8) * 8], axis=1) // 8
    return np.add.reduceat(part.view("<u8"), ends.ravel())[::2]  # every other is what lies between


def tar_end(size: int) -> bytes:
    """What ends a tar of parts with `size` bytes: two empty blocks, and up to a whole record."""
    end = 2 * tarfile.BLOCKSIZE
    return bytes(end + -(size + end) % tarfile.RECORDSIZE)


def _headers(extension: str, keys: Bytes, sizes: NDArray[np.int64]) -> Bytes:
    """(samples, tarfile.BLOCKSIZE): POSIX ustar headers; see the fields in `man 5 tar`."""
    width = keys.shape[1]
    headers = np.tile(_template(extension, width), (len(keys), 1))
    headers[:, :width] = keys
    headers[:, 124:135] = _digits(sizes, 11, 8)
    headers[:, 148:156] = ord(" ")  # the checksum is taken with its own field blank
    headers[:, 148:154] = _digits(headers.sum(axis=1, dtype=np.int64), 6, 8)
    headers[:, 154] = 0
    return headers


@cache
def _template(extension: str, digits: int) -> Bytes:
    info = tarfile.TarInfo(f"{'0' * digits}.{extension}")
    info.mode = 0o444
    return np.frombuffer(info.tobuf(tarfile.USTAR_FORMAT), np.uint8)


def _digits(numbers: NDArray[np.int64], width: int, base: int) -> Bytes:
    """ASCII digits (n, width) of whole numbers, zero-padded."""
    powers = base ** np.arange(width - 1, -1, -1)
    return (ord("0") + numbers[:, None] // powers % base).astype(np.uint8)
