"""Where results lie: in a folder (or a zip file of one), or at a URL. Nothing else asks which."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from patchsweep.errors import BadInput
from patchsweep.inputs import usable
from patchsweep.store.bucket import SCHEMES, Bucket, parts_of
from patchsweep.store.files import ROOT, SCHEMA, marked
from patchsweep.store.folder import Folder
from patchsweep.store.manifest import MANIFEST, root_of

LONGEST = 220  # bytes of a name: names of what lies beside it are longer


class Place(Protocol):
    """What a place can do. Keys are names of files, with slashes, below the results. BadInput, one
    line, where a place refuses."""

    @property
    def at(self) -> Path | str:
        """A folder's path, or a URL."""

    @property
    def name(self) -> str:
        """The last part of it."""

    @property
    def job(self) -> Path:
        """The local folder of the logs and the progress of what writes here, and of a folder's
        lock: beside it, as Zarr takes every file within for an array and warns; of a URL in the
        working folder."""

    def beside(self, name: str) -> Path:
        """A local path beside a folder; of a URL in the working folder."""

    @property
    def private(self) -> bool:
        """Whether only this process sees what is there."""

    def exists(self) -> bool:
        """Whether anything is there but results that a kill has left half laid out."""

    def get(self, key: str) -> bytes:
        """The content of a file; FileNotFoundError if it is not there, BadInput if it is a link or
        cannot be read."""

    def gets(self, keys: Iterable[str]) -> dict[str, bytes]:
        """The contents of those files that are there."""

    def put(self, key: str, content: bytes) -> None:
        """Write a file, whole or not at all."""

    def files(self) -> Iterable[str]:
        """The files that are there."""

    def __contains__(self, key: str) -> bool:
        """Whether a file is there."""

    def listed(self) -> Container[str]:
        """The files that are there, for one who asks after many."""

    def check_writable(self) -> None:
        """BadInput for what can only be read."""

    def of_v2(self, groups: Iterable[str]) -> str | None:
        """The name of a file that makes these groups, or what is in them, Zarr v2; None if there
        is none."""

    def writing(self, then: str) -> AbstractContextManager[None]:
        """Turns what is refused inside into BadInput; `then` is what to do after the mend."""

    def changing(self, then: str) -> AbstractContextManager[None]:
        """The same, where results that are there are changed; BadInput if they are not any more."""

    def inside(self) -> Path | str | None:
        """The results that this lies in, somewhere below."""

    def foreign(self) -> str | None:
        """The name of something that is here and not of the results (`owned`); None if nothing
        is."""

    def check_own(self) -> None:
        """BadInput if there is something foreign."""

    def laid_out(
        self, attrs: Mapping[str, Any], fsync: bool, instead: bool
    ) -> AbstractContextManager[Place]:
        """Where files are to be written that will be results once the root is, the last thing: all
        of them or nothing; `attrs` say what they will consist of. `instead`: they then take the
        place of the results that are there."""

    def put_back(self) -> None:
        """Results that a kill has caught while others took their place are there again."""

    def settle(self, keys: Iterable[str]) -> None:
        """Wait until files outlive a power cut."""

    def remove(self, keys: Iterable[str], fsync: bool) -> None:
        """Delete files, in order; and those of ours that a kill has left half written."""

    def delete(self) -> None:
        """Delete the results, which are none any more from the first moment on. BadInput if there
        is something foreign."""

    def locked(self, again: bool) -> AbstractContextManager[None]:
        """Nobody else writes these results inside. BadInput if somebody does. `again`: a launcher
        has started this process again after an end of it."""


def place_of(at: str | Path) -> Place:
    """The place that a path or a URL names. BadInput for a URL that cannot be."""
    given = path_or_url(at)
    return Folder(given) if isinstance(given, Path) else Bucket(given)


def path_or_url(at: str | Path) -> Path | str:
    """Text is a path unless it is a URL, scheme://... BadInput for a URL that cannot be, and for a
    path that cannot be."""
    usable(at, LONGEST)
    if isinstance(at, str) and "://" in at:
        parts_of(at)
        return at
    path = Path(at)
    if path.parts and path.parts[0].removesuffix(":") in SCHEMES and ":" in path.parts[0]:
        raise BadInput(f"{path} was a URL: give it as text where results go, a path elsewhere")
    return path


def job_folder(at: str | Path) -> Path:
    """See `Place.job`."""
    return place_of(at).job


def beside(at: str | Path, name: str) -> Path:
    """See `Place.beside`."""
    return place_of(at).beside(name)


def locked(at: str | Path, again: bool = False) -> AbstractContextManager[None]:
    """See `Place.locked`."""
    return place_of(at).locked(again)


def put_back(at: str | Path) -> None:
    """See `Place.put_back`."""
    place_of(at).put_back()


def private(at: str | Path) -> bool:
    """See `Place.private`."""
    return place_of(at).private


def exists(at: str | Path) -> bool:
    """See `Place.exists`."""
    return place_of(at).exists()


def schema_of(place: Place) -> int | None:
    """The schema version of results, None for anything else. BadInput for what cannot be read."""
    found = place.gets((ROOT, MANIFEST))
    return marked(root_of(found.get(ROOT, b""), found.get(MANIFEST, b"")))


def known_by(at: str | Path) -> bytes:
    """The root of results, whatever their schema, unless that is newer; BadInput for anything
    else."""
    place = place_of(at)
    schema = schema_of(place)
    if schema is None and not place.exists():
        raise changed(at)
    if not schema:
        raise BadInput(f"{place.at} is not a results folder of patchsweep: check the path")
    if schema > SCHEMA:
        raise BadInput(another_schema(place, schema))
    return place.gets([ROOT]).get(ROOT, b"")


def changed(path: str | Path) -> BadInput:
    """Results are not what they were a moment ago."""
    return BadInput(f"{path} was just changed by another run: run again")


def another_schema(place: Place, schema: int) -> str:
    """The line that refuses results of another schema."""
    mend = "update it" if schema > SCHEMA else "run the sweep again with --overwrite"
    return f"{place.at} has schema {schema}, this patchsweep reads {SCHEMA}: {mend}"


def check_own(at: str | Path) -> None:
    """See `Place.check_own`."""
    place_of(at).check_own()


def check_free(at: str | Path) -> None:
    """BadInput if anything is there."""
    place = place_of(at)
    if not place.exists():
        place.check_own()  # in what a kill has left
    else:
        mend = "choose another --out"
        if schema_of(place) is not None:
            mend = "use --resume to continue it or --overwrite to replace it"
        raise BadInput(f"{place.at} exists already: {mend}")
