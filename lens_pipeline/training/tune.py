"""Tuning: a study of trainings that differ in their settings, in one folder that goes on."""

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
import pandas as pd
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger

from lens_pipeline.errors import InputError, NoAnswerError, NoRoomError
from lens_pipeline.evaluation.plots import png_bytes, tuning_figure
from lens_pipeline.files import file_aside, write_aside
from lens_pipeline.models.system import LensClassifier, LitLensSystem
from lens_pipeline.settings_files import read_yaml
from lens_pipeline.shards.datamodule import CutoutModule
from lens_pipeline.training.config import TrainConfig
from lens_pipeline.training.inputs import hashed_inputs, other_inputs, recorded_inputs
from lens_pipeline.training.member import INPUTS
from lens_pipeline.training.space import Pruner, Range, SearchSpace
from lens_pipeline.training.study import (
    BEST_CONFIG,
    CONFIG,
    DATABASE,
    LOSS,
    PICTURE,
    PRUNER,
    SPACE,
    TABLE,
    TRIALS,
    TunedStudy,
    ranked,
)
from lens_pipeline.training.train import deciding_metric, free_memory, train

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

# Makes the loggers of a trial by its number and settings, and learns how it ended.
Recorder = Callable[[int, TrainConfig], AbstractContextManager[Sequence[Logger]]]
NAME = "lens_pipeline"  # of the one study in a database
REASON, PRUNED = "reason", "pruned"  # of a failure; in which epoch
HOPELESS = 3  # trials in a row that fail
PATIENCE = 120  # seconds that SQLite waits for another worker's writing

log = logging.getLogger(__name__)


def tune(
    config: TrainConfig,
    space: SearchSpace,
    data: CutoutModule,
    out: str | Path,
    n_trials: int = 20,
    pruner: Pruner = "median",
    record: Recorder = lambda number, config: nullcontext([]),
    system_type: type[LensClassifier] = LitLensSystem,
) -> TunedStudy:
    """Train with settings from the space until the study has `n_trials`, and keep the best.

    out: an empty folder, or that of the same study, which goes on: trials that were killed are
    taken up in the middle of their epoch, each is run once, and a study that was stopped anywhere
    ends with the same trials as an undisturbed one (on one worker). Several processes may call this
    on the same folder at once: they share the trials. A trial's value is the best of
    `training.monitor` over its epochs; settings are drawn by the tree-structured Parzen estimator
    (Bergstra et al. 2011), seeded by `training.seed` and the number of the trial. pruner: `median`
    stops a trial whose value after an epoch is below the median of the others there, `hyperband`
    (Li et al. 2018) gives more epochs to fewer. system_type: as for `train`. Raises InputError
    where the folder holds another study, where optuna is not installed, and where the first three
    trials fail, or later three in a row by other than their settings.
    """
    if find_spec("optuna") is None:
        raise InputError("tuning needs the package optuna; install lens-pipeline[tune]")
    for name, alone in (
        ("hardware.devices", config.hardware.devices == 1),
        ("training.fast_dev_run", not config.training.fast_dev_run),
    ):
        if not alone:
            raise InputError(f"{name}: goes with one training, not with a study of many")
    if n_trials < 1:
        raise InputError(f"n_trials {n_trials}: at least 1 is needed")
    out = Path(out)
    study = _Study(out, config, space, data, pruner)
    failed: list[Failure | None] = []
    while (begun := study.next_trial(n_trials)) is not None:
        trial, held = begun
        with held:
            failed.append(study.run(trial, record, system_type))
        study.write_down()
        free_memory()
        last = [problem for problem in failed[-HOPELESS:] if problem is not None]
        # Later on settings that cannot be are drawn now and then; what breaks otherwise goes on.
        outage = not any(problem.of_settings for problem in last)
        if len(last) == HOPELESS and (outage or len(failed) == HOPELESS):
            raise InputError(f"{HOPELESS} trials in a row have failed; the last: {last[-1].reason}")
    study.write_down()  # of what another was killed before
    return TunedStudy(out)


@dataclass(frozen=True)
class Failure:
    """Of a trial. Not the exception: by its traceback it would keep what the step had in memory."""

    of_settings: bool
    reason: str


class _Study:
    """A study's folder and its storage, as one worker sees them."""

    def __init__(
        self, out: Path, config: TrainConfig, space: SearchSpace, data: CutoutModule, pruner: Pruner
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.out, self.space, self.data, self.pruner = out, space, data, pruner
        monitor = {"monitor": deciding_metric(config, data)}
        self.config = config.with_changes({"training": monitor}, "tune")
        self.lowest = self.config.training.monitor == "val/loss"
        (out / TRIALS).mkdir(parents=True, exist_ok=True)
        with self._lock():
            self._begin()
            self.storage = optuna.storages.RDBStorage(
                f"sqlite:///{out / DATABASE}",
                engine_kwargs={"connect_args": {"timeout": PATIENCE}},
            )
            optuna.create_study(
                study_name=NAME,
                storage=self.storage,
                direction="minimize" if self.lowest else "maximize",
                load_if_exists=True,
            )

    def _lock(self) -> filelock.BaseFileLock:
        """Held by who looks for a trial to begin, or writes down what came of one."""
        return filelock.FileLock(self.out / ".lock")

    def _begin(self) -> None:
        """Write down what the study is. Raises InputError where the folder holds another."""
        inputs = hashed_inputs(self.config, self.data)
        if (self.out / CONFIG).exists():
            before = TrainConfig.read(self.out / CONFIG)
            changed = before.differences(self.config)
            for name, kept, now in (
                ("the space", read_yaml(self.out / SPACE), self.space.as_values()),
                ("the pruner", (self.out / PRUNER).read_text(), self.pruner),
            ):
                if kept != now:
                    changed.append(name)
            changed += [f"the {name}" for name in other_inputs(recorded_inputs(self.out), inputs)]
            if changed:
                raise InputError(
                    f"{self.out}: holds a study that differs: {', '.join(changed)}; go on with the "
                    "same, or name another folder"
                )
        write_aside(self.out / INPUTS, json.dumps(inputs, indent=1))
        write_aside(self.out / SPACE, self.space.yaml)
        write_aside(self.out / PRUNER, self.pruner)
        write_aside(self.out / CONFIG, self.config.yaml)

    def _load(self, number: int = 0) -> "Study":
        """The study, with the sampler of a trial."""
        import optuna

        entropy = (self.config.training.seed, number)
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        pruners = {
            "median": lambda: optuna.pruners.MedianPruner(n_warmup_steps=1),
            "hyperband": lambda: optuna.pruners.HyperbandPruner(
                min_resource=1, max_resource=self.config.training.epochs
            ),
            "none": optuna.pruners.NopPruner,
        }
        return optuna.load_study(
            study_name=NAME,
            storage=self.storage,
            sampler=optuna.samplers.TPESampler(seed=seed),
            pruner=pruners[self.pruner](),
        )

    def next_trial(self, n_trials: int) -> "tuple[Trial, AbstractContextManager[Any]] | None":
        """A trial whose worker has died, or a new one; None where there are enough. Who holds the
        lock that comes with it is its worker: the system frees it when the worker dies."""
        import optuna

        with self._lock():
            running = (optuna.trial.TrialState.RUNNING,)
            for trial in self._load().get_trials(deepcopy=False, states=running):
                try:
                    held = self._trial_lock(trial.number).acquire(blocking=False)
                except filelock.Timeout:
                    continue
                if self.storage.get_trial(trial._trial_id).state in running:
                    # What `ask` does with a trial's id, which Optuna tells nowhere else.
                    return optuna.Trial(self._load(trial.number), trial._trial_id), held
                held.lock.release()  # its worker has told of it just now
            trials = self._trials()
            if len(trials) >= n_trials:
                return None
            held = self._trial_lock(len(trials)).acquire()
            return self._load(len(trials)).ask(), held

    def _trial_lock(self, number: int) -> filelock.BaseFileLock:
        return filelock.FileLock(self.out / TRIALS / f".{number:04d}.lock")

    def run(
        self, trial: "Trial", record: Recorder, system_type: type[LensClassifier]
    ) -> Failure | None:
        """Train with a trial's settings, and tell the study what came of it.

        Returns what it has failed by, if it has. Raises NoAnswerError of a store, and NoRoomError:
        the trial goes on later.
        """
        import optuna

        changes = self._draw(trial)
        monitor = self.config.training.monitor
        drawn = [
            f"{name.split('.')[1]} {f'{value:.3g}' if isinstance(value, float) else value}"
            for name, value in trial.params.items()
        ]
        log.info("trial %d: %s", trial.number, ", ".join(drawn))
        out = TunedStudy(self.out).trained(trial.number).folder
        try:
            config = self.config.with_changes(changes, f"trial {trial.number}")
            with record(trial.number, config) as loggers:
                if PRUNED in trial.user_attrs:  # and its worker was killed before it could tell
                    raise optuna.TrialPruned
                pruning = Pruning(trial, monitor)
                trained = train(config, self.data, out, loggers, [pruning], system_type)
            curves = trained.curves.sort_values(
                [monitor, "val/loss"], ascending=[self.lowest, True]
            )
            value, loss = (float(curves[name].iloc[0]) for name in (monitor, "val/loss"))
            if not math.isfinite(value):
                raise InputError(f"{monitor} is {value} in every epoch")
            trial.set_user_attr(LOSS, loss)
        except (NoAnswerError, NoRoomError):
            raise
        except optuna.TrialPruned:
            trial.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            log.info("trial %d: pruned", trial.number)
        except Exception as problem:  # of any kind: left as it is, it would be tried for ever
            reason = _in_words(problem)
            log.debug("trial %d", trial.number, exc_info=not isinstance(problem, InputError))
            trial.set_user_attr(REASON, reason)
            trial.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            log.warning("trial %d has failed: %s", trial.number, reason)
            return Failure(isinstance(problem, InputError), reason)
        else:
            trial.study.tell(trial, value)
            best = ranked(self._table(self._trials()), self.lowest).iloc[0]
            told = (trial.number, monitor, value, best["value"], best["number"])
            log.info("trial %d: %s %.4g; the best is %.4g of trial %d", *told)
        return None

    def _trials(self) -> "list[FrozenTrial]":
        return self._load().get_trials(deepcopy=False)

    def _table(self, trials: "Iterable[FrozenTrial]") -> pd.DataFrame:
        return pd.DataFrame(map(self._row, trials))

    def _draw(self, trial: "Trial") -> dict[str, dict[str, Any]]:
        changes: dict[str, dict[str, Any]] = {}
        for name, how in self.space.settings.items():
            section, field = name.split(".")
            if not isinstance(how, Range):
                value = trial.suggest_categorical(name, how)
            elif name in self.space.whole:
                value = trial.suggest_int(name, int(how.low), int(how.high), log=how.log)
            else:
                value = trial.suggest_float(name, how.low, how.high, log=how.log)
            changes.setdefault(section, {})[field] = value
        return changes

    def write_down(self) -> None:
        """The table, its picture, the best settings; and the end of weights that are not those of
        the best."""
        with self._lock():
            trials = self._trials()
            table = self._table(trials)
            write_aside(self.out / TABLE, table.to_csv(index=False))
            figure = tuning_figure(table, self.space.scales, self.config.training.monitor)
            with file_aside(self.out / PICTURE) as file:
                file.write(png_bytes(figure))
            study = TunedStudy(self.out)
            row = study.best
            best = None if row is None else int(row["number"])
            if best is not None:
                write_aside(self.out / BEST_CONFIG, study.trained(best).config.yaml)
            for trial in trials:
                if trial.state.is_finished() and trial.number != best:
                    folder = study.trained(trial.number).folder
                    # Those of a process that was killed while it wrote, too.
                    for path in folder.rglob("*.ckpt*"):
                        path.unlink(missing_ok=True)

    def _row(self, trial: "FrozenTrial") -> dict[str, Any]:
        return {
            "number": trial.number,
            "state": {"FAIL": "failed"}.get(trial.state.name, trial.state.name.lower()),
            "value": trial.value,
            LOSS: trial.user_attrs.get(LOSS),
            "epochs": len(trial.intermediate_values),
            "seconds": trial.duration.total_seconds() if trial.duration else None,
            **{name: trial.params.get(name) for name in self.space.settings},
            REASON: trial.user_attrs.get(REASON),
        }


def _in_words(problem: Exception) -> str:
    """In one line; of what is no word of ours to the user, with its type."""
    kind = "" if isinstance(problem, InputError) else f"{type(problem).__name__}: "
    return " ".join(f"{kind}{problem}".split())


class Pruning(Callback):
    """Tells a trial its metric after each epoch, and stops it where others were better."""

    def __init__(self, trial: "Trial", monitor: str) -> None:
        self.trial, self.monitor = trial, monitor

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        import optuna

        with warnings.catch_warnings():
            # By a training that was killed between an epoch's validation and its checkpoint.
            warnings.filterwarnings("ignore", message=".*is ignored because this `step`.*")
            value = float(trainer.callback_metrics[self.monitor])
            self.trial.report(value, trainer.current_epoch)
        if self.trial.should_prune():
            self.trial.set_user_attr(PRUNED, trainer.current_epoch)  # it is not asked twice
            raise optuna.TrialPruned
