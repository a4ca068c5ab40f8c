"""What is wrong with a file that is not what was written."""

from __future__ import annotations

from typing import Literal

from numcodecs.zstd import Zstd

from patchsweep.errors import BadInput

Why = Literal["missing", "truncated", "checksum", "inconsistent", "another version"]


class Damaged(BadInput):
    """A file is not what was written; `why`, and `key`, its name below the results."""

    why: Why = "checksum"
    key: str = ""


def damaged(at: object, key: str, why: Why) -> Damaged:
    """The one line that says so."""
    said = "it is missing" if why == "missing" else f"it is not what was written ({why})"
    error = Damaged(
        f"cannot read {at}/{key}: {said}; 'patchsweep check {at}' says what must be redone"
    )
    error.why, error.key = why, key
    return error


def decoded(frame: bytes) -> bytes:
    """What Zstd packed; ValueError for anything else, and for a frame that claims a size that no
    memory has."""
    try:
        return bytes(Zstd().decode(frame))
    except (RuntimeError, MemoryError, SystemError) as error:
        raise ValueError(str(error)) from error


def why_of(chunk: bytes) -> Why:
    """Zstd tells a cut or overwritten frame from one whose content has changed, or is elsewhere."""
    try:
        decoded(chunk)
    except ValueError as error:
        return "truncated" if "invalid input" in str(error) else "checksum"
    return "checksum"
