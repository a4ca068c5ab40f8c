"""Results in a local folder, or in a zip file of one, only to be read."""

from __future__ import annotations

import glob
import shutil
import zipfile
from collections.abc import Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import zarr
from filelock import FileLock, Timeout
from zarr.storage import ZipStore

from patchsweep.errors import BadInput
from patchsweep.store.files import ANY, ROOT, files_of, hidden, hidden_name, settle, writing

_UNFINISHED = ".partial"  # how Zarr ends the name of a file that it is writing


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
        return (self._files / key).read_bytes()

    def files(self) -> Iterable[str]:
        if isinstance(self._files, zipfile.Path):
            return self._files.root.namelist()
        files = (p for p in self.at.rglob("*") if p.is_file())
        return sorted(p.relative_to(self.at).as_posix() for p in files if p.suffix != _UNFINISHED)

    def __contains__(self, key: object) -> bool:
        return (self._files / str(key)).exists()

    def listed(self) -> Container[str]:
        return self

    def group(self, mode: Literal["r", "r+"]) -> zarr.Group:
        packed = isinstance(self._files, zipfile.Path)
        if packed and mode == "r+":
            raise BadInput(f"{self} is a zip file, only to be read: unpack it")
        files = ZipStore(self.at, mode="r") if packed else self.at
        return zarr.open_group(files, mode=mode, zarr_format=3, use_consolidated=False)

    def reading(self) -> AbstractContextManager[None]:
        return nullcontext()

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
    def laid_out(self, fsync: bool, instead: bool) -> Iterator[zarr.Group]:
        target = self.at.resolve()
        partial = hidden(target)
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            yield zarr.create_group(partial, zarr_format=3)
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
