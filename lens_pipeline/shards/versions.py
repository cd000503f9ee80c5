"""Which version of published shards lies at a URL: the one that its `latest.json` names."""

import json
import logging
import posixpath
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Self

from lens_pipeline.errors import InputError
from lens_pipeline.shards.manifest import MANIFEST
from lens_pipeline.shards.patience import RefusedError
from lens_pipeline.shards.store import Store

LATEST = "latest.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Latest:
    """The newest version: when its last upload began (ISO 8601, UTC, by the store's clock), and its
    number, from 1."""

    version: str
    created: str
    sequence: int

    @property
    def content(self) -> bytes:
        return json.dumps({"schema": 1, **asdict(self)}).encode()

    @classmethod
    def parse(cls, content: bytes, source: str) -> Self:
        """Raises InputError where it is not as it was written."""
        try:
            values = json.loads(content)
            if values.pop("schema") != 1:
                raise ValueError("a newer version wrote it")
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise InputError(
                f"{source}: does not name a version ({problem}); remove it, and publish again"
            ) from None

    @classmethod
    def at(cls, store: Store) -> Self | None:
        """None where nothing is published. Raises InputError as `parse`."""
        content = store.read(LATEST)
        return None if content is None else cls.parse(content, f"{store.url}/{LATEST}")


def newest_version(url: str, storage_options: Mapping[str, Any] | None = None) -> str | None:
    """The URL of the version that `<url>/latest.json` names; None where there is no such file."""
    store = Store(url, storage_options)
    latest = Latest.at(store)
    if latest is None:
        return None
    log.info("%s: version %s, made %s", url, latest.version, latest.created)
    return posixpath.join(store.url, latest.version)


def version_at(url: str, storage_options: Mapping[str, Any] | None = None, *names: str) -> str:
    """The URL of the newest version at a URL; the URL itself where there is none, or where a
    manifest, or an object of one of these names, lies there."""
    store = Store(url, storage_options)
    try:
        if any(store.about(name) is not None for name in (MANIFEST, *names)):
            return url
    except RefusedError:  # so S3 tells who may not list that there is none
        with suppress(RefusedError):
            if newest := newest_version(url, storage_options):
                return newest
        raise
    return newest_version(url, storage_options) or url


def published_at(url: str, storage_options: Mapping[str, Any] | None = None) -> str | None:
    """See `version_at`; None where there is neither a version nor a manifest."""
    place = version_at(url, storage_options)
    if place == url and Store(url, storage_options).read(MANIFEST) is None:
        return None
    return place


def published_version(url: str, storage_options: Mapping[str, Any] | None = None) -> str:
    """The same; raises InputError where there is neither."""
    version = published_at(url, storage_options)
    if version is None:
        raise InputError(f"{url}: no shards are published there, for it holds no {LATEST}")
    return version


def is_published(url: str, storage_options: Mapping[str, Any] | None = None) -> bool:
    """Whether shards are published at a URL, even by a `latest.json` that is damaged."""
    store = Store(url, storage_options)
    try:
        return any(store.read(name) is not None for name in (LATEST, MANIFEST))
    except RefusedError:  # see `version_at`
        with suppress(RefusedError):
            if store.read(MANIFEST) is not None:
                return True
        raise
