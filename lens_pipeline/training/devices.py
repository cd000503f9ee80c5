"""Which GPUs a training takes: none that another training of this host has."""

import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import filelock
import torch

from lens_pipeline.training.config import HardwareSection

VISIBLE = "CUDA_VISIBLE_DEVICES"
log = logging.getLogger(__name__)
_held: dict[str, filelock.BaseFileLock] = {}


def claim_gpus(hardware: HardwareSection) -> None:
    """Leave this process, and those it starts, only as many GPUs as a training asks for, which no
    other process that called this uses until it ends; it waits where all are taken.

    The first call decides, and must come before CUDA is initialised; later trainings of the same
    process have what it has. Nothing happens where there are not so many, or none (whoever trains
    says so), or where the training is told to share.
    """
    wanted = hardware.exclusive and hardware.accelerator != "cpu"
    if _held or not wanted or torch.cuda.device_count() < hardware.devices:
        return
    names = os.environ.get(VISIBLE) or ",".join(map(str, range(torch.cuda.device_count())))
    os.environ[VISIBLE] = ",".join(claim(names.split(","), hardware.devices))


def claim(names: Sequence[str], n: int, folder: Path | None = None) -> list[str]:
    """`n` of these names that no other process holds, in their order; held until this process ends.

    folder: of the locks; all users of the host share the default.
    """
    folder = folder or Path(tempfile.gettempdir()) / "lens-pipeline-gpus"
    if not folder.exists():
        folder.mkdir(exist_ok=True)
        folder.chmod(0o1777)  # of everybody, as the folder it lies in
    told = False
    while True:
        for name in names:
            lock = filelock.FileLock(folder / f"{name}.lock", mode=0o666)
            try:
                lock.acquire(blocking=False)
            except filelock.Timeout:
                continue
            _held[name] = lock
            if len(_held) == n:
                return [name for name in names if name in _held]
        # Two that wait for the second of two GPUs, each with one, would wait for ever.
        for held in _held.values():
            held.release()
        _held.clear()
        if not told:
            log.warning("waiting for %d of the GPUs %s", n, ", ".join(names))
            told = True
        time.sleep(1)
