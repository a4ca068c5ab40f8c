"""The arrays of results, laid out empty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from patchsweep.sites import EDGES, Grid, dimensions, unit_name
from patchsweep.store import described
from patchsweep.store.ledger import SCORED, Ledger

RUNS = ("clean", "corrupt")
ESTIMATED = "completion/estimates"
# How far what was computed together was split, because it ran out of memory.
WAVES_SPLIT = "completion/waves_split"
ESTIMATED_SPLIT, SCORED_SPLIT = f"{ESTIMATED}_split", f"{SCORED}_split"


class Nodes(NamedTuple):
    """Both ends of edges, and the positions that exact ones are run at; empty without edges."""

    senders: Sequence[str] = ()
    receivers: Sequence[str] = ()
    positions: Sequence[int] | Sequence[str] = ()


def create_array(
    group: zarr.Group,
    name: str,
    dims: Sequence[str],
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: Any,
    fill: Any,
    attributes: Mapping[str, Any] | None = None,
) -> zarr.Array[Any]:
    return group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        fill_value=fill,
        compressors=ZstdCodec(level=3, checksum=True),
        dimension_names=list(dims),
        attributes=dict(attributes or {}),
        config={"write_empty_chunks": True},
    )


def put(
    group: zarr.Group,
    name: str,
    dims: Sequence[str],
    data: Any,
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """Create and fill a small array in one chunk; strings become Zarr's variable-length strings."""
    data = np.asarray(data)
    text = data.dtype.kind in "UO"
    chunks = tuple(max(1, n) for n in data.shape)
    dtype, fill = (str, "") if text else (data.dtype, 0)
    array = create_array(group, name, dims, data.shape, chunks, dtype, fill, attributes)
    array[...] = data.astype(object) if text else data


def create_component(
    root: zarr.Group,
    grid: Grid,
    metrics: Sequence[str],
    attrs: Mapping[str, Any],
    texts: Mapping[str, NDArray[Any]],
    nodes: Nodes,
) -> None:
    """`texts`: what `texts_of` has of its positions; sets and edges have none."""
    group = root.create_group(grid.component, attributes={"unit_name": unit_name(grid.component)})
    dims = dimensions(grid.component)
    for metric in metrics:
        for kind, dtype, fill in (("", attrs["dtype"], math.nan), ("_status", "uint8", 0)):
            said = described.stored(attrs, metric, kind, grid.component)
            name, cut = f"{metric}{kind}", grid.chunks
            create_array(group, name, dims, grid.shape, cut, dtype, fill, said)
    places: tuple[Any, ...] = (
        np.arange(grid.first_layer, grid.first_layer + grid.layers),
        np.arange(grid.units),
        grid.positions,
    )
    if grid.component == EDGES:
        places = (nodes.positions, nodes.receivers, grid.positions)
    pairs = (grid.directions, grid.sources, np.arange(grid.samples), np.arange(grid.pairs))
    for name, data in zip(dims, (*pairs, *places), strict=True):
        put(group, name, (name,), data, described.coordinate(name, grid.component))
    for name, data in texts.items():
        put(group, name, ("pair", "position")[-data.ndim :], data, described.coordinate(name))


def create_splits(root: zarr.Group, blocks: int) -> None:
    """Of as many waves as there can be: of one block each."""
    create_array(root, WAVES_SPLIT, ("wave",), (blocks,), (1,), "uint64", 0)


def create_records(root: zarr.Group, ledger: Ledger) -> None:
    """One after another, each a chunk."""
    dims, shape = ("record",), (ledger.size,)
    create_array(root, ledger.name, dims, shape, (ledger.length,), "uint64", 0)


def chunk_counts(root: zarr.Group) -> dict[str, tuple[int, ...]]:
    """How many chunks every array has, along its dimensions."""
    members = root.members(max_depth=None)
    return {
        name: tuple(-(-n // c) for n, c in zip(member.shape, member.chunks, strict=True))
        for name, member in members
        if isinstance(member, zarr.Array)
    }


def create_estimates(
    root: zarr.Group,
    grids: Sequence[Grid],
    metrics: Sequence[str],
    attrs: Mapping[str, Any],
) -> None:
    estimators, dtype = attrs.get("estimators", {}), attrs["dtype"]
    if not estimators:
        return
    for grid in (g for g in grids if g.component in estimators):
        how = f"attribution patching ({estimators[grid.component]})"
        for metric in metrics:
            name = f"{grid.component}/{metric}_estimate"
            said = described.stored(attrs, metric, "_estimate", grid.component)
            said["approximation"] = how
            create_array(
                root,
                name,
                dimensions(grid.component),
                grid.shape,
                grid.chunks,
                dtype,
                math.nan,
                said,
            )
        for what, said in described.CHOICE.items():
            name = f"choice/{grid.component}_{what}"
            count = attrs.get("chosen_columns", {}).get(grid.component, len(grid.positions))
            cells = (*grid.shape[4:6], count)
            dims = ("direction", "source", "layer", "unit", "column")
            shape = (len(grid.directions), len(grid.sources), *cells)
            create_array(root, name, dims, shape, (1, 1, *cells), "uint8", 0, said)
    for name in (ESTIMATED, ESTIMATED_SPLIT):
        create_marks(root, name, grids[0])


def create_marks(root: zarr.Group, name: str, grid: Grid) -> None:
    shape = (len(grid.sources), grid.samples, grid.pairs)
    create_array(root, name, ("source", "sample", "pair"), shape, (1, 1, 1), "uint64", 0)


def create_edges(
    root: zarr.Group,
    grid: Grid,
    metrics: Sequence[str],
    attrs: Mapping[str, Any],
    nodes: Nodes,
) -> None:
    group, how = root.create_group(EDGES), attrs[EDGES]
    coordinates: dict[str, Any] = {
        "direction": grid.directions,
        "source": grid.sources,
        "sample": np.arange(grid.samples),
        "pair": np.arange(grid.pairs),
        "sender": nodes.senders,
        "receiver": nodes.receivers,
    }
    sizes = tuple(map(len, coordinates.values()))
    text = how if isinstance(how, str) else f"eap_ig, {how['eap_ig']['steps']} steps"
    for metric in metrics:
        chunks = (1, 1, 1, 1, *sizes[4:])
        said = described.values(attrs, metric, "edge")
        said["approximation"] = f"edge attribution patching ({text})"
        dims, dtype = tuple(coordinates), attrs["dtype"]
        create_array(group, metric, dims, sizes, chunks, dtype, math.nan, said)
    for name, data in coordinates.items():
        put(group, name, (name,), data, described.coordinate(name))
    create_marks(root, SCORED_SPLIT, grid)


def create_baseline(
    root: zarr.Group,
    grids: Sequence[Grid],
    metrics: Sequence[str],
    pairs: int,
    attrs: Mapping[str, Any],
) -> None:
    group = root.create_group("baseline")
    # The pairs of any block are then whole chunks.
    chunks = (len(RUNS), 1, 1, math.gcd(*(grid.pair_tile for grid in grids)))
    sources, samples = grids[0].sources, grids[0].samples
    dims = ("run", "source", "sample", "pair")
    for metric in metrics:
        for name, kind in ((metric, "unpatched"), (f"{metric}_noise_floor", "_noise_floor")):
            shape = (len(RUNS), len(sources), samples, pairs)
            said = described.values(attrs, metric, kind)
            create_array(group, name, dims, shape, chunks, attrs["dtype"], math.nan, said)
    coordinates = (RUNS, sources, np.arange(samples), np.arange(pairs))
    for name, data in zip(dims, coordinates, strict=True):
        put(group, name, (name,), data, described.coordinate(name))
