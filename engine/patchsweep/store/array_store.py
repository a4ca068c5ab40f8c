"""The arrays of results, by name: regions of them, and the chunks and files that these lie in."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping
from operator import lt
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.metadata import ArrayV3Metadata

from patchsweep.errors import BadInput
from patchsweep.store.books import Books
from patchsweep.store.checked import Checked, is_filled
from patchsweep.store.damage import Damaged
from patchsweep.store.digests import Digests, digest, sealed, unsealed
from patchsweep.store.ledger import Ledger
from patchsweep.store.nodes import ZARR_JSON, node
from patchsweep.store.place import Place

Region = tuple[slice, ...]


class ArrayStore:
    """The arrays in a folder or at a URL, whatever they mean.

    path: of the folder, or the URL. `once` are the files that are written once, `books` the records
    of all others. `here` holds the names of the files that are there. What writes raises BadInput
    if the disk refuses, with what to do `then`, after the mend.
    """

    def __init__(
        self,
        place: Place,
        once: Mapping[str, bytes],
        books: Books,
        fsync: bool = False,
        here: Container[str] | None = None,
        then: str = "continue with --resume",
    ) -> None:
        self.path = place.at
        self._place = place
        self._once = once
        self._books = books
        self._files = Checked(place, once, books)
        self._fsync = fsync
        self._then = then
        self._here = place if here is None else here
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def node_attrs(self, name: str) -> dict[str, Any]:
        """The attributes of a group, for example `prompts`, or of an array, <group>/<array>."""
        return dict(self._node(name).get("attributes", {}))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._place.name

    def arrays(self) -> list[str]:
        """The names of all arrays."""
        names = (key.removesuffix(f"/{ZARR_JSON}") for key in self._once if "/" in key)
        nodes = (name for name in names if f"{name}/{ZARR_JSON}" in self._once)
        return [name for name in nodes if self._node(name)["node_type"] == "array"]

    def is_filled(self, name: str) -> bool:
        """Whether a sweep fills an array after it is laid out."""
        return is_filled(name, self._books)

    def shape(self, name: str) -> tuple[int, ...]:
        """The sizes of an array."""
        return self._array(name).shape

    def dims(self, name: str) -> tuple[str, ...]:
        """The names of its dimensions."""
        return tuple(self._node(name)["dimension_names"])

    def dtype(self, name: str) -> np.dtype[Any]:
        """The type of its elements."""
        found: np.dtype[Any] = self._array(name).dtype
        return found

    def chunk_sizes(self, name: str) -> tuple[int, ...]:
        """The sizes of its chunks."""
        return self._array(name).chunks

    def chunks(self, name: str) -> Iterator[Region]:
        """The regions of an array's chunks."""
        array = self._array(name)
        starts = (range(0, n, c) for n, c in zip(array.shape, array.chunks, strict=True))
        for at in itertools.product(*starts):
            yield tuple(slice(i, i + c) for i, c in zip(at, array.chunks, strict=True))

    def keys(self, name: str, region: Region) -> list[str]:
        """The files of the chunks that a region of an array lies in, whether or not they exist.
        Dimensions that the region leaves out at the end are whole."""
        array = self._array(name)
        tiles = []
        parts = (*region, *[slice(None)] * (array.ndim - len(region)))
        for part, size, chunk in zip(parts, array.shape, array.chunks, strict=True):
            start, stop, _ = part.indices(size)
            tiles.append(range(start // chunk, -(-stop // chunk)))
        assert isinstance(array.metadata, ArrayV3Metadata)
        encode = array.metadata.encode_chunk_key
        return [f"{name}/{encode(at)}" for at in itertools.product(*tiles)]

    def written(self, name: str) -> Iterator[Region]:
        """The regions of those chunks of an array that are there, where they are few of many; none
        of an array that is not there."""
        if f"{name}/{ZARR_JSON}" not in self._once:
            return
        array = self._array(name)
        sizes = array.chunks
        counts = [-(-n // size) for n, size in zip(array.shape, sizes, strict=True)]
        for file in self._place.files():
            parts = file.removeprefix(f"{name}/c/").split("/")
            if not all(part.isdecimal() for part in parts) or len(parts) != len(counts):
                continue
            at = [*map(int, parts)]
            if number_key(name, at) == file and all(map(lt, at, counts)):  # else it is not ours
                yield tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, sizes, strict=True))

    def has(self, key: str) -> bool:
        """Whether a file is there."""
        return key in self._here

    def read(self, name: str, region: Any = ...) -> NDArray[Any]:
        """The array `<group>/<array>`, or a region of it; Damaged if a chunk of it is, BadInput
        if it cannot be reached."""
        array = self._array(name)
        try:
            return np.asarray(array[region])
        except BadInput:
            raise
        except (RuntimeError, ValueError, TypeError, KeyError) as exc:
            raise self._damaged(name, exc) from exc

    def numbers(self, name: str, region: Any = ...) -> NDArray[np.uint8]:
        """Small numbers, each in a chunk of its own, as `_put_numbers` writes them, or older
        results did; Damaged for one that belongs to another place."""
        found = self.read(name, region)
        if not self._books.vouching:
            return found.astype(np.uint8)
        starts = [part.start or 0 for part in region] if isinstance(region, tuple) else []
        starts += [0] * (found.ndim - len(starts))

        def key(at: tuple[int, ...]) -> str:
            return number_key(name, [i + start for i, start in zip(at, starts, strict=True)])

        try:
            return unsealed(found, key)
        except ValueError as exc:
            raise self._damaged(name, exc) from exc

    def _damaged(self, name: str, exc: Exception) -> Damaged:
        cause = " ".join(str(exc).split())
        found = Damaged(
            f"cannot read {self.path}/{name}: {cause}; "
            f"'patchsweep check {self.path}' says what must be redone"
        )
        found.why = "truncated" if "invalid input" in cause else "checksum"
        return found

    def _write_recorded(
        self, ledger: Ledger, arrays: Mapping[str, NDArray[Any]], region: Region, state: int
    ) -> None:
        """Write one region of some arrays of a ledger, whole records, and then that it is there.
        What is there already is first recorded to be about to change."""
        with self._place.changing(self._then):
            chunks = self._encoded(arrays, region)
            records: dict[int, list[tuple[int, int]]] = {}
            for key, content in chunks.items():
                array, _, chunk = key.partition("/c/")
                number, slot = ledger.place(array, tuple(map(int, chunk.split("/"))))
                records.setdefault(number, []).append((slot, digest(key, content)))
            before, after = dict[int, Digests](), dict[int, Digests]()
            for number, found in records.items():
                known = self._books.record(ledger, number, fresh=True)
                now, soon = known.now, np.zeros_like(known.soon)
                for slot, of_it in found:
                    soon[slot] = of_it
                if known.now[[slot for slot, _ in found]].any():
                    before[number] = np.concatenate([[np.uint64(known.state)], now, soon])
                now = np.where(soon, soon, now)
                after[number] = np.concatenate([[np.uint64(state)], now, np.zeros_like(soon)])
            self._record(ledger, before)
            self._put(chunks)
            self._record(ledger, after)

    def _record(self, ledger: Ledger, rows: Mapping[int, Digests]) -> None:
        """Write some records, by number."""
        files: dict[str, bytes] = {}
        for number, row in rows.items():
            at = slice(number * ledger.length, (number + 1) * ledger.length)
            files |= self._encoded({ledger.name: row}, (at,))
        self._put(files)
        for number, row in rows.items():
            self._books.note(ledger, number, row)

    def _put_numbers(self, name: str, places: Iterable[tuple[int, ...]], number: int) -> None:
        """Write a number below 256 into chunks of one."""
        files: dict[str, bytes] = {}
        for at in places:
            value = np.full([1] * len(at), sealed(number_key(name, at), number), np.uint64)
            files |= self._encoded({name: value}, tuple(slice(i, i + 1) for i in at))
        self._put(files)

    def _encoded(self, arrays: Mapping[str, NDArray[Any]], region: Region) -> dict[str, bytes]:
        """The chunks, by name, that hold one region of some arrays."""
        with self._files.held() as files:
            for name, found in arrays.items():
                self._array(name)[region] = found
        return files

    def _put(self, files: Mapping[str, bytes]) -> None:
        for key, content in files.items():
            self._place.put(key, content)
        if self._fsync and files:
            self._place.settle(files)

    def remove(self, keys: Iterable[str]) -> None:
        """Delete chunks, in order: what they held is not done any more."""
        with self._place.changing(self._then):
            self._place.remove(keys, self._fsync)
        self._books.forget()

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._arrays:
            if self._node(name)["node_type"] != "array":
                raise BadInput(f"{self.path} is damaged, {name} is no array: run with --overwrite")
            array = zarr.open_array(self._files, path=name, mode="r+", zarr_format=3)
            # Zarr keeps this setting in memory only; without it a chunk of fill values is deleted.
            self._arrays[name] = array.with_config({"write_empty_chunks": True})
        return self._arrays[name]

    def _node(self, name: str) -> dict[str, Any]:
        key = f"{name}/{ZARR_JSON}" if name else ZARR_JSON
        if key not in self._once:
            raise BadInput(f"{self.path} is damaged, {name} is missing: run with --overwrite")
        return node(self._once[key])


def number_key(name: str, at: Iterable[int]) -> str:
    """The file of a small number that is a chunk of its own."""
    return f"{name}/c/{'/'.join(map(str, at))}"
