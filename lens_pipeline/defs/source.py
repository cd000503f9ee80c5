"""What lies at LENS_SOURCE now."""

import json
import logging
from contextlib import suppress
from pathlib import Path

from lens_pipeline.defs.catalogue import catalogue_recipe, table_recipe
from lens_pipeline.errors import InputError, NoAnswerError, told_of
from lens_pipeline.files import digest, write_aside
from lens_pipeline.locations import names_table, protocol_of
from lens_pipeline.settings import Settings

ANSWER = "source.json"  # in LENS_HOME: what LENS_SOURCE was when it was last asked
log = logging.getLogger(__name__)


def source_is_published(settings: Settings) -> bool:
    """Whether LENS_SOURCE names published shards; a folder or store is asked, nothing else, and
    where it does not answer, what it said the last time holds: by it the assets are defined, and
    without them nothing would run, or tell, until somebody loads them again.

    Raises InputError; NoAnswerError where it never answered.
    """
    if settings.is_simulated or names_table(settings.source):
        return False
    from lens_pipeline.shards.versions import is_published

    kept, source = settings.home / ANSWER, digest(settings.source)
    before = _published(kept)
    try:
        now = {source: is_published(settings.source, settings.storage_options)}
    except InputError as problem:
        if not isinstance(problem, NoAnswerError) or source not in before:
            raise told_of("LENS_SOURCE", problem) from None
        log.warning("LENS_SOURCE: %s; what it was before is assumed", problem)
        return before[source]
    if before.get(source) and not now[source] and _is_away(settings.source):
        log.warning("LENS_SOURCE: nothing is at %s; what it was before is assumed", settings.source)
        return True
    if now != before:
        with suppress(OSError):  # there is no home yet, or it can only be read
            write_aside(kept, json.dumps(now))
    return now[source]


def _is_away(source: str) -> bool:
    """Whether there is nothing at a path, as where a disk is not mounted."""
    return not protocol_of(source) and not any(Path(source).glob("*"))


def _published(kept: Path) -> dict[str, bool]:
    """{a source's hash: whether it was published shards}, of the one that was asked last."""
    try:
        return dict(json.loads(kept.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def source_glance(settings: Settings) -> str | None:
    """A hash that is another where the catalogue at LENS_SOURCE has been written to; nothing is
    read. None where only `source_state` tells it.

    Raises NoAnswerError where its store fails.
    """
    from lens_pipeline.catalogue.table import source_glance as glance

    if source_is_published(settings):  # of which the newest version is asked in any case
        return None
    found = glance(settings.source, settings.storage_options)
    return None if found is None else table_recipe(settings, found).key


def source_state(settings: Settings) -> str:
    """A hash of the catalogue's content and of which cutouts it names; of the newest version where
    the source is published shards; of the simulation's settings.

    Raises InputError where the source cannot be read.
    """
    if source_is_published(settings):
        from lens_pipeline.shards.versions import published_version

        return digest(published_version(settings.source, settings.storage_options))
    state = [catalogue_recipe(settings).key]
    if not settings.is_simulated:
        from lens_pipeline.catalogue.images import files_fingerprint
        from lens_pipeline.catalogue.table import read_catalogue

        storage = settings.storage_options
        references = read_catalogue(settings.source, storage).references
        state.append(files_fingerprint(references, storage))
    return digest(state)
