"""Files wherever they lie: a local path, or a URL that fsspec knows (`s3://`, `gs://`, ...)."""

from collections.abc import Mapping
from typing import Any

import fsspec

_FRESH = {"use_listings_cache": False}  # other processes put and remove objects, too
# A connection that stalls is given up: without limits, libraries wait for minutes, or for ever.
DEFAULTS: Mapping[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 20}, **_FRESH},
    "gs": {"timeout": 20, **_FRESH},
}
_SYNONYMS = {"s3a": "s3", "gcs": "gs"}


def locate(
    location: str, storage_options: Mapping[str, Any] | None = None
) -> tuple[fsspec.AbstractFileSystem, str]:
    """(the filesystem, the path in it). Raises ValueError or ImportError for an unknown kind."""
    options = {**DEFAULTS.get(protocol_of(location), {}), **(storage_options or {})}
    return fsspec.url_to_fs(location, **options)


def protocol_of(location: str) -> str:
    """`s3`, `gs`, ...; empty of a local path."""
    protocol, separator, _ = location.partition("://")
    return _SYNONYMS.get(protocol, protocol) if separator else ""
