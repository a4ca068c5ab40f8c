"""Results as a store of Zarr: it gets what was checked, and what it writes is held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any

from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype

from patchsweep.store.books import Books
from patchsweep.store.damage import damaged
from patchsweep.store.nodes import ZARR_JSON
from patchsweep.store.place import Place

_HOLDING = Lock()


class Checked(Store):
    """What is written once comes from `once`, chunks that are filled later from the place, once
    they are what their record says. Nothing else is there, whatever lies in the place: Zarr and
    xarray see no file that was not checked. Nothing is written: see `held`."""

    supports_writes = True
    supports_deletes = False
    supports_listing = False

    def __init__(self, place: Place, once: Mapping[str, bytes], books: Books) -> None:
        super().__init__(read_only=False)
        self._is_open = True
        self._place, self._once, self._books = place, once, books
        self._held: dict[str, bytes] = {}

    @contextmanager
    def held(self) -> Iterator[dict[str, bytes]]:
        """The files that Zarr writes inside, by name; one thread at a time is inside."""
        with _HOLDING:
            self._held = {}
            yield self._held

    def found(self, key: str) -> bytes | None:
        """The content of a file; None if it is not there, or not yet."""
        if key in self._once:
            return self._once[key]
        array, _, chunk = key.partition("/c/")
        if f"{array}/{ZARR_JSON}" not in self._once or not chunk:
            return None
        if is_filled(array, self._books):
            return self._books.chunk(array, tuple(map(int, chunk.split("/"))), key)
        raise damaged(self._place.at, key, "missing")  # it is written once

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        found = await asyncio.to_thread(self.found, key)
        if found is None:
            return None
        return prototype.buffer.from_bytes(found[_part(byte_range)])

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, part) for key, part in key_ranges]

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self.found, key) is not None

    async def set(self, key: str, value: Buffer) -> None:
        self._held[key] = value.to_bytes()

    async def delete(self, key: str) -> None:
        raise NotImplementedError

    async def list(self) -> AsyncIterator[str]:
        for key in self._once:
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in self._once:
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        start = f"{prefix.rstrip('/')}/" if prefix else ""
        for name in {k[len(start) :].split("/")[0] for k in self._once if k.startswith(start)}:
            yield name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Checked) and self._place == other._place

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return type(self), (self._place, self._once, self._books)


def is_filled(array: str, books: Books) -> bool:
    """Whether a sweep fills an array, chunk by chunk, after it is laid out."""
    return books.of(array) is not None or array.startswith(("completion/", "records/"))


def _part(given: ByteRequest | None) -> slice:
    match given:
        case RangeByteRequest(start, end):
            return slice(start, end)
        case OffsetByteRequest(offset):
            return slice(offset, None)
        case SuffixByteRequest(suffix):
            return slice(-suffix, None)
    return slice(None)
