"""What fails by chance is tried again, against a real S3 server that is unwell for a while."""

import importlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import fsspec
import numpy as np
import pandas as pd
import pytest

from lens_pipeline.definitions import make_definitions
from lens_pipeline.defs import shards, stages
from lens_pipeline.defs.catalogue import cutout_catalogue
from lens_pipeline.defs.dataset import processed_dataset
from lens_pipeline.defs.resources import LensHome
from lens_pipeline.errors import InputError, NoAnswerError
from lens_pipeline.runner import open_instance
from lens_pipeline.settings import Settings
from lens_pipeline.shards import patience, publish_shards
from lens_pipeline_tests.faulty_proxy import FaultyProxy
from lens_pipeline_tests.object_stores import GCSServer, S3Server

Proxies = Callable[[S3Server | GCSServer], FaultyProxy]
N = 30
STAGES = (cutout_catalogue, processed_dataset)


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a catalogue, table.csv, which is LENS_SOURCE, and its images."""
    table = pd.DataFrame({"id": [f"c{i}" for i in range(N)], "label": np.arange(N) // 3 % 2})
    table["path"] = [f"{i}.npy" for i in range(N)]
    table["split"] = np.array(["train", "val", "test"])[np.arange(N) % 3]
    folder = tmp_path / "images"
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(3).normal(size=(N, 1, 32, 32))):
        np.save(folder / f"{i}.npy", pixels)
    table.to_csv(folder / "table.csv", index=False)
    monkeypatch.setenv("LENS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LENS_IMAGE_SIZE", "32")
    monkeypatch.setenv("LENS_SOURCE", str(folder / "table.csv"))
    monkeypatch.setattr(stages, "AGAIN", stages.AGAIN._replace(delay=0.5))
    return folder


@pytest.fixture
def proxy(
    images: Path,
    s3_bucket: str,
    s3_server: S3Server,
    faulty_proxy: Proxies,
    monkeypatch: pytest.MonkeyPatch,
) -> FaultyProxy:
    """In front of a server where `images` are, as LENS_SOURCE says."""
    filesystem, root = fsspec.url_to_fs(s3_bucket, **s3_server.storage_options())
    filesystem.put([str(path) for path in images.iterdir()], root + "/")
    through = faulty_proxy(s3_server)
    monkeypatch.setenv("LENS_SOURCE", f"{s3_bucket}/table.csv")
    monkeypatch.setenv("LENS_STORAGE_OPTIONS", json.dumps(s3_server.storage_options(through.url)))
    return through


def retries(ran: dg.ExecuteInProcessResult) -> list[str | None]:
    return [
        e.step_key for e in ran.all_events if e.event_type == dg.DagsterEventType.STEP_UP_FOR_RETRY
    ]


@pytest.mark.parametrize(
    ("unwell", "tried_again"),
    [(r"table\.csv", "cutout_catalogue"), (r"GET .*7\.npy", "processed_dataset")],
)
def test_a_store_that_is_unwell_for_a_while_costs_neither_the_run_nor_an_image(
    proxy: FaultyProxy, instance: dg.DagsterInstance, unwell: str, tried_again: str
) -> None:
    proxy.every(1, status=503, only=unwell)
    ended = threading.Event()

    def recover() -> None:
        kind = dg.DagsterEventType.STEP_UP_FOR_RETRY
        while not ended.wait(0.1):
            runs = instance.get_run_ids(limit=1)
            if runs and instance.get_records_for_run(runs[0], of_type=kind).records:
                proxy.pass_through()
                return

    recovery = threading.Thread(target=recover)
    recovery.start()
    try:
        ran = dg.materialize(
            [one.asset() for one in STAGES], instance=instance, resources={"lens": LensHome()}
        )
    finally:
        ended.set()
        recovery.join()
    assert ran.success
    assert retries(ran) == [tried_again]
    shown = ran.asset_materializations_for_node("processed_dataset")[0].metadata
    assert shown["rejects"].value == 0


@pytest.mark.parametrize(
    ("reads", "changed", "tried_again"),
    [
        ("table.read_catalogue", "table.csv", "cutout_catalogue"),
        ("build.build_dataset", "7.npy", "processed_dataset"),
    ],
)
def test_a_source_that_changes_while_it_is_read_is_read_again(
    reads: str,
    changed: str,
    tried_again: str,
    images: Path,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it would be kept as what it was before, and be taken for that when that comes back."""
    other = (images / changed).read_bytes() + b"\n"
    module, name = reads.split(".")
    library = importlib.import_module(f"lens_pipeline.catalogue.{module}")
    reading = getattr(library, name)

    def read(*arguments: Any, **named: Any) -> Any:
        if (images / changed).read_bytes() != other:
            (images / changed).write_bytes(other)
        return reading(*arguments, **named)

    monkeypatch.setattr(library, name, read)
    ran = dg.materialize(
        [one.asset() for one in STAGES], instance=instance, resources={"lens": LensHome()}
    )
    assert ran.success
    assert retries(ran) == [tried_again]


def test_a_setting_out_of_its_bounds_is_named_and_not_tried_again(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was mistyped in the launchpad."""
    monkeypatch.setenv("LENS_HOME", str(own_home))
    monkeypatch.setenv("LENS_PRESET", "tiny")
    monkeypatch.setattr(stages, "AGAIN", stages.AGAIN._replace(delay=0.1))
    settings = Settings.load()
    member = dg.AssetKey(["checkpoints", "lastro"])
    with open_instance(settings) as instance:
        ran = (
            make_definitions(settings)
            .resolve_job_def("training")
            .execute_in_process(
                {"ops": {"checkpoints__lastro": {"config": {"training": {"epochs": 0}}}}},
                instance=instance,
                asset_selection=[member],
                raise_on_error=False,
            )
        )
    assert retries(ran) == []
    (failed,) = [e for e in ran.all_events if e.is_step_failure]
    said = "checkpoints/lastro: training.epochs: Input should be greater than or equal to 1"
    assert said in failed.step_failure_data.error.message


def test_where_somebody_waits_the_first_failure_comes_out_as_it_is(proxy: FaultyProxy) -> None:
    proxy.every(1, status=503, only=r"table\.csv")
    begun = time.monotonic()
    with pytest.raises(NoAnswerError, match=r"s3://.*/table\.csv: its store fails"):
        dg.materialize([cutout_catalogue.asset(retries=False)], resources={"lens": LensHome()})
    assert time.monotonic() - begun < 60


def test_published_shards_are_asked_for_again_where_nobody_waits(
    shards_folder: Path,
    s3_bucket: str,
    s3_server: S3Server,
    faulty_proxy: Proxies,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish_shards(
        shards_folder, f"{s3_bucket}/shards", storage_options=s3_server.storage_options()
    )
    through = faulty_proxy(s3_server)
    through.every(1, status=503)
    monkeypatch.setenv("LENS_SOURCE", f"{s3_bucket}/shards")
    monkeypatch.setenv("LENS_STORAGE_OPTIONS", json.dumps(s3_server.storage_options(through.url)))
    monkeypatch.setattr(patience, "PATIENCE", 0.1)
    monkeypatch.setattr(shards, "AGAIN", stages.AGAIN._replace(delay=0))

    def observed(retries: bool) -> dg.ExecuteInProcessResult:
        definitions = dg.Definitions(
            [shards.observed_shards(retries)],
            jobs=[dg.define_asset_job("look", dg.AssetSelection.all(include_sources=True))],
            resources={"lens": LensHome()},
        )
        look = definitions.resolve_job_def("look")
        return look.execute_in_process(instance=instance, raise_on_error=False)

    assert retries(observed(retries=True)) == 2 * ["cloud_shards"]
    assert retries(observed(retries=False)) == []


def test_bad_input_is_never_tried_again(
    proxy: FaultyProxy,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
    s3_bucket: str,
) -> None:
    monkeypatch.setenv("LENS_SOURCE", f"{s3_bucket}/nothing.csv")
    resources = {"lens": LensHome()}
    with pytest.raises(InputError, match="there is no such file or folder"):
        dg.materialize([cutout_catalogue.asset(retries=False)], resources=resources)
    ran = dg.materialize(
        [cutout_catalogue.asset()], instance=instance, resources=resources, raise_on_error=False
    )
    assert not ran.success
    assert retries(ran) == []
    (failed,) = [e for e in ran.all_events if e.is_step_failure]
    assert "there is no such file or folder" in str(failed.step_failure_data.error)
