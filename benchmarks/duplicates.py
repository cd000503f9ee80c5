"""Whether near-duplicates are found among many cutouts that only look alike.

Galaxies of all shapes in noise, one band of 48 pixels; of some of them copies in another split. A
row a kind of copy: how many are among the pairs whose pixels are compared, and how many of these
the correlation knows again. Then, for hashes by chance, how many pairs there are for each cutout:
what is compared, PAIRS_PER_CUTOUT, must leave room for copies, however large a catalogue is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._harness import Row, Target, options, report
from lens_pipeline.catalogue.cutout import SIGMA_UNITS
from lens_pipeline.catalogue.duplicates import (
    MIN_CORRELATION,
    PAIRS,
    PAIRS_PER_CUTOUT,
    candidates,
    perceptual_hash,
    phase_correlation,
)

SIZE, MARGIN = 48, 4  # pixels
EACH = 200  # copies of a kind
CHUNK = 1000
HALF = np.float32(0.5)
FRACTIONS = (0.65, 0.15, 0.2)  # of the splits

Images = NDArray[np.float32]


def skies(n: int, seed: int) -> Images:
    """(n, 1, side, side) with MARGIN around: an exponential disc or two in smoothed noise."""
    random = np.random.default_rng(seed)
    side = SIZE + 2 * MARGIN
    y, x = np.mgrid[:side, :side].astype(np.float32) - side / 2
    sky = random.standard_normal((n, side + 1, side + 1), np.float32)
    sky = HALF * (sky[:, 1:, 1:] + sky[:, :-1, 1:] + sky[:, 1:, :-1] + sky[:, :-1, :-1])
    for brightest, spread in ((40, 1), (8, 10)):
        column = (n, 1, 1)
        angle, axis = random.uniform(0, np.pi, column), random.uniform(0.3, 1, column)
        right, up = x - random.normal(0, spread, column), y - random.normal(0, spread, column)
        along = right * np.cos(angle) + up * np.sin(angle)
        across = (up * np.cos(angle) - right * np.sin(angle)) / axis
        scale = random.uniform(1.5, 5, column)
        disc = np.exp(-np.hypot(along, across) / scale)
        sky += (random.uniform(0.1, 1, column) * brightest * disc).astype(np.float32)
    return sky[:, None]


def cut(images: Images, down: int = 0, right: int = 0) -> Images:
    rows, columns = (slice(MARGIN + low, MARGIN + low + SIZE) for low in (down, right))
    return images[:, :, rows, columns].copy()


def noisy(sigma: float) -> Callable[[Images], Images]:
    def copied(images: Images) -> Images:
        noise = np.random.default_rng(1).standard_normal(images.shape, np.float32)
        return cut(images + np.float32(sigma) * noise)

    return copied


COPIES: dict[str, Callable[[Images], Images]] = {
    "exact": cut,
    "a pixel aside": lambda images: cut(images, 1, 0),
    "three pixels aside": lambda images: cut(images, -3, 3),
    "half a pixel aside": lambda images: HALF * (cut(images) + cut(images, 0, 1)),
    "resampled, mirrored": lambda images: HALF * (cut(images, 1) + cut(images, 2))[..., ::-1],
    "noise of 0.2 sigma": noisy(0.2),
    "noise of 0.4 sigma": noisy(0.4),
}


def found_copies(n: int) -> list[Row]:
    split = np.random.default_rng(0).choice(len(FRACTIONS), n, p=FRACTIONS)
    hashes = [
        perceptual_hash(cut(skies(min(CHUNK, n - first), first)), SIGMA_UNITS)
        for first in range(0, n, CHUNK)
    ]
    first = skies(min(CHUNK, n), 0)
    originals = np.flatnonzero(split[: len(first)] == 0)[:EACH]
    copies = {kind: copy(first[originals]) for kind, copy in COPIES.items()}
    hashes += [perceptual_hash(of, SIGMA_UNITS) for of in copies.values()]
    copied_to = np.full(len(copies) * len(originals), 2)
    pairs = candidates(np.concatenate(hashes), np.concatenate([split, copied_to]))
    compared = pairs[: max(PAIRS, int(PAIRS_PER_CUTOUT * (n + len(copied_to))))]
    proposed = {tuple(pair) for pair in compared[:, :2].tolist()}
    rows = []
    for number, (kind, images) in enumerate(copies.items()):
        begin = n + number * len(originals)
        there = np.array([(row, begin + k) in proposed for k, row in enumerate(originals)])
        laid = images[..., ::-1] if "mirrored" in kind else images
        correlation = phase_correlation(cut(first[originals]), laid.copy(), SIGMA_UNITS)
        known = (correlation >= MIN_CORRELATION) & there
        rows.append({"cutouts": n, "copies": kind, "compared": there.mean(), "found": known.mean()})
    return [*rows, {"cutouts": n, "copies": "pairs for each cutout", "compared": len(pairs) / n}]


def by_chance(n: int) -> Row:
    random = np.random.default_rng(n)
    hashes = random.integers(0, 2**64, (n, 2, 2), dtype=np.uint64)
    pairs: Any = candidates(hashes, random.choice(len(FRACTIONS), n, p=FRACTIONS))
    return {"cutouts": n, "copies": "none, hashes by chance", "compared": len(pairs) / n}


def measure(n: int) -> tuple[Sequence[Row], Sequence[Target]]:
    rows = found_copies(n)
    chance = [by_chance(times * n) for times in (1, 2, 4)]
    worst = min(row["found"] for row in rows if "found" in row)
    return [*rows, *chance], [
        Target("copies found, of the worst kind", worst, at_least=0.95),
        Target("pairs for each cutout", rows[-1]["compared"], at_most=PAIRS_PER_CUTOUT),
        Target("by chance", max(row["compared"] for row in chance), at_most=PAIRS_PER_CUTOUT / 2),
    ]


if __name__ == "__main__":
    arguments = options(__doc__, n=50_000)
    report(arguments, lambda: measure(arguments.n))
