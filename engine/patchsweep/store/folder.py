"""Results in a local folder, or in a zip file of one, only to be read."""

from __future__ import annotations

import glob
import os
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from filelock import FileLock, Timeout

from patchsweep.errors import BadInput
from patchsweep.store.damage import damaged
from patchsweep.store.files import (
    ABSENT,
    ANY,
    ROOT,
    check_no_link,
    files_of,
    hidden,
    hidden_name,
    reading,
    settle,
    unfinished,
    writing,
)
from patchsweep.store.nodes import OF_V2, first_of_v2

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

    @contextmanager
    def laid_out(self, fsync: bool, instead: bool) -> Iterator[Folder]:
        target = self.at.resolve()
        partial = hidden(target)
        try:
            partial.mkdir(parents=True)
            here = Folder(partial)
            here.put(ROOT, unfinished())
            yield here
            if fsync:
                settle((p for p in partial.rglob("*") if p.is_file()), partial)
            if instead:
                target.rename(self._aside)
            partial.rename(target)
            if fsync:
                settle((), target.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if instead:
            shutil.rmtree(self._aside)

    def put_back(self) -> None:
        with self.writing("run again"):
            if not self.exists() and self._aside.exists():
                with self.locked(again=False):  # does it
                    pass

    @property
    def _aside(self) -> Path:
        """Where results lie while others take their place."""
        target = self.at.resolve()
        return target.with_name(f".{target.name}.replaced")

    def settle(self, keys: Iterable[str]) -> None:
        settle((self.at / key for key in keys), self.at)

    def remove(self, keys: Iterable[str], fsync: bool) -> None:
        for key in keys:
            file = self.at / key
            file.unlink(missing_ok=True)
            if fsync and file.parent.exists():
                settle((), file.parent)
        for left in self.at.rglob(f"*{_UNFINISHED}"):
            left.unlink(missing_ok=True)

    def delete(self) -> None:
        target = self.at.resolve()
        doomed = hidden(target)
        target.rename(doomed)  # a kill halfway then leaves no half-deleted results
        shutil.rmtree(doomed)

    @contextmanager
    def locked(self, again: bool) -> Iterator[None]:  # noqa: ARG002
        """Who is killed lets go.

        Results are laid out and deleted inside, so hidden folders that are there before are what
        killed processes have left: they are deleted, but for results that others were to replace.
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
            for left in target.parent.glob(hidden_name(glob.escape(target.name), ANY)):
                shutil.rmtree(left, ignore_errors=True)
            if self.exists():
                shutil.rmtree(self._aside, ignore_errors=True)
            elif self._aside.exists():
                self._aside.rename(target)
            yield
        finally:
            if not self.exists():  # a sweep that was refused leaves nothing
                shutil.rmtree(self.job, ignore_errors=True)
            lock.release()

    @cached_property
    def _files(self) -> Path | zipfile.Path:
        return files_of(self.at)


def _raised(error: OSError) -> None:
    raise error
