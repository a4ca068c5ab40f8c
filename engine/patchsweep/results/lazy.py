"""A component as an xarray dataset that reads, and computes effects, when values are used; with
dask, chunk by chunk."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from patchsweep.results.columns import Columns
from patchsweep.results.effects import Effects
from patchsweep.sites import DIMENSIONS, MEASURED, SETS, Status
from patchsweep.statistics import Array, change, ratio
from patchsweep.store import Store, described

_COLUMN = "column"


def dataset(results: Effects, component: str, by: str | None, squeeze: bool) -> xr.Dataset:
    """See `Results.to_xarray`."""
    grid, store = results.grid(component), results.store
    found: dict[str, xr.Variable] = {}
    for metric in results.metrics:
        name = f"{component}/{metric}"
        effect = _LazyEffect(store, name, *results.ends(metric, grid))
        arrays: dict[str, BackendArray] = {"": _Lazy(store, name), "_effect": effect}
        kinds = ("_status", "_estimate") if component in store.estimators else ("_status",)
        arrays |= {kind: _Lazy(store, f"{name}{kind}") for kind in kinds}
        for kind, array in arrays.items():
            said = described.values(results.attrs, metric, kind)
            if kind == "_estimate":
                said["approximation"] = store.node_attrs(f"{name}{kind}")["approximation"]
            found[f"{metric}{kind}"] = xr.Variable(
                DIMENSIONS, indexing.LazilyIndexedArray(array), said
            )
    unit_name = store.node_attrs(component).get("unit_name", "")
    coordinates = {
        dim: (dim, _plain(store.read(f"{component}/{dim}")), described.coordinate(dim, component))
        for dim in DIMENSIONS
    }
    ds = xr.Dataset(found, coordinates, {"unit_name": unit_name})
    if find_spec("dask"):
        # Without a token dask would read everything, for a name of its own.
        chunks = dict(zip(DIMENSIONS, grid.chunks, strict=True))
        ds = ds.chunk(chunks, token=uuid.uuid4().hex)
    if by is not None:
        ds = _by_meaning(results, component, ds, results.columns(component, by))
    elif component != SETS:
        ds = ds.assign_coords(_beside(results.texts(component)))
    unit = "" if component == SETS else unit_name
    ds = ds.rename(unit=unit) if unit else ds.isel(unit=0, drop=True)
    if component == SETS:
        ds = ds.rename(position="set").isel(layer=0, drop=True)
    may_go = ds.sizes if squeeze else ("direction", "source", "sample")
    return ds.squeeze([dim for dim in may_go if ds.sizes[dim] == 1])


def _by_meaning(results: Effects, component: str, ds: xr.Dataset, columns: Columns) -> xr.Dataset:
    """The same with columns in place of positions, of each its mean over a pair's positions."""
    texts = results.tokens_of(component, columns)
    tokens = [["/".join(dict.fromkeys(two)) if two else "" for two in row] for row in texts]
    there = [[two is not None for two in row] for row in texts]
    if columns.members is not None:
        members = xr.DataArray(
            columns.members.astype(np.float64), dims=("pair", _COLUMN, "position")
        )

        def mean(name: str, use: Any) -> Any:
            count = xr.dot(use.astype(np.float64), members, dim="position")
            total = xr.dot(ds[name].where(use, 0.0), members, dim="position")
            return (total / count.where(count > 0)).assign_attrs(ds[name].attrs)

        found = {}
        for name in map(str, ds.data_vars):
            kind = name.rsplit("_", 1)[-1]
            if kind == "status":
                found[name] = _statuses(ds[name], members)
            elif kind == "estimate":
                found[name] = mean(name, np.isfinite(ds[name]))
            else:
                status = ds[f"{name.removesuffix('_effect')}_status"]
                found[name] = mean(name, status.isin(MEASURED) & np.isfinite(ds[name]))
        ds = xr.Dataset(found, attrs=ds.attrs).rename({_COLUMN: "position"})
    beside = _beside({"token": np.array(tokens, object), "n_pairs": np.sum(there, axis=0)})
    return ds.assign_coords({"position": list(columns.names), **beside})


def _statuses(status: xr.DataArray, members: xr.DataArray) -> Any:
    """What a column is, by what its positions are: not known if one is not, run if one was."""
    order = (Status.NOT_DONE, Status.NOT_FINITE, Status.STRUCTURAL)
    found: Any = xr.full_like(status.isel(position=0, drop=True), Status.OUTSIDE)
    for code in (*order, Status.AUDITED, Status.EXACT, Status.ESTIMATED):
        seen: Any = xr.dot((status == code).astype(np.float64), members, dim="position") > 0
        found = found * ~seen + code * seen
    return found.astype(np.uint8).assign_attrs(status.attrs)


def _beside(texts: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """What is at the positions, as coordinates."""
    return {
        name: (("pair", "position")[-data.ndim :], data, described.coordinate(name))
        for name, data in texts.items()
    }


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
