"""Signals at the terminal, and the paths that flags name."""

import os
import signal
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from lens_pipeline.terminal import interruptible, local_path


def _write_and_be_interrupted() -> None:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        raise OSError("what was being written is not whole")


def test_an_error_that_a_signal_has_caused_is_an_interruption() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        _write_and_be_interrupted()
    with pytest.raises(FileNotFoundError), interruptible():
        Path("/nowhere").read_text()


@pytest.fixture
def interrupted_as_usual() -> Iterator[None]:
    """Python's own handler of Ctrl-C: who trained before may have left none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupted_as_usual")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_an_object_is_freed_is_not_lost(how: signal.Signals) -> None:
    def freed(_: object) -> None:
        os.kill(os.getpid(), how)

    def work() -> None:
        thing = {1}
        reference = weakref.ref(thing, freed)
        del thing  # Python ignores what is raised in the callback
        assert reference() is None
        for _ in range(50):
            time.sleep(0.1)

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interruptible():
        work()
    assert time.monotonic() - begun < 4


def test_a_place_that_cannot_be_looked_at_is_left_to_who_writes_there() -> None:
    too_long = Path("/") / ("x" * 300) / "scores.csv"
    assert local_path(str(too_long)) == too_long
