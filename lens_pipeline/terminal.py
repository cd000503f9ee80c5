"""What the command line shares with the terminal: messages and signals."""

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from lens_pipeline.errors import masked
from lens_pipeline.locations import at_home, meant_as_url

INTERRUPTED = 130
GRACE = 8  # seconds that an interrupted run has for an orderly end
# Of a command and all that it starts. The image sets the same, for what is started there.
ENVIRONMENT = {
    "PYTHONSAFEPATH": "1",  # else `yaml.py` in the working directory would be taken for the library
    "MLFLOW_DISABLE_TELEMETRY": "true",  # Dagster's is off in dagster.yaml
}


class _Terminal(logging.StreamHandler[TextIO]):
    """Messages on what is standard error when they come, which a caller may have redirected; the
    secrets in their URLs are masked."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


_terminal = _Terminal()


def prepare_environment() -> None:
    """See ENVIRONMENT; whoever has set one of these otherwise is left alone."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def local_path(text: str) -> Path:
    """Of a flag: a path on this machine, made absolute, `~` for the user's home; shells leave that
    in `--out=~/file`. A URL is none, nor is an empty text, or a place in a file."""
    if not text:  # as of a variable of the shell that is not set
        raise argparse.ArgumentTypeError("is given, and empty")
    if meant_as_url(text):
        raise argparse.ArgumentTypeError(f"{text} is a URL; name a place on this machine")
    path = at_home(text).absolute()
    # Unlike `Path.is_file` it does not fail where one may not look, or a name is too long.
    if files := [folder for folder in path.parents if os.path.isfile(folder)]:  # noqa: PTH113
        raise argparse.ArgumentTypeError(f"{text}: {files[0]} is a file, not a folder")
    return path


def configure_logging(verbose: bool) -> None:
    """Our own messages on stderr; those of the libraries only where they are asked for."""
    logger = logging.getLogger("lens_pipeline")
    logger.setLevel(logging.INFO)
    logger.addHandler(_terminal)
    if not verbose:
        # Set by name, before the libraries configure the loggers above these.
        for library in ("pytorch_lightning", "lightning_fabric"):
            for part in ("rank_zero", "distributed"):
                logging.getLogger(f"{library}.utilities.{part}").setLevel(logging.ERROR)
        logging.getLogger("dagster").setLevel(logging.ERROR)
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends what runs here as Ctrl-C does, and neither takes longer than ten seconds.

    An error that follows a signal comes of it (a file that was being written, say), and is raised
    as KeyboardInterrupt. An interruption that came while Python was freeing an object, where it
    ignores every exception, is sent again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are another's
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    ended, interrupted, ignored = threading.Event(), threading.Event(), threading.Event()

    def watch() -> None:
        while signals := os.read(reader, 1):
            if signals[0] in (signal.SIGINT, signal.SIGTERM):
                interrupted.set()
                latest = time.monotonic() + GRACE
                while not ended.wait(0.1) and time.monotonic() < latest:
                    if ignored.is_set():
                        ignored.clear()
                        os.kill(os.getpid(), signals[0])
                if ended.is_set():
                    break
                # Whatever is stuck is cut off: steps are renamed into place only when they are
                # whole, and the next run frees what a dead one held.
                print("error: interrupted, and ended by force", file=sys.stderr, flush=True)
                os._exit(INTERRUPTED)
        os.close(reader)

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    def unraisable(what: "sys.UnraisableHookArgs", /) -> None:
        if issubclass(what.exc_type, Exception):
            hook(what)
        else:
            ignored.set()

    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    before = signal.signal(signal.SIGTERM, interrupt)
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        try:
            yield
        finally:
            ended.set()
            signal.set_wakeup_fd(descriptor)
            signal.signal(signal.SIGTERM, before)
            sys.unraisablehook = hook
            os.close(writer)
            watcher.join()
    except Exception:
        if interrupted.is_set():
            raise KeyboardInterrupt from None
        raise
