"""The one exception for input that a user can mend, and what messages are made of; no message shows
a secret in a URL."""

import errno
import re
from collections.abc import Iterator, Sequence
from typing import Any

# In names of what must not be shown.
SECRET = re.compile(
    "sig(?!nature_version)|token|key|secret|password|credential|authorization|connection_string",
    re.IGNORECASE,
)
# Not of a web address with a port, and an @ in its path.
_PASSWORD = re.compile(r"((?:(?<!http)(?<!https)|(?=://[^\s/:@]*:(?!\d+/)))://[^\s/:@]*:)\S*@")
# A token, of a web address, that stands where the user does.
_USER = re.compile(r"(https?://)[^/\s@:]+@")
_QUERY = re.compile(r"(://[^\s?]*\?)\S*[^\s:;,.)\]'\"]")
# Of a URL without its beginning, as clients tell of it.
_VALUE = re.compile(rf"([?&][\w-]*(?:{SECRET.pattern})[\w-]*=)[^\s&'\")]+", re.IGNORECASE)

_SHOWN = {_PASSWORD: r"\1***@", _USER: r"\1***@", _QUERY: r"\1***", _VALUE: r"\1***"}


def masked(text: str) -> str:
    """A text with the passwords and queries (`?X-Amz-Signature=...`) of its URLs as ``***``, and
    with the users of web addresses that have no password."""
    for secret, shown in _SHOWN.items():
        text = secret.sub(shown, text)
    return text


def secrets_in(options: Any, name: str | None = None) -> Iterator[tuple[str, str]]:
    """(name, value) of what nested options hold under names that look secret; name: what they are
    under themselves, if that looks so."""
    if isinstance(options, dict):
        for key, value in options.items():
            yield from secrets_in(value, name or (key if SECRET.search(str(key)) else None))
    elif isinstance(options, list):
        for value in options:
            yield from secrets_in(value, name)
    elif name is not None:
        yield name, str(options)


def words_of(problem: BaseException, most: int = 300) -> str:
    """What an exception says, so many characters of it; its type where it says nothing."""
    return " ".join(str(problem).split())[:most] or type(problem).__name__


def first_of(names: Sequence[object], most: int = 5) -> str:
    """`a, b and 7 more`: so many names by themselves."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


class InputError(ValueError):
    """Bad input: the message names the file, row, column or setting, and what to do.

    The command line shows it as one line, ``error: <message>``, and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))


class NoAnswerError(InputError):
    """A store that fails: the address may be wrong, or the store unwell for a while; or a source
    that changes while it is read. Whoever waits is told; whoever does not, tries again."""


def told_of(what: str, problem: InputError) -> InputError:
    """The same kind of error, its message after what it is about."""
    return type(problem)(f"{what}: {problem}")


FULL = (errno.ENOSPC, errno.EDQUOT)  # `errno` where a disk is, or one's part of it


class NoRoomError(InputError):
    """A full disk: what was done is kept, and goes on when there is room."""
