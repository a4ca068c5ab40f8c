"""What is written outside results: never inside others, nor over a user's own files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from patchsweep.errors import BadInput
from patchsweep.store.files import hidden, writing
from patchsweep.store.place import place_of

MADE = b"patchsweep"  # what figures and pages say near their beginning
_BEGINNING = 4096  # bytes


def check_outside(at: str | Path) -> None:
    """BadInput if a path or a URL lies inside results: what is in there is theirs alone."""
    place = place_of(at)
    if (above := place.inside()) is not None:
        raise BadInput(f"{place.at} is inside the results {above}: choose a place outside them")


def check_made(path: Path, mark: bytes = MADE) -> None:
    """BadInput if there is a file that does not say `mark` near its beginning, as the file does
    that is to take its place."""
    try:
        with path.open("rb") as file:
            made = mark in file.read(_BEGINNING)
    except OSError:
        return  # it is not there, or who writes says why
    if not made:
        raise BadInput(
            f"{path} exists and was not made by patchsweep: move it away, or choose another --out"
        )


@contextmanager
def replacing(path: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden path, whose file takes the place of `path` at the end, whole or not at all. BadInput
    if `path` is inside results, if the disk refuses, and without `overwrite` if it is there."""
    check_outside(path)
    partial = hidden(path)
    with writing(path, "run again"):
        _check_new(path, overwrite)
        try:
            yield partial
            _check_new(path, overwrite)
            partial.replace(path)
        finally:
            with suppress(OSError):  # a read-only disk refuses this, too, and has been named
                partial.unlink(missing_ok=True)


def _check_new(path: Path, overwrite: bool) -> None:
    if not overwrite and path.exists():
        raise BadInput(f"{path} exists already: use --overwrite to replace it, or another name")
