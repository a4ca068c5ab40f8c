"""From cells to runs, blocks and waves, with their cost: pure, no tensors.

A *run* is one patched forward, carried from its layer and first position on; a *block* is whole
chunks of the results (`sites.Grid`); a *wave* is a set of blocks of the same pairs that goes up the
layers together. The plan is a function of the pairs, the model's dimensions and the token budget.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from patchsweep.cone import cone
from patchsweep.dimensions import Dimensions
from patchsweep.errors import BadInput
from patchsweep.pairs import Pair
from patchsweep.sites import Block, Direction, Grid, blocks, component

Ints = NDArray[np.int64]

# A patched token passes the layer beside the rows, and its row is born from what comes out.
INJECTED = frozenset({"head_z", "attn_out", "resid_mid", "mlp_out"})
# Logits held at once in the tail, in elements, and how many arrays of that size there are.
TAIL_ELEMENTS, TAIL_ARRAYS = 1 << 23, 5
TAIL_TILE = 256
# Attention scores held at once, in elements, and how many arrays of that size there are.
SCORES_ELEMENTS, SCORES_ARRAYS = 1 << 22, 4


class BudgetTooSmall(BadInput):
    """The smallest block of a sweep does not fit the token budget; `least` would do."""

    def __init__(self, budget: int, least: int) -> None:
        super().__init__(
            f"token_budget {budget} is too small for one block of this sweep: "
            f"it needs {least}; raise it or sweep fewer positions"
        )
        self.least = least


@dataclass(frozen=True)
class Cells:
    """The grid of one component over all pairs, in one direction (both directions are alike).

    exists, start, patched are [pair, layer, entry], entry being the grid's positions: whether there
    is a run, its row's first position, and how many tokens it replaces. inside [pair, entry] tells
    which entries lie in the prompt.
    """

    grid: Grid
    exists: NDArray[np.bool_]
    start: Ints
    patched: Ints
    inside: NDArray[np.bool_]
    places: NDArray[np.bool_] | None  # `all`: the patched [pair, layer, position]

    @property
    def joins(self) -> int:
        """How many layers after its own a run's row is first carried."""
        return 0 if self.grid.component == "resid_pre" else 1

    @property
    def injected(self) -> bool:
        return self.grid.component in INJECTED


@dataclass(frozen=True)
class Wave:
    """Blocks that go up the layers together. `owner` waves write the baselines of their pairs."""

    index: int
    pairs: range
    blocks: tuple[Block, ...]
    owner: bool
    tokens: int  # packed tokens in its largest layer call
    rows: int  # whose logits are read: runs, baselines and null patches
    flops: int


@dataclass(frozen=True)
class Plan:
    """Everything a sweep will do, before it does it."""

    pairs: Sequence[Pair]
    directions: tuple[Direction, ...]
    dimensions: Dimensions
    token_budget: int
    cells: dict[str, Cells]
    waves: tuple[Wave, ...]
    metric_count: int
    tail_weights: int  # vocabulary rows that multiply one read token

    @property
    def grids(self) -> list[Grid]:
        return [c.grid for c in self.cells.values()]

    def counts(self) -> dict[str, int]:
        """Totals: cells, structural cells, runs, blocks, waves, tokens·layers, FLOPs, bytes."""
        cells = runs = outside = disk = 0
        value = 8 if self.dimensions.bytes_per_value == 8 else 4
        for c in self.cells.values():
            per_cell = len(self.directions) * c.grid.units
            cells += int(np.prod(c.grid.shape))
            runs += int(c.exists.sum()) * per_cell
            outside += int((~c.inside).sum()) * per_cell * c.grid.layers
            disk += int(np.prod(c.grid.shape)) * self.metric_count * (value + 1)
        return {
            "cells": cells - outside,
            "structural": cells - outside - runs,
            "runs": runs,
            "blocks": sum(len(w.blocks) for w in self.waves),
            "waves": len(self.waves),
            "peak_tokens": max((w.tokens for w in self.waves), default=0),
            "flops": sum(w.flops for w in self.waves),
            "peak_bytes": self.peak_bytes,
            "disk_bytes": disk,
        }

    def cells_of(self, wave: Wave) -> int:
        """Cells of the grid that a wave settles, structural ones counted."""
        return sum(
            len(b.units)
            * self.dimensions.layers
            * int(self.cells[b.component].inside[entries_of(b)].sum())
            for b in wave.blocks
        )

    @property
    def peak_bytes(self) -> int:
        """Upper bound of the memory that a wave takes beside the model."""
        d = self.dimensions
        tokens = max((w.tokens for w in self.waves), default=0)
        rows = max((w.rows for w in self.waves), default=0)
        tail = max(TAIL_ELEMENTS, rows * TAIL_TILE) * TAIL_ARRAYS + 3 * rows * d.d_model
        scores = SCORES_ELEMENTS * SCORES_ARRAYS
        return tokens * d.bytes_per_token + (tail + scores) * max(4, d.bytes_per_value)

    @cached_property
    def hash(self) -> str:
        """Identifies the waves: equal for equal pairs, dimensions, grids and budget."""
        said = {
            "pairs": [asdict(replace(p, labels=dict(p.labels))) for p in self.pairs],
            "dimensions": asdict(self.dimensions),
            "grids": [asdict(g) for g in self.grids],
            "waves": [[(b.component, b.index) for b in w.blocks] for w in self.waves],
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def entries_of(b: Block) -> tuple[slice, slice]:
    """A block's part of arrays [pair, entry]."""
    return slice(b.pairs.start, b.pairs.stop), slice(b.positions.start, b.positions.stop)


def make_plan(
    pairs: Sequence[Pair],
    components: Sequence[str],
    directions: tuple[Direction, ...],
    positions: tuple[tuple[int, ...] | tuple[str, ...], Ints],
    dimensions: Dimensions,
    token_budget: int,
    metric_count: int,
    whole_vocabulary: bool,
) -> Plan:
    """Plan a sweep. `positions`: the entries' names and their index [pair, entry], −1 outside."""
    longest = max(len(p) for p in pairs)
    if dimensions.max_positions is not None and longest > dimensions.max_positions:
        raise BadInput(
            f"a prompt has {longest} tokens, the model takes {dimensions.max_positions}: shorten it"
        )
    cells = {name: _cells(name, pairs, *positions, directions, dimensions) for name in components}
    tail_weights = dimensions.vocab if whole_vocabulary else 2
    empty = Plan(pairs, directions, dimensions, token_budget, {}, (), metric_count, tail_weights)
    return arranged(empty, cells)


def arranged(plan: Plan, whole: dict[str, Cells]) -> Plan:
    """The plan of other cells: their blocks and waves under the same budget."""
    pairs, d = plan.pairs, plan.dimensions
    costs = {name: _cost(c, pairs, d) for name, c in whole.items()}
    beside = _beside(pairs, len(plan.directions), d)
    cells = _tiled(whole, costs, beside, plan.token_budget)
    waves = _waves(cells, costs, beside, d, plan.token_budget, plan.tail_weights)
    return replace(plan, cells=cells, waves=waves)


@dataclass(frozen=True)
class _Cost:
    """What rows take. tokens [pair, layer, entry] in a layer call; reads [pair, entry], the keys
    read by all queries in all layers; rows [pair, entry]. Of a component: for one unit."""

    tokens: Ints
    reads: Ints
    rows: Ints

    def part(self, pairs: range, entries: range) -> tuple[Ints, int, int]:
        """Tokens [layer], reads and rows of a range of pairs and entries."""
        p, e = slice(pairs.start, pairs.stop), slice(entries.start, entries.stop)
        return (
            self.tokens[p, :, e].sum((0, 2)),
            int(self.reads[p, e].sum()),
            int(self.rows[p, e].sum()),
        )


def _cells(
    name: str,
    pairs: Sequence[Pair],
    names: tuple[int, ...] | tuple[str, ...],
    index: Ints,
    directions: tuple[Direction, ...],
    d: Dimensions,
) -> Cells:
    """The grid of a component, not yet cut into blocks."""
    entire = names == ("all",)
    shape = (len(pairs), d.layers, len(names))
    exists, start, patched = np.zeros(shape, bool), np.zeros(shape, int), np.zeros(shape, int)
    places = np.zeros((len(pairs), d.layers, max(map(len, pairs))), bool)
    for i, pair in enumerate(pairs):
        there = cone(differs(pair), d.windows, len(pair) - 1).exists(name)
        places[i, :, : len(pair)] = there
        if entire:
            exists[i, :, 0] = there.any(1)
            start[i, :, 0] = there.argmax(1)
            patched[i, :, 0] = there.sum(1)
        else:
            exists[i] = there[:, index[i]] & (index[i] >= 0)
            start[i] = index[i]
            patched[i] = exists[i]
    units = d.heads if component(name).unit == "head" else 1
    grid = Grid(name, directions, len(pairs), d.layers, units, names, len(pairs), units, len(names))
    inside = np.ones((len(pairs), 1), bool) if entire else index >= 0
    return Cells(grid, exists, start, patched, inside, places if entire else None)


def differs(pair: Pair) -> NDArray[np.bool_]:
    """[position]: where the two prompts' tokens differ."""
    return np.not_equal(pair.clean, pair.corrupt)


def _cost(c: Cells, pairs: Sequence[Pair], d: Dimensions) -> _Cost:
    """Cost of one unit's runs."""
    lengths = np.array([len(p) for p in pairs])
    carried = np.cumsum(c.exists * (lengths[:, None, None] - c.start), 1)
    tokens = _later(carried, c.joins) + (c.exists * c.patched if c.injected else 0)
    reads = np.zeros((len(pairs), c.exists.shape[2]), int)
    for window in set(d.windows):
        total = _total_context(lengths.max(), window)
        row = total[lengths][:, None, None] - total[np.maximum(c.start, 0)]
        by_layer = _later(np.cumsum(c.exists * row, 1), c.joins)
        reads += by_layer[:, [w == window for w in d.windows]].sum(1)
    return _Cost(tokens, reads, c.exists.sum(1))


def _later(by_layer: Ints, layers: int) -> Ints:
    """[pair, layer, entry] moved up by 0 or 1 layers."""
    if not layers:
        return by_layer
    return np.concatenate([np.zeros_like(by_layer[:, :1]), by_layer[:, :-1]], 1)


def _total_context(length: int, window: int | None) -> Ints:
    """[position]: keys that the queries before a position read together."""
    context = np.minimum(np.arange(1, length + 1), window or length)
    return np.concatenate([[0], np.cumsum(context)])


def _beside(pairs: Sequence[Pair], directions: int, d: Dimensions) -> _Cost:
    """Cost of what every wave carries for its pairs: both runs, and a null patch per direction."""
    lengths = np.array([len(p) for p in pairs])
    first = np.array([differs(p).argmax() for p in pairs])
    tokens = 2 * lengths + directions * (lengths - first)
    reads = np.zeros(len(pairs), int)
    for window in d.windows:
        total = _total_context(lengths.max(), window)
        reads += 2 * total[lengths] + directions * (total[lengths] - total[first])
    rows = np.full((len(pairs), 1), 2 + directions)
    return _Cost(np.repeat(tokens[:, None, None], d.layers, 1), reads[:, None], rows)


def _tiled(
    cells: dict[str, Cells], costs: dict[str, _Cost], beside: _Cost, budget: int
) -> dict[str, Cells]:
    """Blocks as large as the budget allows: fewer pairs first, then positions, then units."""
    pairs = len(beside.tokens)

    def peak(grid: Grid) -> int:
        tokens = np.add.reduceat(
            costs[grid.component].tokens, np.arange(0, pairs, grid.pair_tile), 0
        )
        entries = np.arange(0, len(grid.positions), grid.position_tile)
        always = np.add.reduceat(beside.tokens, np.arange(0, pairs, grid.pair_tile), 0)
        together = np.add.reduceat(tokens, entries, 2) * grid.unit_tile + always
        return int(together.max())

    grids = {name: c.grid for name, c in cells.items()}
    for tile in ("pair_tile", "position_tile", "unit_tile"):
        for name in grids:
            while peak(grids[name]) > budget and getattr(grids[name], tile) > 1:
                smaller = -(-getattr(grids[name], tile) // 2)
                changed = grids if tile == "pair_tile" else [name]  # waves need common pairs
                for n in changed:
                    grids[n] = replace(grids[n], **{tile: smaller})
    least = max(map(peak, grids.values()))
    if least > budget:
        raise BudgetTooSmall(budget, least)
    return {name: replace(c, grid=grids[name]) for name, c in cells.items()}


def _waves(
    cells: dict[str, Cells],
    costs: dict[str, _Cost],
    beside: _Cost,
    d: Dimensions,
    budget: int,
    tail_weights: int,
) -> tuple[Wave, ...]:
    """Blocks of the same pairs packed into waves, costliest first; waves in order of their cost."""
    by_pairs: dict[range, list[Block]] = {}
    for c in cells.values():
        for block in blocks(c.grid):
            by_pairs.setdefault(block.pairs, []).append(block)

    def total(members: Sequence[Block], pairs: range) -> tuple[Ints, int, int]:
        tokens, reads, rows = beside.part(pairs, range(1))
        for b in members:
            more = costs[b.component].part(b.pairs, b.positions)
            tokens = tokens + more[0] * len(b.units)
            reads += more[1] * len(b.units)
            rows += more[2] * len(b.units)
        return tokens, reads, rows

    waves = []
    for pairs, members in by_pairs.items():
        alone = [(b, total([b], pairs)[0] - total([], pairs)[0]) for b in members]
        alone.sort(key=lambda item: -int(item[1].sum()))
        bins: list[tuple[list[Block], Ints]] = []
        for block, tokens in alone:
            for i, (inside, held) in enumerate(bins):
                if (held + tokens).max() <= budget:
                    inside.append(block)
                    bins[i] = (inside, held + tokens)
                    break
            else:
                bins.append(([block], total([], pairs)[0] + tokens))
        for inside, _ in bins:
            tokens, reads, rows = total(inside, pairs)
            flops = (
                2 * d.layer_weights * int(tokens.sum())
                + 4 * d.heads * d.d_head * reads
                + 2 * d.d_model * tail_weights * rows
            )
            waves.append(Wave(0, pairs, tuple(inside), False, int(tokens.max()), rows, flops))
    waves.sort(key=lambda w: -w.flops)
    owned: set[range] = set()
    for i, wave in enumerate(waves):
        waves[i] = replace(wave, index=i, owner=wave.pairs not in owned)
        owned.add(wave.pairs)
    return tuple(waves)
