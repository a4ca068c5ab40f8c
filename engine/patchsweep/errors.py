"""The exceptions that a user is meant to read."""

from __future__ import annotations

import re

LONGEST = 2000  # characters of a line that a user is to read
_WORD = 300  # and of a word in it
# URLs; what may be secret in them: all up to an @, all behind a question mark.
_URL = re.compile(r"\b[A-Za-z][\w+.-]*:/{1,2}([^\s'\"]*)", re.ASCII)
_SECRETS = re.compile(r"(?P<scheme>\b[A-Za-z][\w+.-]*:/{1,2})(?P<user>[^\s'\"]*@)?", re.ASCII)
_QUERY = re.compile(r"(\b[A-Za-z][\w+.-]*:/{1,2}[^\s'\"?]*\?)[^\s'\"]+", re.ASCII)


class BadInput(ValueError):
    """Wrong use or wrong input: one line that says what, where and the mend."""

    def __init__(self, said: object = "") -> None:
        super().__init__(one_line(said))


class NotOnWavefront(BadInput):
    """This model cannot run on the wavefront; it may run through nnsight."""


class Lost(Exception):
    """What keeps several processes together has ended: the launcher, or the first process."""


def one_line(said: object) -> str:
    """A text as a line for a terminal: without the secrets of URLs, control characters, and the
    middle of what is too long."""
    text = without_secrets(str(said))
    text = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    text = re.sub(rf"\S{{{_WORD},}}", lambda found: cut(found[0], _WORD), text)
    return cut(text, LONGEST)


def as_line(error: BaseException) -> str:
    """An exception in one line: its kind, and the beginning of what it says."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:200]}" if said else type(error).__name__


def cut(text: str, most: int) -> str:
    """A text without its middle, if it has more than `most` characters."""
    if len(text) <= most:
        return text
    return f"{text[: most * 2 // 3]}…{text[-most // 4 :]}"


def shown(value: object, most: int = 100) -> str:
    """A value as it is written, cut."""
    try:
        return cut(repr(value), most)
    except (RecursionError, ValueError):  # ValueError: an integer of thousands of digits
        return f"a {type(value).__name__} too large to show"


def without_secrets(text: str) -> str:
    """A text in which every URL has lost its user, password and query."""
    hidden = _QUERY.sub(r"\1…", text)
    return _SECRETS.sub(lambda f: f["scheme"] + ("…@" if f["user"] else ""), hidden)


def has_secrets(text: str) -> bool:
    """Whether there is a URL with a user, a password or a query in a text."""
    for rest in _URL.findall(text):
        host = rest.partition("/")[0]
        # A password may hold slashes that nobody has quoted.
        if "?" in rest or "@" in host or (":" in host and "@" in rest):
            return True
    return False
