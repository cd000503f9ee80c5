"""`lens-pipeline tune`: many trainings with settings from a space, and the best of them."""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lens_pipeline.commands.train import (
    asked_config,
    name_of,
    reporting,
    system_type,
)
from lens_pipeline.cores import n_cores
from lens_pipeline.errors import InputError
from lens_pipeline.files import digest, make_folder
from lens_pipeline.settings import Settings
from lens_pipeline.settings_files import read_yaml
from lens_pipeline.terminal import configure_logging, local_path
from lens_pipeline.training.config import TrainConfig, in_a_line
from lens_pipeline.training.flags import add_flags
from lens_pipeline.training.launch import FAILURE, TOLD, leave_word, raise_told
from lens_pipeline.training.space import DEFAULT_SPACE, Pruner, SearchSpace

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

    from lens_pipeline.training.study import TunedStudy

SHOWN = 10  # trials in the table


def add_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=local_path, help="a YAML file of `train`; flags override it"
    )
    parser.add_argument(
        "--space",
        type=local_path,
        help="a YAML file of what the trials change: sections and settings as in --config, each "
        "with its choices, [32, 64], or its range, {low: 1e-5, high: 1e-2, log: true} "
        "[learning rate, weight decay, batch size and dropout]",
    )
    parser.add_argument("--trials", type=int, default=20, help="of the study in all [20]")
    parser.add_argument(
        "--workers", type=int, default=1, help="trials at a time, each on a GPU of its own [1]"
    )
    parser.add_argument(
        "--pruner", choices=get_args(Pruner), default="median", help="what stops a trial [median]"
    )
    parser.add_argument(
        "--out",
        type=local_path,
        help="where the files go; a study that was stopped there goes on [LENS_HOME/tuning/...]",
    )
    add_flags(parser)
    parser.set_defaults(do=tune_command)


def tune_command(options: argparse.Namespace) -> int:
    settings = Settings.load(home=options.home)
    for name in ("trials", "workers"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: at least 1 is needed")
    config = asked_config(options, settings)
    values, source = DEFAULT_SPACE, "--space"
    if options.space:
        values, source = read_yaml(options.space), str(options.space)
    space = SearchSpace.parse(values, config, source)
    out = options.out or settings.home / "tuning" / name_of(
        config, settings, space=space.as_values(), pruner=options.pruner
    )
    make_folder(out)
    with reporting():
        study = _recorded(config, space, settings, out, options)
    _tell(study)
    return 0


def _recorded(
    config: TrainConfig,
    space: SearchSpace,
    settings: Settings,
    out: Path,
    options: argparse.Namespace,
) -> "TunedStudy":
    """The study, in an MLflow run in which those of its trials are nested."""
    from lens_pipeline.registry import answering
    from lens_pipeline.tracking import Tracking, short_waits
    from lens_pipeline.training.devices import gpus_claimed
    from lens_pipeline.training.study import BEST_CONFIG, PICTURE, TABLE, TunedStudy

    tracking = Tracking(settings)
    with nullcontext() if TOLD in os.environ else short_waits(), answering("MLFLOW_TRACKING_URI"):
        _ = tracking.client
    parent = tracking.reopened_run(f"tuning {out.name}", digest(str(out)))
    share = (config, space, settings, out, options.trials, options.pruner, parent)
    try:
        with gpus_claimed(config.hardware, options.workers):
            if options.workers == 1:
                _share(*share)
            else:
                _in_workers(options.workers, share, out, options.verbose)
    except BaseException:
        tracking.client.set_terminated(parent, "KILLED")  # it goes on with the next command
        raise
    study = TunedStudy(out)
    if study.best is not None:
        value = float(study.best["value"])
        name = f"best {study.base.training.monitor}"
        tracking.client.log_metric(parent, name, value, step=len(study.trials))
    files = [out / name for name in (TABLE, BEST_CONFIG, PICTURE) if (out / name).exists()]
    tracking.finish_run(parent, config.model_dump(), artifacts=tuple(files), again=True)
    return study


def _share(
    config: TrainConfig,
    space: SearchSpace,
    settings: Settings,
    out: Path,
    n_trials: int,
    pruner: Pruner,
    parent: str,
) -> None:
    """One worker's trials."""
    from lens_pipeline.training.data import data_module
    from lens_pipeline.training.study import TunedStudy
    from lens_pipeline.training.tune import tune

    @contextmanager
    def record(number: int, config: TrainConfig) -> "Iterator[Sequence[Logger]]":
        with _nested_run(settings, parent, number, config, TunedStudy(out)) as logger:
            yield [logger]

    data = data_module(config, settings)
    tune(config, space, data, out, n_trials, pruner, record, system_type(config))


@contextmanager
def _nested_run(
    settings: Settings, parent: str, number: int, config: TrainConfig, study: "TunedStudy"
) -> "Iterator[Logger]":
    """The MLflow run of a trial: FINISHED, KILLED where it was pruned, or FAILED."""
    import optuna

    from lens_pipeline.tracking import PARENT, Tracking

    tracking = Tracking(settings)
    key = digest([parent, number])
    # It goes on with what a worker has left that was killed.
    run_id = tracking.start_run(f"trial {number}", key, {PARENT: parent}, goes_on=True)
    try:
        with tracking.recorded(run_id, config.known_before) as logger:
            yield logger
        tracking.tell_parameters(run_id, study.trained(number).config.model_dump())
    except optuna.TrialPruned:
        tracking.client.set_terminated(run_id, "KILLED")
        raise


def _in_workers(n: int, share: tuple[Any, ...], out: Path, verbose: bool) -> None:
    """The study shared by processes, whose messages come through this one."""
    import torch

    failure = out / f"{FAILURE}-{os.getpid()}"
    messages = torch.multiprocessing.get_context("spawn").Queue()
    listener = QueueListener(messages, *logging.getLogger("lens_pipeline").handlers)
    listener.start()
    try:
        torch.multiprocessing.spawn(_worker, (n, share, messages, failure, verbose), nprocs=n)
    except (
        torch.multiprocessing.ProcessExitedException,
        torch.multiprocessing.ProcessRaisedException,
    ) as problem:
        raise_told(failure)
        why = str(problem).strip().splitlines()[-1]
        raise RuntimeError(f"worker {problem.error_index} of {n} ended: {why}") from None
    finally:
        listener.stop()
        failure.unlink(missing_ok=True)


def _worker(
    index: int, n: int, share: tuple[Any, ...], messages: Any, failure: Path, verbose: bool
) -> None:
    import torch

    from lens_pipeline.training.devices import VISIBLE, visible_gpus

    configure_logging(verbose)
    logging.getLogger("lens_pipeline").handlers[:] = [QueueHandler(messages)]
    # The epochs of several trials at once are too much to follow.
    for part in ("training", "progress"):
        logging.getLogger(f"lens_pipeline.{part}").setLevel(logging.WARNING)
    logging.getLogger("lens_pipeline.training.tune").setLevel(logging.INFO)
    torch.set_num_threads(max(1, n_cores() // n))
    if torch.cuda.device_count():
        gpus = visible_gpus()
        os.environ[VISIBLE] = gpus[index % len(gpus)]
    try:
        _share(*share)
    except InputError as problem:
        leave_word(failure, problem)
        sys.exit(1)


def _tell(study: "TunedStudy") -> None:
    from lens_pipeline.training.study import BEST_CONFIG, PICTURE, TABLE

    trials = study.ranked.head(SHOWN).drop(columns=["reason", "seconds"])
    trials.columns = [name.rpartition(".")[2] for name in trials.columns]
    print(trials.to_string(index=False, float_format="{:.3g}".format, na_rep=""))
    states = study.trials["state"].value_counts()
    print(", ".join(f"{count} {state}" for state, count in states.items()))
    print(f"Trials      {study.folder / TABLE}, {PICTURE} beside it")
    if study.best is not None:
        print(f"Checkpoint  {study.trained(int(study.best['number'])).checkpoint}")
        print(f"To repeat it: lens-pipeline train --config {study.folder / BEST_CONFIG}")
        arch = study.trained(int(study.best["number"])).config.model.arch
        print(f"For the pipeline, with {arch} in LENS_ARCHS, and as the file of LENS_TRAINING:")
        print(in_a_line(study.found))
