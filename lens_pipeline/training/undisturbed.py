"""What a training changes in its process, and how it is given back."""

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import distributed

# Lightning's seed for workers, and what it asks of cuBLAS where kernels are to be deterministic.
VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUBLAS_WORKSPACE_CONFIG")
# Where the processes of a training find each other, also where it has one.
OF_A_GROUP = (
    *("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK", "OMP_NUM_THREADS"),
)


def _in_a_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@contextmanager
def process_left_as_it_was() -> Iterator[None]:
    """Random numbers of Python, NumPy and torch go on after the block as if it had not been; which
    kernels torch takes, the environment, and what signals do are those from before."""
    # Lightning gives signals back last of all, and not where the end of a training fails.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    variables = {name: os.environ.get(name) for name in (*VARIABLES, *OF_A_GROUP)}
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    of_python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed, on_gpus = torch.initial_seed(), torch.cuda.is_initialized()
    of_gpus = torch.cuda.get_rng_state_all() if on_gpus else []
    together = _in_a_group()
    try:
        yield
    finally:
        # Of several processes others may still be at work, and the next training goes on in theirs.
        if not together and _in_a_group() and distributed.get_world_size() == 1:
            distributed.destroy_process_group()
        if not together and _in_a_group():
            for name in OF_A_GROUP:
                del variables[name]
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if on_gpus:
            torch.cuda.set_rng_state_all(of_gpus)
        elif torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)  # with which they would have begun
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None and signal.getsignal(number) is not handler:
                    signal.signal(number, handler)
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
