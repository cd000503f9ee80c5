"""Progress bars: on a terminal and in notebooks, and nowhere else."""

import sys
import warnings
from collections.abc import Iterable
from typing import Any

from tqdm import TqdmWarning

with warnings.catch_warnings():
    # Without ipywidgets a notebook has the bar of a terminal, which will do.
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm


def shows_progress() -> bool:
    """Whether somebody may be looking on: at a terminal, or in a notebook."""
    return sys.stderr.isatty() or in_notebook()


def in_notebook() -> bool:
    """Whether this process is the kernel of one."""
    kernel = sys.modules.get("ipykernel.zmqshell")  # whose process has it imported
    return kernel is not None and kernel.ZMQInteractiveShell.initialized()


def progress_bar(iterable: Iterable[Any] | None = None, *, shown: bool = True, **about: Any) -> Any:
    """That of tqdm, where `shows_progress`; shown: false for none at all; about: tqdm's own."""
    return tqdm(iterable, disable=not (shown and shows_progress()), **about)
