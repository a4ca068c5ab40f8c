"""Hidden folders beside the results, in which they are laid out or deleted.

Who uses one holds a lock on it (`flock`), which ends with the process however that ends: a folder
without a lock is what a killed process has left. Where there are no such locks (Windows, some
network disks) nothing is taken for a leftover.
"""

from __future__ import annotations

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_HEX = 12


def hidden(target: Path) -> Path:
    """A new name beside `target`."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:_HEX]}.partial")


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """An empty hidden folder, held; deleted in the end unless it was renamed."""
    while True:
        folder = hidden(target)
        folder.mkdir(parents=True)
        with held(folder):
            if not folder.exists():  # swept away before it was held
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Nobody else sweeps the folder away, under whatever name."""
    lock = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if lock is not None:
            with suppress(OSError):  # a disk without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        if lock is not None:
            os.close(lock)


def sweep(target: Path) -> None:
    """Delete the hidden folders of `target` that nobody holds, as far as the disk lets us."""
    pattern = f".{glob.escape(target.name)}.{'[0-9a-f]' * _HEX}.partial"
    for folder in target.parent.glob(pattern) if fcntl else ():
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)
