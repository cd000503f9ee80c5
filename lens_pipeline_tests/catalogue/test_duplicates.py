"""Near-duplicates across splits: copies of every kind are found, and nothing else."""

from collections.abc import Callable
from io import BytesIO
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from lens_pipeline.catalogue import build_dataset, read_catalogue
from lens_pipeline.catalogue.dataset import Dataset
from lens_pipeline.catalogue.duplicates import (
    LIGHT,
    MAX_DISTANCE,
    NEIGHBOURS,
    PAIRS_PER_CUTOUT,
    candidates,
    furthest,
    perceptual_hash,
    phase_correlation,
    turned,
)
from lens_pipeline.evaluation.sheets import colour_composite
from lens_pipeline.simulation import Simulation
from lens_pipeline_tests.simulation.drawn import simulation

__all__ = ["simulation"]

SIDE = 56  # pixels of a cutout, of the 64 that are simulated
EACH = 15  # copies of each kind
Images = NDArray[np.float32]


@pytest.fixture(scope="module")
def sky(simulation: Simulation) -> Simulation:
    return simulation


def cut(images: Images, down: int = 0, right: int = 0) -> Images:
    """SIDE pixels of images (n, bands, 64, 64), aside of their middle by some."""
    low = (images.shape[-1] - SIDE) // 2
    return images[:, :, low + down :, low + right :][:, :, :SIDE, :SIDE]


def noisy(images: Images) -> Images:
    noise = np.random.default_rng(1).standard_normal(images.shape, np.float32)
    return cut(images + np.float32(0.2) * noise)


def resampled(images: Images) -> Images:
    """Half a pixel aside."""
    return (cut(images) + cut(images, 0, 1)) / 2


COPIES: dict[str, Callable[[Images], Images]] = {
    "exact": cut,
    "mirrored": lambda images: cut(images)[..., ::-1],
    "quarter turn": lambda images: np.rot90(cut(images), 1, (2, 3)),
    "half turn": lambda images: np.rot90(cut(images), 2, (2, 3)),
    "transposed, noisy": lambda images: noisy(images).swapaxes(2, 3),
    "turned, mirrored": lambda images: np.rot90(cut(images, 0, -3), 1, (2, 3))[..., ::-1],
    "upside down": lambda images: cut(images)[..., ::-1, :],
    "shifted": lambda images: cut(images, 3, -2),
    "far": lambda images: cut(images, -4, 4),
    "rescaled": lambda images: cut(images) * np.float32(0.8),
    "noisy": noisy,
    "resampled": resampled,
}
# How a copy is mirrored, and then rotated, to be as the original was.
BACK = {
    "mirrored": (True, 0),
    "quarter turn": (False, 270),
    "half turn": (False, 180),
    "transposed, noisy": (True, 90),
    "turned, mirrored": (True, 270),
    "upside down": (True, 180),
}


def catalogue_of(sky: Simulation, folder: Path, copied_to: str = "test") -> pd.DataFrame:
    """The simulated cutouts, and EACH copies of every kind, under ids and groups of their own.

    `original` names what a copy shows; the originals are in `train`.
    """
    table = sky.table[["id", "label", "group"]].copy()
    kinds = dict(zip(COPIES, range(len(COPIES)), strict=True))
    stacks, parts = [cut(sky.images)], [table]
    for kind, number in kinds.items():
        rows = np.arange(EACH) * len(kinds) + number
        stacks.append(COPIES[kind](sky.images[rows]))
        copies = table.iloc[rows]
        ids = kind + "-" + copies["id"]
        parts.append(
            copies.assign(id=ids, group=ids, split=copied_to, original=copies["id"].to_numpy())
        )
    copied = table["group"].isin(table["group"][: EACH * len(kinds)])
    table["split"] = np.where(copied, "train", None)
    np.save(folder / "stack.npy", np.concatenate(stacks))
    catalogue = pd.concat(parts, ignore_index=True)
    catalogue["path"] = [f"stack.npy#{row}" for row in range(len(catalogue))]
    return catalogue.assign(flux_unit="background_sigma")


def built(catalogue: pd.DataFrame, folder: Path) -> Dataset:
    catalogue.to_parquet(folder / "catalogue.parquet")
    out = folder / "dataset"
    out.mkdir()
    return build_dataset(read_catalogue(folder / "catalogue.parquet"), out, image_size=SIDE)


def test_copies_of_every_kind_are_found_and_nothing_else(sky: Simulation, tmp_path: Path) -> None:
    catalogue = catalogue_of(sky, tmp_path)
    dataset = built(catalogue, tmp_path)
    found = dataset.near_duplicates()
    copies = catalogue.dropna(subset="original")
    wanted = set(zip(copies["original"], copies["id"], strict=True))
    assert set(zip(found["id"], found["other_id"], strict=True)) == wanted
    assert set(found["split"]) == {"train"}
    assert set(found["other_split"]) == {"test"}
    assert found["correlation"].is_monotonic_decreasing
    assert found["correlation"].min() > 0.5
    kind = found["other_id"].str.extract("^(.*)-des-", expand=False)
    for name, laid in zip(kind, zip(found["mirrored"], found["rotated"], strict=True), strict=True):
        assert laid == BACK.get(name, (False, 0)), name
    exact = found["correlation"][kind == "exact"]
    assert len(exact) == EACH
    assert (exact == 1).all()
    assert dataset.facts["n_near_duplicates"] == len(copies)
    assert dataset.facts["n_alike_not_compared"] == 0


def test_copies_in_one_split_or_group_or_without_a_label_do_not_leak(
    sky: Simulation, tmp_path: Path
) -> None:
    catalogue = catalogue_of(sky, tmp_path, copied_to="train")
    copies = catalogue["original"].notna()
    unlabelled = copies & (np.arange(len(catalogue)) % 3 == 0)
    catalogue.loc[unlabelled, "label"] = None
    one_group = copies & (np.arange(len(catalogue)) % 3 == 1)
    of = catalogue.set_index("id")["group"]
    catalogue.loc[one_group, "group"] = of[catalogue.loc[one_group, "original"]].to_numpy()
    catalogue.loc[one_group, "split"] = None
    assert built(catalogue, tmp_path).near_duplicates().empty


def test_pictures_are_known_again_when_they_are_compressed(sky: Simulation, tmp_path: Path) -> None:
    n = 200
    pictures = (colour_composite(cut(sky.images[:n]), "background_sigma") * 255).astype(np.uint8)
    moved = colour_composite(cut(sky.images[:n], 2, -3), "background_sigma")
    rows = []
    for row, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{row}.png")
        rows.append((str(row), f"{row}.png", row % 2, sky.table["group"][row], "train"))
    for row in range(0, n, 10):
        Image.fromarray(pictures[row]).save(tmp_path / f"again-{row}.jpg", quality=90)
        Image.fromarray((moved[row] * 255).astype(np.uint8)).save(tmp_path / f"moved-{row}.png")
        for name in (f"again-{row}.jpg", f"moved-{row}.png"):
            rows.append((name, name, row // 10 % 2, name, ("val", "test")[row // 20 % 2]))
    catalogue = pd.DataFrame(rows, columns=["id", "path", "label", "group", "split"])
    found = built(catalogue, tmp_path).near_duplicates()
    # The two copies of a picture are in one split.
    assert len(found) == n // 10 * 2
    assert set(found["other_id"]) == set(catalogue["id"][n:])
    assert (found["id"] == found["other_id"].str.extract(r"-(\d+)\.", expand=False)).all()


@pytest.mark.parametrize(("quality", "most"), [(None, 0.2), (75, 0.2), (50, 0.37)])
def test_other_skies_stay_below_the_limit(
    sky: Simulation, quality: int | None, most: float
) -> None:
    """Hosts of other groups, and a lens beside its decoy: the same light, and neighbours."""
    images, units = cut(sky.images), "background_sigma"
    if quality:
        pictures = (colour_composite(images, units) * 255).astype(np.uint8)
        images, units = np.stack([jpeg(picture, quality) for picture in pictures]), "composite"
    for step, turn in [(1, 0), (2, 0), (5, 0), *((1, turn) for turn in range(1, 8))]:
        others = turned(images[:-step], turn)
        assert phase_correlation(images[step:], others, units).max() < most


def jpeg(picture: NDArray[np.uint8], quality: int) -> Images:
    content = BytesIO()
    Image.fromarray(picture).save(content, "jpeg", quality=quality)
    return np.moveaxis(np.asarray(Image.open(content)), -1, 0).astype(np.float32) / 255


def test_pairs_are_found_without_comparing_all() -> None:
    """Up to 8 bits, none is missed, turned by quarters or not."""
    random = np.random.default_rng(2)
    hashes = random.integers(0, 2**64, (500, 2, 2), dtype=np.uint64)
    copies = hashes.copy()
    turn = np.arange(500) // 125
    for row, copy in enumerate(copies):
        if turn[row] % 2:
            copy ^= np.uint64(2**64 - 1)
        if turn[row] > 1:  # transposed
            copy[:] = copy[::-1].copy()
        for bit in random.choice(64, row % 20, replace=False):
            copy ^= np.uint64(1) << np.uint64(bit)  # of both words
    split = np.repeat([2, 0], 500)
    both = np.concatenate([hashes, copies])
    pairs = candidates(both, split)
    assert (split[pairs[:, :2]] == [0, 2]).all()
    there = pairs[:, 0] == pairs[:, 1] + 500
    laid = np.array([0, 1, 5, 4])[turn[pairs[there, 1]]]
    assert (pairs[there, 2] == laid).all()
    other = both[pairs[:, 1], pairs[:, 2] // 4]
    other = np.where(np.isin(pairs[:, 2], (1, 4))[:, None], ~other, other)
    distance = np.bitwise_count(both[pairs[:, 0], 0] ^ other).astype(int)
    assert (np.diff(distance.sum(axis=1)) >= 0).all()
    assert distance[:, 0].max() <= MAX_DISTANCE
    planted = distance[there, 0]
    assert (np.bincount(planted)[:9] == 25).all()


def test_copies_come_before_what_is_alike_by_chance() -> None:
    """Those 12 bits away in either word, as resampled ones with some noise may be: by the first
    word alone a hundred other pairs would be as near."""
    random = np.random.default_rng(3)
    n, planted = 20_000, 100
    hashes = random.integers(0, 2**64, (n, 2, 2), dtype=np.uint64)
    hashes[-planted:, 0] = hashes[:planted, 0]
    for row, word in product(range(n - planted, n), range(2)):
        for bit in random.choice(64, 12, replace=False):
            hashes[row, 0, word] ^= np.uint64(1) << np.uint64(bit)
    pairs = candidates(hashes, np.repeat([0, 1], n // 2))
    copies = (pairs[:, 1] - pairs[:, 0] == n - planted) & (pairs[:, 2] == 0)
    assert copies.sum() > 0.85 * planted
    assert copies[: copies.sum()].all()


def test_fewer_bits_may_differ_among_more_cutouts() -> None:
    """So that chance has as few pairs for each, whatever their number."""
    assert [furthest(n) for n in (0, 10, 1000, 4000)] == [MAX_DISTANCE + 64] * 4
    many = [10**power for power in range(5, 10)]
    found = [furthest(n) for n in many]
    assert found == sorted(found, reverse=True)
    assert furthest(10**7) >= 29
    bits, word = np.arange(MAX_DISTANCE + 1), stats.binom(64, 0.5)
    for n, most in zip(many, found, strict=True):
        by_chance = LIGHT * (word.pmf(bits) * word.cdf(most - bits)).sum()
        assert PAIRS_PER_CUTOUT / 20 < n * by_chance <= PAIRS_PER_CUTOUT / 2


def test_a_crowd_of_look_alikes_is_not_compared_pair_by_pair() -> None:
    split = np.arange(3000) % 3
    words = np.array([[7, 2**40], [2**63, 2**20]], np.uint64)
    alike = np.repeat(np.stack([words, words], axis=2), 1500, axis=0)
    pairs = candidates(alike, split)
    assert len(pairs) <= 3 * NEIGHBOURS * 3000
    assert len(np.unique(pairs[:, :2])) == 3000
    assert (split[pairs[:, 0]] < split[pairs[:, 1]]).all()


def test_no_cutouts_no_pairs() -> None:
    for n in (0, 1):
        assert candidates(np.zeros((n, 2, 2), np.uint64), np.zeros(n, np.int64)).shape == (0, 3)


def test_a_hash_is_that_of_the_image_whatever_is_beside_it(sky: Simulation) -> None:
    images = cut(sky.images[:70])
    together = perceptual_hash(images, "background_sigma")
    alone = np.concatenate([perceptual_hash(one[None], "background_sigma") for one in images])
    assert (np.bitwise_count(together ^ alone) <= 1).all()  # by rounding
    assert len(np.unique(together)) == 4 * 70


def test_neighbours_on_the_real_sky(shared_data: Path, tmp_path: Path) -> None:
    """CFHTLS: two candidates are 5 arcsec apart, in images of 21. Their group holds them together;
    without it, they are found, and nothing else is."""
    catalogue = read_catalogue(shared_data / "cfhtls_graded" / "catalogue.csv")
    with_groups = build_dataset(catalogue, tmp_path, image_size=112)
    assert with_groups.near_duplicates().empty
    assert with_groups.facts["n_alike_not_compared"] == 0
    alone = ["CFHTLSJ020647.4-065655", "CFHTLSJ020647.6-065659"]
    table = catalogue.table
    table["group"] = table["id"]
    table["label"] = table["label"].fillna(0)
    table["split"] = [("train", "val", "test")[row % 3] for row in range(len(table))]
    (tmp_path / "alone").mkdir()
    found = build_dataset(catalogue, tmp_path / "alone", image_size=112).near_duplicates()
    assert [sorted(pair) for pair in found[["id", "other_id"]].to_numpy().tolist()] == [alone]


def test_what_is_too_much_to_compare_is_told(
    sky: Simulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lens_pipeline.catalogue.duplicates.PAIRS", 5)
    monkeypatch.setattr("lens_pipeline.catalogue.duplicates.PAIRS_PER_CUTOUT", 0)
    dataset = built(catalogue_of(sky, tmp_path), tmp_path)
    assert len(dataset.near_duplicates()) == 5
    # Where little is compared, fewer bits may differ.
    assert dataset.facts["n_alike_not_compared"] > 0.9 * EACH * len(COPIES)
