"""MLflow runs of trainings: whose they are, and what is written into them."""

from pathlib import Path

from lens_pipeline.settings import Settings
from lens_pipeline.tracking import Tracking


def test_a_run_of_another_home_on_the_same_server_is_left_alone(tmp_path: Path) -> None:
    server = f"sqlite:///{tmp_path / 'shared.db'}"
    one, two = (
        Tracking(Settings.load(home=tmp_path / name, MLFLOW_TRACKING_URI=server))
        for name in ("one", "two")
    )
    first = one.start_run("lastro", "key", {})
    assert two.find_run("key") is None
    second = two.start_run("lastro", "key", {})
    assert one.client.get_run(first).info.status == "RUNNING"
    one.finish_run(first, {"epochs": 1})
    third = two.start_run("lastro", "key", {})  # the second was left unfinished
    status = {run: one.client.get_run(run).info.status for run in (first, second, third)}
    assert status == {first: "FINISHED", second: "FAILED", third: "RUNNING"}


def test_parameters_that_a_run_has_are_kept_and_others_added(tmp_path: Path) -> None:
    tracking = Tracking(Settings.load(home=tmp_path))
    run = tracking.start_run("lastro", "key", {})
    tracking.tell_parameters(run, {"training": {"epochs": 3}})
    tracking.finish_run(run, {"training": {"epochs": 4, "batch_size": 8}})
    params = tracking.client.get_run(run).data.params
    assert params == {"training.epochs": "3", "training.batch_size": "8"}
