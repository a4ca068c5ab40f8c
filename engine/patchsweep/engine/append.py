"""Further pairs or metrics for results that are there.

The larger sweep is laid out beside them, and takes their place once it holds all that they hold.
Cells that were run are not run again, or keep their bits where the rest of their chunk is: blocks
are no larger than before, and no wave joins pairs that were there with others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchsweep.engine.prepare import digest
from patchsweep.inputs import by_name
from patchsweep.pairs import Pair
from patchsweep.passes import Values
from patchsweep.plan import Cut, Plan
from patchsweep.sites import EDGES, Block, Grid, Status, blocks
from patchsweep.spec import Gaussian, Mean, Resample, Sweep
from patchsweep.store import Store, scored, stored_pairs

Map = NDArray[np.bool_]
Arrays = Mapping[str, NDArray[Any]]  # by metric
# What may be another one; the backend in use is compared, not the one that is asked for.
FREE = {"metrics", "token_budget", "backend", "remote", "fsync", "provenance"}


def cut(store: Store, pairs: int) -> Cut:
    """How results are cut when these go on with so many pairs."""
    grids = list(store.grids.values())
    known = [grids[0].pairs, *(entry["pairs"] for entry in _history(store))]
    # Older results: a chunk is a block.
    most = store.attrs.get("pairs_per_block", max(grid.pair_tile for grid in grids))
    blocks = store.blocks_per_chunk if grids[0].pairs == pairs else None
    return Cut(most, max((n for n in known if n < pairs), default=0), blocks)


def refusal(
    store: Store,
    plan: Plan,
    settings: Sweep,
    attrs: Mapping[str, Any],
    values: Values,
    tokenizer: Any,
) -> str | None:
    """Why results cannot become those of this sweep, `attrs` being what it says of itself; None if
    they can: more pairs after the same ones, or more metrics, and nothing else."""
    before, spec, now = store.attrs, store.attrs["spec"], attrs["spec"]
    for key in Sweep.model_fields:
        if key not in FREE and key in spec and by_name(spec[key]) != by_name(now[key]):
            return f"{key} differs"
    for key in ("model_fingerprint", "backend"):
        if before[key] != attrs[key]:
            return f"it is of another {key.removesuffix('_fingerprint')}"
    if settings.prefilter or settings.estimate or (settings.edges and settings.edges.prefilter):
        return "what is estimated is chosen over all pairs and metrics"
    if settings.circuit:
        return "a circuit is chosen over all pairs"
    wanted = by_name(now["metrics"])
    for metric in by_name(spec["metrics"]):
        if metric not in wanted:
            return f"its metric {metric} is missing"
    directions = {c: x for c, x in values.directions.items() if c in store.metrics}
    old_values = replace(values, directions=directions)
    same_values = digest(old_values, plan, tokenizer) == before["values"]
    return _refused_pairs(stored_pairs(store), store, plan, settings, same_values) or (
        None if same_values else "it has other vectors, probes or another autoencoder"
    )


def _refused_pairs(
    pairs: Sequence[Pair], store: Store, plan: Plan, settings: Sweep, same_values: bool
) -> str | None:
    """What the pairs are in the way of, as `refusal`."""
    if len(plan.pairs) < len(pairs):
        return f"it has {len(pairs)} pairs, and {len(plan.pairs)} are asked for"
    for i, pair in enumerate(pairs):
        if pair != plan.pairs[i]:
            return f"its pair {i} is another: further pairs come after those that are there"
    if len(plan.pairs) == len(pairs):
        return None
    if any(isinstance(given, Resample) for _, given in settings.sources):
        return "resample draws from all pairs"
    if any(isinstance(given, Mean) for _, given in settings.sources) and not same_values:
        return "its mean is over all pairs"
    if isinstance(settings.corrupt, Gaussian) and settings.corrupt.std != "table":
        return "its noise is scaled by the tokens of all pairs (std: table is not)"
    for name, grid in store.grids.items():
        if plan.grids[name].positions[: len(grid.positions)] != grid.positions:
            return "there are windows at every position, and the longest prompt is longer"
    return None


def described(store: Store, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """What results that say `attrs` say of those that they take the place of, which are fewer or
    older."""
    entry = {
        "pairs": next(iter(store.grids.values())).pairs,
        "metrics": list(store.metrics),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    larger = (
        store.attrs["plan_hash"] != attrs["plan_hash"]
        or store.attrs["spec"]["metrics"] != (attrs["spec"]["metrics"])
    )
    history = [*_history(store), *([entry] if larger else [])]
    return {"created": store.attrs["created"], **({"appended": history} if history else {})}


def copy(before: Store, after: Store) -> None:
    """Write what results hold into those of a larger sweep. Chunks whose cells are all there, by
    every metric, are done; the others get what is there."""
    there = {name: _there(before, grid) for name, grid in before.grids.items()}
    # Pairs that have all their blocks, so a baseline too: [source, sample, pair].
    whole = np.all([cells.all((0, 4, 5)) for cells in there.values()], axis=0)
    old = range(whole.shape[2])
    tiles = next(iter(after.grids.values())).pair_tiles()  # those of all grids
    for source, sample in np.ndindex(whole.shape[:2]):
        for pairs in (tile[: len(old[tile.start :])] for tile in tiles):
            if pairs and whole[source, sample, pairs.start : pairs.stop].all():
                found = before.baseline(source, sample, pairs, before.metrics)
                after.write_baseline(source, sample, pairs, *found)
    for name, grid in after.grids.items():
        for block in blocks(grid):
            if block.pairs.start in old:
                _copy_block(before, after, there[name], block)
    if scored(before.attrs) and before.metrics == after.metrics:
        for source, sample, pair in np.argwhere(before.scored()).tolist():
            region = (slice(None), source, sample, slice(pair, pair + 1))
            scores = {m: before.read(f"{EDGES}/{m}", region) for m in before.metrics}
            after.write_edges(source, sample, range(pair, pair + 1), scores)


def kept(store: Store, block: Block, values: Arrays, status: Arrays) -> tuple[Arrays, Arrays]:
    """A chunk as it is to be written: cells that were there before an append stay as they are."""
    if block.pairs.start >= _before(store):
        return values, status
    region = block.region(store.grids[block.component])
    found: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for metric in values:
        name = f"{block.component}/{metric}"
        known = store.read(f"{name}_status", region)
        there = known != Status.NOT_DONE
        found[0][metric] = np.where(there, store.read(name, region), values[metric])
        found[1][metric] = np.where(there, known, status[metric])
    return found


def kept_baseline(
    store: Store, source: int, sample: int, pairs: range, values: Arrays, floor: Arrays
) -> tuple[Arrays, Arrays]:
    """Baselines and noise floors [run, pair] as they are to be written, as `kept`."""
    if pairs.start >= _before(store):
        return values, floor
    old, old_floor = store.baseline(source, sample, pairs, values)
    return (
        {m: np.where(np.isfinite(old[m]), old[m], x) for m, x in values.items()},
        {m: np.where(np.isfinite(old_floor[m]), old_floor[m], x) for m, x in floor.items()},
    )


def _history(store: Store) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = store.attrs.get("appended", [])
    return found


def _before(store: Store) -> int:
    """Pairs that were there when results were appended to."""
    return max((entry["pairs"] for entry in _history(store)), default=0)


def _there(store: Store, grid: Grid) -> Map:
    """[direction, source, sample, pair, unit, position]: which cells are written, in all layers."""
    done = store.done(grid.component)
    there = np.zeros((*grid.shape[:4], *grid.shape[5:]), bool)
    for block in blocks(grid):
        there[_but_layers(block.region(grid))] = done[block.index]
    return there


def _but_layers(region: tuple[slice, ...]) -> tuple[slice, ...]:
    return (*region[:4], *region[5:])


def _copy_block(before: Store, after: Store, there: Map, block: Block) -> None:
    """Write what there is of a block. Positions behind the longest prompt that there was are
    outside those prompts."""
    name, grid = block.component, before.grids[block.component]
    region = block.region(after.grids[name])
    shape = tuple(part.stop - part.start for part in region)
    known = np.ones((*shape[:4], *shape[5:]), bool)
    old = tuple(
        slice(part.start, min(part.stop, n)) for part, n in zip(region, grid.shape, strict=True)
    )
    sizes = tuple(max(0, part.stop - part.start) for part in old)
    inner = tuple(slice(0, n) for n in sizes)
    if all(sizes):
        known[_but_layers(inner)] = there[_but_layers(old)]
    known[:, :, :, sizes[3] :] = False
    if not known.any():
        return
    values, status = {}, {}
    for metric in before.metrics:
        value = np.full(shape, np.nan, after.attrs["dtype"])
        state = np.full(shape, Status.OUTSIDE, np.uint8)
        if all(sizes):
            value[inner] = before.read(f"{name}/{metric}", old)
            state[inner] = before.read(f"{name}/{metric}_status", old)
        by_layer = np.broadcast_to(np.expand_dims(known, 4), shape)
        values[metric] = np.where(by_layer, value, np.nan).astype(value.dtype)
        status[metric] = np.where(by_layer, state, Status.NOT_DONE).astype(np.uint8)
    if known.all() and {*before.metrics} == {*after.metrics}:
        after.write_block(block, values, status)
    else:
        after.write_cells(block, values, status)
