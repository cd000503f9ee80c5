"""What is said of cutouts that are unlike those that an ensemble has learnt from."""

import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lens_pipeline.catalogue import read_catalogue
from lens_pipeline.catalogue.build import build_dataset
from lens_pipeline.catalogue.dataset import CutoutFormat, DatasetSplit
from lens_pipeline.ensemble.learnt import FEWEST, LEARNT_PIXELS, learnt_pixels
from lens_pipeline.ensemble.system import LensEnsemble, load_ensemble
from lens_pipeline.scoring import open_cutout_source, score_catalogue, score_to_file
from lens_pipeline.scoring.likeness import tell_of_unlike
from lens_pipeline.scoring.scored_rows import model_hash
from lens_pipeline.scoring.sources import CatalogueCutouts
from lens_pipeline.shards import write_shards
from lens_pipeline.simulation import Simulation, simulate

UNLIKE = "the cutouts are unlike"


@cache
def _drawn(survey: str, seed: int) -> Simulation:
    """300 simulated cutouts."""
    return simulate(survey, 300, seed=seed, image_size=32)


def learnt_from(*surveys: str, form: CutoutFormat) -> list[dict[str, Any]]:
    """Of 300 simulated cutouts of each survey."""
    drawn = [_drawn(survey, seed=4) for survey in surveys]
    table = pd.concat([one.table for one in drawn], ignore_index=True)
    split = DatasetSplit(table, np.concatenate([one.images for one in drawn]))
    return learnt_pixels(split, table, form, simulation=True)


@pytest.fixture(scope="session")
def ensemble(home: Path) -> LensEnsemble:
    """That of the tests, as if it had learnt from more cutouts of DES."""
    found = load_ensemble(next((home / "ensemble").glob("[!.]*")))
    assert [one["cutouts"] for one in found.facts[LEARNT_PIXELS]] == ["simulated cutouts of des"]
    learnt = learnt_from("des", form=found.format)
    return replace(found, facts=found.facts | {LEARNT_PIXELS: learnt})


@pytest.fixture(scope="session")
def drawn_anew() -> np.ndarray:
    """Other cutouts of the survey and the population that the ensemble has learnt from."""
    return _drawn("des", seed=5).images


def catalogue_of(images: np.ndarray, folder: Path) -> Path:
    np.save(folder / "images.npy", images.astype(np.float32))
    rows = [f"images.npy#{row}" for row in range(len(images))]
    table = pd.DataFrame({"id": rows, "path": rows, "bands": "g,r,i"})
    table.assign(flux_unit="background_sigma", pixel_scale=0.263).to_csv(
        folder / "catalogue.csv", index=False
    )
    return folder / "catalogue.csv"


def said(
    ensemble: LensEnsemble, images: np.ndarray, folder: Path, caplog: pytest.LogCaptureFixture
) -> str:
    """What is said of likeness before cutouts are scored."""
    source = CatalogueCutouts(read_catalogue(catalogue_of(images, folder)))
    with caplog.at_level(logging.WARNING):
        tell_of_unlike(ensemble, source, np.arange(len(images)))
    return _told(caplog)


def _told(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(message for message in caplog.messages if UNLIKE in message)


def test_cutouts_of_the_same_kind_are_scored_without_a_word(
    ensemble: LensEnsemble,
    drawn_anew: np.ndarray,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        scores = score_catalogue(ensemble, catalogue_of(drawn_anew, tmp_path))
    assert _told(caplog) == ""
    assert scores["reject_reason"].isna().all()


def test_resampled_cutouts_are_told_with_the_correlation_of_their_noise(
    ensemble: LensEnsemble,
    drawn_anew: np.ndarray,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A mean of two pixels along each axis, of which neighbours have one in common: 0.5."""
    noise = np.random.default_rng(0).normal(size=drawn_anew.shape)
    mean = (noise + np.roll(noise, 1, axis=-1)) / 2
    mean = (mean + np.roll(mean, 1, axis=-2)) / 2
    found = said(ensemble, drawn_anew + 6 * mean, tmp_path, caplog)
    assert str(tmp_path / "catalogue.csv") in found
    assert "unlike the simulated cutouts of des" in found
    named = found.partition("correlation of adjacent pixels' noise of ")[2]
    assert float(named.split()[1]) == pytest.approx(0.5, abs=0.1)
    caplog.clear()  # and the scores are made of them all the same
    scores = score_catalogue(ensemble, tmp_path / "catalogue.csv")
    assert _told(caplog) == found
    assert scores["reject_reason"].isna().all()


@pytest.mark.parametrize(
    ("factor", "what"), [((1, 10, 1), "of r"), ((1, 1, 0.05), "of i")], ids=["brighter", "fainter"]
)
def test_the_band_that_differs_is_named_alone(
    factor: tuple[float, ...],
    what: str,
    ensemble: LensEnsemble,
    drawn_anew: np.ndarray,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As of another zero point, or of a unit that was not the stated one."""
    moved = drawn_anew * np.array(factor)[:, None, None]
    found = said(ensemble, moved, tmp_path, caplog)
    differences = found.rpartition("them: ")[2].split(", ")
    assert any("brightness" in one or "noise" in one for one in differences)
    assert all(what in one for one in differences)


def test_of_too_few_cutouts_nothing_is_told(
    ensemble: LensEnsemble,
    drawn_anew: np.ndarray,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert said(ensemble, 9 * drawn_anew[:90], tmp_path, caplog) == ""


def test_a_file_of_scores_is_told_of_before_it_is_written(
    ensemble: LensEnsemble,
    drawn_anew: np.ndarray,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = CatalogueCutouts(read_catalogue(catalogue_of(9 * drawn_anew, tmp_path)))
    out = tmp_path / "scores.parquet"

    class Unwell(LensEnsemble):
        def predict(self, images: Any) -> pd.DataFrame:
            raise MemoryError

    with caplog.at_level(logging.WARNING), pytest.raises(MemoryError):
        score_to_file(Unwell(**vars(ensemble)), source, out, model="models:/lens_ensemble/1")
    assert UNLIKE in caplog.text
    assert not out.exists()


def test_an_ensemble_of_an_earlier_release_says_nothing(
    ensemble: LensEnsemble,
    drawn_anew: np.ndarray,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    facts = {name: fact for name, fact in ensemble.facts.items() if name != LEARNT_PIXELS}
    earlier = replace(ensemble, facts=facts)
    assert said(earlier, 9 * drawn_anew, tmp_path, caplog) == ""


def test_each_survey_is_compared_with_its_own_cutouts(
    ensemble: LensEnsemble, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DES and LSST together are like neither."""
    learnt = learnt_from("des", "lsst", form=ensemble.format)
    assert [one["cutouts"] for one in learnt] == [
        "simulated cutouts of des",
        "simulated cutouts of lsst",
    ]
    of_lsst = _drawn("lsst", seed=4).images
    assert learnt[1]["statistics"]["r"]["median"] == pytest.approx(np.median(of_lsst[:, 1]))
    of_both = replace(ensemble, facts=ensemble.facts | {LEARNT_PIXELS: learnt})
    other = _drawn("lsst", seed=6).images
    assert said(of_both, other, tmp_path, caplog) == ""
    alone = replace(ensemble, facts=ensemble.facts | {LEARNT_PIXELS: learnt[:1]})
    assert "simulated cutouts of des" in said(alone, other, tmp_path, caplog)


@pytest.mark.parametrize(("n", "seed"), [(FEWEST, 20), (FEWEST, 21), (FEWEST, 22), (256, 23)])
def test_another_draw_of_a_population_is_like_it(
    n: int, seed: int, ensemble: LensEnsemble, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a hundred cutouts the brightness often differs by half."""
    images = simulate("des", n, seed=seed, image_size=32).images
    assert said(ensemble, images, tmp_path, caplog) == ""


def test_a_band_without_a_pixel_is_not_compared(
    ensemble: LensEnsemble, drawn_anew: np.ndarray
) -> None:
    """As in shards that somebody else has made."""
    spoilt = drawn_anew.copy()
    spoilt[:, 1] = np.nan
    table = pd.DataFrame({"id": range(len(spoilt)), "label": 0})
    (found,) = learnt_pixels(DatasetSplit(table, spoilt), table, ensemble.format, simulation=False)
    assert found["cutouts"] == "real cutouts"
    assert list(found["statistics"]) == list(found["errors"]) == ["g", "i"]


def test_a_band_that_a_part_of_the_cutouts_lacks_does_not_stop_the_scoring(
    ensemble: LensEnsemble,
    drawn_anew: np.ndarray,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoilt = drawn_anew.copy()
    spoilt[:60, 1] = np.nan
    table = pd.DataFrame({"id": range(len(spoilt)), "label": 0})
    learnt = learnt_pixels(DatasetSplit(table, spoilt), table, ensemble.format, simulation=False)
    of_these = replace(ensemble, facts=ensemble.facts | {LEARNT_PIXELS: learnt})
    told = said(of_these, 9 * drawn_anew, tmp_path, caplog)
    assert "of g" in told
    assert "of i" in told
    assert "of r" not in told


def test_what_was_learnt_from_decides_on_no_score(ensemble: LensEnsemble) -> None:
    """Lest a survey be scored anew where the pixels are measured otherwise."""
    otherwise = replace(ensemble, facts=ensemble.facts | {LEARNT_PIXELS: []})
    assert model_hash(otherwise) == model_hash(ensemble)


def test_a_sample_of_shards_lies_in_the_first_of_them(
    simulated_catalogue: Path, tmp_path: Path
) -> None:
    """Others need not be fetched for it."""
    dataset = build_dataset(read_catalogue(simulated_catalogue), tmp_path / "d", image_size=32)
    shards = tmp_path / "shards"
    write_shards(dataset, shards, shard_size=50)
    source = open_cutout_source(shards, cache=tmp_path / "cache")
    rows = source.sample(np.arange(200), 50)
    index = pd.read_parquet(shards / "index.parquet").set_index("id")
    ids = source.catalogue.table["id"].iloc[rows]
    assert len(ids) == 50
    assert index.loc[ids, "shard"].nunique() == 1
