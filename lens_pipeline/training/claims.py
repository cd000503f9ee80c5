"""What one process of this host has at a time, by names and locks: GPUs, of which it needs none."""

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import filelock

log = logging.getLogger(__name__)


@contextmanager
def claimed(names: Sequence[str], n: int, folder: Path | None = None) -> Iterator[list[str]]:
    """`n` of these names that no other process holds, in their order, while it is open.

    folder: of the locks; all users of the host share the default.
    """
    folder = folder or Path(tempfile.gettempdir()) / "lens-pipeline-gpu-claims"
    if not folder.exists():
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)  # where it is sticky, neither filelock nor Linux opens another's file
    told = False
    while True:
        with ExitStack() as held:
            mine = []
            for name in names:
                lock = filelock.FileLock(folder / f"{name}.lock", mode=0o666)
                try:
                    held.enter_context(lock.acquire(blocking=False))
                except filelock.Timeout:
                    continue
                os.utime(lock.lock_file)  # what has been left for days may be removed there
                mine.append(name)
                if len(mine) == n:
                    yield mine
                    return
        # All are let go: two that wait for the second of two, each with one, would wait for ever.
        if not told:
            log.warning("waiting for %d of the GPUs %s", n, ", ".join(names))
            told = True
        time.sleep(1)
