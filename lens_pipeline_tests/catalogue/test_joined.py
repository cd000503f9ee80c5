"""Datasets of several surveys, seen as one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lens_pipeline.catalogue.build import build_dataset
from lens_pipeline.catalogue.dataset import CutoutFormat, Dataset
from lens_pipeline.catalogue.joined import JoinedDataset, joined_content, joined_format
from lens_pipeline.catalogue.splits import PARTS
from lens_pipeline.catalogue.table import read_catalogue
from lens_pipeline.errors import InputError

DES = CutoutFormat(("g", "r", "i"), 64, "background_sigma", 0.263)


def dataset_of(catalogue: Path, survey: str, out: Path) -> Dataset:
    out.mkdir()
    rows = read_catalogue(catalogue).of_surveys([survey], split_seed=0)
    return build_dataset(rows, out, image_size=32, whole=False)


def test_each_split_holds_the_cutouts_of_one_after_the_other(
    two_surveys: Path, tmp_path: Path
) -> None:
    parts = {name: dataset_of(two_surveys, name, tmp_path / name) for name in ("des", "hsc")}
    joined = JoinedDataset(parts)
    table = pd.read_parquet(two_surveys)
    for part in PARTS:
        images = [np.asarray(one.images(part)) for one in parts.values()]
        expected = np.concatenate(images)
        split = joined.split(part)
        assert len(split) == len(joined.table(part)) == len(expected)
        assert split.ids.tolist() == joined.table(part)["id"].tolist()
        places = np.random.default_rng(0).permutation(len(expected))[:20]
        for chosen in (places, places - len(expected), np.isin(np.arange(len(expected)), places)):
            np.testing.assert_array_equal(split.gather(chosen), expected[chosen])
        np.testing.assert_array_equal(np.concatenate([*split.in_order(7)] or [expected]), expected)
        assert joined.facts["splits"][part]["n"] == len(expected)
        rows = joined.table(part)["row"]  # those of the whole catalogue
        assert joined.table(part)["id"].tolist() == table["id"].iloc[rows].tolist()
    assert joined.format == replace(parts["des"].format, pixel_scale=None)


def test_the_content_depends_on_each_part_and_not_on_their_order() -> None:
    contents = {"des": "a", "hsc": "b"}
    assert joined_content(contents) == joined_content({"hsc": "b", "des": "a"})
    for other in ({"des": "b", "hsc": "a"}, {"des": "a"}, {"des": "a", "lsst": "b"}):
        assert joined_content(other) != joined_content(contents)


def test_cutouts_of_other_bands_sizes_or_units_are_refused_by_name() -> None:
    assert joined_format({"des": DES, "hsc": DES}) == DES
    assert joined_format({"des": DES, "hsc": replace(DES, pixel_scale=0.168)}).pixel_scale is None
    for change, said in [
        ({"bands": ("g", "r")}, "hsc: bands: the cutouts have g, r, those of des g, r, i"),
        ({"image_size": 48}, "hsc: image_size: the cutouts have 48, those of des 64"),
        ({"units": "composite"}, "hsc: units: the cutouts have composite, those of des back"),
    ]:
        with pytest.raises(InputError, match=said):
            joined_format({"des": DES, "hsc": replace(DES, **change)})


def test_a_survey_may_lack_what_others_hold(two_surveys: Path, tmp_path: Path) -> None:
    table = pd.read_parquet(two_surveys)
    only_tests = table["survey"] == "hsc"
    table["split"] = None
    table.loc[only_tests, "split"] = "test"
    table.loc[only_tests, "group"] = "hsc " + table["group"]
    table.to_parquet(two_surveys)
    hsc = dataset_of(two_surveys, "hsc", tmp_path / "hsc")
    assert len(hsc.images("train")) == 0
    assert len(hsc.images("test")) == only_tests.sum()
    with pytest.raises(InputError, match=r"\(hsc\): split train has no lenses"):
        build_dataset(
            read_catalogue(two_surveys).of_surveys(["hsc"], 0), tmp_path / "again", image_size=32
        )
