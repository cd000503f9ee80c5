"""Progress: bars on a terminal and in notebooks; elsewhere, as of a batch job, lines in the log."""

import io
import logging
import sys
import warnings
from collections.abc import Iterable
from typing import Any

from tqdm import TqdmWarning, std

with warnings.catch_warnings():
    # Without ipywidgets a notebook has the bar of a terminal, which will do.
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm

LINES = 60.0  # seconds between them
LINE = "{desc}: {n_fmt} of {total_fmt} ({percentage:.0f} %), {remaining} left{postfix}"
log = logging.getLogger(__name__)


def shows_progress() -> bool:
    """Whether somebody may be looking on: at a terminal, or in a notebook."""
    return sys.stderr.isatty() or in_notebook()


def in_notebook() -> bool:
    """Whether this process is the kernel of one."""
    kernel = sys.modules.get("ipykernel.zmqshell")  # whose process has it imported
    return kernel is not None and kernel.ZMQInteractiveShell.initialized()


class _Lines(std.tqdm):
    """A bar that is not drawn: what it would show is logged now and then."""

    monitor_interval = 0  # no thread of its own: what is at work counts

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:  # else it is to be wiped out
            log.info("  %s", self)


def progress_bar(iterable: Iterable[Any] | None = None, *, shown: bool = True, **about: Any) -> Any:
    """That of tqdm where `shows_progress`, and else one whose lines are logged; shown: false for
    neither; about: tqdm's own."""
    if not shown or shows_progress():
        return tqdm(iterable, disable=not shown, **about)
    about |= {"delay": LINES, "mininterval": LINES, "miniters": 1, "leave": False}
    return _Lines(iterable, file=io.StringIO(), bar_format=LINE, **about)
