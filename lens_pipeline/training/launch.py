"""Training in several processes of this machine, one a device, by torchrun's own launcher."""

import logging
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lens_pipeline.cores import n_cores
from lens_pipeline.errors import InputError, NoAnswerError, NoRoomError
from lens_pipeline.files import write_aside

QUIET = (
    *("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing"),
    *(
        "torch.distributed.elastic.agent.server.api",
        "torch.distributed.elastic.multiprocessing.api",
    ),
)

FAILURE = ".failure"  # in the folder of a training: why one of its processes ended
TOLD = "LENS_FAILURE"  # names that file to a command that another process has started
KINDS = (NoRoomError, NoAnswerError, InputError)  # who has started it treats each in its own way


def train_argv(config: Path, out: Path, home: Path) -> list[str]:
    """What trains by a configuration file, in a process of its own or several."""
    return _command("train", home, config=config, checkpoint_dir=out)


def tune_argv(config: Path, space: Path, out: Path, home: Path, **how: Any) -> list[str]:
    """What tunes a configuration, in a process of its own; `how` as the command's flags."""
    return _command("tune", home, config=config, space=space, out=out, **how)


def _command(name: str, home: Path, **flags: Any) -> list[str]:
    given = {"home": home} | flags
    return [
        *(sys.executable, "-m", "lens_pipeline.cli", name),
        *(f"--{flag.replace('_', '-')}={value}" for flag, value in given.items()),
    ]


def leave_word(failure: Path, problem: InputError) -> None:
    """Write down what ended this process, for who has started it."""
    kind = next(kind for kind in KINDS if isinstance(problem, kind))
    write_aside(failure, f"{kind.__name__}\n{problem}")


def raise_told(failure: Path) -> None:
    """Raise what another process has left there by `leave_word`, if it has."""
    if failure.exists():
        kind, _, message = failure.read_text().partition("\n")
        raise {one.__name__: one for one in KINDS}[kind](message) from None


def is_first() -> bool:
    """Whether this is the process that reports: of many, one."""
    return os.environ.get("RANK", "0") == "0"


def launch(entry: Callable[..., None], arguments: tuple[Any, ...], devices: int) -> None:
    """Run a function once for each device; when one process fails, all are ended.

    Raises ChildFailedError (of torch) where one has failed.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in QUIET:  # it tells of a failure with a page of its own
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Together the processes use the cores that there are.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, n_cores() // devices)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
        start_method="spawn",
    )
    elastic_launch(config, entry)(*arguments)
