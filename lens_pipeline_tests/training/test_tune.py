"""A study of trainings: what it may change, what it finds, and how it goes on."""

import os
import signal
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import torch
import yaml
from pytorch_lightning.loggers import Logger
from pytorch_lightning.loggers.logger import DummyLogger

from lens_pipeline import LensDataModule, LitLensSystem
from lens_pipeline.cli import main
from lens_pipeline.errors import InputError, NoRoomError
from lens_pipeline.training import TrainedMember, train
from lens_pipeline.training.config import TrainConfig
from lens_pipeline.training.space import SearchSpace
from lens_pipeline.training.study import DATABASE, TunedStudy
from lens_pipeline.training.tune import PRUNED, tune
from lens_pipeline_tests.training.killed import forked
from lens_pipeline_tests.training.small import small_config

RATES = {"learning_rate": {"low": 1e-6, "high": 3e-2, "log": True}}
_config = partial(small_config, monitor="val/average_precision")


def _space(config: TrainConfig, **sections: Any) -> SearchSpace:
    return SearchSpace.parse(sections, config, "space.yaml")


def _tune(
    config: TrainConfig, shards: Path, out: Path, n_trials: int, *more: Any, **sections: Any
) -> TunedStudy:
    return tune(config, _space(config, **sections), LensDataModule(shards), out, n_trials, *more)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study draws its picture anew after each trial, which few tests look at."""
    monkeypatch.setattr("lens_pipeline.training.tune.png_bytes", lambda _: b"")


def _weights(trained: TrainedMember) -> dict[str, torch.Tensor]:
    return torch.load(trained.checkpoint, weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"epochs": [3, 4]}}, "training.epochs: is not tuned; these are: model.arch"),
        ({"data": {"image_size": [32]}}, "data.image_size: is not tuned"),
        ({"training": {"learning_rat": [1e-3]}}, "did you mean training.learning_rate?"),
        ({"training": {"learning_rate": {"low": 0.1, "high": 3}}}, "training.learning_rate: Input"),
        ({"training": {"learning_rate": {"low": 1e-2, "high": 1e-3}}}, "0.01 to 0.001 is not low"),
        ({"training": {"ema": {"low": 0, "high": 0.9, "log": True}}}, "is not 0 < low < high"),
        ({"training": {"learning_rate": {"lowest": 1e-3}}}, "learning_rate.low: Field required"),
        ({"training": {"learning_rate": []}}, "must list numbers or names to choose from"),
        ({"training": {"balance": {"low": 0, "high": 1}}}, "balance: must list what to choose"),
        ({"training": {"loss": ["bce", "hinge"]}}, "training.loss: Input should be"),
        ({"training": 3}, "training: must hold settings and their values"),
        ({"training": {"noise": {"low": 0, "high": float("inf")}}}, "noise.high: Input should be"),
        ({}, "names no setting to tune"),
    ],
)
def test_a_space_that_cannot_be_is_refused_by_name(sections: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as problem:
        SearchSpace.parse(sections, _config(), "space.yaml")
    assert str(problem.value).startswith("space.yaml: ")


def test_trials_that_could_not_be_compared_are_refused() -> None:
    with pytest.raises(InputError, match=r"training\.loss: with it val/loss means another thing"):
        _space(_config(monitor="val/loss"), training={"loss": ["bce", "focal"]})
    with pytest.raises(InputError, match=r"training\.batch_size: with training\.limit_val_batches"):
        _space(_config(limit_val_batches=2), training={"batch_size": [16, 32]})
    assert _space(_config(limit_val_batches=1.0), training={"batch_size": [16, 32]})


def test_what_no_trial_could_mean_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.pretrained: a registered model is the start of"):
        _space(_config(), model={"pretrained": ["none", "models:/lens_ensemble@champion"]})
    ensemble = TrainConfig.parse({"model": {"model_type": "ensemble"}}, "test")
    with pytest.raises(InputError, match=r"model\.arch: is for model\.model_type single"):
        _space(ensemble, model={"arch": ["lastro", "deeplens"]})


def test_numbers_that_are_text_to_yaml_are_numbers() -> None:
    given = yaml.safe_load("learning_rate: [1e-4, 0.001]")
    assert given["learning_rate"][0] == "1e-4"
    assert _space(_config(), training=given).settings["training.learning_rate"] == (1e-4, 1e-3)


def test_a_space_is_what_it_writes() -> None:
    space = _space(
        _config(), training={**RATES, "batch_size": {"low": 8, "high": 32}, "balance": [True]}
    )
    assert SearchSpace.parse(yaml.safe_load(space.yaml), _config(), "again") == space


@pytest.mark.slow
def test_the_best_settings_are_found_and_train_again_to_the_same(
    uneven_shards: Path, tmp_path: Path
) -> None:
    study = _tune(
        _config(epochs=3), uneven_shards, tmp_path / "study", 6,
        training={"learning_rate": [1e-7, 3e-3], "batch_size": {"low": 8, "high": 16}},
    )  # fmt: skip
    trials, best = study.trials, study.best
    assert best is not None
    assert set(trials["training.learning_rate"]) == {1e-7, 3e-3}
    assert best["training.learning_rate"] == 3e-3
    assert best["value"] == trials["value"].max()
    assert trials["training.batch_size"].between(8, 16).all()
    assert trials["training.batch_size"].dtype == int
    config = TrainConfig.read(study.folder / "best.yaml")
    assert config.training.learning_rate == 3e-3
    again = train(config, LensDataModule(uneven_shards), tmp_path / "again")
    assert again.curves["val/average_precision"].max() == best["value"]
    for name, value in _weights(study.trained(int(best["number"]))).items():
        assert torch.equal(value, _weights(again)[name])
    kept = [path.parent.name for path in study.folder.glob("trials/*/best.ckpt")]
    assert kept == [f"{best['number']:04d}"]
    assert (study.folder / "trials.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_trial_that_others_beat_is_stopped(uneven_shards: Path, tmp_path: Path) -> None:
    ends: dict[int, str] = {}

    @contextmanager
    def record(number: int, config: TrainConfig) -> Iterator[Sequence[Logger]]:
        ends[number] = "ended"
        try:
            yield []
        except BaseException as problem:
            ends[number] = type(problem).__name__
            raise

    study = _tune(
        _config(epochs=4, seed=1), uneven_shards, tmp_path, 12, "median", record, training=RATES
    )
    pruned = study.trials.query("state == 'pruned'")
    assert len(pruned) > 0
    assert (pruned["epochs"] < 4).all()
    assert pruned["training.learning_rate"].max() < study.best["training.learning_rate"]  # type: ignore[index]
    assert {number for number, end in ends.items() if end == "TrialPruned"} == set(pruned["number"])


@pytest.mark.usefixtures("undrawn")
def test_what_fails_is_told_and_the_others_go_on(uneven_shards: Path, tmp_path: Path) -> None:
    archs = {"arch": ["lastro", "torchvision:net_of_nobody"]}
    config = _config(epochs=1, limit_train_batches=1)
    study = _tune(config, uneven_shards, tmp_path / "some", 4, model=archs)
    failed = study.trials.query("state == 'failed'")
    assert 0 < len(failed) < 4
    assert failed["reason"].str.contains("net_of_nobody").all()
    assert study.best is not None
    for begun in (3, 6):  # and no further by itself
        with pytest.raises(InputError, match="3 trials in a row have failed; the last: .*of_nobo"):
            _tune(_config(), uneven_shards, tmp_path / "all", 9, model={"arch": archs["arch"][1:]})
        assert len(TunedStudy(tmp_path / "all").trials) == begun


@pytest.mark.usefixtures("undrawn")
def test_a_trial_that_breaks_in_the_library_has_failed_and_is_not_tried_for_ever(
    uneven_shards: Path, tmp_path: Path
) -> None:
    @contextmanager
    def breaks_once(number: int, config: TrainConfig) -> Iterator[Sequence[Logger]]:
        if number == 0:
            raise RuntimeError("no kernel image")
        yield []

    config = _config(epochs=1, limit_train_batches=1)
    study = _tune(config, uneven_shards, tmp_path, 2, "none", breaks_once, training=RATES)
    assert study.trials["state"].tolist() == ["failed", "complete"]
    assert study.trials["reason"][0] == "RuntimeError: no kernel image"


@pytest.mark.usefixtures("undrawn")
def test_an_outage_does_not_use_up_the_study(uneven_shards: Path, tmp_path: Path) -> None:
    @contextmanager
    def breaks(number: int, config: TrainConfig) -> Iterator[Sequence[Logger]]:
        if number > 0:
            raise RuntimeError("the GPU is lost")
        yield []

    config = _config(epochs=1, limit_train_batches=1)
    with pytest.raises(InputError, match="3 trials in a row have failed; .*the GPU is lost"):
        _tune(config, uneven_shards, tmp_path, 9, "none", breaks, training=RATES)
    states = TunedStudy(tmp_path).trials["state"]
    assert states.tolist() == ["complete", "failed", "failed", "failed"]


@pytest.mark.slow
def test_hyperband_gives_most_trials_less_than_all_epochs(
    uneven_shards: Path, tmp_path: Path
) -> None:
    config = _config(epochs=4, seed=1)
    study = _tune(config, uneven_shards, tmp_path, 8, "hyperband", training=RATES)
    trials = study.trials
    assert set(trials["state"]) == {"complete", "pruned"}
    assert (trials.query("state == 'pruned'")["epochs"] < 4).all()


@pytest.mark.usefixtures("undrawn")
def test_a_full_disk_leaves_the_trial_for_later(uneven_shards: Path, tmp_path: Path) -> None:
    @contextmanager
    def full(number: int, config: TrainConfig) -> Iterator[Sequence[Logger]]:
        raise NoRoomError("no room")
        yield []

    config = _config(epochs=1, limit_train_batches=1)
    with pytest.raises(NoRoomError):
        _tune(config, uneven_shards, tmp_path, 2, "none", full, training=RATES)
    study = _tune(config, uneven_shards, tmp_path, 2, "none", training=RATES)
    assert study.trials["number"].tolist() == [0, 1]
    assert study.trials["state"].tolist() == ["complete", "complete"]


@pytest.mark.usefixtures("undrawn")
def test_what_records_a_trial_learns_that_it_was_pruned_before_its_worker_was_killed(
    uneven_shards: Path, tmp_path: Path
) -> None:
    ends = {}

    @contextmanager
    def record(number: int, config: TrainConfig) -> Iterator[Sequence[Logger]]:
        if not ends and number == 0:
            ends[number] = "killed"
            raise NoRoomError("the trial goes on later")
        try:
            yield []
        except optuna.TrialPruned:
            ends[number] = "pruned"
            raise

    config = _config(epochs=1, limit_train_batches=1)
    with pytest.raises(NoRoomError):
        _tune(config, uneven_shards, tmp_path, 2, "none", record, training=RATES)
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / DATABASE}")
    (study,) = storage.get_all_studies()
    (trial,) = storage.get_all_trials(study._study_id)
    storage.set_trial_user_attr(trial._trial_id, PRUNED, 0)
    found = _tune(config, uneven_shards, tmp_path, 2, "none", record, training=RATES)
    assert ends == {0: "pruned"}
    assert found.trials["state"].tolist() == ["pruned", "complete"]


@pytest.mark.parametrize(("monitor", "best"), [("val/recall", 2), ("val/loss", 0)])
def test_of_trials_with_equal_values_the_one_with_the_lower_loss_is_best(
    monitor: str, best: int, tmp_path: Path
) -> None:
    table = {
        "number": range(4),
        "state": ["complete", "complete", "complete", "pruned"],
        "value": [0.5, 1.0, 1.0, 1.0],
        "validation_loss": [0.2, 0.7, 0.6, 0.1],
    }
    (tmp_path / "config.yaml").write_text(_config(monitor=monitor).yaml)
    pd.DataFrame(table).to_csv(tmp_path / "trials.csv", index=False)
    found = TunedStudy(tmp_path).best
    assert found is not None
    assert found["number"] == best


def test_of_trials_with_losses_of_two_kinds_these_are_not_compared(tmp_path: Path) -> None:
    """The focal loss is lower than the cross-entropy of the same scores."""
    table = {
        "number": range(3),
        "state": "complete",
        "value": [0.5, 1.0, 1.0],
        "validation_loss": [0.2, 0.7, 0.02],
        "training.loss": ["focal", "bce", "focal"],
    }
    (tmp_path / "config.yaml").write_text(_config(monitor="val/recall").yaml)
    pd.DataFrame(table).to_csv(tmp_path / "trials.csv", index=False)
    assert TunedStudy(tmp_path).ranked["number"].tolist() == [1, 2, 0]
    # Nor where all so far have one: with the next the best would be another, without its weights.
    pd.DataFrame(table | {"training.loss": "focal"}).to_csv(tmp_path / "trials.csv", index=False)
    assert TunedStudy(tmp_path).ranked["number"].tolist() == [1, 2, 0]


@pytest.mark.usefixtures("undrawn")
def test_a_folder_holds_one_study(uneven_shards: Path, shards_folder: Path, tmp_path: Path) -> None:
    config = _config(epochs=1, limit_train_batches=1)
    rates = {"learning_rate": [1e-3, 1e-2]}
    _tune(config, uneven_shards, tmp_path, 1, training=rates)
    for changed, shards, pruner, sections, what in (
        (_config(epochs=2), uneven_shards, "median", rates, r"training\.epochs \(1, now 2\)"),
        (config, uneven_shards, "none", rates, "the pruner"),
        (config, uneven_shards, "median", RATES, "the space"),
        (config, shards_folder, "median", rates, "the cutouts"),
    ):
        with pytest.raises(InputError, match=f"holds a study that differs: .*{what}"):
            _tune(changed, shards, tmp_path, 1, pruner, training=sections)
    assert len(_tune(config, uneven_shards, tmp_path, 2, training=rates).trials) == 2


class _KillingLogger(DummyLogger):
    """kill -9 when the metrics of an epoch are told, before its checkpoint is written."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if "train/loss" in metrics:
            os.kill(os.getpid(), signal.SIGKILL)


def _killed(config: TrainConfig, shards: Path, out: Path, n_trials: int, at: int) -> None:
    """A study whose process is killed in one of its trials."""

    @contextmanager
    def record(number: int, config: TrainConfig) -> Iterator[Sequence[Logger]]:
        yield [_KillingLogger()] if number == at else []

    _tune(config, shards, out, n_trials, "none", record, training=RATES)


@pytest.mark.slow
def test_a_study_that_was_killed_ends_with_the_trials_of_an_undisturbed_one(
    uneven_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    config = _config(save_every_n_steps=2)
    expected = _tune(config, uneven_shards, undisturbed, 4, "none", training=RATES)
    assert forked(_killed, config, uneven_shards, killed, 4, 1) == -signal.SIGKILL
    with caplog.at_level("INFO", logger="lens_pipeline"):
        found = _tune(config, uneven_shards, killed, 4, "none", training=RATES)
    assert f"goes on from {killed / 'trials' / '0001' / 'last.ckpt'}" in caplog.text
    pd.testing.assert_frame_equal(
        expected.trials.drop(columns="seconds"), found.trials.drop(columns="seconds")
    )


@pytest.mark.slow
def test_workers_share_a_study_that_mlflow_shows(
    uneven_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lens_pipeline.settings import Settings
    from lens_pipeline.tracking import Tracking

    home, space = tmp_path / "home", tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"training": {"learning_rate": [1e-5, 1e-3, 1e-2]}}))
    command = [
        *("tune", "--home", str(home), "--data-root", str(uneven_shards), "--arch", "lastro"),
        *("--epochs", "1", "--batch-size", "16", "--accelerator", "cpu", "--space", str(space)),
    ]
    assert main([*command, "--trials", "5", "--workers", "2"]) == 0
    assert "5 complete" in capsys.readouterr().out
    (folder,) = (home / "tuning").iterdir()
    assert sorted(TunedStudy(folder).trials["number"]) == list(range(5))
    assert main([*command, "--trials", "6"]) == 0  # it goes on, in the same MLflow run
    tracking = Tracking(Settings.load(home=str(home)))
    runs = tracking.client.search_runs([tracking.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    nested = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in nested} == {parent.info.run_id}
    assert {run.info.run_name for run in nested} == {f"trial {n}" for n in range(6)}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all("val/auroc" in run.data.metrics for run in nested)
    rates = {float(run.data.params["training.learning_rate"]) for run in nested}
    assert rates <= {1e-5, 1e-3, 1e-2}
    best = TunedStudy(folder).best
    assert best is not None
    assert parent.data.metrics["best val/auroc"] == best["value"]
    assert (folder / "best.yaml").is_file()


def test_bad_flags_of_the_command_are_named(
    uneven_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("training: {learning_rate: {low: 1e-5, high: 7}}")
    command = ["tune", "--home", str(tmp_path), "--data-root", str(uneven_shards)]
    for flags, said in (
        (["--trials", "0"], "error: --trials 0: at least 1 is needed"),
        (["--space", str(space)], f"error: {space}: training.learning_rate: "),
        (["--devices", "2", "--accelerator", "cpu"], "error: hardware.devices: goes with one"),
    ):
        assert main([*command, *flags]) == 2
        assert said in capsys.readouterr().err


def test_what_a_trial_that_failed_had_in_memory_is_free_for_the_next(
    uneven_shards: Path, tmp_path: Path, undrawn: None
) -> None:
    """A GPU's memory would be full of it: a batch that was too large, and what it became."""
    steps: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    class TooLarge(LitLensSystem):
        def features(self, images: torch.Tensor) -> torch.Tensor:
            found = super().features(images)
            steps.append(weakref.ref(found))
            raise torch.OutOfMemoryError("CUDA out of memory")

    @contextmanager
    def record(number: int, config: TrainConfig) -> Iterator[list[Any]]:
        alive.append(sum(one() is not None for one in steps))
        yield []

    space = _space(_config(), training=RATES)
    with pytest.raises(InputError, match="3 trials in a row have failed; the last: training.batch"):
        tune(
            *(_config(), space, LensDataModule(uneven_shards), tmp_path, 5),
            record=record,
            system_type=TooLarge,
        )
    assert len(steps) == 3
    assert alive == [0, 0, 0]
