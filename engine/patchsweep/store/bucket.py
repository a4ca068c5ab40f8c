"""Results at a URL: in a bucket (s3, gs, az), in this process's memory, or in files.

One PUT is whole or not at all, and that is all there is: no rename, no locks. So the mark of
results, in the root `zarr.json`, is PUT last, and until then it says 0, half laid out; deleting
begins by putting that 0. The lock is an object, `.NAME.job/lock` beside the results, made by a PUT
that fails where it is already.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from patchsweep.errors import BadInput
from patchsweep.store.files import ROOT, attributes, check_no_link, clear_job, marked, unfinished
from patchsweep.store.manifest import MANIFEST, root_of
from patchsweep.store.nodes import first_of_v2
from patchsweep.store.owned import not_ours, owned

SCHEMES = ("s3", "gs", "az", "memory", "file")
AT_ONCE = 16  # GETs


@dataclass(frozen=True)
class Bucket:
    """See `Place`. Credentials come from the environment."""

    at: str

    def __str__(self) -> str:
        return self.at

    @property
    def name(self) -> str:
        return parts_of(self.at)[2].rpartition("/")[2]

    @property
    def job(self) -> Path:
        return Path(f".{self.name}.job").absolute()

    def beside(self, name: str) -> Path:
        return Path(name)

    @property
    def private(self) -> bool:
        return parts_of(self.at)[0] == "memory"

    def exists(self) -> bool:
        try:
            return marked(self.get(ROOT)) != 0
        except FileNotFoundError:
            return any(True for _ in self.files())

    def get(self, key: str) -> bytes:
        scheme, _, folder = parts_of(self.at)
        if scheme == "file":
            check_no_link(Path("/", folder), key)
        with self.reading():
            return bytes(_obstore().get(_objects(self.at), key).bytes())

    def files(self) -> Iterator[str]:
        try:
            with self.reading():
                for some in _obstore().list(_objects(self.at)):
                    yield from (found["path"] for found in some)
        except FileNotFoundError:
            raise BadInput(f"cannot read {self}: there is no such bucket: create it") from None

    def __contains__(self, key: object) -> bool:
        try:
            with self.reading():
                _obstore().head(_objects(self.at), str(key))
        except FileNotFoundError:
            return False
        return True

    def listed(self) -> Container[str]:
        return frozenset(self.files())

    def gets(self, keys: Iterable[str]) -> dict[str, bytes]:
        def one(key: str) -> tuple[str, bytes | None]:
            try:
                return key, self.get(key)
            except FileNotFoundError:
                return key, None

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return {key: found for key, found in pool.map(one, keys) if found is not None}

    def put(self, key: str, content: bytes) -> None:
        _obstore().put(_objects(self.at), key, content)

    def check_writable(self) -> None:
        """Who writes is told."""

    def of_v2(self, groups: Iterable[str]) -> str | None:  # noqa: ARG002
        return first_of_v2(self.files())

    @contextmanager
    def reading(self) -> Iterator[None]:
        try:
            yield
        except _obstore().exceptions.BaseError as exc:
            mend = "check the URL and the credentials"
            raise BadInput(f"cannot read {self}: {_cause(exc)}; {mend}") from exc

    @contextmanager
    def writing(self, then: str) -> Iterator[None]:
        try:
            yield
        except (_obstore().exceptions.BaseError, OSError) as exc:
            mend = f"check the URL and the credentials, and {then}"
            raise BadInput(f"cannot write {self}: {_cause(exc)}; {mend}") from exc

    def changing(self, then: str) -> AbstractContextManager[None]:
        return self.writing(then)

    def inside(self) -> str | None:
        scheme, host, key = parts_of(self.at)
        parts = key.split("/")
        for count in range(1, len(parts)):
            above = f"{scheme}://{host}/{quote('/'.join(parts[:count]))}"
            with suppress(FileNotFoundError, BadInput):  # what one may not read is not said
                if marked(Bucket(above).get(ROOT)) is not None:
                    return above
        return None

    def foreign(self) -> str | None:
        ours = owned(self._attrs())
        return next((key for key in self.files() if not ours.file(key)), None)

    def check_own(self) -> None:
        if (key := self.foreign()) is not None:
            raise BadInput(not_ours(self, key))

    def _attrs(self) -> dict[str, Any]:
        found = self.gets((ROOT, MANIFEST))
        return attributes(root_of(found.get(ROOT, b""), found.get(MANIFEST, b"")))

    @contextmanager
    def laid_out(
        self,
        attrs: Mapping[str, Any],
        fsync: bool,  # noqa: ARG002
        instead: bool,
    ) -> Iterator[Bucket]:
        if instead:
            raise BadInput(
                f"{self}: at a URL nothing takes the place of results as a whole: append to a copy "
                "in a folder, or choose another --out"
            )
        self.delete()  # what a kill has left
        try:
            self._put_unfinished(attrs)
            yield self
        except BaseException:
            with suppress(BadInput), self.writing("run again"):
                self.delete()
            raise

    def put_back(self) -> None:
        """Nothing takes the place of results here."""

    def settle(self, keys: Iterable[str]) -> None:
        """What a bucket has taken it keeps."""

    def remove(self, keys: Iterable[str], fsync: bool) -> None:  # noqa: ARG002
        for key in keys:
            with suppress(FileNotFoundError):
                _obstore().delete(_objects(self.at), key)

    def delete(self) -> None:
        self.check_own()
        found = list(self.files())
        if not found:
            return
        self._put_unfinished(self._attrs())
        if rest := [key for key in found if key != ROOT]:
            _obstore().delete(_objects(self.at), rest)
        _obstore().delete(_objects(self.at), ROOT)

    @contextmanager
    def locked(self, again: bool) -> Iterator[None]:
        """Who is killed does not let go: a lock that is left is deleted by the user, who alone
        knows that its run has ended; but a process that a launcher has started `again` takes over
        what the same launcher's process had."""
        above, _, name = self.at.rstrip("/").rpartition("/")
        folder = f"{above}/.{name}.job"
        mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "launcher": os.getppid(),
            "since": datetime.now(UTC).isoformat(),
        }
        content = json.dumps(mine).encode()
        with self.writing("run again"):
            objects = _objects(folder, make=True)
            try:
                _obstore().put(objects, "lock", content, mode="create")
            except _obstore().exceptions.AlreadyExistsError:
                found = bytes(_obstore().get(objects, "lock").bytes())
                if not found:  # it is a folder's
                    raise BadInput(f"{self} was written by its path: give that") from None
                held = _holder(found)
                if held is None:
                    raise BadInput(
                        f"{folder}/lock is no lock of patchsweep: move it away"
                    ) from None
                ours = all(held[part] == mine[part] for part in ("host", "launcher"))
                # A PUT whose answer was lost is repeated, and meets itself.
                if held != mine and not (again and ours):
                    raise BadInput(self._taken(f"{folder}/lock", held)) from None
                _obstore().put(objects, "lock", content)
        try:
            yield
        finally:
            # What cannot be deleted now is named by the next run.
            with suppress(BadInput, FileNotFoundError), self.writing("run again"):
                if not self.exists():  # a sweep that was refused leaves nothing
                    clear_job(self.job)
                _obstore().delete(objects, "lock")

    def _taken(self, lock: str, held: dict[str, Any]) -> str:
        who = f"process {held['pid']} on {held['host']} since {held['since'][:19]} UTC"
        return (
            f"{self} is being written by another run ({who}): wait until that ends, or, if it was "
            f"killed, delete the object {lock}"
        )

    def _put_unfinished(self, attrs: Mapping[str, Any]) -> None:
        _obstore().put(_objects(self.at, make=True), ROOT, unfinished(attrs))


def _holder(lock: bytes) -> dict[str, Any] | None:
    """Who a lock says holds it; None where it is something else."""
    try:
        held = json.loads(lock)
    except ValueError:
        return None
    parts = {"host", "pid", "launcher", "since"}
    return held if isinstance(held, dict) and parts <= {*held} else None


def parts_of(url: str) -> tuple[str, str, str]:
    """Scheme, bucket, and the key of the results in it; memory has no buckets. BadInput for a URL
    that cannot be."""
    scheme, _, rest = url.partition("://")
    host, _, path = ("", "", rest) if scheme == "memory" else rest.partition("/")
    key = unquote(path).strip("/")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise BadInput(f"{url}: unknown kind of URL: use one of {known}, or a path")
    if scheme == "file" and host:
        raise BadInput(f"{url}: '{host}' would be a host: write file:///absolute/path")
    if not key or {"", ".", ".."} & set(key.split("/")):
        raise BadInput(f"{url} names no results: write e.g. {scheme}://bucket/ioi.zarr")
    return scheme, host, key


def _objects(url: str, make: bool = False) -> Any:
    """The objects below a URL. `make` a folder, where it is one."""
    scheme, host, key = parts_of(url)
    if scheme != "file":
        return _kept(scheme, host, key)
    folder, stores = Path("/", key), _obstore().store
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    return stores.LocalStore(folder) if folder.is_dir() else stores.MemoryStore()  # nothing there


@cache
def _kept(scheme: str, host: str, key: str) -> Any:
    """What is in memory stays as long as the process lives; a bucket is connected to once."""
    url, stores = f"{scheme}://{host}/{quote(key)}", _obstore().store
    try:
        return stores.MemoryStore() if scheme == "memory" else stores.from_url(url)
    except _obstore().exceptions.BaseError as exc:
        raise BadInput(f"{url}: {_cause(exc)}; set it in the environment") from exc


def _obstore() -> Any:
    try:
        import obstore.store
    except ImportError:
        raise BadInput(
            "results at a URL need the package obstore: pip install 'patchsweep[cloud]'"
        ) from None
    return obstore


def _cause(exc: Exception) -> str:
    """What obstore says before it goes into details."""
    return str(exc).partition("\n")[0]
