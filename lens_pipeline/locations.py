"""Where things lie: paths on this machine, and URLs (`s3://`, `gs://`, `https://`, ...)."""

import os
import re
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from lens_pipeline.errors import SECRET, InputError

TABLES = (".csv", ".parquet", ".fits", ".fit", ".vot", ".votable", ".xml")  # of a catalogue
WEB = ("http", "https")
_SYNONYMS = {"s3a": "s3", "gcs": "gs"}


def protocol_of(location: str) -> str:
    """`s3`, `gs`, ...; empty of a local path."""
    protocol, separator, _ = location.partition("://")
    return _SYNONYMS.get(protocol, protocol) if separator else ""


def meant_as_url(location: str) -> bool:
    """Whether it begins as a URL does, with one slash or two: a path of that name is not meant."""
    return re.match("[a-z][a-z0-9+]+:/", location) is not None


def absolute(location: str) -> str:
    """A path made absolute; a URL (``scheme://``) as it is.

    `~` is the user's home. Raises InputError for a URL with a password, or of the web with a user,
    which would be written down with every result, for one that lacks a slash, and for a bucket's
    without a bucket.
    """
    if meant_as_url(location) and not protocol_of(location):
        raise InputError(f"{location}: a URL has two slashes behind the colon")
    if re.match("(s3a?|gs|gcs):///*$", location):
        raise InputError(f"{location}: names no bucket")
    if protocol_of(location):
        parts = urlsplit(location)
        # A token may be all that is there: web servers take it in the place of the user. And a
        # password with a slash, as AWS gives out, ends what is taken for the server.
        torn = re.match(r"[^:/]+://[^/@]*:[^@]*/[^@]*@", location) and not _port_of(parts)
        if torn or parts.password or (parts.username is not None and parts.scheme in WEB):
            raise InputError(
                f"{location}: a URL must not carry a user or password; give credentials through "
                "the environment, as its provider's tools take them"
            )
        return location
    return str(at_home(location).resolve())


def _port_of(parts: SplitResult) -> int | None:
    """That of a server of the web; None where what stands in its place is no number."""
    try:
        return parts.port if parts.scheme in WEB else None
    except ValueError:
        return None


def at_home(path: str) -> Path:
    """A path with its `~` at the beginning, if that is somebody's home, replaced by it."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  (the other fails where it is nobody's)


def existing(location: str) -> str:
    """A location to read from. Raises InputError for a path at which there is nothing; a URL is not
    asked for."""
    if not protocol_of(location) and not os.path.exists(location):  # noqa: PTH110  (it never fails)
        raise InputError(f"{location}: there is no such file or folder")
    return location


def written_down(location: str) -> str:
    """`absolute`, of a location that results name. Raises InputError for a URL that is signed."""
    if protocol_of(location) and SECRET.search(urlsplit(location).query):
        raise InputError(
            f"{location}: a URL must not carry a signature or token, for results name it; give "
            "credentials through the environment, as its provider's tools take them"
        )
    return absolute(location)


def publishable(location: str) -> str:
    """`written_down`, of where shards are published. Raises InputError for braces, which in the
    URLs of shards stand for their numbers."""
    if set("{}") & set(location):
        raise InputError(f"{location}: where shards are published must not hold braces")
    return written_down(location)


def without_query(location: str) -> str:
    """A path as it is; a URL without what follows `?`, where it is signed."""
    return location.partition("?")[0] if protocol_of(location) else location


def names_table(location: str) -> bool:
    """Whether a path or URL ends as a catalogue's does."""
    return without_query(location).lower().endswith(TABLES)
