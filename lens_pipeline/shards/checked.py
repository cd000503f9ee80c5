"""Files in a folder that are known to be what a manifest lists, so that they are read once.

Their state when they were read stands in `.checked.json` beside them: what was changed, replaced or
copied since is in another, and is read again.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from fsspec.implementations.local import LocalFileSystem

from lens_pipeline.errors import InputError
from lens_pipeline.files import write_aside
from lens_pipeline.shards.checksums import Checksums
from lens_pipeline.shards.manifest import Listed, difference

RECORD = ".checked.json"
# Seconds. A file that changes twice within a tick of the clock has the time of the first change:
# what is younger is read when nobody can change it unseen any more.
TICK = 0.05

_LOCAL = LocalFileSystem()
_kept: dict[Path, dict[str, Any]] = {}  # of folders where no record may be written


class CheckedFolder:
    """What its block finds whole is known from then on. every_byte: read what is known, too."""

    def __init__(self, folder: Path, every_byte: bool = False) -> None:
        self.folder, self.every_byte = folder, every_byte
        self._known: dict[str, Any] = {} if every_byte else _recorded(folder)
        self._found: dict[str, Any] = {}

    def difference(self, listed: Listed) -> str | None:
        """How a file differs from what the manifest lists, or None."""
        if self._of(listed) is not None:
            return None
        path = self.folder / listed.name
        state = self._settled(path)
        wrong = difference(_LOCAL, str(path), listed)
        if wrong is None:
            self._found[listed.name] = {"state": state, "sha256": listed.sha256}
        return wrong

    def checksums(self, listed: Listed) -> Checksums:
        """Those of a file. Raises InputError where it is not what the manifest lists."""
        known = self._of(listed)
        if known is not None and "md5" in known:
            return Checksums(known["sha256"], known["md5"], known["etag"])
        path = self.folder / listed.name
        state = self._settled(path)
        checksums = Checksums.of(path) if path.is_file() else None
        if checksums is None or checksums.sha256 != listed.sha256:
            wrong = difference(_LOCAL, str(path), listed) or "changes while it is read"
            raise _not_as_listed(path, wrong)
        self._found[listed.name] = {"state": state, **asdict(checksums)}
        return checksums

    def require(self, listed: Listed) -> None:
        """Raises InputError where a file is not what the manifest lists."""
        wrong = self.difference(listed)
        if wrong:
            raise _not_as_listed(self.folder / listed.name, wrong)

    def _of(self, listed: Listed) -> dict[str, Any] | None:
        """What is known of a file in its present state."""
        known = self._found.get(listed.name) or self._known.get(listed.name)
        if known is None or known.get("sha256") != listed.sha256:
            return None
        state = _state(self.folder / listed.name)
        return known if state is not None and state == known.get("state") else None

    def _settled(self, path: Path) -> list[int] | None:
        """The state that a file has, and has had for long enough; None where it is changing."""
        state = _state(path)
        age = TICK if state is None else time.time() - state[-1] / 1e9
        if 0 <= age < TICK:
            time.sleep(TICK - age)
        return state if state == _state(path) else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Writes down what was found whole, however the block ends."""
        if not self._found:
            return
        known = _recorded(self.folder) | self._found
        try:
            write_aside(self.folder / RECORD, json.dumps({"schema": 1, "files": known}))
        except OSError:  # others' shards, which we may only read
            _kept[self.folder.absolute()] = known


def _not_as_listed(path: Path, wrong: str) -> InputError:
    return InputError(f"{path}: {wrong}; write the shards again")


def _state(path: Path) -> list[int] | None:
    """What a change of a file changes; None where it cannot be seen. No number of the device: it
    is another one on each machine that shares a folder."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _recorded(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / RECORD).read_text())
        files = values["files"] if values["schema"] == 1 else {}
        recorded = {name: dict(known) for name, known in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        recorded = {}
    return recorded | _kept.get(folder.absolute(), {})
