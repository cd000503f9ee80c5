"""Random numbers that belong to a host galaxy, whatever else is drawn before or beside it."""

import hashlib
from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is for; streams of different purposes never overlap."""

    CANDIDATES = 0
    DECOY = 1
    NOISE = 2
    KIND = 3
    NEIGHBOURS = 4
    DEFECTS = 5
    SATELLITES = 6


def stream(seed: int, host: int, purpose: Purpose, block: int = 0) -> np.random.Generator:
    """Counter-based: Philox with the key (seed, host), counting on from (block, purpose)."""
    key = np.array([seed, host], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, block, int(purpose)]))


def number_of(name: str, n: int) -> int:
    """A number below n that is a function of the name alone; names are spread evenly."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % n
