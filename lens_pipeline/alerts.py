"""Messages to people: the log, and the webhook of LENS_WEBHOOK_URL; and to the service that tells
them when none can come any more, LENS_HEARTBEAT_URL."""

import http.client
import json
import logging
import os
import time
import urllib.request
from contextlib import suppress
from typing import Any

from pydantic import SecretStr

from lens_pipeline.errors import InputError, masked, secrets_in
from lens_pipeline.settings import Settings

TRIES = 3
MARK = "alert: "  # how its line begins among other messages
log = logging.getLogger(__name__)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """They would be followed by a GET: without the text, and to a page for people to log in."""

    def redirect_request(self, *about: Any) -> None:
        return None


def alert(settings: Settings, text: str, **facts: str | None) -> None:
    """Log a text, in one line, and post it with its facts, as JSON with the key `text` (which
    Slack, Mattermost and others show), to the webhook where there is one. The text ends with the
    address of the page of `run`, the id of a run of Dagster, where that is among the facts.

    Raises InputError where the webhook cannot be told.
    """
    page = settings.dagster_run_page(run) if (run := facts.get("run")) else None
    text = f"{text}; see {page}" if page else text
    content = {"text": text, "deployment": settings.deployment, **facts}
    content = {name: value and without_secrets(value) for name, value in content.items()}
    log.warning("%s%s", MARK, " ".join(str(content["text"]).split()))
    if settings.webhook_url is not None:
        _request("LENS_WEBHOOK_URL", settings.webhook_url, json.dumps(content).encode())


def beat(address: SecretStr) -> None:
    """Tell the service at LENS_HEARTBEAT_URL that all is well. Raises InputError where it cannot be
    told."""
    _request("LENS_HEARTBEAT_URL", address)


def _request(name: str, address: SecretStr, content: bytes | None = None) -> None:
    """POST JSON to an address, or GET it; name: of the setting that it is from."""
    headers = {"Content-Type": "application/json"} if content else {}
    request = urllib.request.Request(address.get_secret_value(), content, headers)
    opener = urllib.request.build_opener(_NoRedirects)
    for after in range(TRIES):
        time.sleep(after)
        try:
            with opener.open(request, timeout=10):
                return
        except (http.client.InvalidURL, UnicodeError):  # it would be shown
            raise InputError(f"{name}: is no address of a server; correct or unset it") from None
        except (OSError, http.client.HTTPException) as problem:
            reason = str(problem)
    raise InputError(f"{name}: cannot be told ({without_secrets(reason)})")


def without_secrets(text: str) -> str:
    """A text without passwords of URLs, and without what variables of the environment, and the
    options in LENS_STORAGE_OPTIONS, hold under names that look secret."""
    with suppress(KeyError, ValueError):
        text = _without(text, json.loads(os.environ["LENS_STORAGE_OPTIONS"]))
    return masked(_without(text, dict(os.environ)))


def _without(text: str, options: Any) -> str:
    for _, value in secrets_in(options):
        if len(value) >= 6:
            text = text.replace(value, "***")
    return text
