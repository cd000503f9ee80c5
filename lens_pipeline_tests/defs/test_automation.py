"""What schedules and sensors launch, and what they leave alone."""

import importlib.metadata
import json
import os
import shutil
from datetime import timedelta
from pathlib import Path

import dagster as dg
import fsspec
import numpy as np
import pandas as pd
import pytest
from dagster._core.scheduler import DagsterDaemonScheduler

from lens_pipeline.definitions import make_definitions
from lens_pipeline.errors import InputError
from lens_pipeline.runner import open_instance
from lens_pipeline.settings import Settings
from lens_pipeline.shards import patience
from lens_pipeline.shards.cloud import publish_shards
from lens_pipeline_tests.defs.conftest import Webhook
from lens_pipeline_tests.defs.ticks import RESOURCES, SURVEYS, Sensor
from lens_pipeline_tests.object_stores import S3Server


@pytest.fixture
def source(simulated_catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a catalogue that is LENS_SOURCE, of cutouts beside it; it is not there yet."""
    place = tmp_path / "source"
    shutil.copytree(simulated_catalogue.parent, place)
    (place / simulated_catalogue.name).unlink()
    monkeypatch.setenv("LENS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LENS_SOURCE", str(place / simulated_catalogue.name))
    return place / simulated_catalogue.name


def test_a_new_catalogue_is_processed_once_it_rests_and_the_same_one_never_again(
    source: Path, simulated_catalogue: Path, instance: dg.DagsterInstance
) -> None:
    sensor = Sensor("source_changed", instance)
    assert [sensor.tick() for _ in range(3)] == [[], [], []]  # there is none
    source.write_bytes(simulated_catalogue.read_bytes()[:1000])
    assert sensor.tick() == []  # it is being written
    shutil.copy(simulated_catalogue, source)
    assert sensor.tick() == []  # it may be written still
    (first,) = sensor.tick()
    assert [sensor.tick() for _ in range(3)] == [[], [], []]
    shutil.copy(simulated_catalogue, source)  # the same one, at another time
    assert [sensor.tick() for _ in range(3)] == [[], [], []]
    image = source.with_name("images-00000.npy")
    before = image.stat()
    os.utime(image, (0, 0))  # a cutout that has changed
    assert [sensor.tick() for _ in range(3)] == [[], [], []]  # all are looked at each hour
    sensor.an_hour_later()
    assert sensor.tick() == []
    (second,) = sensor.tick()
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))  # and is again what it was
    sensor.an_hour_later()
    assert sensor.tick() == []
    (third,) = sensor.tick()
    assert len({first, second, third}) == 3


def test_a_change_in_a_bucket_is_seen(
    s3_bucket: str,
    s3_server: S3Server,
    simulated_catalogue: Path,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = s3_server.storage_options()
    filesystem, root = fsspec.url_to_fs(s3_bucket, **options)
    monkeypatch.setenv("LENS_SOURCE", f"{s3_bucket}/{simulated_catalogue.name}")
    monkeypatch.setenv("LENS_STORAGE_OPTIONS", json.dumps(options))
    sensor = Sensor("source_changed", instance)
    assert sensor.tick() == []
    for file in simulated_catalogue.parent.iterdir():
        filesystem.put(str(file), f"{root}/{file.name}")
    assert [len(sensor.tick()) for _ in range(3)] == [0, 1, 0]
    filesystem.put(str(simulated_catalogue), f"{root}/{simulated_catalogue.name}")  # the same one
    assert [len(sensor.tick()) for _ in range(2)] == [0, 0]
    filesystem.pipe_file(f"{root}/images-00000.npy", b"other cutouts")
    assert [len(sensor.tick()) for _ in range(2)] == [0, 0]
    sensor.an_hour_later()
    assert [len(sensor.tick()) for _ in range(3)] == [0, 1, 0]
    fewer = pd.read_parquet(simulated_catalogue).iloc[1:].to_parquet()
    filesystem.pipe_file(f"{root}/{simulated_catalogue.name}", fewer)
    assert [len(sensor.tick()) for _ in range(3)] == [0, 1, 0]  # at once


def test_a_new_image_in_a_folder_is_seen_at_once(
    tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(name: str) -> None:
        (tmp_path / "cutouts" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "cutouts" / name, np.zeros((3, 8, 8), np.float32))

    for split in ("train", "val", "test"):
        for kind in ("lens", "nonlens"):
            add(f"{split}/{kind}/first.npy")
    monkeypatch.setenv("LENS_SOURCE", str(tmp_path / "cutouts"))
    sensor = Sensor("source_changed", instance)
    assert [len(sensor.tick()) for _ in range(3)] == [0, 1, 0]
    add("val/lens/second.npy")
    assert [len(sensor.tick()) for _ in range(3)] == [0, 1, 0]
    (tmp_path / "cutouts/val/lens/second.npy").write_bytes(b"another")  # in its place
    assert [len(sensor.tick()) for _ in range(2)] == [0, 0]
    sensor.an_hour_later()
    assert [len(sensor.tick()) for _ in range(3)] == [0, 1, 0]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="this system does not count reads")
def test_a_catalogue_that_rests_is_not_read_each_minute(
    tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "catalogue.csv"
    rows = {"id": range(20_000), "path": "image.npy", "label": 0, "note": "x" * 50}
    pd.DataFrame(rows).to_csv(source, index=False)
    monkeypatch.setenv("LENS_SOURCE", str(source))
    sensor = Sensor("source_changed", instance)
    assert [len(sensor.tick()) for _ in range(3)] == [0, 1, 0]

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read()
    assert sensor.tick() == []
    assert read() - before < source.stat().st_size / 2


def test_a_new_version_of_published_shards_is_seen(
    shards_folder: Path,
    uneven_shards: Path,
    tmp_path: Path,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish_shards(shards_folder, str(tmp_path / "published"))
    monkeypatch.setenv("LENS_SOURCE", str(tmp_path / "published"))
    sensor = Sensor("source_changed", instance)
    assert [len(sensor.tick()) for _ in range(3)] == [0, 1, 0]
    publish_shards(shards_folder, str(tmp_path / "published"))  # the same ones
    assert [len(sensor.tick()) for _ in range(2)] == [0, 0]
    publish_shards(uneven_shards, str(tmp_path / "published"))
    assert [len(sensor.tick()) for _ in range(3)] == [0, 1, 0]


def test_a_source_that_can_no_longer_be_read_is_told_once(
    source: Path,
    simulated_catalogue: Path,
    instance: dg.DagsterInstance,
    webhook: Webhook,
) -> None:
    sensor = Sensor("source_changed", instance)
    shutil.copy(simulated_catalogue, source)
    assert [len(sensor.tick()) for _ in range(2)] == [0, 1]
    content, before = source.read_bytes(), source.stat()
    source.unlink()
    assert sensor.tick() == []
    assert webhook.posted == []  # it may be on its way
    assert [sensor.tick() for _ in range(4)] == [[], [], [], []]
    (told,) = webhook.posted
    assert "can no longer be read" in told["text"]
    assert source.name in told["text"]
    source.write_bytes(content)  # it is back as it was
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [sensor.tick() for _ in range(3)] == [[], [], []]
    source.unlink()
    assert [sensor.tick() for _ in range(2)] == [[], []]
    assert len(webhook.posted) == 2  # another time


def test_the_simulation_is_not_watched(instance: dg.DagsterInstance) -> None:
    assert Sensor("source_changed", instance).tick() == []


def scheduled(
    instance: dg.DagsterInstance, loaded: dg.Definitions | None = None
) -> list[dg.RunRequest]:
    """loaded: the definitions, by default those of now."""
    definitions = loaded or make_definitions(Settings.load())
    schedule = definitions.resolve_schedule_def("weekly_retraining")
    with dg.build_schedule_context(instance=instance, resources=RESOURCES) as context:
        return list(schedule.evaluate_tick(context).run_requests or [])


def launched(
    instance: dg.DagsterInstance,
    request: dg.RunRequest,
    status: dg.DagsterRunStatus = dg.DagsterRunStatus.SUCCESS,
) -> None:
    """Let a run that the schedule asks for be as it is later."""
    instance.add_run(
        dg.DagsterRun(job_name="full_pipeline", tags=dict(request.tags), status=status)
    )


def test_nothing_is_retrained_twice_from_the_same_source_settings_and_code(
    source: Path,
    simulated_catalogue: Path,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (unread,) = scheduled(instance)  # the source is not there, as the run will tell
    assert unread.tags["lens/inputs"] == "unknown"
    launched(instance, unread, dg.DagsterRunStatus.FAILURE)
    shutil.copy(simulated_catalogue, source)
    (request,) = scheduled(instance)
    for status in (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED):
        launched(instance, request, status)
    assert scheduled(instance) == [request]  # which did not succeed
    launched(instance, request, dg.DagsterRunStatus.STARTED)
    assert scheduled(instance) == []
    launched(instance, unread)  # what it has read nobody knows, nor whether that is still there
    assert scheduled(instance) == [request]
    launched(instance, request)
    monkeypatch.setenv("LENS_IMAGE_SIZE", "48")
    (other,) = scheduled(instance)
    assert other.tags != request.tags
    launched(instance, other)
    assert scheduled(instance) == []
    training = source.with_name("training.yaml")
    monkeypatch.setenv("LENS_TRAINING", str(training))
    for epochs in (2, 3):  # the file is the same one, and says something else
        training.write_text(f"training: {{epochs: {epochs}}}")
        (other,) = scheduled(instance)
        launched(instance, other)
    decide_nothing = {"TIME_ZONE": "Europe/Paris", "CACHE_GB": "5", "DEPLOYMENT": "staging"}
    for name, value in {**decide_nothing, "FUSION": "best", "SURVEY": ""}.items():  # by default
        monkeypatch.setenv(f"LENS_{name}", value)
        assert scheduled(instance) == [], name
    os.utime(source.with_name("images-00000.npy"), (0, 0))
    assert len(scheduled(instance)) == 1


def test_a_store_that_does_not_answer_is_told_and_costs_no_retraining(
    source: Path,
    simulated_catalogue: Path,
    instance: dg.DagsterInstance,
    webhook: Webhook,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of published shards, too, which are asked for patiently."""
    sensor = Sensor("source_changed", instance)
    shutil.copy(simulated_catalogue, source)
    assert [len(sensor.tick()) for _ in range(2)] == [0, 1]
    loaded = make_definitions(Settings.load())
    monkeypatch.setattr(patience, "PATIENCE", 0.1)
    for name in ("lenses", "lenses/catalogue.csv"):
        monkeypatch.setenv("LENS_SOURCE", f"http://127.0.0.1:9/{name}")
        (request,) = scheduled(instance, loaded)  # whose first step asks again
        assert request.tags["lens/inputs"] == "unknown"
        launched(instance, request)
        assert [sensor.tick() for _ in range(2)] == [[], []]
        assert len(webhook.posted) == 1
    assert "the source can no longer be read: " in webhook.texts[0]
    monkeypatch.setenv("LENS_SOURCE", str(source))
    assert scheduled(instance)[0].tags["lens/inputs"] != "unknown"


def test_a_home_has_ticks_of_schedules_that_fail_tried_again(tmp_path: Path) -> None:
    """Dagster by itself would wait for the next one, a week later."""
    with open_instance(Settings.load(home=tmp_path)) as instance:
        assert isinstance(instance.scheduler, DagsterDaemonScheduler)
        assert instance.scheduler.max_tick_retries == 60


def test_settings_that_are_taken_back_are_trained_with_again(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was last made is of other settings, though there once was a run with these."""
    (first,) = scheduled(instance)
    launched(instance, first)
    monkeypatch.setenv("LENS_SEED", "1")
    (second,) = scheduled(instance)
    launched(instance, second, dg.DagsterRunStatus.FAILURE)
    monkeypatch.delenv("LENS_SEED")
    assert scheduled(instance) == []  # the first one's is still what was last made
    launched(instance, second, dg.DagsterRunStatus.STARTED)
    instance.add_run(  # by hand
        dg.DagsterRun(job_name="full_pipeline", status=dg.DagsterRunStatus.SUCCESS)
    )
    assert scheduled(instance) == [first]  # it will be made after the second, which is under way
    launched(instance, first, dg.DagsterRunStatus.STARTING)
    assert scheduled(instance) == []


def test_another_version_of_a_library_that_trains_is_trained_with(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = importlib.metadata.version
    launched(instance, *scheduled(instance))
    for library, asked in (("torchmetrics", 1), ("dagster", 0)):
        with monkeypatch.context() as upgraded:
            upgraded.setattr(
                "importlib.metadata.version",
                lambda name, new=library: "99.1" if name == new else installed(name),
            )
            assert len(scheduled(instance)) == asked, library


def test_the_schedule_is_that_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENS_RETRAIN_CRON", "30 4 * * 6")
    monkeypatch.setenv("LENS_TIME_ZONE", "Pacific/Honolulu")
    schedule = make_definitions(Settings.load()).resolve_schedule_def("weekly_retraining")
    assert schedule.cron_schedule == "30 4 * * 6"
    assert schedule.execution_timezone == "Pacific/Honolulu"
    assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED
    for name, wrong in (("LENS_RETRAIN_CRON", "monthly"), ("LENS_TIME_ZONE", "Europe/Paree")):
        monkeypatch.setenv(name, wrong)
        with pytest.raises(InputError, match=f"{name}.*{wrong}"):
            make_definitions(Settings.load())
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("cron", "warned", "failed"),
    [
        ("0 3 * * 1", 8, 35),
        ("0 3 * * *", 2, 5),
        ("0 3 1 * *", 32, 155),
        ("0 3 * * 1-5", 4, 15),  # nothing is due at weekends
        ("* * * * *", 2, 5),
    ],
)
def test_what_is_retrained_is_overdue_by_the_schedule(
    cron: str, warned: int, failed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LENS_RETRAIN_CRON", cron)
    graph = make_definitions(Settings.load()).resolve_asset_graph()
    for name in ("cutout_catalogue", "registered_ensemble"):
        policy = graph.get(dg.AssetKey(name)).to_asset_spec().freshness_policy
        assert policy == dg.FreshnessPolicy.time_window(
            fail_window=timedelta(days=failed), warn_window=timedelta(days=warned)
        )


def test_schedule_and_sensor_launch_one_run_for_all_surveys(
    source: Path,
    two_surveys: Path,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LENS_SURVEY", ",".join(SURVEYS))
    shutil.copy(two_surveys, source)
    (request,) = scheduled(instance)
    assert request.partition_key_range == dg.PartitionKeyRange(*SURVEYS)
    sensor = Sensor("source_changed", instance)
    assert [len(sensor.tick()) for _ in range(3)] == [0, 1, 0]
    (requested,) = sensor.requested
    assert requested.partition_key_range == dg.PartitionKeyRange(*SURVEYS)


def test_new_data_wait_for_a_training_that_is_under_way(
    source: Path,
    simulated_catalogue: Path,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whose networks would be of shards that are not the newest when it ends."""
    sensor = Sensor("source_changed", instance)
    training = make_definitions(Settings.load()).resolve_job_def("training")
    run = instance.create_run_for_job(training, status=dg.DagsterRunStatus.STARTED)
    shutil.copy(simulated_catalogue, source)
    assert [sensor.tick() for _ in range(3)] == [[], [], []]
    assert "once no run of `training` is under way" in sensor.skipped
    with monkeypatch.context() as patch:  # for days nobody looks at millions of cutouts
        patch.setattr("lens_pipeline.defs.sensors.source_state", lambda _: 1 / 0)
        assert sensor.tick() == []
    instance.report_run_canceled(run)
    assert len(sensor.tick()) == 1
