"""Results as a whole: deleted, and packed into one file."""

from __future__ import annotations

import zipfile
from pathlib import Path

from patchsweep.store.outside import replacing
from patchsweep.store.place import place_of, schema_of
from patchsweep.store.store import Store


def remove(path: str | Path) -> None:
    """Delete results; BadInput if `path` is anything else."""
    place = place_of(path)
    if not schema_of(place):
        Store.open(path)  # says what is wrong
    with place.writing("run again"):
        place.delete()


def pack(path: str | Path, target: Path, *, overwrite: bool = False) -> None:
    """Put results into one zip file, whole or not at all; BadInput if the disk refuses, for a
    `target` inside results, and without `overwrite` for one that is there.

    Chunks are compressed already; what is not of the results is left out.
    """
    store, place = Store.open(path), place_of(path)
    with replacing(target, overwrite) as partial, zipfile.ZipFile(partial, "w") as packed:
        for key in filter(store.owns, place.files()):
            packed.writestr(key, place.get(key))
