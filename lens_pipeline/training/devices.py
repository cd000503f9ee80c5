"""What a training computes on: whether it is there, in which precision, and that no other training
of this host has it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lens_pipeline.cores import n_cores
from lens_pipeline.errors import InputError
from lens_pipeline.training.claims import claimed
from lens_pipeline.training.config import HardwareSection, TrainConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"


def check_devices(config: TrainConfig) -> None:
    """Raises InputError where the machine has not the devices that the configuration names."""
    wanted, n_gpus = config.hardware, torch.cuda.device_count()
    on_gpus = wanted.accelerator == "gpu" or (wanted.accelerator == "auto" and n_gpus > 0)
    if on_gpus and wanted.devices > n_gpus:
        has = f"{n_gpus} GPUs; name fewer, or" if n_gpus else "no GPU;"
        raise InputError(
            f"hardware.devices {wanted.devices}: this machine has {has} set hardware.accelerator "
            "to cpu"
        )
    if not on_gpus and wanted.devices > (cores := n_cores()):
        raise InputError(
            f"hardware.devices {wanted.devices}: this process has {cores} cores, and each device "
            "would be a process of its own; name fewer"
        )
    if wanted.precision == "16-mixed" and not on_gpus:
        raise InputError("hardware.precision 16-mixed: needs a GPU; on a CPU, auto is 32-true")


def on_gpu(config: TrainConfig) -> bool:
    """Whether a configuration trains on GPUs here."""
    return config.hardware.accelerator != "cpu" and torch.cuda.is_available()


def device(config: TrainConfig) -> str:
    """What torch calls that."""
    return "cuda" if on_gpu(config) else "cpu"


def resolved_precision(config: TrainConfig) -> Any:
    """`auto`: bf16 where the GPU computes in it, fp16 on older ones; a CPU without the instructions
    is far slower with either."""
    if config.hardware.precision != "auto":
        return config.hardware.precision
    if not on_gpu(config):
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(False) else "16-mixed"


def attention_that_repeats(config: TrainConfig) -> AbstractContextManager[None]:
    """Where the same weights are asked for on a GPU: torch's faster attention sums up gradients in
    any order, of which it only warns."""
    if config.hardware.deterministic and on_gpu(config):
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def is_out_of_memory(problem: RuntimeError) -> bool:
    """Of a GPU: torch tells by a class of its own only what its own allocator could not have."""
    said = str(problem)
    return isinstance(problem, torch.OutOfMemoryError) or (
        "CUDA error: out of memory" in said or "_STATUS_ALLOC_FAILED" in said
    )


@contextmanager
def gpus_claimed(hardware: HardwareSection, trainings: int = 1) -> Iterator[None]:
    """While it is open, the GPUs of a training, or of several at a time as far as there are enough,
    are nobody else's who asks here; it waits where all are taken.

    This process, and those it starts, are left these alone: for good, since CUDA sees what was
    visible when it was initialised. So the first time decides, and must come before that; another
    training of the process waits for the same. Nothing happens where there are not enough for one,
    or none (whoever trains says so), or where the training is told to share.
    """
    there = torch.cuda.device_count()
    n = min(hardware.devices * trainings, there)
    if not hardware.exclusive or hardware.accelerator == "cpu" or n < hardware.devices:
        yield
        return
    visible = visible_gpus()
    gpus = dict(zip(of_the_host(visible, _uuids()), visible, strict=True))
    with claimed([*gpus], n) as mine:
        os.environ[VISIBLE] = ",".join(gpus[one] for one in mine)
        yield


def of_the_host(visible: Sequence[str], uuids: Sequence[str]) -> list[str]:
    """What tells GPUs that are visible from all others of this host: a job of Slurm's, or a
    container, may call each that it was given 0.

    visible: their names, as CUDA_VISIBLE_DEVICES has them; uuids: of all that the driver shows to
    this process, in its order. Names for which there are none stay as they are.
    """

    def whole(name: str) -> str:
        if name.isdecimal():
            return uuids[int(name)] if int(name) < len(uuids) else name
        return next((uuid for uuid in uuids if uuid.startswith(name)), name)  # or its beginning

    return [whole(name) for name in visible]


def _uuids() -> list[str]:
    try:
        return torch.cuda._raw_device_uuid_nvml() or []
    except (OSError, AttributeError):  # no NVIDIA driver, or one that does not tell
        return []


def visible_gpus() -> list[str]:
    """Their names, as CUDA_VISIBLE_DEVICES has them."""
    numbers = map(str, range(torch.cuda.device_count()))
    names = (os.environ.get(VISIBLE) or ",".join(numbers)).split(",")
    return [name.strip() for name in names if name.strip()]
