"""A home's Dagster instance: its settings, and what runs that have died leave to others."""

import hashlib
import os
import sqlite3
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from lens_pipeline import runner
from lens_pipeline.definitions import make_definitions
from lens_pipeline.defs.checkpoints import POOL
from lens_pipeline.errors import InputError
from lens_pipeline.launcher import CANCELED
from lens_pipeline.processes import HOST, PID, RUN, process_tags, sign_of_life
from lens_pipeline.runner import (
    open_instance,
    prepare_home,
    release_dead_runs,
    run_pipeline,
    settings_of_home,
)
from lens_pipeline.settings import Settings
from lens_pipeline_tests.served import until


def test_dead_and_ended_runs_give_their_slots_back_and_a_live_one_keeps_its(tmp_path: Path) -> None:
    settings = Settings.load(home=tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    dead = {PID: str(ended.pid)}
    ended.wait()
    with open_instance(settings) as instance:
        job = dg.GraphDefinition("trains").to_job()
        cases = {
            "dead": (dead, dg.DagsterRunStatus.STARTED),
            "dead and canceling": (dead, dg.DagsterRunStatus.CANCELING),
            "dead, to be cancelled": (dead, dg.DagsterRunStatus.STARTED),
            "cancelled": (dead, dg.DagsterRunStatus.CANCELED),
            "alive": ({}, dg.DagsterRunStatus.STARTED),
            "tried again": (dead | {RUN: "the first"}, dg.DagsterRunStatus.STARTING),
        }
        instance.event_log_storage.set_concurrency_slots(POOL, len(cases))
        runs = {name: str(uuid.uuid4()) for name in cases}
        for name, (tags, status) in cases.items():
            run_id = runs[name]
            asked = {CANCELED: run_id} if name == "dead, to be cancelled" else {}
            instance.create_run_for_job(
                job, run_id=run_id, tags=process_tags(run_id) | tags | asked, status=status
            )
        for run_id in runs.values():
            claim = instance.event_log_storage.claim_concurrency_slot(POOL, run_id, "step")
            assert claim.is_claimed
        cancelled = {runs["dead and canceling"], runs["dead, to be cancelled"]}
        assert set(release_dead_runs(instance)) == {runs["dead"], *cancelled}
        info = instance.event_log_storage.get_concurrency_info(POOL)
        assert info.active_run_ids == {runs["alive"], runs["tried again"]}
        for run in instance.get_runs(dg.RunsFilter(run_ids=[*cancelled])):
            assert run.status == dg.DagsterRunStatus.CANCELED  # not tried again


@pytest.mark.parametrize("its_turn", [False, True])
def test_a_run_that_died_while_it_waited_for_the_pool_keeps_no_other_waiting(
    its_turn: bool, tmp_path: Path
) -> None:
    """Whether its turn came before anybody saw that it had died, or after."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with open_instance(Settings.load(home=tmp_path)) as instance:
        storage = instance.event_log_storage
        storage.initialize_concurrency_limit_to_default(POOL)

        def begun(**tags: str) -> str:
            run_id = str(uuid.uuid4())
            tags = process_tags(run_id) | tags
            job, status = dg.GraphDefinition("trains").to_job(), dg.DagsterRunStatus.STARTED
            return instance.create_run_for_job(job, run_id=run_id, tags=tags, status=status).run_id

        def claims(run_id: str) -> bool:
            return storage.claim_concurrency_slot(POOL, run_id, "step").is_claimed

        first, dead, last = begun(), begun(**{PID: str(ended.pid)}), begun()
        assert [claims(run_id) for run_id in (first, dead)] == [True, False]
        if its_turn:
            storage.free_concurrency_slots_for_run(first)
        assert release_dead_runs(instance) == [dead]
        storage.free_concurrency_slots_for_run(first)
        assert claims(last)


def test_a_run_that_waits_for_one_of_another_host_goes_on_when_that_dies(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner, "PATIENCE", 1)
    settings = Settings.load(home=own_home, preset="tiny")
    settings.export()
    held = str(uuid.uuid4())
    sign = sign_of_life(settings.dagster_home, held)
    holder = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[sign]
    )
    os.close(sign)
    with open_instance(settings) as instance:
        instance.create_run_for_job(
            make_definitions(settings).resolve_job_def("full_pipeline"),
            run_id=held,
            tags=process_tags(held, holder.pid) | {HOST: "elsewhere"},
            status=dg.DagsterRunStatus.STARTED,
        )
        instance.event_log_storage.initialize_concurrency_limit_to_default(POOL)
        assert instance.event_log_storage.claim_concurrency_slot(POOL, held, "step").is_claimed
        storage = type(instance.event_log_storage)
    look, looks = storage.get_concurrency_info, []

    def away_at_first(*about: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            looks.append(about)
            if len(looks) == 1:
                raise sqlite3.OperationalError("database is locked")
        return look(*about)

    monkeypatch.setattr(storage, "get_concurrency_info", away_at_first)
    with ThreadPoolExecutor(1) as other:
        waiting = f"held by run {held[:8]} (process {holder.pid} on elsewhere)"

        def ends_once_it_is_named() -> None:
            until(lambda: waiting in caplog.text, 120, waiting)
            holder.communicate(b"\n")

        ended = other.submit(ends_once_it_is_named)
        run_pipeline(settings, {})
        ended.result()
    assert "is not known now: database is locked" in caplog.text
    assert list((own_home / "dagster" / ".alive").iterdir()) == []


def test_the_instance_settings_of_a_former_version_are_replaced_and_edited_ones_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.load(home=tmp_path)
    prepare_home(settings)
    file = tmp_path / "dagster" / "dagster.yaml"
    shipped = file.read_text()
    for content, kept in (("telemetry: {enabled: false}\n", False), ("# mine\n", True)):
        file.write_text(content)
        if not kept:
            former = hashlib.sha256(file.read_bytes()).hexdigest()
            monkeypatch.setattr(runner, "FORMER", {former})
        prepare_home(settings)
        assert file.read_text() == (content if kept else shipped)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is damaged; remove it"),
        ("3", "is damaged; remove it"),
        ('{"preset": "huge"}', "of the last run: LENS_PRESET: "),
    ],
)
def test_what_a_home_remembers_is_not_blamed_on_the_environment(
    content: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(InputError, match=f"{tmp_path}/settings.json.*{said}"):
        settings_of_home(str(tmp_path))


def test_who_looks_at_a_home_sees_the_graph_of_its_last_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings_of_home(str(home)).preset == "tiny"
    monkeypatch.setenv("LENS_PRESET", "full")
    assert settings_of_home(str(home)).preset == "full"
