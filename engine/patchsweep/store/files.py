"""Results as files: what refuses to be written, names that hide, folders and zip files."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from patchsweep.errors import BadInput

ROOT = "zarr.json"
README = "README.txt"  # and the root attribute `readme` says so: in older results it is the user's
SCHEMA = 3
OLDER = 2  # without a manifest, with records that only mark what is done: it is read
MARK = "patchsweep_schema"  # of results, in the attributes of the root

ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

# Causes that a user can mend: what is wrong, and the mend.
_CAUSES = {
    errno.ENOENT: ("there is no such folder", "make it"),
    errno.ENOSPC: ("no space left on the device", "free space"),
    errno.EDQUOT: ("disk quota exceeded", "free space"),
    errno.EROFS: ("read-only file system", "make it writable"),
    errno.EACCES: ("permission denied", "make it writable"),
    errno.EPERM: ("permission denied", "make it writable"),
    errno.ENOTDIR: ("part of the path is a file, not a folder", "move that file away"),
    errno.EEXIST: ("part of the path is a file, not a folder", "move that file away"),
    errno.ENOLCK: ("the file system has no locks", "choose another --out"),
    errno.EFBIG: ("the file would be larger than allowed", "raise the limit (ulimit -f)"),
    errno.ENAMETOOLONG: ("the name is too long", "choose another --out"),
    errno.ENOTEMPTY: ("another process has just created it", "choose another --out"),
}


@contextmanager
def writing(path: Path, then: str) -> Iterator[None]:
    """Turn a refusal of the file system into BadInput; `then` is what to do after the mend."""
    try:
        yield
    except OSError as exc:
        if exc.errno is None:
            raise
        said = os.strerror(exc.errno).lower()
        cause, mend = _CAUSES.get(exc.errno, (said, "see to the disk or the network"))
        raise BadInput(f"cannot write {path}: {cause}; {mend} and {then}") from exc


def attributes(root: bytes) -> dict[str, Any]:
    """What a root `zarr.json` says; nothing where it is none."""
    try:
        found = json.loads(root)["attributes"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what keeps one from reading into BadInput; that a file is not there is something else,
    and so is damage."""
    try:
        yield
    except ABSENT:
        raise
    except OSError as exc:
        said = (os.strerror(exc.errno) if exc.errno else str(exc)).lower()
        denied = exc.errno in (errno.EACCES, errno.EPERM)
        mend = "make it readable" if denied else "see to the disk or the network"
        raise BadInput(f"cannot read {path}: {said}; {mend} and run again") from exc


def check_no_link(results: Path, key: str) -> None:
    """BadInput for a link in results: what it points to is not theirs."""
    path = results
    for part in key.split("/"):
        path /= part
        if path.is_symlink():
            raise BadInput(
                f"{path} is a symbolic link: results hold none; put there what it points to"
            )


def marked(root: bytes) -> int | None:
    """The schema version that a root `zarr.json` says, None where it says none."""
    schema = attributes(root).get(MARK)
    return schema if isinstance(schema, int) else None


def unfinished(attrs: Mapping[str, Any]) -> bytes:
    """The root `zarr.json` of results that are half laid out or half deleted: what they consist of,
    and that they are none yet, or none any more."""
    said = {
        MARK: 0,
        **{key: attrs[key] for key in ("components", "metrics", "readme") if key in attrs},
    }
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": said}).encode()


# What is in the folder of a job, beside the results.
_OF_A_JOB = re.compile(r"lock|progress\.(json|tmp)|rank-\d+\.log")


def clear_job(folder: Path) -> None:
    """Delete what jobs have left in their folder, and it too if nothing else is there."""
    with suppress(OSError):
        for file in folder.iterdir():
            if _OF_A_JOB.fullmatch(file.name) and file.is_file():
                file.unlink()
        folder.rmdir()


def files_of(path: Path) -> Path | zipfile.Path:
    """Where the files of results are."""
    return zipfile.Path(path) if path.is_file() and zipfile.is_zipfile(path) else path


Kind = Literal["partial", "replaced"]  # half laid out or deleted; moved aside


def hidden(path: Path, kind: Kind = "partial") -> Path:
    """A new hidden name beside `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.{kind}")


def all_hidden(path: Path, kind: Kind) -> list[Path]:
    """The folders beside `path` that have such a name, and are no links."""
    found = path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 12}.{kind}")
    return [folder for folder in found if folder.is_dir() and not folder.is_symlink()]


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
