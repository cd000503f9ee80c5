"""How long a store is asked again, and what its errors mean.

Whatever it raises becomes a message that names the object and the cause. What may pass, such as a
server that restarts, is tried again for some time.
"""

import errno
import logging
import posixpath
import random
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from lens_pipeline.errors import FULL, InputError, NoAnswerError, words_of
from lens_pipeline.storage import FINAL, PASSING, blames_the_request, lacks_credentials

T = TypeVar("T")
PATIENCE = 60.0  # seconds for which a request is tried again
FIRST_PAUSE = 0.25
NOT_SHOWN = (403, 410)  # what web servers may answer for what is not there
BAD_SIGNATURE = (
    *("SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken", "ExpiredToken"),
    "401",
)
SPOILT_ON_THE_WAY = ("BadDigest", "IncompleteBody")  # what of S3's blames is no request's fault

log = logging.getLogger(__name__)


class StoreError(NoAnswerError):
    """A store that failed, in spite of all patience; the message names the object and the cause."""


class RefusedError(InputError):
    """A store that will not do what it was asked for: the message names the object and says why."""


def patiently(
    request: Callable[[], T],
    url: str,
    name: str,
    refused: str = "may not be read",
    *,
    local: bool = False,
) -> T:
    """What a request for an object at a URL gives, tried for PATIENCE seconds. Raises StoreError
    after that; at once what trying again does not change: RefusedError, with `refused` in its
    message, where the store blames the request.

    local: the URL is of a folder, of which few errors pass.
    """
    until, pause = time.monotonic() + PATIENCE, FIRST_PAUSE
    place = posixpath.join(url, name).rstrip("/")
    while True:
        try:
            return request()
        except InputError:
            raise
        except (TypeError, ValueError) as problem:  # of the client, which was not made
            raise InputError(
                f"{url}: cannot be used ({words_of(problem)}); correct the address, or "
                "LENS_STORAGE_OPTIONS"
            ) from None
        except Exception as problem:
            if getattr(problem, "status", None) in NOT_SHOWN:
                raise FileNotFoundError(name) from None
            if _is_refusal(problem):
                if code_of(problem) in BAD_SIGNATURE:
                    refused += ", for credentials are refused"
                raise RefusedError(f"{place}: {refused} ({words_of(problem)})") from None
            if isinstance(problem, FINAL) or getattr(problem, "errno", None) in FULL:
                raise
            if lacks_credentials(problem):
                raise InputError(
                    f"{url}: there are no credentials for it ({words_of(problem)}); "
                    "give them through the environment, as the provider's tools take them"
                ) from None
            if local and getattr(problem, "errno", None) not in PASSING:
                raise InputError(
                    f"{place}: cannot be used ({words_of(problem)}); correct the path"
                ) from None
            if time.monotonic() + pause > until:
                raise StoreError(f"{place}: {words_of(problem)}") from None
            log.info("%s: %s; once more", place, words_of(problem))
        time.sleep(pause * random.uniform(0.5, 1.5))
        pause = min(2 * pause, 10)


def code_of(problem: Exception) -> str:
    """What a store calls the reason, `AccessDenied` or `412`; empty where it does not say."""
    answer = getattr(problem.__cause__, "response", None)  # of an S3 store
    if isinstance(answer, Mapping):
        return str(answer.get("Error", {}).get("Code", ""))
    return str(getattr(problem, "code", ""))


def _is_refusal(problem: Exception) -> bool:
    """Whether a store answers the same however often it is asked: 401, 403, and other statuses that
    blame the request. s3fs and gcsfs make errors of some that do not carry them."""
    if isinstance(problem, PermissionError) or str(problem).startswith("Forbidden:"):
        return True
    code, number = code_of(problem), getattr(problem, "errno", None)
    if number == errno.EINVAL:
        return code not in ("", *SPOILT_ON_THE_WAY)
    return number == errno.ENOSYS or blames_the_request(problem)


def is_precondition(problem: Exception) -> bool:
    """Whether a conditional put was refused because the object has changed meanwhile."""
    conflicts = ("PreconditionFailed", "ConditionalRequestConflict", "412")
    return isinstance(problem, FileExistsError) or code_of(problem) in conflicts
