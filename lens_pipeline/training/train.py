"""Train one network, or several together: from a configuration to a folder with its checkpoint."""

import gc
import json
import logging
import math
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from lens_pipeline.errors import InputError, NoAnswerError
from lens_pipeline.evaluation.metrics import FPRS, ranking_metric
from lens_pipeline.files import file_aside, write_aside
from lens_pipeline.models.metrics import RANKED
from lens_pipeline.models.pretrained import read_checkpoint
from lens_pipeline.models.split_scores import split_scores
from lens_pipeline.models.system import BATCH, LensClassifier, LitLensSystem
from lens_pipeline.shards.datamodule import CutoutModule
from lens_pipeline.training.callbacks import Curves
from lens_pipeline.training.checkpoints import (
    BestCheckpoints,
    LastCheckpoint,
    RenamedCheckpoints,
    save_aside,
    telling_of_a_full_disk,
)
from lens_pipeline.training.config import DataSection, TrainConfig, limited
from lens_pipeline.training.devices import (
    attention_that_repeats,
    check_devices,
    device,
    is_out_of_memory,
    resolved_precision,
)
from lens_pipeline.training.inputs import START, hashed_inputs, other_inputs, recorded_inputs
from lens_pipeline.training.loggers import end, file_loggers
from lens_pipeline.training.member import (
    BEST,
    CURVES,
    FITTED,
    INPUTS,
    LAST,
    SCORES,
    SETTINGS,
    TOP,
    TrainedMember,
)
from lens_pipeline.training.trainer import chosen_callbacks, make_trainer, no_news
from lens_pipeline.training.undisturbed import process_left_as_it_was

COMPUTED_ON = "device and precision"
WEIGHTS = ("state_dict", "hyper_parameters", "epoch", "global_step", "pytorch-lightning_version")

log = logging.getLogger(__name__)


@process_left_as_it_was()
def train(
    config: TrainConfig,
    data: CutoutModule,
    out: str | Path,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[Callback] = (),
    system_type: type[LensClassifier] = LitLensSystem,
) -> TrainedMember:
    """Train what the configuration says and leave its files in `out`.

    data: its batch size and seed become those of the configuration. system_type: LitEnsembleSystem
    where `model.model_type` is `ensemble`; a member's training does not import it, and need not be
    done again when ensembles change. out: an empty folder, or one in which the same training was
    stopped, anywhere: it goes on from last.ckpt, and ends with the weights of an undisturbed one;
    of one that has ended nothing is done again. The same configuration and data give the same
    weights, bit for bit, on a CPU, and on a GPU with `hardware.deterministic`. The process's random
    numbers, and which kernels torch takes in it, are afterwards what they were. Lightning ends the
    process on Ctrl-C; here it stays a KeyboardInterrupt. Raises InputError for what this machine
    does not have, where the settings name other cutouts than `data` has or another system, where
    the folder holds another training, where a loss is no number, or memory or disk are too small.
    """
    out = Path(out)
    check_devices(config)
    _check_taken(config, data)
    data.seed = config.training.seed
    if config.hardware.devices == 1:
        # Whatever Slurm, say, calls this process: it is all of its training.
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
    with telling_of_a_full_disk(out):
        config, going_on = _begin(config, data, out)
    trial = config.training.fast_dev_run
    if (out / SCORES).exists() and not trial:
        if not (out / BEST).exists():
            raise InputError(
                f"{out / BEST}: is not there any more, which the training in this folder has left; "
                "name another folder"
            )
        log.info("  %s holds this training with its scores: nothing is trained again", out)
        (out / FITTED).unlink(missing_ok=True)  # of a process that was killed just there
        return TrainedMember(out)
    if rank_zero_only.rank == 0 and not trial:  # type: ignore[attr-defined]
        for path in out.rglob(".*.ckpt.*"):  # of a process that was killed while it wrote
            path.unlink()
    if going_on is None and not trial and not (out / FITTED).exists():
        # Of a process that was killed before there was anything to go on from.
        shutil.rmtree(out / TOP, ignore_errors=True)
    while trial or not (out / FITTED).exists():
        try:
            _fit(config, data, out, going_on, loggers, callbacks, system_type)
            break
        except RuntimeError as problem:
            if not is_out_of_memory(problem):
                raise
            half = config.training.batch_size // 2
            # It was not too large for whole epochs: somebody else has the memory.
            begun = going_on or (not trial and any((out / TOP).glob("*.ckpt")))
            if begun:
                raise NoAnswerError(
                    f"training.batch_size {config.training.batch_size}: the GPU has too little "
                    f"memory for it now, and {out} holds a training with it; free the memory, and "
                    "the same goes on, or begin another in another folder"
                ) from None
            if not config.training.find_batch_size or half < 2:
                raise InputError(
                    f"training.batch_size {config.training.batch_size}: the GPU has too little "
                    "memory for it; halve it and double training.accumulate_grad_batches, or set "
                    "training.find_batch_size"
                ) from None
            log.warning("training.batch_size: too little memory; trying %d", half)
        config = config.with_changes({"training": {"batch_size": half}}, "training")
        if not trial:
            (out / LAST).unlink(missing_ok=True)
            shutil.rmtree(out / TOP, ignore_errors=True)
        free_memory()
        with telling_of_a_full_disk(out):
            config, going_on = _begin(config, data, out)
    if rank_zero_only.rank == 0 and not trial:  # type: ignore[attr-defined]
        try:
            with telling_of_a_full_disk(out):
                _finish(config, data, out, system_type)
        except RuntimeError as problem:
            if not is_out_of_memory(problem):
                raise
            raise InputError(
                f"{out}: the training has ended, and the GPU has too little memory now for the "
                "scores of the validation split; free it, and the same goes on with them"
            ) from None
    return TrainedMember(out)


def free_memory() -> None:
    """Of a training that has ended, or failed: a trainer and its system know each other."""
    gc.collect()
    torch.cuda.empty_cache()


def set_seed(seed: int) -> None:
    """Of all random numbers of Python, NumPy and torch, here and in workers."""
    pl.seed_everything(seed, workers=True, verbose=False)


def build_system(
    config: TrainConfig, data: CutoutModule, system_type: type[LensClassifier] = LitLensSystem
) -> LensClassifier:
    """The untrained system of a configuration, for the cutouts of `data`."""
    chosen, how = config.model, config.training
    pos_weight = 1.0
    if how.balance:
        n_nonlens, n_lens = data.class_counts("train")
        if not n_lens or not n_nonlens:
            raise InputError("train: has cutouts of one class only; training needs both")
        pos_weight = n_nonlens / n_lens
    shared: dict[str, Any] = {
        "lr": how.learning_rate,
        "pos_weight": pos_weight,
        "bands": len(data.bands),
        "image_size": data.image_size,
        "units": data.units,
        "channels_last": config.hardware.channels_last,
        "pretrained": chosen.pretrained,
        "dropout_rate": chosen.dropout_rate,
        "compile_model": chosen.compile_model,
        **how.model_dump(
            include={
                "weight_decay",
                "loss",
                "focal_gamma",
                "label_smoothing",
                "schedule",
                "warmup",
                "decay",
                "decay_epochs",
                "augment",
                "shift",
                "noise",
            }
        ),
    }
    if config.together != ("architectures" in system_type._arguments()):
        wanted = "LitEnsembleSystem" if config.together else "LitLensSystem"
        raise InputError(
            f"model.model_type {chosen.model_type}: is trained with system_type={wanted}, not "
            f"{system_type.__name__}"
        )
    which = {"architectures", "ensemble_strategy"} if config.together else {"arch"}
    return system_type(**chosen.model_dump(include=which), **shared)


def _check_taken(config: TrainConfig, data: CutoutModule) -> None:
    """Raises InputError where the configuration asks for other cutouts than `data` has, which would
    be recorded as if it had been so; or where a limit leaves none to train on."""
    unless_said = DataSection()
    for name in ("bagging", "image_size"):
        wanted, has = getattr(config.data, name), getattr(data, name)
        if wanted not in (getattr(unless_said, name), has):
            raise InputError(
                f"data.{name} {wanted}: {type(data).__name__} was made with {has}; make it with "
                f"{name}={wanted}"
            )
    _limited_batches(config, int(data.taking_part("train").sum()), "train")


def _limited_batches(config: TrainConfig, n: int, of: Literal["train", "val"]) -> int:
    """How many batches a limit leaves of n cutouts. Raises InputError where that is none."""
    name = f"limit_{of}_batches"
    limit = getattr(config.training, name)
    n_batches = math.ceil(n / (config.training.batch_size * config.hardware.devices))
    if n_batches and limited(n_batches, limit) == 0:
        raise InputError(
            f"training.{name} {limit}: of {n_batches} batches that is none; give a larger one, or "
            "a number of batches"
        )
    return limited(n_batches, limit)


def _begin(config: TrainConfig, data: CutoutModule, out: Path) -> tuple[TrainConfig, Path | None]:
    """(the configuration with the batch size that was found, the checkpoint to go on from, if there
    is one). Raises InputError where the folder holds another training."""
    out.mkdir(parents=True, exist_ok=True)
    inputs = hashed_inputs(config, data)
    here = f"{device(config)}, {resolved_precision(config)}"
    last = out / LAST
    if config.training.fast_dev_run:  # which reads and writes nothing there
        return config, None
    if last.exists() or (out / SCORES).exists():
        before = TrainConfig.read(out / SETTINGS)
        if config.training.find_batch_size:
            found = {"batch_size": before.training.batch_size}
            if found["batch_size"] != config.training.batch_size:
                log.info("  training.batch_size: %d, as this training has found", *found.values())
            config = config.with_changes({"training": found}, "training")
        changed = before.differences(config)
        if changed:
            best = out / BEST
            start = ""
            if best.exists() and not before.together:
                weights = shlex.quote(str(best))
                start = f", and start from the best of this one: --pretrained {weights}"
            raise InputError(
                f"{out}: holds a training with other settings: {', '.join(changed)}; go on with "
                f"the same, or name another folder{start}"
            )
        recorded = recorded_inputs(out)
        if config.starts_from_a_file and not Path(config.model.pretrained).exists():
            inputs[START] = recorded.get(START, config.start)  # removed since, it is no other
        others = other_inputs(recorded, inputs)
        if others:
            raise InputError(
                f"{out}: holds a training with other {' and '.join(others)}; go on with the same, "
                "or name another folder"
            )
        if not (out / SCORES).exists():
            log.info("  goes on from %s", last)
            if (there := recorded.get(COMPUTED_ON, here)) != here:
                log.warning(
                    "  it was computed on %s, and goes on on %s: the weights will not be, bit for "
                    "bit, those of a training on either alone",
                    *(there, here),
                )
    if not (out / SCORES).exists():  # else nothing is computed here, nor by these settings
        write_aside(out / INPUTS, json.dumps(inputs | {COMPUTED_ON: here}, indent=1))
        write_aside(out / SETTINGS, config.yaml)
    return config, last if last.exists() else None


def deciding_metric(config: TrainConfig, data: CutoutModule) -> str:
    """What chooses the best epoch: `training.monitor`, or where the validation set has too few
    non-lenses to resolve it, what it can rank by, see `ranking_metric`. Raises InputError where it
    holds cutouts of one class only, which no metric of ranks can be had of."""
    wanted, limit = config.training.monitor, config.training.limit_val_batches
    metric = wanted.removeprefix("val/")
    labels = data.split("val").labels
    if limit is not None:
        at_once = config.training.batch_size * config.hardware.devices
        labels = labels[: _limited_batches(config, len(labels), "val") * at_once]
    n_nonlens = int((labels == 0).sum())
    if metric in RANKED and n_nonlens in (0, len(labels)) and not config.training.fast_dev_run:
        among = "" if limit is None else f"within training.limit_val_batches {limit}, "
        raise InputError(
            f"val: {among}has cutouts of one class only; {wanted} needs both, or set "
            "training.monitor to val/loss"
        )
    fpr = {"tpr10": 0.1, **FPRS}.get(metric)
    if fpr and n_nonlens * fpr < 1:
        instead = f"val/{ranking_metric(n_nonlens)}"
        log.info(
            "  %d non-lenses of the validation set cannot resolve %s; %s chooses the epoch",
            *(n_nonlens, wanted, instead),
        )
        return instead
    return wanted


def _fit(
    config: TrainConfig,
    data: CutoutModule,
    out: Path,
    going_on: Path | None,
    loggers: Sequence[Logger],
    callbacks: Sequence[Callback],
    system_type: type[LensClassifier],
) -> None:
    how = config.training
    data.batch_size = how.batch_size
    set_seed(how.seed)
    # What it started from may be gone, or out of reach, when it goes on: all weights are kept.
    changes = {"model": {"pretrained": "none"}} if going_on else {}
    system = build_system(config.with_changes(changes, "train"), data, system_type)
    monitor = deciding_metric(config, data)
    mode = "min" if monitor == "val/loss" else "max"
    best = BestCheckpoints(
        dirpath=out / TOP,
        filename="epoch_{epoch:03d}",
        auto_insert_metric_name=False,
        monitor=monitor,
        mode=mode,
        save_top_k=how.save_top_k,
        # Those of an average are only in a whole one.
        save_weights_only=not how.ema,
        enable_version_counter=False,
    )
    files, curves = RenamedCheckpoints(), Curves()
    # Behind the others, whose state it keeps.
    last = LastCheckpoint(out / LAST, how.save_every_n_steps, best, files)
    chosen = [*chosen_callbacks(config, monitor, mode, callbacks, curves), best]
    with telling_of_a_full_disk(out):
        into_files = [] if how.fast_dev_run else file_loggers(config, out)
    with no_news():
        trainer = make_trainer(
            config,
            data,
            out,
            logger=[*into_files, *loggers],
            callbacks=chosen if how.fast_dev_run else [*chosen, last],
            plugins=[files],
        )
        # Of memory that is written to anyway: with the deterministic kernels torch would do it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            with telling_of_a_full_disk(out), attention_that_repeats(config):
                trainer.fit(system, data, ckpt_path=going_on, weights_only=True)
        except SystemExit:
            raise KeyboardInterrupt from None
        finally:
            end(into_files)
            data.trainer = None  # which holds the network, and what the optimiser knows of it
    if trainer.is_global_zero and not how.fast_dev_run:
        kept = {Path(path).name for path in (best.best_model_path, *best.best_k_models)}
        for path in (out / TOP).glob("*.ckpt"):  # of a process that was killed, and did better
            if path.name not in kept:
                path.unlink()
        with telling_of_a_full_disk(out):
            pd.DataFrame(curves.rows).to_csv(out / CURVES, index=False)
            write_aside(out / FITTED, Path(best.best_model_path).name)


def _finish(
    config: TrainConfig, data: CutoutModule, out: Path, system_type: type[LensClassifier]
) -> None:
    """The best checkpoint, weights alone, and its scores of the validation set. Stopped anywhere,
    it can be done again."""
    best = out / TOP / (out / FITTED).read_text()
    for path in (out / TOP).glob("*.ckpt"):
        checkpoint = read_checkpoint(path)
        weights = {name: checkpoint[name] for name in WEIGHTS}
        save_aside(weights, path)
        if path == best:
            save_aside(weights, out / BEST)
    system = system_type.load_from_checkpoint(out / BEST, device(config), compile_model=False)
    split = data.split("val")
    # What a step had memory for, this has, too.
    scores = split_scores(system, split, min(BATCH, config.training.batch_size))
    # Where this was trained is no part of what was: the same training leaves the same bytes.
    checkpoint = read_checkpoint(out / LAST)
    save_aside(checkpoint | {"callbacks": {}}, out / LAST)
    best.unlink(missing_ok=True)
    if (out / TOP).exists() and not any((out / TOP).iterdir()):
        (out / TOP).rmdir()
    with file_aside(out / SCORES) as file:
        scores.to_parquet(file, index=False)
    (out / FITTED).unlink()
