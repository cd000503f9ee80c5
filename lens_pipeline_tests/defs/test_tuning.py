"""The job `tuning`, on the shards that a run has published."""

from pathlib import Path

import dagster as dg
import pytest

from lens_pipeline.definitions import make_definitions
from lens_pipeline.presets import chosen_members, member_config
from lens_pipeline.settings import Settings
from lens_pipeline.training.config import TrainConfig


def _run(
    home: Path, config: dict[str, object], instance: dg.DagsterInstance
) -> dg.JobExecutionResult:
    settings = Settings.load(home=str(home), preset="tiny")
    settings.export()
    return (
        make_definitions(settings)
        .resolve_job_def("tuning")
        .execute_in_process(
            run_config={"ops": {"tune_member": {"config": config}}},
            instance=instance,
            raise_on_error=False,
        )
    )


@pytest.mark.slow
def test_the_job_finds_settings_and_shows_them(own_home: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        space = {"training": {"learning_rate": [1e-4, 1e-3]}}
        ran = _run(own_home, {"member": "lastro", "trials": 2, "space": space}, instance)
        assert ran.success
        best = TrainConfig.read(Path(ran.output_for_node("tune_member")))
        assert best.model.arch == "lastro"
        assert best.training.learning_rate in (1e-4, 1e-3)
        assert best.data.data_root is not None
        assert best.data.data_root.startswith(str(own_home / "cloud"))
        (output,) = [e for e in ran.all_events if e.event_type_value == "STEP_OUTPUT"]
        about = output.step_output_data.metadata
        assert {"trials", "table", "best settings", "study"} <= set(about)
        assert about["trials"].value.startswith("![trials](data:image/png;base64,")
        assert len(about["table"].records) == 2
        (own_home / "training.yaml").write_text(about["for LENS_TRAINING"].value)
        settings = Settings.load(training=str(own_home / "training.yaml"), archs="lastro")
        (member,) = chosen_members(settings)
        rate = best.training.learning_rate
        assert member_config(settings, member).training.learning_rate == rate
        told = [entry.user_message for entry in instance.all_logs(ran.run_id)]
        assert any("trial 1: val/" in line for line in told)


def test_the_job_refuses_a_space_that_cannot_be(own_home: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        space = {"training": {"epochs": [1, 2]}}
        ran = _run(own_home, {"space": space}, instance)
        assert not ran.success
        (failed,) = [e for e in ran.all_events if e.event_type_value == "STEP_FAILURE"]
        assert "space: training.epochs: is not tuned" in str(failed.step_failure_data.error)
    assert not (own_home / "tuning").exists()
