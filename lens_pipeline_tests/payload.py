"""What a file that would run code carries."""

from collections.abc import Callable
from pathlib import Path


class Payload:
    """Unpickled, it leaves a file: whoever reads one has run what a stranger wrote."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.mark,)
