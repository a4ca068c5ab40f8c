"""Results as files: what refuses to be written, locks, names that hide, folders and zip files."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from patchsweep.errors import BadInput

MARK = "patchsweep_schema"

# Causes that a user can mend: what is wrong, and the mend.
_CAUSES = {
    errno.ENOSPC: ("no space left on the device", "free space"),
    errno.EDQUOT: ("disk quota exceeded", "free space"),
    errno.EROFS: ("read-only file system", "make it writable"),
    errno.EACCES: ("permission denied", "make it writable"),
    errno.EPERM: ("permission denied", "make it writable"),
    errno.ENOTDIR: ("part of the path is a file, not a folder", "move that file away"),
    errno.EEXIST: ("part of the path is a file, not a folder", "move that file away"),
    errno.ENOLCK: ("the file system has no locks", "choose another --out"),
    errno.ENOTEMPTY: ("another process has just created it", "choose another --out"),
}


@contextmanager
def writing(path: Path, then: str) -> Iterator[None]:
    """Turn a refusal of the file system into BadInput; `then` is what to do after the mend."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in _CAUSES:
            raise
        cause, mend = _CAUSES[exc.errno]
        raise BadInput(f"cannot write {path}: {cause}; {mend} and {then}") from exc


def schema_of(path: Path) -> int | None:
    """The schema version of a results folder, None for anything else."""
    try:
        schema = json.loads((files_of(path) / "zarr.json").read_text())["attributes"][MARK]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    return schema if isinstance(schema, int) else None


def files_of(path: Path) -> Path | zipfile.Path:
    """Where the files of results are."""
    return zipfile.Path(path) if path.is_file() and zipfile.is_zipfile(path) else path


_ANY = "[0-9a-f]" * 12


def hidden(path: Path) -> Path:
    """A new hidden name beside `path`."""
    return path.with_name(hidden_name(path.name, uuid.uuid4().hex[:12]))


def hidden_name(name: str, number: str) -> str:
    return f".{name}.{number}.partial"


def job_folder(path: Path) -> Path:
    """Where the lock, the logs and the progress of what writes these results are: beside them, as
    Zarr takes every file within for an array and warns."""
    target = path.resolve()
    return target.with_name(f".{target.name}.job")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else writes these results inside. BadInput if somebody does; who is killed lets go.

    Results are laid out and deleted inside, so hidden folders that are there before are what killed
    processes have left: they are deleted.
    """
    with writing(path, "run again"):
        job_folder(path).mkdir(parents=True, exist_ok=True)
        lock = FileLock(job_folder(path) / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BadInput(
                f"{path} is being written by another run: wait until that ends, or choose "
                "another --out"
            ) from None
    try:
        target = path.resolve()
        for left in target.parent.glob(hidden_name(glob.escape(target.name), _ANY)):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        if not path.exists():  # a sweep that was refused leaves nothing
            shutil.rmtree(job_folder(path), ignore_errors=True)
        lock.release()


def settle(files: Iterable[Path], root: Path) -> None:
    """Wait until files, and the folders above them up to `root`, are on the disk (fsync)."""
    wait = {root}
    for file in files:
        wait |= {file, *(p for p in file.parents if p.is_relative_to(root))}
    for path in wait:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
