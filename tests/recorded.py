"""A record of every file and folder that Python deletes, moves or writes: audit events, which name
the calls of the operating system, whoever makes them.

What obstore does goes past Python: at a file:// URL the tree is compared before and after.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Event = tuple[str, Path]
_records: list[list[Event]] = []
_hooked = False


def _path(name: Any, folder: Any) -> Path:
    """Where a name is, which may be relative to an open folder."""
    if isinstance(name, int):
        return Path(os.readlink(f"/proc/self/fd/{name}"))  # noqa: PTH115
    path = Path(os.fsdecode(name))
    if isinstance(folder, int) and folder >= 0:
        return Path(os.readlink(f"/proc/self/fd/{folder}"), path)  # noqa: PTH115
    return Path.cwd() / path


def _heard(event: str, args: tuple[Any, ...]) -> None:
    if not _records:
        return
    if event in ("os.remove", "os.rmdir"):
        found = [("deleted", _path(args[0], args[1]))]
    elif event in ("os.rename", "os.link"):
        found = [("moved", _path(args[0], args[2])), ("replaced", _path(args[1], args[3]))]
    elif event == "os.truncate" or (event == "open" and _writes(args)):
        found = [("written", _path(args[0], -1))]
    else:
        return
    for record in _records:
        record.extend(found)


def _writes(args: tuple[Any, ...]) -> bool:
    _, _, flags = args
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


@contextmanager
def recorded() -> Iterator[list[Event]]:
    """What happens inside, in this process."""
    global _hooked  # a hook stays as long as the process
    if not _hooked:
        sys.addaudithook(_heard)
        _hooked = True
    record: list[Event] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)


def tree(folder: Path) -> dict[str, tuple[int, int, bytes | str]]:
    """All that is in a folder: inode, time of change and content."""
    found: dict[str, tuple[int, int, bytes | str]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content: bytes | str = b""
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = path.read_bytes()
        time = 0 if path.is_dir() else status.st_mtime_ns  # of a folder it says what is in it
        found[path.relative_to(folder).as_posix()] = (status.st_ino, time, content)
    return found
