"""`lens-pipeline train`: one network, or several together, from a configuration to a checkpoint."""

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_pipeline.errors import InputError
from lens_pipeline.files import digest, make_folder
from lens_pipeline.locations import existing, written_down
from lens_pipeline.settings import Settings
from lens_pipeline.steps import LOCKS, locked
from lens_pipeline.terminal import configure_logging, local_path
from lens_pipeline.training.config import TrainConfig
from lens_pipeline.training.flags import add_flags, changes
from lens_pipeline.training.launch import FAILURE, is_first, launch, leave_word, raise_told

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

    from lens_pipeline.models.system import LensClassifier
    from lens_pipeline.training.member import TrainedMember


def add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=local_path, help="a YAML file; flags override it")
    parser.add_argument(
        "--checkpoint-dir",
        type=local_path,
        help="where the files go; a training that was stopped there goes on "
        "[LENS_HOME/trainings/...]",
    )
    add_flags(parser)
    parser.set_defaults(do=train_command)


def train_command(options: argparse.Namespace) -> int:
    settings = Settings.load(home=options.home)
    config = asked_config(options, settings)
    out = options.checkpoint_dir or settings.home / "trainings" / name_of(config, settings)
    if out.is_file():
        raise InputError(f"--checkpoint-dir: {out} is a file; name a folder")
    from lens_pipeline.training.devices import gpus_claimed

    make_folder(out.parent)
    with locked(out.parent / LOCKS / f"{out.name}.lock"), gpus_claimed(config.hardware):
        if config.hardware.devices > 1:
            trained = _in_processes(config, settings, out, options.verbose)
        else:
            trained = train_here(config, settings, out)
    if config.training.fast_dev_run:
        print("one batch of each kind went through")
        return 0
    _tell(trained, config, settings)
    return 0


def asked_config(options: argparse.Namespace, settings: Settings) -> TrainConfig:
    """What the file and the flags say, with the places of data for another working directory and
    another day (of published shards, the version that is the newest now), and with a
    file in the place of a registered model. Raises InputError for what this machine does not have,
    too."""
    config = TrainConfig.read(options.config) if options.config else TrainConfig()
    config = config.with_changes(changes(options), options.command)
    if config.data.data_root is not None:
        existing(written_down(config.data.data_root))  # before torch is loaded, in ten seconds
    from lens_pipeline.registered import with_local_weights
    from lens_pipeline.registry import Registry
    from lens_pipeline.training.devices import check_devices

    check_devices(config)  # before a store is asked
    config = config.with_changes(_places(config, settings), options.command)
    return with_local_weights(Registry(settings), config)


def train_here(config: TrainConfig, settings: Settings, out: Path) -> "TrainedMember":
    """Train in this process, with the loggers that the configuration names."""
    from lens_pipeline.training.data import data_module
    from lens_pipeline.training.member import SCORES
    from lens_pipeline.training.train import train

    data = data_module(config, settings)
    if config.data.test_urls is not None:
        data.split("test")  # what is wrong with it is not to be told after hours
    to_do = not config.training.fast_dev_run and not (out / SCORES).exists()
    told = "mlflow" in config.training.loggers and to_do
    with _mlflow(config, settings, out, told) as loggers:
        return train(config, data, out, loggers=loggers, system_type=system_type(config))


def system_type(config: TrainConfig) -> "type[LensClassifier]":
    from lens_pipeline.ensemble.lit_system import LitEnsembleSystem
    from lens_pipeline.models.system import LitLensSystem

    return LitEnsembleSystem if config.together else LitLensSystem


@contextmanager
def _mlflow(
    config: TrainConfig, settings: Settings, out: Path, told: bool
) -> "Iterator[list[Logger]]":
    """MLflow's logger, if it is to be told: of one run for the training in a folder, however often
    it goes on."""
    if not told:
        yield []
        return
    from lens_pipeline.registry import answering
    from lens_pipeline.tracking import Tracking, short_waits
    from lens_pipeline.training.member import LAST, TrainedMember

    tracking = Tracking(settings)
    given = os.environ.get("MLFLOW_RUN_ID")  # of who started this process, and records the rest
    with nullcontext() if given else short_waits(), answering("MLFLOW_TRACKING_URI"):
        _ = tracking.client  # makes the registry's database where there is none
    if given or not is_first():
        yield [tracking.logger(given)]
        return
    goes_on = (out / LAST).exists()
    key = digest(config.of_weights | {"out": str(out)})
    run_id = tracking.start_run(out.name, key, {}, goes_on=goes_on)
    with tracking.recorded(run_id, config.known_before) as logger:
        yield [logger]
    tracking.tell_parameters(run_id, TrainedMember(out).config.model_dump())


def _in_processes(
    config: TrainConfig, settings: Settings, out: Path, verbose: bool
) -> "TrainedMember":
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from lens_pipeline.training.member import TrainedMember

    out.mkdir(parents=True, exist_ok=True)
    failure = out / FAILURE
    failure.unlink(missing_ok=True)
    try:
        launch(_one_of_many, (config, settings, out, verbose), config.hardware.devices)
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as problem:
        raise_told(failure)
        rank, why = problem.get_first_failure()
        raise RuntimeError(f"process {rank} of {config.hardware.devices} ended: {why}") from None
    return TrainedMember(out)


def _one_of_many(config: TrainConfig, settings: Settings, out: Path, verbose: bool) -> None:
    configure_logging(verbose)
    if not is_first():
        logging.getLogger("lens_pipeline").setLevel(logging.ERROR)
    try:
        with reporting():
            train_here(config, settings, out)
    except InputError as problem:
        leave_word(out / FAILURE, problem)
        sys.exit(1)


@contextmanager
def reporting() -> Iterator[None]:
    """Of the processes that a Dagster step has started, the first tells the step's log."""
    if "DAGSTER_PIPES_CONTEXT" not in os.environ or not is_first():
        yield
        return
    from dagster_pipes import open_dagster_pipes

    logger = logging.getLogger("lens_pipeline")
    with open_dagster_pipes() as pipes:
        for handler in pipes.log.handlers:
            logger.addHandler(handler)
        yield


def name_of(config: TrainConfig, settings: Settings, **more: Any) -> str:
    """Of a training, or a study: what is trained, and a hash of all settings (and of what there is
    more) and of the cutouts themselves, so that the same goes on, and other pixels at the same
    place are trained on anew."""
    from lens_pipeline.training.data import data_module

    model = config.model
    more["cutouts"] = data_module(config, settings).content
    what = "_".join(model.architectures) if config.together else model.arch
    safe = "".join(c if c.isalnum() or c in "_-" else "_" for c in what)
    return f"{safe}-{digest(config.deciding | more)[:8]}"


def _places(config: TrainConfig, settings: Settings) -> dict[str, dict[str, Any]]:
    from lens_pipeline.shards.cutouts import newest_shards
    from lens_pipeline.shards.urls import in_versions
    from lens_pipeline.shards.versions import version_at

    names = ("data_root", "train_urls", "val_urls", "test_urls", "cache_dir")
    places = {name: getattr(config.data, name) for name in names}
    found = {name: written_down(place) for name, place in places.items() if place is not None}
    if not config.data.use_webdataset and not found.keys() - {"cache_dir"}:
        found["data_root"] = str(newest_shards(settings.home))
    if "data_root" in found:
        found["data_root"] = version_at(found["data_root"], settings.storage_options)
    urls = {name: url for name, url in found.items() if name.endswith("_urls")}
    return {"data": found | in_versions(urls, settings.storage_options)}


def _test_metrics(
    trained: "TrainedMember", config: TrainConfig, settings: Settings
) -> dict[str, Any]:
    from lens_pipeline.models.split_scores import split_scores
    from lens_pipeline.training.data import data_module
    from lens_pipeline.training.devices import device
    from lens_pipeline.training.member import metrics_of

    kind = system_type(config)
    system = kind.load_from_checkpoint(trained.checkpoint, device(config), compile_model=False)
    return metrics_of(split_scores(system, data_module(config, settings).split("test")))


def _tell(trained: "TrainedMember", config: TrainConfig, settings: Settings) -> None:
    from lens_pipeline.evaluation.tables import format_metrics_table
    from lens_pipeline.training.member import SETTINGS

    name = "ensemble" if config.together else config.model.arch
    print(format_metrics_table({name: trained.val_metrics}, split="Validation"))
    if config.data.test_urls is not None:
        tested = _test_metrics(trained, config, settings)
        print(format_metrics_table({name: tested}, split="Test"))
    print(f"Checkpoint  {trained.checkpoint}")
    print(f"Settings    {trained.folder / SETTINGS}")
