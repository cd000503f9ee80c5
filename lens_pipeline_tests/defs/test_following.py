"""What follows by itself where an asset has changed: the cheap stages, and no training."""

from collections.abc import Callable

import dagster as dg
import pytest

from lens_pipeline.definitions import make_definitions
from lens_pipeline.settings import Settings
from lens_pipeline_tests.defs.ticks import SURVEYS

CHEAP_END = {"lens_ensemble", "ensemble_evaluation", "registered_ensemble"}


@pytest.fixture
def follow_up(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], set[str]]:
    """What is launched by itself at a tick, all assets having been made once."""
    monkeypatch.setenv("LENS_ARCHS", "a=lastro,b=resnet18")
    return following(instance)


def following(instance: dg.DagsterInstance) -> Callable[[], set[str]]:
    """See `follow_up`; of what is made by survey, `asset of survey`."""
    definitions = make_definitions(Settings.load())
    names = set()
    for key in definitions.resolve_all_asset_keys():
        partitions = definitions.resolve_asset_graph().get(key).partitions_def
        surveys = partitions.get_partition_keys() if partitions else [None]
        names |= {_named(key, survey) for survey in surveys}
    for name in names:
        made(instance, name)
    cursor = None

    def tick() -> set[str]:
        nonlocal cursor
        found = dg.evaluate_automation_conditions(definitions, instance, cursor=cursor)
        cursor = found.cursor
        return {
            _named(key, survey)
            for key in definitions.resolve_all_asset_keys()
            for survey in found.get_requested_partitions(key)
        }

    assert tick() == set()
    return tick


def _named(key: dg.AssetKey, survey: str | None) -> str:
    return " of ".join(filter(None, (key.to_user_string(), survey)))


def made(instance: dg.DagsterInstance, name: str) -> None:
    """name: of an asset, or `asset of survey`."""
    asset, _, survey = name.partition(" of ")
    key = dg.AssetKey(asset.split("/"))
    instance.report_runless_asset_event(dg.AssetMaterialization(key, partition=survey or None))


@pytest.mark.parametrize(
    ("changed", "launched"),
    [
        (["cutout_catalogue"], {"processed_dataset", "lens_shards", "cloud_shards"}),
        (["processed_dataset"], {"lens_shards", "cloud_shards"}),
        (["cloud_shards"], set()),  # the old checkpoints are of other cutouts
        (["checkpoints/a"], CHEAP_END),
        (["checkpoints/a", "checkpoints/b"], CHEAP_END),
        (["lens_ensemble"], CHEAP_END - {"lens_ensemble"}),
    ],
)
def test_cheap_stages_follow_and_no_network_is_trained(
    changed: list[str],
    launched: set[str],
    instance: dg.DagsterInstance,
    follow_up: Callable[[], set[str]],
) -> None:
    for name in changed:
        made(instance, name)
    assert follow_up() == launched
    assert follow_up() == set()


@pytest.mark.parametrize(
    ("changed", "launched"),
    [
        (
            "cutout_catalogue",
            {f"{stage} of {s}" for stage in ("processed_dataset", "lens_shards") for s in SURVEYS},
        ),
        ("processed_dataset of hsc", {"lens_shards of hsc"}),
        ("lens_shards of des", set()),
    ],
)
def test_of_several_surveys_those_follow_that_have_changed(
    changed: str,
    launched: set[str],
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is of all surveys follows once theirs have been made."""
    monkeypatch.setenv("LENS_SURVEY", ",".join(SURVEYS))
    monkeypatch.setenv("LENS_ARCHS", "lastro")
    follow_up = following(instance)
    made(instance, changed)
    if launched:
        assert follow_up() == launched
        assert follow_up() == set()
    for stage in sorted(launched, reverse=True):
        made(instance, stage)
    assert follow_up() == {"cloud_shards"}
    assert follow_up() == set()


def test_no_ensemble_is_made_of_new_and_old_members(
    instance: dg.DagsterInstance, follow_up: Callable[[], set[str]]
) -> None:
    """Where one training of several has failed, those that succeeded wait for it."""

    works = False

    @dg.asset(key=["checkpoints", "b"])
    def training() -> None:
        if not works:
            raise RuntimeError

    made(instance, "checkpoints/a")
    dg.materialize([training], instance=instance, raise_on_error=False)
    assert follow_up() == set()
    works = True
    dg.materialize([training], instance=instance)
    assert follow_up() == CHEAP_END


def test_nothing_follows_what_a_blocking_check_has_refused(
    instance: dg.DagsterInstance, follow_up: Callable[[], set[str]]
) -> None:
    def checked(name: str, passed: bool) -> None:
        key = dg.AssetKey("processed_dataset")
        instance.report_runless_asset_event(dg.AssetCheckEvaluation(key, name, passed))

    checked("bands_are_as_in_the_last_version", passed=False)  # which only warns
    made(instance, "processed_dataset")
    assert follow_up() == {"lens_shards", "cloud_shards"}
    for name in ("lens_shards", "cloud_shards"):
        made(instance, name)
    follow_up()
    made(instance, "processed_dataset")
    checked("no_group_spans_two_splits", passed=False)
    assert follow_up() == set()
    checked("no_group_spans_two_splits", passed=True)
    assert follow_up() == {"lens_shards", "cloud_shards"}
