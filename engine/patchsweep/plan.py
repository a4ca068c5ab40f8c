"""From cells to runs, blocks and waves, with their cost: pure, no tensors.

A *run* is one patched forward, carried from its layer and first position on; a *block* is whole
chunks of the results (`sites.Grid`); a *wave* is a set of blocks of the same pairs and the same
source that goes up the layers together. The plan is a function of the pairs, the model's dimensions
and the token budget.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from patchsweep.dimensions import WHOLE, Dimensions, Offload
from patchsweep.errors import BadInput
from patchsweep.layout import OWN, Features, Layout, Layouts, Variant, make_layouts
from patchsweep.pairs import Pair
from patchsweep.reads import (
    TAIL_ARRAYS,
    TAIL_ELEMENTS,
    TAIL_TILE,
    resolve_reads,
    whole_vocabulary,
)
from patchsweep.sae import TILE as FEATURES_TILE
from patchsweep.sites import SETS, Block, Direction, Grid, blocks
from patchsweep.sources import Source, resolve
from patchsweep.spec import Sweep

Ints = NDArray[np.int64]

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
class Wave:
    """Blocks that go up the layers together, of one source and sample. `owner` waves write the
    baselines of their pairs. `runs` are the sources whose runs are carried beside the clean one."""

    index: int
    pairs: range
    source: int
    sample: int
    runs: tuple[int, ...]
    blocks: tuple[Block, ...]
    owner: bool
    tokens: int  # packed tokens in its largest layer call
    rows: int  # logits read: of runs, baselines and null patches
    flops: int


@dataclass(frozen=True)
class Plan:
    """Everything a sweep will do, before it does it."""

    layouts: Layouts
    token_budget: int
    grids: dict[str, Grid]
    waves: tuple[Wave, ...]
    metric_count: int
    tail_weights: int  # vocabulary rows that multiply one read token
    offload: Offload = WHOLE

    @property
    def pairs(self) -> Sequence[Pair]:
        return self.layouts.pairs

    @property
    def directions(self) -> tuple[Direction, ...]:
        return self.layouts.directions

    @property
    def dimensions(self) -> Dimensions:
        return self.layouts.dimensions

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.layouts.sources

    def variant(self, block: Block) -> Variant:
        return Variant(block.direction, block.source, block.sample)

    def layout(self, block: Block) -> Layout:
        """The layout that a block is a part of."""
        return self.layouts.layout(block.component, self.variant(block))

    def counts(self) -> dict[str, int]:
        """Totals: cells, structural cells, runs, blocks, waves, tokens·layers, FLOPs, bytes (moved:
        weights that are brought in, over all waves)."""
        cells = runs = disk = 0
        value = 8 if self.dimensions.bytes_per_value == 8 else 4
        for name, grid in self.grids.items():
            for variant in variants(self.layouts):
                layout = self.layouts.layout(name, variant)
                cells += int(layout.inside.sum()) * grid.layers * grid.units
                runs += int(layout.exists.sum()) * grid.units
            disk += int(np.prod(grid.shape)) * self.metric_count * (value + 1)
        return {
            "cells": cells,
            "structural": cells - runs,
            "runs": runs,
            "blocks": sum(len(w.blocks) for w in self.waves),
            "waves": len(self.waves),
            "peak_tokens": max((w.tokens for w in self.waves), default=0),
            "flops": sum(w.flops for w in self.waves),
            "peak_bytes": self.peak_bytes,
            "moved_bytes": self.offload.moved * len(self.waves),
            "disk_bytes": disk,
        }

    def cells_of(self, wave: Wave) -> int:
        """Cells of the grid that a wave settles, structural ones counted."""
        return sum(
            len(b.units) * self.grids[b.component].layers * int(self.inside(b).sum())
            for b in wave.blocks
        )

    def inside(self, b: Block) -> NDArray[np.bool_]:
        """[pair, entry] of a block: whether the prompt has the entry."""
        return self.layout(b).inside[entries_of(b)]

    @property
    def peak_bytes(self) -> int:
        """Upper bound of the memory that a wave takes beside the model's weights that stay."""
        d = self.dimensions
        tokens = max((w.tokens for w in self.waves), default=0)
        rows = max((w.rows for w in self.waves), default=0)
        tail = max(TAIL_ELEMENTS, rows * TAIL_TILE) * TAIL_ARRAYS + 3 * rows * d.d_model
        scores = SCORES_ELEMENTS * SCORES_ARRAYS
        beside = (tail + scores + self._features) * max(4, d.bytes_per_value)
        return tokens * d.bytes_per_token + beside + self.offload.held

    @property
    def _features(self) -> int:
        """Features of an autoencoder that are there at one time."""
        if self.layouts.features is None:
            return 0
        base = max(
            (_base_tokens(self.layouts, w.pairs, w.source, w.sample) for w in self.waves), default=0
        )
        return 2 * (base * self.layouts.features.features + FEATURES_TILE)

    @cached_property
    def hash(self) -> str:
        """Identifies the waves: equal for equal pairs, sources, dimensions, grids and budget."""
        table = self.layouts.table
        said = {
            "pairs": [_said(p) for p in self.pairs],
            "sources": [_said_of(s) for s in self.sources],
            "dimensions": asdict(self.dimensions),
            "features": self.layouts.features and asdict(self.layouts.features),
            "grids": [asdict(g) for g in self.grids.values()],
            "members": _digest(self.layouts.positions.members),
            "sites": table
            and {k: _digest(v) for k, v in vars(table).items() if k not in ("names", "entries")},
            "waves": [[(b.component, b.index) for b in w.blocks] for w in self.waves],
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _said(pair: Pair) -> dict[str, object]:
    return {k: dict(v) if k in ("labels", "others") else v for k, v in vars(pair).items()}


def _said_of(source: Source) -> dict[str, object]:
    given = source.given.model_dump(mode="json") if source.given else None
    others = [[(o.tokens, o.align.tolist(), o.noised) for o in row] for row in source.others]
    return {"name": source.name, "given": given, "others": others}


def _digest(array: NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def entries_of(b: Block) -> tuple[slice, slice]:
    """A block's part of arrays [pair, entry]."""
    return slice(b.pairs.start, b.pairs.stop), slice(b.positions.start, b.positions.stop)


def variants(layouts: Layouts) -> list[Variant]:
    """Every direction with every source and sample."""
    return [
        Variant(d, s, n)
        for d in range(len(layouts.directions))
        for s in range(len(layouts.sources))
        for n in range(layouts.samples)
    ]


def make_plan(
    pairs: Sequence[Pair],
    settings: Sweep,
    dimensions: Dimensions,
    token_budget: int,
    features: Features | None = None,
) -> Plan:
    """Plan a sweep; `features` are those of its autoencoder. BadInput for what the pairs or the
    model do not have."""
    sources = resolve(settings, pairs)
    longest = max(
        len(tokens)
        for i, p in enumerate(pairs)
        for tokens in (p.clean, *(o.tokens for s in sources for row in s.others for o in (row[i],)))
    )
    if dimensions.max_positions is not None and longest > dimensions.max_positions:
        raise BadInput(
            f"a prompt has {longest} tokens, the model takes {dimensions.max_positions}: shorten it"
        )
    reads = resolve_reads(pairs, settings.metrics)
    layouts = make_layouts(pairs, settings, sources, reads, dimensions, features)
    names = [*settings.components, *([SETS] if layouts.table else [])]
    tail_weights = dimensions.vocab if whole_vocabulary(settings.metrics) else 2
    return arranged(layouts, names, token_budget, len(settings.metrics), tail_weights)


def arranged(
    layouts: Layouts, names: Sequence[str], token_budget: int, metric_count: int, tail_weights: int
) -> Plan:
    """The blocks and waves of some components under a budget."""
    whole = {name: layouts.grid(name) for name in names}
    costs = _Costs(layouts)
    grids = _tiled(whole, costs, token_budget)
    waves = _waves(grids, costs, token_budget, tail_weights)
    return Plan(layouts, token_budget, grids, waves, metric_count, tail_weights)


@dataclass(frozen=True)
class _Cost:
    """What rows take. tokens [pair, layer, entry] in a layer call; reads [pair, entry], the keys
    read by all queries in all layers, of all heads; rows [pair, entry]. Of a component: for one
    unit."""

    tokens: Ints
    reads: Ints
    rows: Ints

    def of_block(self, b: Block) -> _Part:
        return self.part(b.pairs, b.positions, len(b.units))

    def part(self, pairs: range, entries: range, units: int) -> _Part:
        """Of a range of pairs and entries."""
        p, e = slice(pairs.start, pairs.stop), slice(entries.start, entries.stop)
        return _Part(
            self.tokens[p, :, e].sum((0, 2)) * units,
            int(self.reads[p, e].sum()) * units,
            int(self.rows[p, e].sum()) * units,
        )


@dataclass(frozen=True)
class _Part:
    """Tokens [layer], reads and rows of some blocks."""

    tokens: Ints
    reads: int
    rows: int

    def __add__(self, other: _Part) -> _Part:
        return _Part(self.tokens + other.tokens, self.reads + other.reads, self.rows + other.rows)


class _Costs:
    """What every block takes, and what every wave carries beside its blocks."""

    def __init__(self, layouts: Layouts) -> None:
        self.layouts = layouts
        self._of: dict[tuple[str, int], _Cost] = {}
        self._beside: dict[tuple[int, int], _Cost] = {}

    def of(self, name: str, variant: Variant) -> _Cost:
        """One unit's runs of a component in a variant."""
        layout = self.layouts.layout(name, variant)
        key = (name, id(layout))  # layouts are kept
        if key not in self._of:
            self._of[key] = _cost(layout, self.layouts, variant)
        return self._of[key]

    def distinct(self, name: str) -> list[_Cost]:
        """The costs of a component in all variants, each once."""
        found = [self.of(name, v) for v in variants(self.layouts)]
        return list({id(c): c for c in found}.values())

    def beside(self, source: int, sample: int) -> _Cost:
        """Both runs of every pair, and a null patch per direction."""
        if (source, sample) not in self._beside:
            self._beside[source, sample] = _beside(self.layouts, source, sample)
        return self._beside[source, sample]


def _cost(layout: Layout, layouts: Layouts, variant: Variant) -> _Cost:
    """Cost of one unit's runs."""
    d = layouts.dimensions
    there = layouts.exists_at_all(variant)
    lengths = np.array(
        [f.length for f in layouts.frames(variant)] if there else [0] * len(layouts.pairs)
    )
    pair, entry = np.indices((len(lengths), layout.exists.shape[2]), sparse=True)
    shape = (len(lengths), d.layers + 1, layout.exists.shape[2])
    kinds = list(dict.fromkeys(d.windows))
    totals = [_total_context(max(1, lengths.max()), window) for window in kinds]
    # What rows that are first carried into a layer call add to it and to all calls after.
    tokens, reads = np.zeros(shape, np.int64), np.zeros((len(kinds), *shape), np.int64)
    for i in range(layout.exists.shape[1]):
        start, joins, exists = layout.start[:, i], layout.joins[:, i], layout.exists[:, i]
        tokens[pair, joins, entry] += exists * (lengths[:, None] - start)
        for k, total in enumerate(totals):
            reads[k][pair, joins, entry] += exists * (total[lengths][:, None] - total[start])
    tokens = tokens.cumsum(1)[:, :-1] + layout.extra
    by_layer = reads.cumsum(2)[:, :, :-1]
    read = sum(by_layer[kinds.index(w), :, i] for i, w in enumerate(d.windows))
    every = d.heads * (read + layout.extra_reads) + layout.head_reads
    return _Cost(tokens, every, layout.exists.sum(1) * layouts.reads.positions.shape[1])


def _total_context(length: int, window: int | None) -> Ints:
    """[position]: keys that the queries before a position read together."""
    context = np.minimum(np.arange(1, length + 1), window or length)
    return np.concatenate([[0], np.cumsum(context)])


def carried_runs(layouts: Layouts, source: int) -> tuple[int, ...]:
    """The sources whose runs a wave carries: its own, and those that sites name."""
    used = {source}
    if layouts.table is not None:
        used |= set(layouts.table.source[layouts.table.source != OWN].tolist())
    return tuple(sorted(s for s in used if layouts.sources[s].kind == "run"))


def null_start(layouts: Layouts, variant: Variant, pair: int) -> int:
    """The first position of a null patch's row: the first that differs from the source."""
    return int(layouts.frames(variant)[pair].differs.argmax())


def _beside(layouts: Layouts, source: int, sample: int) -> _Cost:
    """Cost of what every wave carries for its pairs: the runs, and a null patch per direction."""
    d, runs = layouts.dimensions, carried_runs(layouts, source)
    rows = []  # (pair, first position, length)
    for i, pair in enumerate(layouts.pairs):
        others = [layouts.other(s, sample, i) for s in runs]
        rows += [(i, 0, len(pair)), *((i, 0, len(o.tokens)) for o in others if o)]
        if sample < layouts.sources[source].samples:
            for direction in range(len(layouts.directions)):
                variant = Variant(direction, source, sample)
                frame = layouts.frames(variant)[i]
                rows.append((i, null_start(layouts, variant, i), frame.length))
    pair, first, length = np.array(rows).T
    count = len(layouts.pairs)
    tokens = np.bincount(pair, length - first, count).astype(np.int64)
    reads = np.zeros(count, np.int64)
    for window in d.windows:
        total = _total_context(length.max(), window)
        reads += np.bincount(pair, total[length] - total[first], count).astype(np.int64)
    read = np.bincount(pair, minlength=count) * layouts.reads.positions.shape[1]
    every = np.repeat(tokens[:, None, None], d.layers, 1)
    return _Cost(every, d.heads * reads[:, None], read[:, None])


def _tiled(whole: dict[str, Grid], costs: _Costs, budget: int) -> dict[str, Grid]:
    """Blocks as large as the budget allows: fewer pairs first, then positions, then units."""
    layouts = costs.layouts
    pairs = len(layouts.pairs)
    always = [
        costs.beside(s, n).tokens
        for s in range(len(layouts.sources))
        for n in range(layouts.samples)
    ]
    beside = np.maximum.reduce(always)

    def peak(grid: Grid) -> int:
        firsts, entries = (
            np.arange(0, pairs, grid.pair_tile),
            np.arange(0, len(grid.positions), grid.position_tile),
        )
        least = np.add.reduceat(beside, firsts, 0)
        most = 0
        for cost in costs.distinct(grid.component):
            together = np.add.reduceat(np.add.reduceat(cost.tokens, firsts, 0), entries, 2)
            most = max(most, int((together * grid.unit_tile + least).max()))
        return most

    grids = dict(whole)
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
    return grids


def _waves(
    grids: dict[str, Grid], costs: _Costs, budget: int, tail_weights: int
) -> tuple[Wave, ...]:
    """Blocks of the same pairs and source packed into waves, costliest first; waves in order of
    their cost."""
    layouts = costs.layouts
    d = layouts.dimensions
    together: dict[tuple[range, int, int], list[Block]] = {}
    for grid in grids.values():
        for block in blocks(grid):
            together.setdefault((block.pairs, block.source, block.sample), []).append(block)

    waves, reads = [], layouts.reads.positions.shape[1]
    for (pairs, source, sample), members in together.items():
        always = costs.beside(source, sample).part(pairs, range(1), 1)
        parts = [
            (b, costs.of(b.component, Variant(b.direction, source, sample)).of_block(b))
            for b in members
        ]
        parts.sort(key=lambda part: -int(part[1].tokens.sum()))
        bins: list[tuple[list[Block], _Part]] = []
        for block, part in parts:
            for i, (inside, held) in enumerate(bins):
                if (held.tokens + part.tokens).max() <= budget:
                    bins[i] = ([*inside, block], held + part)
                    break
            else:
                bins.append(([block], always + part))
        for inside, held in bins:
            flops = (
                2 * d.layer_weights * int(held.tokens.sum())
                + 4 * d.d_head * held.reads
                + 2 * d.d_model * tail_weights * held.rows
                + _encoding(layouts, inside, source, sample, held.rows // reads)
            )
            waves.append(
                Wave(
                    index=0,
                    pairs=pairs,
                    source=source,
                    sample=sample,
                    runs=carried_runs(layouts, source),
                    blocks=tuple(inside),
                    owner=False,
                    tokens=int(held.tokens.max()),
                    rows=held.rows,
                    flops=flops,
                )
            )
    waves.sort(key=lambda w: -w.flops)
    owned: set[tuple[range, int, int]] = set()
    for i, wave in enumerate(waves):
        key = (wave.pairs, wave.source, wave.sample)
        waves[i] = replace(wave, index=i, owner=key not in owned)
        owned.add(key)
    return tuple(waves)


def _encoding(
    layouts: Layouts, inside: Sequence[Block], source: int, sample: int, rows: int
) -> int:
    """FLOPs of an autoencoder: it encodes the unpatched runs once per wave if a feature is patched,
    features that sets patch where they stand, and those that metrics read in every row."""
    f = layouts.features
    if f is None:
        return 0
    tokens = rows * sum(r.metric.name == "sae_feature" for r in layouts.reads.inner)
    grids = sets = 0
    for b in inside:
        layout = layouts.layout(b.component, Variant(b.direction, source, sample))
        pairs, entries = entries_of(b)
        grids += int(b.component == "sae_feature" and layout.exists[pairs, :, entries].any())
        sets += int(layout.encoded[pairs, entries].sum())
    if grids or sets:
        tokens += sets + _base_tokens(layouts, inside[0].pairs, source, sample)
    return 2 * f.width * f.features * tokens


def _base_tokens(layouts: Layouts, pairs: range, source: int, sample: int) -> int:
    """Tokens of the unpatched runs of some pairs."""
    others = [layouts.other(s, sample, i) for s in carried_runs(layouts, source) for i in pairs]
    own = sum(len(layouts.pairs[i]) for i in pairs)
    return own + sum(len(o.tokens) for o in others if o)
