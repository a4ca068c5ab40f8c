"""A component as an xarray dataset that reads, and computes effects, when values are used; with
dask, chunk by chunk."""

from __future__ import annotations

import uuid
from importlib.util import find_spec
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from patchsweep.effect import Array, change, ratio
from patchsweep.reader import Reader
from patchsweep.sites import DIMENSIONS, SETS
from patchsweep.store import Store


def dataset(results: Reader, component: str) -> xr.Dataset:
    """See `Results.to_xarray`."""
    grid, store = results.grid(component), results.store
    found: dict[str, xr.Variable] = {}
    for metric in results.metrics:
        name = f"{component}/{metric}"
        of_effect = f"effect on {metric} (0 = destination, 1 = source)"
        effect = _LazyEffect(store, name, *results.ends(metric, grid))
        found[metric] = _variable(_Lazy(store, name), store.node_attrs(name))
        found[f"{metric}_effect"] = _variable(effect, {"long_name": of_effect})
        found[f"{metric}_status"] = _variable(_Lazy(store, f"{name}_status"), {})
        if component in store.estimators:
            name = f"{name}_estimate"
            found[f"{metric}_estimate"] = _variable(_Lazy(store, name), store.node_attrs(name))
    unit_name = store.node_attrs(component).get("unit_name", "")
    coordinates = {dim: (dim, _plain(store.read(f"{component}/{dim}"))) for dim in DIMENSIONS}
    ds = xr.Dataset(found, coordinates, {"unit_name": unit_name})
    if find_spec("dask"):
        # Without a token dask would read everything, for a name of its own.
        chunks = dict(zip(DIMENSIONS, grid.chunks, strict=True))
        ds = ds.chunk(chunks, token=uuid.uuid4().hex)
    optional = ["direction", "source", "sample", "pair", "unit"]
    if component == SETS:
        ds, optional = ds.rename(position="set"), [*optional, "layer"]
    squeezed: xr.Dataset = ds.squeeze([dim for dim in optional if ds.sizes[dim] == 1])
    if component == SETS:
        return squeezed.drop_vars(["layer", "unit"])
    return squeezed.rename(unit=unit_name) if unit_name else squeezed.drop_vars("unit")


def _variable(array: BackendArray, attrs: dict[str, Any]) -> xr.Variable:
    return xr.Variable(DIMENSIONS, indexing.LazilyIndexedArray(array), attrs)


def _plain(coordinate: NDArray[Any]) -> NDArray[Any]:
    """Text as objects, as xarray opens it."""
    return coordinate.astype(object) if coordinate.dtype.kind in "UT" else coordinate


class _Lazy(BackendArray):
    """An array of the results, [DIMENSIONS], read for the region that is asked for."""

    def __init__(self, store: Store, name: str) -> None:
        self.shape, self.dtype = store.shape(name), store.dtype(name)
        self._store, self._name = store, name

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.BASIC, self._region
        )

    def _region(self, key: tuple[Any, ...]) -> NDArray[Any]:
        return self._store.read(self._name, key)


class _LazyEffect(_Lazy):
    """The effect of every cell, computed for the region that is asked for."""

    def __init__(self, store: Store, name: str, destination: Array, source: Array) -> None:
        super().__init__(store, name)
        self.dtype = np.dtype(np.float64)
        self._destination, self._source = (
            end[..., None, None, None] for end in (destination, source)
        )

    def _region(self, key: tuple[Any, ...]) -> Array:
        # Baselines are the same in every layer, unit and position.
        of_pair = (*key[:4], *(slice(None) if isinstance(part, slice) else 0 for part in key[4:]))
        destination, source = self._destination[of_pair], self._source[of_pair]
        patched = self._store.read(self._name, key)
        status = self._store.read(f"{self._name}_status", key)
        return ratio(change(patched, status, destination), source - destination)
