"""How much of a machine's processors is this process's."""

import math
import os
from pathlib import Path

# Of Linux's control groups, as a container sees its own: `max 100000`, or microseconds of each so
# many.
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def n_cores() -> int:
    """Cores that it may use: fewer than there are where it is bound to some, as by Slurm, or may
    have the time of some, as in a container."""
    bound = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if bound else os.cpu_count() or 1
    try:
        time, of = _QUOTA.read_text().split()
        return min(cores, max(1, math.ceil(int(time) / int(of))))
    except (OSError, ValueError):  # there is none
        return cores
