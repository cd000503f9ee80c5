"""Near-duplicates: cutouts of the same sky, under two names and in two splits.

A catalogue may hold a galaxy twice: cut out again some pixels aside, resampled, in other units,
compressed, mirrored and turned by right angles as those do who enlarge a training set. A network
that trained on one knows the other. Different galaxies look alike, too, but their noise does not,
and both steps go by it: hashes of 128 bits propose pairs, and a correlation of the pixels decides.
So a stack of other exposures is not found, which shares no noise; nor one with bright arcs painted
on it, as a rule, which have a hash of their own; nor one turned by other angles.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import fft

from lens_pipeline.catalogue.cutout import SIGMA_UNITS
from lens_pipeline.catalogue.splits import SPLITS
from lens_pipeline.progress import progress_bar

if TYPE_CHECKING:
    from lens_pipeline.catalogue.dataset import Dataset

CHUNK = 64  # cutouts, or pairs of them, in memory at a time
SOFTENING_SIGMA = 2.0  # as the networks see a cutout: linear over the noise
LUMA = (0.299, 0.587, 0.114)  # of red, green, blue (ITU-R BT.601): what JPEG keeps best

# Of the hash.
STEP = 1 / 43  # cycles/pixel, between the waves; at least one cycle a cutout
LOWEST = 2  # STEPs: below, most galaxies are alike
PEAK_WIDTH = 0.45  # of a side: of the blur in which the brightest point is looked for

# Of the pairs that are proposed. Of each word of the hashes of independent images, 32 +- 4 bits
# differ.
WORD = 64  # bits
MAX_DISTANCE = 14  # bits of the first word; of both words together, see `furthest`
# So many times more galaxies are alike in the first word than such hashes would be, by their light;
# in the second it is their noise that counts (benchmarks.duplicates).
LIGHT = 60
PIECES, KEY_PIECES = 12, 3  # so 16 bits are compared at a time
NEIGHBOURS = 16  # that one is compared with where more are alike
PAIRS_PER_CUTOUT, PAIRS = 0.3, 10_000  # whose pixels are compared, at least PAIRS

# Eight ways to lay a cutout: `turned` by right angles, those from MIRRORED on mirrored before.
MIRRORED, HALF = 4, 2

# Of the correlation. Of different skies, simulated and real, flux, PNG or JPEG, it reaches 0.27
# (56 pixels) or 0.32 (32 pixels), and 0.36 in coarse JPEG where a lens and its decoy share their
# neighbours; copies as the tests make them have 0.5 or more.
MAX_SHIFT = 0.25  # of a cutout's side
MIN_CORRELATION = 0.4


def find_near_duplicates(dataset: "Dataset") -> tuple[pd.DataFrame, int]:
    """(near-duplicates across train, val and test; how many that look alike were not compared).

    The table has a row a pair: id, split, other_id, other_split, correlation (`phase_correlation`,
    at least MIN_CORRELATION), the most alike first; and how the other is laid to look like the one:
    mirrored (left to right) and then rotated (degrees, counterclockwise). Pixels are compared of
    PAIRS_PER_CUTOUT of the pairs of `candidates`, the nearest first; there are more where a
    catalogue holds an image a hundred times.
    """
    tables = {part: dataset.table(part)[["id"]] for part in SPLITS}
    cutouts = pd.concat(tables, names=["split", "row"]).reset_index()
    split = np.repeat(range(len(tables)), [len(table) for table in tables.values()])
    pairs = candidates(_hashes(dataset, cutouts), split)
    compared = pairs[: max(PAIRS, int(PAIRS_PER_CUTOUT * len(cutouts)))]
    correlation, turns = _correlations(dataset, cutouts, compared)
    found = correlation >= MIN_CORRELATION
    one, other = (cutouts.iloc[side].reset_index(drop=True) for side in compared[found, :2].T)
    table = pd.DataFrame(
        {
            "id": one["id"],
            "split": one["split"],
            "other_id": other["id"],
            "other_split": other["split"],
            # Beyond, it differs from processor to processor, and with it the step's content.
            "correlation": correlation[found].round(3),
            "mirrored": turns[found] >= MIRRORED,
            "rotated": turns[found] % MIRRORED * 90,
        }
    )
    order = ["correlation", "id", "other_id"]
    table = table.sort_values(order, ascending=[False, True, True], kind="stable")
    # What looks alike mirrored, too, has been compared both ways.
    table = table.drop_duplicates(["id", "other_id"], ignore_index=True)
    return table, len(pairs) - len(compared)


def _progress(total: int, what: str, unit: str) -> Any:
    return progress_bar(total=total, desc=what, unit=unit, delay=2)


def _hashes(dataset: "Dataset", cutouts: pd.DataFrame) -> NDArray[np.uint64]:
    block = _block(dataset)
    hashes = [np.zeros((0, 2, 2), np.uint64)]
    with _progress(len(cutouts), "hashing cutouts", "cutout") as progress:
        for part in SPLITS:
            with dataset.open_images(part) as file:
                for images in file.blocks(0, int((cutouts["split"] == part).sum()), block):
                    hashes.append(perceptual_hash(images, dataset.format.units))
                    progress.update(len(images))
    return np.concatenate(hashes)


def _correlations(
    dataset: "Dataset", cutouts: pd.DataFrame, pairs: NDArray[np.int_]
) -> tuple[NDArray[np.float32], NDArray[np.int_]]:
    """(m,), (m,): `phase_correlation` of pairs (m, 3) of rows of `cutouts` (split, row) and a turn
    of the second, or this and half a turn; and the turn where it is higher."""
    split, row = cutouts["split"].tolist(), cutouts["row"].tolist()
    blocks = _block(dataset), _block(dataset)
    correlation = [np.zeros((2, 0), np.float32)]
    with ExitStack() as stack, _progress(len(pairs), "comparing cutouts", "pair") as progress:
        files = {part: stack.enter_context(dataset.open_images(part)) for part in SPLITS}
        for start in range(0, len(pairs), CHUNK):
            some = pairs[start : start + CHUNK]
            for block, side in zip(blocks, some.T[:2], strict=True):
                for place, cutout in enumerate(side):
                    next(files[split[cutout]].blocks(row[cutout], 1, block[place : place + 1]))
            images, others = (block[: len(some)] for block in blocks)
            for other, turn in zip(others, some[:, 2], strict=True):
                other[:] = turned(other, turn)
            ways = (others, turned(others, HALF))
            units = dataset.format.units
            correlation.append(np.stack([phase_correlation(images, way, units) for way in ways]))
            progress.update(len(some))
    both = np.concatenate(correlation, axis=1)
    return both.max(axis=0), pairs[:, 2] + HALF * both.argmax(axis=0)


def turned(images: NDArray[np.float32], turn: int) -> NDArray[np.float32]:
    """Images (..., size, size) laid in one of eight ways, by its number."""
    mirrored = images[..., ::-1] if turn >= MIRRORED else images
    # A copy: what is turned in place would be read while it is written.
    return np.rot90(mirrored, turn % MIRRORED, axes=(-2, -1)).copy()


def _block(dataset: "Dataset") -> NDArray[np.float32]:
    size = dataset.format.image_size
    return np.empty((CHUNK, len(dataset.format.bands), size, size), np.float32)


def _grey(images: NDArray[np.float32], units: str) -> NDArray[np.float32]:
    """float32 (n, size, size): the mean of the bands, stretched unless someone has done so."""
    if units == SIGMA_UNITS:
        return np.arcsinh(images.mean(axis=1) / np.float32(SOFTENING_SIGMA))
    if images.shape[1] == len(LUMA):
        return np.einsum("nbyx,b->nyx", images, np.array(LUMA, np.float32))
    return images.mean(axis=1)


def _hann(distance: NDArray[np.floating]) -> NDArray[np.float32]:
    """Hann's window, from its middle (0) to its ends (-0.5, 0.5) and beyond."""
    return (np.cos(np.pi * distance.clip(-0.5, 0.5)) ** 2).astype(np.float32)


def perceptual_hash(images: NDArray[np.float32], units: str) -> NDArray[np.uint64]:
    """uint64 (n, 2, 2): hashes of float32 images (n, bands, size, size) and of these transposed, of
    two words each, that of the longer waves first.

    Of copies few bits differ, in the first word fewer.

    The usual one, signs of a cosine transform, says where the galaxy is and changes with a shift by
    a few pixels. Here a bit says whether a wave of the image is stronger than the one at a right
    angle to it: where the image is does not matter, nor how bright it is, and half a turn changes
    nothing, a quarter of one all bits. A window on its brightest point covers the same sky in both.
    """
    grey = _grey(images, units)
    n, size = len(grey), grey.shape[-1]
    place = np.arange(size, dtype=np.float32)
    middle = slice(size // 4, size - size // 4)
    blur = _hann((place[:, None] - place) / (PEAK_WIDTH * size))
    blur = (blur / blur.sum(axis=1, keepdims=True))[middle]
    smooth = blur @ grey @ blur.T
    peak = np.unravel_index(smooth.reshape(n, -1).argmax(axis=1), smooth.shape[1:])
    rows, columns = (_hann((place - (size // 4 + at[:, None])) / size) for at in peak)
    windowed = grey - grey.mean(axis=(1, 2), keepdims=True)
    windowed *= rows[:, :, None] * columns[:, None, :]

    i, j = _WAVES
    most = max(i.max(), j.max())
    frequency = max(STEP, 1 / size) * np.arange(-most, most + 1)
    waves = np.exp(-2j * np.pi * np.outer(frequency, place)).astype(np.complex64)
    strength = np.abs(waves @ windowed @ waves.T)
    bits = [
        wave[:, most + i, most + j] > wave[:, most - j, most + i]
        for wave in (strength, strength.swapaxes(1, 2))
    ]
    octets = np.packbits(np.stack(bits, axis=1), axis=2)
    return np.frombuffer(octets.tobytes(), ">u8").astype(np.uint64).reshape(n, 2, 2)


def _waves() -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """The lowest waves from LOWEST on, a bit of two words each: their (y, x) frequencies in STEPs,
    in a quarter plane."""
    i, j = (side.ravel() for side in np.mgrid[:16, 1:17])
    length = np.hypot(i, j)
    order = np.lexsort((j, length))
    order = order[length[order] >= LOWEST][: 2 * WORD]
    return i[order], j[order]


_WAVES = _waves()


def furthest(n: int) -> int:
    """How many bits of both words of two hashes of n cutouts may differ for them to be alike.

    So many that of the pairs that are compared half are so by chance, as these grow as n^2. Up to
    some 5,000 cutouts the first word alone decides; of 10^7, 29 bits may differ: copies that are
    shifted or resampled are found as among few, those in coarse JPEG or with much noise not.
    """
    first = [math.comb(WORD, bits) / 2**WORD for bits in range(WORD + 1)]  # that so many differ
    within = np.cumsum(first)
    room = max(PAIRS, PAIRS_PER_CUTOUT * n) / 2
    most = MAX_DISTANCE + WORD
    # Of n^2 / 2 pairs half are of two splits, and each is laid in four ways.
    while most > MAX_DISTANCE and room < LIGHT * n**2 * sum(
        first[bits] * within[min(most - bits, WORD)] for bits in range(MAX_DISTANCE + 1)
    ):
        most -= 1
    return most


def candidates(hashes: NDArray[np.uint64], split: NDArray[np.int_]) -> NDArray[np.int_]:
    """(m, 3): pairs of different splits whose `perceptual_hash`es (n, 2, 2) are at most
    MAX_DISTANCE bits apart in the first word and `furthest` in both, with the turn of the second
    (0, 1, or these mirrored; half a turn has the same).

    The nearest come first; of a pair, the one of the lower split. The bits of the first word are
    dealt into PIECES, and hashes compared that agree in any KEY_PIECES of them: pairs that are 8
    bits apart are all found, at 10 bits 99 in 100, at 14 bits 72 (locality-sensitive hashing, Indyk
    & Motwani 1998). Where more than NEIGHBOURS agree, each is compared with that many, in the order
    of the hashes: of a crowd of look-alikes some pairs are found, not all.
    """
    second = np.flatnonzero(split > split.min(initial=0))  # of a pair, may be
    row = np.concatenate([np.arange(len(split)), second, second, second])
    turn = np.repeat([0, 1, MIRRORED, MIRRORED + 1], [len(split), *(3 * [len(second)])])
    plain, transposed = hashes[:, 0], hashes[:, 1]
    # Transposed is mirrored and a quarter of a turn.
    keys = np.concatenate([plain, *(way[second] for way in (~plain, ~transposed, transposed))])
    # Equal hashes are mixed, lest each stand beside those of its own split.
    order = np.random.default_rng(0).permutation(len(keys))
    order = order[np.argsort(keys[order, 0], kind="stable")]
    (words, others), row, turn = keys[order].T, row[order], turn[order]
    most = furthest(len(split))
    split = split[row]

    def apart(pair: NDArray[np.int_]) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
        """In the first word, and in both."""
        first, rest = (np.bitwise_count(of[pair[0]] ^ of[pair[1]]) for of in (words, others))
        return first, first + rest

    def of_two_splits(pair: NDArray[np.int_]) -> NDArray[np.int_]:
        pair = np.where(split[pair[0]] > split[pair[1]], pair[::-1], pair)
        return pair[:, (split[pair[0]] < split[pair[1]]) & (turn[pair[0]] == 0)]

    equal = [of_two_splits(pair) for pair in _agreeing(words)]
    equal = [pair[:, apart(pair)[1] <= most] for pair in equal]
    near = [np.zeros((2, 0), np.int64)]
    for pieces in combinations(range(PIECES), KEY_PIECES):
        mask = np.uint64(sum(1 << bit for bit in range(WORD) if bit % PIECES in pieces))
        for pair in _agreeing(words & mask):
            first, both = apart(pair)
            alike = (first > 0) & (first <= MAX_DISTANCE) & (both <= most)
            near.append(of_two_splits(pair[:, alike]))
    different = np.unique(np.concatenate(near, axis=1), axis=1)
    found = np.concatenate([*equal, different], axis=1)
    one, other = found[:, np.argsort(apart(found)[1], kind="stable")]
    return np.stack([row[one], row[other], turn[other]], axis=1)


def _agreeing(keys: NDArray[np.uint64]) -> Iterator[NDArray[np.int_]]:
    """Pairs (2, m) of equal keys, each with NEIGHBOURS others at most, one of them at a time."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    for step in range(1, min(NEIGHBOURS + 1, len(keys))):
        first = np.flatnonzero(keys[step:] == keys[:-step])
        if not len(first):
            return
        yield np.stack([order[first], order[first + step]])


def phase_correlation(
    images: NDArray[np.float32], others: NDArray[np.float32], units: str
) -> NDArray[np.float32]:
    """float32 (n,): how far pairs of images (n, bands, size, size) are the same sky, shifted.

    The peak, over shifts of up to MAX_SHIFT in both directions, of the phase correlation (Kuglin &
    Hines 1975) of their mixed second differences: 1 for copies, about 5 / size for other skies. In
    it all waves count alike, so that noise decides and not the few which make a smooth galaxy; the
    differences remove rows and columns that a detector, a mask or padding has left in both.
    """
    size = images.shape[-1] - 1
    place = np.arange(size, dtype=np.float32)
    window = np.sqrt(_hann((place - (size - 1) / 2) / size))
    detail, other = (
        np.diff(np.diff(_grey(side, units), axis=1), axis=2) * window[:, None] * window
        for side in (images, others)
    )
    phase = fft.rfft2(detail) * fft.rfft2(other).conj()
    phase /= np.maximum(np.abs(phase), np.finfo(np.float32).tiny)
    correlation = fft.irfft2(phase, s=(size, size))
    most = int(MAX_SHIFT * size)
    shift = np.arange(-most, most + 1)
    overlap = (1 - np.abs(shift) / size).astype(np.float32)
    correlation = correlation[:, shift[:, None], shift] / (overlap[:, None] * overlap)
    return correlation.max(axis=(1, 2)).clip(max=1)
