"""The arrays of results, by name: regions of them, and the chunks and files that these lie in."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any
from zipfile import BadZipFile

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.core.metadata import ArrayV3Metadata

from patchsweep.errors import BadInput
from patchsweep.store.place import Place


class Damaged(BadInput):
    """A chunk is not what was written."""


class ArrayStore:
    """The arrays in a folder or at a URL, whatever they mean.

    path: of the folder, or the URL. `here` holds the names of the files that are there. What
    writes raises BadInput if the disk refuses, with what to do `then`, after the mend.
    """

    def __init__(
        self,
        place: Place,
        group: zarr.Group,
        fsync: bool = False,
        here: Container[str] | None = None,
        then: str = "continue with --resume",
    ) -> None:
        self.path = place.at
        self._place = place
        self._group = group
        self._fsync = fsync
        self._then = then
        self._here = place if here is None else here
        self._arrays: dict[str, zarr.Array[Any]] = {}

    @property
    def attrs(self) -> dict[str, Any]:
        """The root attributes."""
        return dict(self._group.attrs)

    def set_attrs(self, **attrs: Any) -> None:
        """Add or replace root attributes. One process only."""
        with self._place.changing(self._then):
            self._group.update_attributes(attrs)
            if self._fsync:
                self._place.settle(["zarr.json"])

    def group_attrs(self, name: str) -> dict[str, Any]:
        """The attributes of a group, for example `prompts`."""
        return dict(self._group[name].attrs)

    def array_attrs(self, name: str) -> dict[str, Any]:
        """The attributes of the array `<group>/<array>`."""
        return dict(self._array(name).attrs)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._place.name

    def opened(self, group: str) -> xr.Dataset:
        """A group as xarray opens it, lazily."""
        files = self._group.store
        found: xr.Dataset = xr.open_zarr(files, group=group, consolidated=False, chunks=None)
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """The sizes of an array."""
        return self._array(name).shape

    def chunks(self, name: str) -> Iterator[tuple[slice, ...]]:
        """The regions of an array's chunks."""
        array = self._array(name)
        starts = (range(0, n, c) for n, c in zip(array.shape, array.chunks, strict=True))
        for at in itertools.product(*starts):
            yield tuple(slice(i, i + c) for i, c in zip(at, array.chunks, strict=True))

    def keys(self, name: str, region: tuple[slice, ...]) -> list[str]:
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

    def written(self, name: str) -> Iterator[tuple[slice, ...]]:
        """The regions of those chunks of an array that are there, where they are few of many."""
        start = f"{name}/c/"
        for file in self._place.files():
            if file.startswith(start):
                chunks = zip(
                    file.removeprefix(start).split("/"), self._array(name).chunks, strict=True
                )
                yield tuple(slice(int(i) * n, (int(i) + 1) * n) for i, n in chunks)

    def has(self, key: str) -> bool:
        """Whether a file is there."""
        return key in self._here

    def read(self, name: str, region: Any = ...) -> NDArray[Any]:
        """The array `<group>/<array>`, or a region of it; Damaged if a chunk of it is, BadInput
        if it cannot be reached."""
        array = self._array(name)
        try:
            with self._place.reading():
                return np.asarray(array[region])
        except BadInput:
            raise
        except (RuntimeError, ValueError, OSError, BadZipFile) as exc:
            cause = " ".join(str(exc).split())
            raise Damaged(
                f"cannot read {self.path}/{name}: {cause}; "
                f"'patchsweep check {self.path}' says what must be redone"
            ) from exc

    def _write(self, arrays: Mapping[str, NDArray[Any]], region: tuple[slice, ...]) -> None:
        """Write one region of some arrays; on the disk when this returns, if so asked."""
        with self._place.changing(self._then):
            for name, found in arrays.items():
                self._array(name)[region] = found
            if self._fsync:
                keys = [key for name in arrays for key in self.keys(name, region)]
                self._place.settle(keys)

    def _mark(self, name: str, region: tuple[slice, ...]) -> None:
        """Record that what was written before is done."""
        shape = [len(range(n)[part]) for n, part in zip(self.shape(name), region, strict=True)]
        self._write({name: np.ones(shape, np.uint8)}, region)

    def remove(self, keys: Iterable[str]) -> None:
        """Delete chunks, in order: what they held is not done any more."""
        with self._place.changing(self._then):
            self._place.remove(keys, self._fsync)

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._arrays:
            array = self._member(name)
            if not isinstance(array, zarr.Array):
                raise BadInput(f"{self.path} is damaged, {name} is missing: run with --overwrite")
            # Zarr keeps this setting in memory only; without it a chunk of fill values is deleted.
            self._arrays[name] = array.with_config({"write_empty_chunks": True})
        return self._arrays[name]

    def _member(self, name: str) -> Any:
        """A group or an array; BadInput if its metadata cannot be read."""
        try:
            with self._place.reading():
                return self._group.get(name)
        except BadInput:
            raise
        except (ValueError, KeyError, TypeError, BadZipFile) as exc:
            cause = " ".join(str(exc).split())
            raise BadInput(
                f"{self.path} is damaged, {name}: {cause}: run with --overwrite"
            ) from exc
