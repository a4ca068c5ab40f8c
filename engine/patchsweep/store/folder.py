"""Results in a local folder, or in a zip file of one, only to be read."""

from __future__ import annotations

import os
import uuid
import zipfile
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from patchsweep.errors import BadInput
from patchsweep.store.damage import damaged
from patchsweep.store.files import (
    ABSENT,
    ROOT,
    all_hidden,
    attributes,
    check_no_link,
    clear_job,
    files_of,
    hidden,
    marked,
    reading,
    settle,
    unfinished,
    writing,
)
from patchsweep.store.manifest import MANIFEST, root_of
from patchsweep.store.nodes import OF_V2, first_of_v2
from patchsweep.store.owned import Owned, not_ours, owned

_UNFINISHED = ".partial"  # how the name of a file ends that is being written


@dataclass(frozen=True)
class Folder:
    """See `Place`. A chunk is written to a temporary file and renamed; results are laid out and
    deleted under a hidden name."""

    at: Path

    def __str__(self) -> str:
        return str(self.at)

    @property
    def name(self) -> str:
        return self.at.name

    @property
    def job(self) -> Path:
        target = self.at.resolve()
        return target.with_name(f".{target.name}.job")

    def beside(self, name: str) -> Path:
        return self.at.with_name(name)

    @property
    def private(self) -> bool:
        return False

    def exists(self) -> bool:
        with self.writing("run again"):
            return self.at.exists()

    def get(self, key: str) -> bytes:
        with reading(self.at / key):
            if isinstance(self._files, zipfile.Path):
                return self._unzipped(self._files.root, key)
            check_no_link(self.at, key)
            return (self.at / key).read_bytes()

    def _unzipped(self, packed: zipfile.ZipFile, key: str) -> bytes:
        try:
            return packed.read(key)
        except KeyError:
            raise FileNotFoundError(key) from None
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError):
            raise damaged(self.at, key, "checksum") from None

    def gets(self, keys: Iterable[str]) -> dict[str, bytes]:
        found = {}
        for key in keys:
            with suppress(*ABSENT):
                found[key] = self.get(key)
        return found

    def put(self, key: str, content: bytes) -> None:
        file = self.at / key
        partial = file.with_suffix(f".{uuid.uuid4().hex}{_UNFINISHED}")
        try:
            partial.write_bytes(content)
        except FileNotFoundError:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
        try:
            partial.replace(file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def files(self) -> Iterable[str]:
        if isinstance(self._files, zipfile.Path):
            return [name for name in self._files.root.namelist() if not name.endswith("/")]
        found = []
        with reading(self.at):
            for above, _, names in os.walk(self.at, onerror=_raised):
                found += [Path(above, name) for name in names if not name.endswith(_UNFINISHED)]
        return sorted(path.relative_to(self.at).as_posix() for path in found)

    def __contains__(self, key: object) -> bool:
        path = self._files / str(key)
        with reading(self.at / str(key)):
            if isinstance(path, zipfile.Path):
                return path.exists()
            with suppress(*ABSENT):
                path.lstat()
                return True
        return False

    def listed(self) -> Container[str]:
        return self

    def check_writable(self) -> None:
        if isinstance(self._files, zipfile.Path):
            raise BadInput(f"{self} is a zip file, only to be read: unpack it")

    def of_v2(self, groups: Iterable[str]) -> str | None:
        if isinstance(self._files, zipfile.Path):
            return first_of_v2(self._files.root.namelist())
        with reading(self.at):
            for group in groups:
                found = [path for path in (self.at / group).glob("*") if path.is_dir()]
                for folder in (self.at / group, *found):
                    for name in OF_V2:
                        if (folder / name).exists():
                            return (folder / name).relative_to(self.at).as_posix()
        return None

    def writing(self, then: str) -> AbstractContextManager[None]:
        return writing(self.at, then)

    @contextmanager
    def changing(self, then: str) -> Iterator[None]:
        with self.writing(then):
            if not (self.at / ROOT).exists():  # Zarr would make the folders again
                raise BadInput(
                    f"{self} was moved or deleted while it was written: move it back, or say where "
                    f"it is with --out, and {then}"
                )
            yield

    def inside(self) -> Path | None:
        for above in self.at.resolve().parents:
            with suppress(OSError):
                if marked((above / ROOT).read_bytes()) is not None:
                    return above
        return None

    def foreign(self) -> str | None:
        if not self.at.is_dir():
            return None
        ours = owned(self._attrs())
        return next((key for key, _ in _entries(self.at.resolve(), ours, theirs=True)), None)

    @contextmanager
    def laid_out(self, attrs: Mapping[str, Any], fsync: bool, instead: bool) -> Iterator[Folder]:
        target = self.at.resolve()
        partial, aside = hidden(target), hidden(target, "replaced")
        try:
            partial.mkdir(parents=True)
            here = Folder(partial)
            here.put(ROOT, unfinished(attrs))
            yield here
            if fsync:
                settle((p for p in partial.rglob("*") if p.is_file()), partial)
            if instead:
                self.check_own()
                target.rename(aside)
            partial.rename(target)
            if fsync:
                settle((), target.parent)
        except BaseException:
            _cleared(partial)
            raise
        if instead:
            _deleted(aside, target)

    def put_back(self) -> None:
        with self.writing("run again"):
            if not self.exists() and self._aside():
                with self.locked(again=False):  # does it
                    pass

    def _aside(self) -> list[Path]:
        """Where results lie while others take their place."""
        found = all_hidden(self.at.resolve(), "replaced")
        return [folder for folder in found if marked(_root(folder))]

    def _attrs(self) -> dict[str, Any]:
        return attributes(_root(self.at))

    def settle(self, keys: Iterable[str]) -> None:
        settle((self.at / key for key in keys), self.at)

    def remove(self, keys: Iterable[str], fsync: bool) -> None:
        for key in keys:
            file = self.at / key
            file.unlink(missing_ok=True)
            if fsync and file.parent.exists():
                settle((), file.parent)
        ours = owned(self._attrs())
        for key, path in _entries(self.at.resolve(), ours, theirs=False):
            if key.endswith(_UNFINISHED):
                path.unlink(missing_ok=True)

    def delete(self) -> None:
        self.check_own()
        target = self.at.resolve()
        _deleted(target, target)  # a kill halfway then leaves no half-deleted results

    def check_own(self) -> None:
        if (key := self.foreign()) is not None:
            raise BadInput(not_ours(self, key))

    @contextmanager
    def locked(self, again: bool) -> Iterator[None]:  # noqa: ARG002
        """Who is killed lets go.

        Results are laid out and deleted inside, so what is in hidden folders that are there before
        is what killed processes have left: it is deleted, but for results that others were to
        replace.
        """
        target = self.at.resolve()
        with self.writing("run again"):
            self.job.mkdir(parents=True, exist_ok=True)
            file = self.job / "lock"
            if file.exists() and file.stat().st_size:
                raise BadInput(
                    f"{self} is being written by a run that was given {target.as_uri()}: wait "
                    f"until that ends, or, if it was killed, delete {file}"
                )
            lock = FileLock(file)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise BadInput(
                    f"{self} is being written by another run: wait until that ends, or choose "
                    "another --out"
                ) from None
        try:
            for left in all_hidden(target, "partial"):
                _cleared(left)
            for aside in self._aside():
                if self.exists():
                    _deleted(aside, target)
                else:
                    aside.rename(target)
            yield
        finally:
            if not self.exists():  # a sweep that was refused leaves nothing
                clear_job(self.job)
            lock.release()

    @cached_property
    def _files(self) -> Path | zipfile.Path:
        return files_of(self.at)


def _root(folder: Path) -> bytes:
    """The root `zarr.json`, or where it is lost or damaged what the manifest has of it."""

    def read(key: str) -> bytes:
        try:
            return (folder / key).read_bytes()
        except OSError:
            return b""

    return root_of(read(ROOT), read(MANIFEST))


def _entries(root: Path, ours: Owned, *, theirs: bool) -> Iterator[tuple[str, Path]]:
    """The files of results that are in a folder; or `theirs`, all other files, links and folders.
    What is in a folder comes before it, and the root `zarr.json` last."""
    last = None
    for above, folders, files in os.walk(root, topdown=False):
        for name in [*files, *folders]:
            path = Path(above, name)
            key = path.relative_to(root).as_posix()
            if path.is_symlink() or name in files:
                own = ours.file(key) and path.is_file() and not path.is_symlink()
            else:
                own = ours.folder(key)
                if own and not theirs:
                    continue
            if own != theirs:
                if key == ROOT:
                    last = path
                else:
                    yield key, path
    if last:
        yield ROOT, last


def _cleared(folder: Path) -> None:
    """Delete the results in a folder of ours, and the folders that are then empty."""
    root = _root(folder)
    if (folder / ROOT).exists() and marked(root) is None:
        return  # somebody else's
    ours = owned(attributes(root))
    for _, path in _entries(folder, ours, theirs=False):
        path.unlink(missing_ok=True)
    for above, _, _ in os.walk(folder, topdown=False):
        key = Path(above).relative_to(folder).as_posix()
        if key == "." or ours.folder(key):
            with suppress(OSError):  # something is in it
                Path(above).rmdir()


def _deleted(results: Path, name: Path) -> None:
    """Delete results, which are none from the first moment on, under a hidden name beside
    `name`."""
    doomed = hidden(name)
    results.rename(doomed)
    _cleared(doomed)


def _raised(error: OSError) -> None:
    raise error
