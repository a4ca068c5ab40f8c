"""What runs take, in tokens of every layer call: by component, variant and block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from patchsweep.plan.context import total_context
from patchsweep.plan.edge_costs import EdgeCosts
from patchsweep.plan.layout import OWN, Layout, Layouts, Variant
from patchsweep.sites import EDGES, RUN, Block, Grid, Status

Ints = NDArray[np.int64]
Map = NDArray[np.bool_]
PARTS = 1 << 12  # that are kept


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


@dataclass(frozen=True, eq=False)
class Chosen:
    """Which cells of a component are run, and as what, where not all are: `status` [layer, unit,
    column] (sites.Status), in every pair that has the column or in none. `members` [pair, column,
    entry]: what a column is in every pair; None where columns are the entries."""

    status: NDArray[np.uint8]
    members: Map | None = None

    def of(self, pairs: range, units: range, entries: range) -> NDArray[np.uint8]:
        """What cells are to be, [pair, layer, unit, entry], one pair for all where these are alike.
        An entry of several columns is what is most of: run if it is in any."""
        status = self.status[:, units.start : units.stop]
        if self.members is None:
            return status[None, :, :, entries.start : entries.stop]
        members = self.members[pairs.start : pairs.stop, :, entries.start : entries.stop]
        found = np.full((len(members), *status.shape[:2], members.shape[2]), LEAST[0], np.uint8)
        for code in LEAST[1:]:
            at = (status == code).astype(np.float32)
            found[(at[None] @ members[:, None].astype(np.float32)) > 0] = code
        return found

    def number(self, units: range) -> Ints:
        """How many of these units are run, [pair, layer, entry], pairs as in `of`."""
        count, _, entries = self.members.shape if self.members is not None else (1, 0, 0)
        entries = entries or self.status.shape[2]
        parts = (self.of(range(i, i + 1), units, range(entries)) for i in range(count))
        return np.concatenate([np.isin(part, RUN).sum(2) for part in parts])


# Of cells that are not structural, by component, direction and source (their numbers).
Choice = Mapping[tuple[str, int, int], Chosen]
LEAST = (Status.ESTIMATED, Status.NOT_FINITE, Status.AUDITED, Status.EXACT)


@dataclass(frozen=True, eq=False)
class Cost:
    """What rows take. tokens [pair, layer, entry] in a layer call; reads [pair, entry], the keys
    read by all queries in all layers, of all heads; rows [pair, entry]. Of a component: for one
    unit."""

    tokens: Ints
    reads: Ints
    rows: Ints

    def part(self, pairs: range, entries: range, units: int) -> Part:
        """Of a range of pairs and entries."""
        p, e = slice(pairs.start, pairs.stop), slice(entries.start, entries.stop)
        return Part(
            self.tokens[p, :, e].sum((0, 2)) * units,
            int(self.reads[p, e].sum()) * units,
            int(self.rows[p, e].sum()) * units,
        )


@dataclass(frozen=True)
class Part:
    """Tokens [layer], reads and rows of some blocks."""

    tokens: Ints
    reads: int
    rows: int

    def __add__(self, other: Part) -> Part:
        return Part(self.tokens + other.tokens, self.reads + other.reads, self.rows + other.rows)


class Costs:
    """What every block takes, and what every wave carries beside its blocks."""

    def __init__(self, layouts: Layouts, choice: Choice | None = None) -> None:
        self.layouts = layouts
        self._choice = choice or {}
        self._of: dict[tuple[str, Variant], Cost] = {}
        self._of_layout: dict[tuple[str, int], Cost] = {}
        self._of_units: dict[tuple[str, Variant, range], Cost] = {}
        self._beside: dict[tuple[int, int], Cost] = {}
        self._part = lru_cache(PARTS)(Cost.part)  # other units take the same

    def of(self, name: str, variant: Variant) -> Cost:
        """One unit's runs of a component in a variant."""
        if (name, variant) not in self._of:
            layout = self.layouts.layout(name, variant)
            key = (name, id(layout))  # layouts are kept
            if key not in self._of_layout:
                self._of_layout[key] = _cost(name, layout, self.layouts, variant)
            self._of[name, variant] = self._of_layout[key]
        return self._of[name, variant]

    def of_block(self, b: Block) -> Part:
        """The runs of one block."""
        name, variant = b.component, Variant(b.direction, b.source, b.sample)
        if name == EDGES:
            return self._part(self._of_receivers(variant, b.units), b.pairs, b.positions, 1)
        chosen = self._choice.get((name, b.direction, b.source))
        if chosen is None:
            return self._part(self.of(name, variant), b.pairs, b.positions, len(b.units))
        key = (name, variant, b.units)
        if key not in self._of_units:
            layout, number = self.layouts.layout(name, variant), chosen.number(b.units)
            self._of_units[key] = _cost(name, layout, self.layouts, variant, number)
        return self._part(self._of_units[key], b.pairs, b.positions, 1)

    def tiles(self, grid: Grid) -> Iterator[tuple[Cost, int]]:
        """The costs of a grid in all variants, each once, of one unit or of several that are not
        alike; and how many of that a block has."""
        every = variants(self.layouts)
        if grid.component == EDGES:
            for first in range(0, grid.units, grid.unit_tile):
                units = range(first, min(first + grid.unit_tile, grid.units))
                found = [self._of_receivers(v, units) for v in every]
                yield from ((c, 1) for c in {id(c): c for c in found}.values())
            return
        found = [self.of(grid.component, v) for v in every]
        yield from ((c, grid.unit_tile) for c in {id(c): c for c in found}.values())

    def _of_receivers(self, variant: Variant, units: range) -> Cost:
        """The edges of some receivers, by sender."""
        key = (EDGES, variant, units)
        if key not in self._of_units:
            ran = self.edges_run(variant, units)
            self._of_units[key] = Cost(*self.edges.of(variant, units, ran))
        return self._of_units[key]

    def edges_run(self, variant: Variant, units: range) -> Map | None:
        """[entry, receiver, sender] of some receivers: which edges are chosen to be run; None if
        all are."""
        chosen = self._choice.get((EDGES, variant.direction, variant.source))
        return None if chosen is None else np.isin(chosen.status[:, units], RUN)

    @cached_property
    def edges(self) -> EdgeCosts:
        return EdgeCosts(self.layouts)

    def beside(self, source: int, sample: int) -> Cost:
        """Both runs of every pair, and a null patch per direction."""
        if (source, sample) not in self._beside:
            self._beside[source, sample] = _beside(self.layouts, source, sample)
        return self._beside[source, sample]


def _cost(
    name: str,
    layout: Layout,
    layouts: Layouts,
    variant: Variant,
    number: Ints | None = None,
) -> Cost:
    """Cost of one unit's runs, or of as many units as `number` [pair, layer, entry] says."""
    d = layouts.dimensions
    runs: Ints = layout.exists.astype(np.int64)
    extra = layout.extra
    if number is not None:
        layers = layouts.layers(name)
        by_call = np.zeros((len(number), *extra.shape[1:]), np.int64)
        by_call[:, layers.start : layers.stop] = number  # added in their runs' own layers
        runs, extra = runs * number, extra * by_call
    lengths: Ints = np.zeros(len(layouts.pairs), np.int64)
    if layouts.exists_at_all(variant):
        lengths[:] = [f.length for f in layouts.frames(variant)]
    pair, entry = np.indices((len(lengths), layout.exists.shape[2]), sparse=True)
    shape = (len(lengths), d.layers + 1, layout.exists.shape[2])
    kinds = list(dict.fromkeys(d.windows))
    totals = [total_context(max(1, lengths.max()), window) for window in kinds]
    # What rows that are first carried into a layer call add to it and to all calls after.
    tokens, reads = np.zeros(shape, np.int64), np.zeros((len(kinds), *shape), np.int64)
    for i in range(layout.exists.shape[1]):
        start, joins, count = layout.start[:, i], layout.joins[:, i], runs[:, i]
        tokens[pair, joins, entry] += count * (lengths[:, None] - start)
        for k, total in enumerate(totals):
            reads[k][pair, joins, entry] += count * (total[lengths][:, None] - total[start])
    tokens = tokens.cumsum(1)[:, :-1] + extra
    by_layer = reads.cumsum(2)[:, :, :-1]
    read = sum(by_layer[kinds.index(w), :, i] for i, w in enumerate(d.windows))
    times = np.ones(1, np.int64) if number is None else number
    every, single = ((x * times).sum(1) for x in (layout.extra_reads, layout.head_reads))
    reading = d.heads * (read + every) + single
    return Cost(tokens, reading, runs.sum(1) * layouts.reads.positions.shape[1])


def carried_runs(layouts: Layouts, source: int) -> tuple[int, ...]:
    """The sources whose runs a wave carries: its own, and those that sites name."""
    used = {source}
    if layouts.table is not None:
        used |= set(layouts.table.source[layouts.table.source != OWN].tolist())
    return tuple(sorted(s for s in used if layouts.sources[s].kind == "run"))


def null_start(layouts: Layouts, variant: Variant, pair: int) -> int:
    """The first position of a null patch's row: the first that differs from the source."""
    return int(layouts.frames(variant)[pair].differs.argmax())


def _beside(layouts: Layouts, source: int, sample: int) -> Cost:
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
        total = total_context(length.max(), window)
        reads += np.bincount(pair, total[length] - total[first], count).astype(np.int64)
    read = np.bincount(pair, minlength=count) * layouts.reads.positions.shape[1]
    every = np.repeat(tokens[:, None, None], d.layers, 1)
    return Cost(every, d.heads * reads[:, None], read[:, None])


def base_tokens(layouts: Layouts, pairs: range, source: int, sample: int) -> int:
    """Tokens of the unpatched runs of some pairs."""
    others = [layouts.other(s, sample, i) for s in carried_runs(layouts, source) for i in pairs]
    own = sum(len(layouts.pairs[i]) for i in pairs)
    return own + sum(len(o.tokens) for o in others if o)
