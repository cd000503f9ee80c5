"""Signals at the terminal."""

import os
import signal

import pytest

from lens_pipeline.terminal import interruptible


def test_an_error_that_a_signal_has_caused_is_an_interruption() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            raise OSError("a file that was being written is not whole")
    with pytest.raises(OSError, match="no signal"), interruptible():
        raise OSError("no signal")
