"""What is checked of a dataset and its shards, on small catalogues of noise."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
import pytest

from lens_pipeline.catalogue.dataset import Dataset, open_dataset
from lens_pipeline.catalogue.splits import assign_splits
from lens_pipeline.defs.catalogue import cutout_catalogue
from lens_pipeline.defs.dataset import processed_dataset
from lens_pipeline.defs.dataset_checks import check_not_refused
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.defs.shards import cloud_shards, lens_shards
from lens_pipeline.defs.stages import DATASET, SHARDS, Made
from lens_pipeline.errors import InputError
from lens_pipeline.settings import Settings
from lens_pipeline.shards import read_manifest

STAGES = [one.asset() for one in (cutout_catalogue, processed_dataset, lens_shards, cloud_shards)]
N = 90


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


@pytest.fixture
def noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    """A catalogue's table: 30 cutouts a split, each second one a lens, of a stack of noise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LENS_HOME", "home")
    monkeypatch.setenv("LENS_IMAGE_SIZE", "32")
    pixels = np.random.default_rng(3).normal(size=(N, 2, 32, 32)).astype(np.float32)
    np.save(tmp_path / "stack.npy", pixels)
    table = pd.DataFrame({"id": [f"c{i}" for i in range(N)], "label": np.arange(N) // 3 % 2})
    table["path"] = [f"stack.npy#{i}" for i in range(N)]
    table["split"] = np.array(["train", "val", "test"])[np.arange(N) % 3]
    return table.assign(bands="r,g", flux_unit="background_sigma")


def run(
    table: pd.DataFrame,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
    stages: int = 2,
) -> dg.ExecuteInProcessResult:
    """Materialise the first stages of a catalogue with this table."""
    table.to_csv("table.csv", index=False)
    monkeypatch.setenv("LENS_SOURCE", "table.csv")
    return dg.materialize(
        STAGES[:stages],
        instance=instance,
        resources={"lens": LensHome()},
        raise_on_error=False,
    )


def checks_of(ran: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    return {check.check_name: check for check in ran.get_asset_check_evaluations()}


def figures(check: dg.AssetCheckEvaluation) -> dict[str, Any]:
    return {name: value.value for name, value in check.metadata.items()}


def test_a_sound_dataset_passes_and_each_check_shows_its_figure(
    noise: pd.DataFrame, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = run(noise, instance, monkeypatch, stages=4)
    assert ran.success
    checks = checks_of(ran)
    assert all(check.passed for check in checks.values()), checks
    blocking = {name for name, check in checks.items() if check.blocking}
    assert blocking == {
        "no_group_spans_two_splits",
        "every_split_holds_both_classes",
        "all_pixels_are_finite",
        "manifest_is_whole",
        "cloud_equals_manifest",
    }
    of_classes = figures(checks["every_split_holds_both_classes"])
    assert (of_classes["fewest of a class"], of_classes["at least"]) == (15, 10)
    assert of_classes["lens fraction of val"] == 0.5
    assert figures(checks["all_pixels_are_finite"])["non-finite pixels"] == 0
    first = figures(checks["bands_are_as_in_the_last_version"])
    assert first == {"compared": "there is no earlier version to compare with"}
    assert figures(checks["manifest_is_whole"])["problems"] == 0


def test_a_split_with_few_lenses_is_warned_of(
    noise: pd.DataFrame, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    lenses = noise.index[(noise["split"] == "val") & (noise["label"] == 1)]
    noise.loc[lenses[3:], "label"] = 0
    ran = run(noise, instance, monkeypatch, stages=3)
    assert ran.success
    check = checks_of(ran)["every_split_holds_both_classes"]
    assert not check.passed
    assert check.severity == dg.AssetCheckSeverity.WARN
    found = figures(check)
    assert (found["fewest of a class"], found["lenses in val"]) == (3, 3)
    assert found["lens fraction of val"] == 0.1
    assert found["lens fraction of test"] == 0.5


def test_a_split_without_lenses_stops_what_follows(
    noise: pd.DataFrame, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which building a dataset refuses itself: here it is one that something else has left."""
    assert run(noise, instance, monkeypatch).success
    (facts,) = Path("home").glob("dataset/*/dataset.json")
    facts.chmod(0o644)
    facts.write_text(facts.read_text().replace('"n_lens": 15', '"n_lens":  0', 1))
    ran = run(noise, instance, monkeypatch, stages=3)
    check = checks_of(ran)["every_split_holds_both_classes"]
    assert not check.passed
    assert check.severity == dg.AssetCheckSeverity.ERROR
    assert figures(check)["fewest of a class"] == 0
    assert not ran.asset_materializations_for_node("lens_shards")


@pytest.mark.parametrize("n_real_lenses", [0, 5])
def test_real_non_lenses_beside_simulated_lenses_are_warned_of(
    n_real_lenses: int,
    noise: pd.DataFrame,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their noise would tell them: as of candidates of a network that were graded."""
    train = noise.index[noise["split"] == "train"]
    noise["simulated"] = 1
    real = [*train[noise.loc[train, "label"] == 0][:9], *train[noise.loc[train, "label"] == 1]]
    noise.loc[real[: 9 + n_real_lenses], "simulated"] = 0
    check = checks_of(run(noise, instance, monkeypatch))["each_origin_holds_both_classes"]
    assert check.passed == (n_real_lenses > 0)
    assert check.severity == dg.AssetCheckSeverity.WARN
    assert figures(check) == {
        "lens fraction of simulated": pytest.approx((15 - n_real_lenses) / (21 - n_real_lenses)),
        "lens fraction of real": pytest.approx(n_real_lenses / (9 + n_real_lenses)),
        "at least of either class": 0.1,
    }


def test_a_pixel_that_is_not_finite_stops_what_follows(
    noise: pd.DataFrame, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which reading an image mends or refuses itself: here a disk has changed it."""
    assert run(noise, instance, monkeypatch).success
    (images,) = Path("home").glob("dataset/*/test.npy")
    images.chmod(0o644)
    pixels = np.load(images, mmap_mode="r+")
    pixels[4, 1, 0, :2] = (np.nan, np.inf)
    pixels.flush()
    for measured in Path("home").glob("statistics/*/pixels.json"):
        measured.unlink()
    ran = run(noise, instance, monkeypatch, stages=3)
    check = checks_of(ran)["all_pixels_are_finite"]
    assert not check.passed
    found = figures(check)
    assert (found["non-finite pixels"], found["at most"]) == (2, 0)
    assert (found["of these in test"], found["of these in train"]) == (2, 0)
    assert not ran.asset_materializations_for_node("lens_shards")
    # Nor by a run of their own, in which no check blocks them.
    alone = dg.materialize(
        STAGES[:3],
        selection=[SHARDS],
        instance=instance,
        resources={"lens": LensHome()},
        raise_on_error=False,
    )
    (failure,) = (event for event in alone.all_events if event.is_step_failure)
    assert "all_pixels_are_finite has refused it" in str(failure.step_failure_data.error)


def test_cutouts_that_were_too_many_to_compare_are_warned_of(
    noise: pd.DataFrame, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many of one shallow survey may look; here one says so that something else has left."""
    assert run(noise, instance, monkeypatch).success
    (facts,) = Path("home").glob("dataset/*/dataset.json")
    known, told = facts.read_text(), '"n_alike_not_compared": '
    assert f"{told}0" in known
    facts.chmod(0o644)
    facts.write_text(known.replace(f"{told}0", f"{told}7"))
    ran = run(noise, instance, monkeypatch)
    assert ran.success
    check = checks_of(ran)["no_near_duplicates_across_splits"]
    assert not check.passed
    assert check.severity == dg.AssetCheckSeverity.WARN
    assert figures(check)["alike, but not compared"] == 7


def test_a_version_is_compared_with_the_last_one_that_has_other_content(
    noise: pd.DataFrame, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bands_check() -> dg.AssetCheckEvaluation:
        ran = run(noise, instance, monkeypatch)
        assert ran.success
        return checks_of(ran)["bands_are_as_in_the_last_version"]

    assert "compared" in figures(bands_check())
    pixels = np.load("stack.npy")
    pixels[:, 1] += 0.5  # a sky that was subtracted otherwise
    np.save("stack.npy", pixels)
    for _ in range(2):  # made, then reused: compared with the same one
        check = bands_check()
        assert not check.passed
        assert check.severity == dg.AssetCheckSeverity.WARN
        assert not check.blocking
        found = figures(check)
        assert found["of"] == "median of g"
        assert found["largest change"] == pytest.approx(0.5, abs=0.05)
        assert found["at most"] == 0.25
        assert str(check.description).startswith("median of g: changed by 0.")
    pixels += 0.01
    np.save("stack.npy", pixels)
    check = bands_check()
    assert check.passed
    assert figures(check)["largest change"] < 0.05


def test_other_bands_than_in_the_last_version_are_told(
    noise: pd.DataFrame, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(noise, instance, monkeypatch).success
    monkeypatch.setenv("LENS_BANDS", "r")
    check = checks_of(run(noise, instance, monkeypatch))["bands_are_as_in_the_last_version"]
    assert not check.passed
    assert figures(check) == {"compared": "the bands are r, were r, g"}
    assert check.description == "the bands are r, were r, g"  # which the terminal says, too


def test_a_damaged_shard_is_named_and_not_published(
    noise: pd.DataFrame,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert run(noise, instance, monkeypatch, stages=3).success
    (tar,) = Path("home").glob("shards/*/val-000000.tar")
    content = bytearray(tar.read_bytes())
    content[3000] ^= 1
    tar.chmod(0o644)
    tar.write_bytes(content)
    ran = run(noise, instance, monkeypatch, stages=4)
    check = checks_of(ran)["manifest_is_whole"]
    assert not check.passed
    found = figures(check)
    assert found["problems"] == 1
    assert "val-000000.tar: has sha256" in found["first"]
    assert not ran.asset_materializations_for_node("cloud_shards")
    assert "make the shards again with --verify" in caplog.text
    monkeypatch.setenv("LENS_VERIFY", "true")
    assert run(noise, instance, monkeypatch, stages=4).success


def test_tables_show_the_splits_the_columns_and_the_shards(
    noise: pd.DataFrame, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise.loc[:8, "label"] = None
    ran = run(noise, instance, monkeypatch, stages=3)
    assert ran.success
    events = [event.step_materialization_data for event in ran.get_asset_materialization_events()]
    shown = {event.materialization.asset_key: event.materialization.metadata for event in events}
    catalogue = shown[dg.AssetKey("cutout_catalogue")]
    splits = {r.data["split"]: r.data for r in catalogue["splits"].records}
    assert {part: of["n"] for part, of in splits.items()} == {
        "train": "27",
        "val": "27",
        "test": "27",
        "unlabelled": "9",
    }
    columns = {c.name: c for c in catalogue["dagster/column_schema"].schema.columns}
    assert set(columns) >= set(noise)
    assert "0 not" in (columns["label"].description or "")
    dataset = open_dataset(shown[DATASET]["location"].value)
    counted = {r.data["split"]: r.data["n_lens"] for r in shown[DATASET]["splits"].records}
    assert counted == {p: str(of["n_lens"]) for p, of in dataset.facts["splits"].items()}
    manifest = read_manifest(shown[SHARDS]["location"].value)
    listed = [r.data["name"] for r in shown[SHARDS]["table"].records]
    assert listed == [shard.name for shard in manifest.shards]


def test_no_shards_are_made_of_what_a_blocking_check_has_refused(
    dataset: Dataset, tmp_path: Path
) -> None:
    """Whichever run asked for them: a check blocks in its own run alone."""
    settings = Settings.load(home=tmp_path / "home")
    own = Path(shutil.copytree(dataset.folder, tmp_path / "dataset"))
    check_not_refused(Made(str(own), "sound"), settings)
    pixels = np.load(own / "train.npy", mmap_mode="r+")
    pixels[3, 0, 5, 5] = np.nan
    pixels.flush()
    with pytest.raises(InputError, match="all_pixels_are_finite has refused it"):
        check_not_refused(Made(str(own), "spoilt"), settings)
    torn = pd.read_parquet(own / "val.parquet").assign(group=dataset.table("train")["group"][0])
    torn.to_parquet(own / "val.parquet")
    with pytest.raises(InputError, match="no_group_spans_two_splits has refused it"):
        check_not_refused(Made(str(own), "torn"), settings)


def test_the_sky_is_searched_once_for_the_same_rows_and_splits(
    noise: pd.DataFrame, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = noise.assign(ra=np.arange(N, dtype=float), dec=5.0)
    noise.loc[3, "ra"] = noise.loc[1, "ra"] + 1 / 3600

    def searched(pairs: int) -> dict[Path, int]:
        check = checks_of(run(noise, instance, monkeypatch, stages=1))[name]
        assert (check.passed, figures(check)["pairs"]) == (pairs == 0, pairs)
        return {
            p: p.stat().st_mtime_ns for p in Path("home").glob("statistics/*/positions.parquet")
        }

    name = "no_position_is_in_two_splits"
    first = searched(pairs=1)
    assert len(first) == 1
    assert searched(pairs=1) == first
    noise["split"] = None
    monkeypatch.setenv("LENS_SEED", "1")
    split = assign_splits(noise.assign(group=noise["id"]), 1)
    assert len(searched(pairs=int(split[1] != split[3]))) == 2
    noise = noise.drop(index=3)
    assert len(searched(pairs=0)) == 3
