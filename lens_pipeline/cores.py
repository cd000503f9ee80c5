"""How much of a machine's processors is this process's."""

import os


def n_cores() -> int:
    """Cores that it may use: fewer than there are where it is bound to some, as by Slurm."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
