"""What pixels are like, by NumPy's and astropy's own formulas, and how far two versions differ."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.stats import mad_std

from lens_pipeline.catalogue import drift
from lens_pipeline.catalogue.dataset import Dataset, open_dataset
from lens_pipeline.catalogue.drift import (
    MOST,
    SAMPLE,
    band_statistics,
    changes,
    noise_correlation,
    other_format,
    pixel_statistics,
)
from lens_pipeline.simulation import load_config, simulate


def of_bands(**bands: np.ndarray) -> dict[str, dict[str, float]]:
    return {name: band_statistics(pixels) for name, pixels in bands.items()}


def test_the_statistics_of_a_band_are_those_of_numpy_and_astropy() -> None:
    pixels = np.random.default_rng(1).lognormal(size=(7, 31, 33)).astype(np.float32)
    found = band_statistics(pixels)
    assert found["median"] == pytest.approx(np.median(pixels))
    assert found["sigma"] == pytest.approx(mad_std(pixels), rel=1e-4)
    assert found["bright"] == pytest.approx(np.percentile(pixels, 99) - np.median(pixels))
    spoilt = pixels.copy()
    spoilt[0, 0, :3] = (np.nan, np.inf, -np.inf)
    assert band_statistics(spoilt) == pytest.approx(found, rel=0.01)


def test_a_dataset_is_measured_on_its_training_split_band_by_band(dataset: Dataset) -> None:
    found = pixel_statistics(dataset)
    train = np.asarray(dataset.images("train"))
    assert train.size < SAMPLE  # so all of it is looked at
    assert found["bands"] == ["g", "r", "i"]
    for number, statistics in enumerate(found["statistics"].values()):
        assert statistics["median"] == pytest.approx(np.median(train[:, number]))
    assert found["units"] == "background_sigma"
    assert found["non_finite"] == {"train": 0, "val": 0, "test": 0, "unlabelled": 0}


def test_a_large_dataset_is_measured_on_a_sample_that_stays_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of cutouts that alternate, as simulated pairs do, a sample must not take every second."""
    sample = SAMPLE // 8
    monkeypatch.setattr(drift, "SAMPLE", sample)
    n = 2 * sample // 128**2
    pixels = np.random.default_rng(0).normal(size=(n, 1, 128, 128)).astype(np.float32)
    pixels[::2] += 1
    facts = '{"bands": ["r"], "image_size": 128, "units": "flux", "pixel_scale": null}'
    (tmp_path / "dataset.json").write_text(facts)
    for part in ("train", "val", "test", "unlabelled"):
        np.save(tmp_path / f"{part}.npy", pixels if part == "train" else pixels[:2])
    found = pixel_statistics(open_dataset(tmp_path))
    assert found == pixel_statistics(open_dataset(tmp_path))
    assert found["statistics"]["r"]["median"] == pytest.approx(np.median(pixels), abs=0.1)
    assert found["statistics"]["r"]["sigma"] == pytest.approx(mad_std(pixels), rel=0.1)


def test_pixels_that_are_not_finite_are_counted_in_every_split(
    dataset: Dataset, tmp_path: Path
) -> None:
    for path in dataset.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for part, bad in (("train", [np.nan, np.inf, -np.inf]), ("unlabelled", [np.nan])):
        images = np.load(tmp_path / f"{part}.npy", mmap_mode="r+")
        images[-1, 0, 0, : len(bad)] = bad
        images.flush()
    found = pixel_statistics(open_dataset(tmp_path))["non_finite"]
    assert found == {"train": 3, "val": 0, "test": 0, "unlabelled": 1}


def moved(pixels: np.ndarray, part: float) -> np.ndarray:
    """By a part of a pixel along both axes, bilinearly, as a coadd's exposures are."""
    for axis in (1, 2):
        pixels = (1 - part) * pixels + part * np.roll(pixels, -1, axis)
    return pixels


@pytest.mark.parametrize("part", [0.0, 0.1, 0.25, 0.5])
def test_the_correlation_of_noise_is_measured_beside_galaxies(part: float) -> None:
    random = np.random.default_rng(6)
    y, x = np.mgrid[:64, :64] - 31.5
    size, flux = random.uniform(2, 6, (300, 1, 1)), random.lognormal(3, 1, (300, 1, 1))
    galaxies = flux * np.exp(-np.hypot(x, y) / size)
    pixels = moved(random.normal(size=(300, 64, 64)), part) + galaxies
    expected = part * (1 - part) / (1 - 2 * part * (1 - part))
    assert noise_correlation(pixels.astype(np.float32)) == pytest.approx(expected, abs=0.02)
    pixels += 5
    pixels[::2, :, :4] = 0  # a border that is filled with what is darker than the sky
    pixels[::3, :9] = 0
    assert noise_correlation(pixels) == pytest.approx(expected, abs=0.02)


def test_real_stacks_have_correlated_noise_and_simulated_cutouts_what_they_are_told(
    shared_data: Path,
) -> None:
    stacks = []
    for path in sorted((shared_data / "ps1_grizy").rglob("*.fits"))[:60]:
        with fits.open(path) as file:
            band = np.asarray(file[1].data, np.float32)  # g
        stacks.append(band[:40, :40] / mad_std(band, ignore_nan=True))
    assert 0.1 < noise_correlation(np.stack(stacks)) < 0.3
    config = load_config("lsst")
    for correlation in (0.0, 0.2, 0.5):
        survey = config.survey.model_copy(update={"noise_correlation": correlation})
        told = config.model_copy(update={"survey": survey})
        found = noise_correlation(simulate("lsst", 30, seed=1, config=told).images[:, 1])
        assert found == pytest.approx(correlation, abs=0.03)


def test_of_what_has_no_noise_or_is_too_small_no_correlation_is_told() -> None:
    assert noise_correlation(np.zeros((3, 64, 64))) == 0
    assert noise_correlation(np.random.default_rng(7).normal(size=(3, 8, 8))) == 0


@pytest.mark.parametrize(
    ("statistic", "altered", "change"),
    [
        ("noise_correlation", lambda pixels: moved(pixels, 0.25), 0.3),
        ("median", lambda pixels: pixels + 0.5, 0.5),
        ("sigma", lambda pixels: 2 * pixels, 0.5),
        ("bright", lambda pixels: np.where(pixels > 2, 4 * pixels, pixels), 0.75),
    ],
)
def test_each_statistic_tells_of_its_own_change(
    statistic: str, altered: Callable[[np.ndarray], np.ndarray], change: float
) -> None:
    pixels = np.random.default_rng(2).normal(size=(500, 32, 32))
    before = of_bands(g=pixels, r=pixels)
    now = of_bands(g=pixels, r=altered(pixels))
    found = changes(before, now).set_index(["band", "statistic"])
    assert found.loc[("r", statistic), "change"] == pytest.approx(change, abs=0.02)
    assert found.loc[("r", statistic), "change"] > MOST[statistic]
    assert (found.loc["g", "change"] == 0).all()
    backward = changes(now, before).set_index(["band", "statistic"])
    assert backward["change"].to_dict() == pytest.approx(found["change"].to_dict())


def test_another_draw_of_the_same_sky_is_no_change() -> None:
    one, other = (np.random.default_rng(seed).normal(size=(500, 32, 32)) for seed in (3, 4))
    found = changes(of_bands(g=one), of_bands(g=other))
    assert (found["change"] < 0.2 * found["at_most"]).all()


def test_a_band_that_is_black_almost_everywhere_can_be_compared() -> None:
    black = np.zeros((50, 32, 32))
    assert (changes(of_bands(g=black), of_bands(g=black))["change"] == 0).all()
    found = changes(of_bands(g=black), of_bands(g=black + 0.1)).set_index("statistic")
    assert found.loc["median", "change"] == 1


def test_a_version_of_which_the_correlation_was_not_measured_can_be_compared() -> None:
    now = of_bands(g=np.random.default_rng(8).normal(size=(5, 32, 32)))
    known = {name: value for name, value in now["g"].items() if "noise" not in name}
    found = changes({"g": known}, now)
    assert sorted(found["statistic"]) == ["bright", "median", "sigma"]


def test_other_bands_and_units_are_told() -> None:
    before = {"bands": ["g", "r"], "units": "background_sigma"}
    now = before | {"bands": ["r"]}
    assert other_format(before, now) == "the bands are r, were g, r"
    assert other_format(now, now) == ""
    picture = {**now, "units": "composite"}
    assert other_format(now, picture) == "the units are composite, were background_sigma"
