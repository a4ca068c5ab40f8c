"""Paths as a user gives them: made usable, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

from patchsweep.errors import BadInput, has_secrets

LONGEST_PATH, LONGEST_NAME = 4096, 255  # bytes, of most file systems
SECRETS = (
    "a URL with a user, a password or a query (…@, ?…) is not taken, nor kept: credentials come "
    "from the environment"
)


def usable(path: str | Path, longest: int = LONGEST_NAME) -> str:
    """A path or a URL as it was given. BadInput for one that no file system takes, with a name of
    more than `longest` bytes in it, or that holds credentials."""
    text = str(path)
    if has_secrets(text):
        raise BadInput(SECRETS)
    if "\0" in text:
        raise BadInput(f"{text}: a path cannot hold the character NUL: leave it out")
    raw = text.encode(errors="replace")
    if len(raw) > LONGEST_PATH or any(len(part) > longest for part in raw.split(b"/")):
        raise BadInput(
            f"{text}: the name is too long: use at most {LONGEST_PATH:,} bytes, "
            f"and {longest} in each part"
        )
    return text


def home(path: str | Path) -> Path:
    """A path whose ~ is the user's home. BadInput if there is no such user, and as `usable`."""
    try:
        return Path(usable(path)).expanduser()
    except RuntimeError as error:
        raise BadInput(f"{path}: there is no such user's home: write the path in full") from error


ELSEWHERE = "…/"


def short(path: str) -> str:
    """An absolute path as results keep it: from the working directory on, or only its name,
    elsewhere."""
    given = Path(path)
    if not given.is_absolute():
        return path
    try:
        return given.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return f"{ELSEWHERE}{given.name}"


def found(path: str) -> str:
    """The path that `short` has left of one; a name is looked for in the working directory."""
    return path.removeprefix(ELSEWHERE)


# Keys of a spec whose texts may be paths.
PATHS = {"model", "file", "prompts", "results", "offload_folder", "out"}


def shortened(said: Any, how: Callable[[str], str] = short) -> Any:
    """The same part of a spec, its paths made short."""
    if isinstance(said, dict):
        return {
            key: how(part) if key in PATHS and isinstance(part, str) else shortened(part, how)
            for key, part in said.items()
        }
    return [shortened(part, how) for part in said] if isinstance(said, list) else said


def by_name(said: Any) -> Any:
    """A part of a spec as it is compared with another: its files by their names. That they hold
    the same is told by `values`."""
    return shortened(said, lambda path: PurePath(path).name)
