"""How large what a user gives may be: beyond that it is refused in one line, not tried."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from patchsweep.errors import BadInput, cut, has_secrets
from patchsweep.inputs.paths import LONGEST_NAME, SECRETS, usable

SPEC_BYTES = 1 << 18  # of a spec file
PAIRS_BYTES = 1 << 30  # of a pairs file
PAIRS = 100_000  # of a sweep
SAMPLES = 1_000  # of a source
RUNS = 1_000_000  # pairs x samples, over all sources
BLOCKS = 4_000_000  # of a plan
DEPTH = 20  # lists and mappings within one another
TOO_DEEP = f"more than {DEPTH} lists and mappings within one another"
ENTRIES = 100_000  # in all lists and mappings together
NAME = 200  # characters of a key, a label, the name of a set or a prompt
TEXT = 1_000_000  # characters of a prompt
LARGEST = 2**63 - 1  # an integer's size


def check_data(data: object, where: str, text: int | None = None) -> None:
    """BadInput, which begins with `where`, for data that are too deep, too many or too large, and
    for texts that hold NUL or the credentials of a URL.

    text: characters of a text; if left out all texts may be paths, and are as `usable` says.
    """
    todo: list[tuple[object, str, int]] = [(data, "", 0)]
    entries = 0
    while todo:
        value, place, depth = todo.pop()
        at = f"{where}: {place}: " if place else f"{where}: "
        if isinstance(value, Mapping | list | tuple):
            if depth == DEPTH:
                raise BadInput(f"{at}{TOO_DEEP}")
            entries += len(value)
            if entries > ENTRIES:
                raise BadInput(f"{at}more than {ENTRIES:,} entries: write fewer")
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, item in items:
                if isinstance(value, Mapping):
                    _check_key(key, at)
                todo.append((item, f"{place}.{key}" if place else str(key), depth + 1))
        elif isinstance(value, str | Path):
            _check_text(str(value), at, text)
        elif isinstance(value, int) and abs(value) > LARGEST:
            raise BadInput(f"{at}the number is too large: use at most 2^63 - 1")


def check_name(name: str, what: str) -> None:
    """BadInput for a name that is too long, or holds what no name in a file's should."""
    if len(name) > NAME:
        raise BadInput(f"{what} '{cut(name, 60)}' has {len(name):,} characters: use at most {NAME}")
    if not name.isprintable() or {"/", "\\"} & {*name}:
        raise BadInput(f"{what} {name!r}: use letters, digits and signs, no slashes")


def _check_key(key: object, at: str) -> None:
    if isinstance(key, int) and abs(key) > LARGEST:
        raise BadInput(f"{at}a key is too large a number: use at most 2^63 - 1")
    if isinstance(key, str) and len(key) > NAME:
        raise BadInput(
            f"{at}the key '{cut(key, 60)}' has {len(key):,} characters: use at most {NAME}"
        )
    if isinstance(key, str) and has_secrets(key):
        raise BadInput(f"{at}{SECRETS}")


def _check_text(text: str, at: str, longest: int | None) -> None:
    if longest is None:
        try:
            usable(text, LONGEST_NAME)
        except BadInput as error:
            raise BadInput(f"{at}{error}") from error
    elif len(text) > longest:
        raise BadInput(f"{at}a text of {len(text):,} characters: use at most {longest:,}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{at}half a character (a lone surrogate): write it whole") from error
