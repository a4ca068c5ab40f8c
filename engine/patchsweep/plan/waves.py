"""Blocks as large as the budget allows, and the waves that they are packed into."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from patchsweep.errors import BadInput
from patchsweep.plan.chunks import MOST_BLOCKS
from patchsweep.plan.costs import Costs, Part, base_tokens, carried_runs, entries_of
from patchsweep.plan.layout import Variant
from patchsweep.sites import EDGES, Block, Grid, blocks

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
    baselines of their pairs. `runs` are the sources whose runs are carried beside the clean one.
    What it takes is told for the wavefront, or for full forwards (`backends.stacked`)."""

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
    passes: int = 1  # over the weights
    scores: int = SCORES_ELEMENTS


@dataclass(frozen=True)
class Cut:
    """How a sweep that goes on is cut: blocks have `most` pairs at most, no wave joins blocks of
    the first `apart` pairs with others, and chunks hold `blocks` at most (None: as in a new one).
    """

    most: int
    apart: int = 0
    blocks: int | None = None


def tiled(
    whole: dict[str, Grid], costs: Costs, budget: int, cut: Cut | None = None
) -> dict[str, Grid]:
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
        for cost, times in costs.tiles(grid):
            together = np.add.reduceat(np.add.reduceat(cost.tokens, firsts, 0), entries, 2)
            most = max(most, int((together * times + least).max()))
        return most

    widest = min(cut.most, pairs) if cut else pairs
    grids = {name: replace(grid, pair_tile=widest) for name, grid in whole.items()}
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


@dataclass(frozen=True)
class _Load:
    """Blocks that go up the layers together, and what they take with all that goes beside them."""

    pairs: range
    source: int
    sample: int
    blocks: list[Block]
    part: Part

    def takes(self, more: Part, budget: int) -> bool:
        return int((self.part.tokens + more.tokens).max()) <= budget


def packed_units(
    grids: dict[str, Grid],
    chunks: dict[str, Grid],
    costs: Costs,
    budget: int,
    tail_weights: int,
    cut: Cut | None,
) -> tuple[tuple[Wave, ...], ...]:
    """All blocks as waves, in units: waves that settle whole chunks together. Units and the waves
    in them are in order of their cost."""
    if grids == chunks:
        every = (block for grid in grids.values() for block in blocks(grid))
        return tuple(numbered(alone(every, costs, budget, tail_weights, cut)))
    units = [
        _waves(unit, costs, budget, tail_weights, cut) for unit in _units(grids, chunks, costs)
    ]
    units.sort(key=lambda unit: -sum(w.flops for w in unit))
    return tuple(numbered(units))


def alone(
    members: Iterable[Block], costs: Costs, budget: int, tail_weights: int, cut: Cut | None = None
) -> list[list[Wave]]:
    """Blocks as waves, each a unit."""
    return [[wave] for wave in _waves(members, costs, budget, tail_weights, cut)]


def numbered(units: Iterable[Sequence[Wave]]) -> Iterator[tuple[Wave, ...]]:
    """The same, numbered one after another; of all units that settle some pairs of a source the
    first owns their baselines, and in it the first wave of each pair."""
    count, owned = itertools.count(), set()
    for unit in units:
        pairs = min(w.pairs.start for w in unit), max(w.pairs.stop for w in unit)
        settled = (unit[0].source, unit[0].sample, *pairs)
        own = {w.pairs for w in unit} if settled not in owned else set()
        owned.add(settled)
        out = []
        for wave in unit:
            out.append(replace(wave, index=next(count), owner=wave.pairs in own))
            own.discard(wave.pairs)
        yield tuple(out)


def _units(grids: dict[str, Grid], chunks: dict[str, Grid], costs: Costs) -> Iterator[list[Block]]:
    """The blocks of chunks of the same pairs and source: of one chunk, or of small ones that
    together take no more than the costliest of all, MOST_BLOCKS at most."""
    size = {
        (name, chunk.index): int(costs.of_block(chunk).tokens.sum())
        for name, grid in chunks.items()
        for chunk in blocks(grid)
    }
    most = max(size.values())
    held: dict[tuple[str, int], list[Block]] = {}
    for name, grid in grids.items():
        for block in blocks(grid):
            held.setdefault((name, chunks[name].number(block)), []).append(block)
    together: dict[tuple[int, int, range], list[tuple[str, int]]] = {}
    for name, grid in chunks.items():
        for chunk in blocks(grid):
            of = (chunk.source, chunk.sample, chunk.pairs)
            together.setdefault(of, []).append((name, chunk.index))
    for members in together.values():
        members.sort(key=lambda key: -size[key])
        unit: list[Block] = []
        taken = 0
        for key in members:
            more = len(unit) + len(held[key])
            if unit and (taken + size[key] > most or more > MOST_BLOCKS):
                yield unit
                unit, taken = [], 0
            unit, taken = unit + held[key], taken + size[key]
        yield unit


def _waves(
    members: Iterable[Block], costs: Costs, budget: int, tail_weights: int, cut: Cut | None
) -> list[Wave]:
    """Blocks as waves, in order of their cost."""
    together: dict[tuple[int, int, range], list[Block]] = {}
    for block in members:
        together.setdefault((block.source, block.sample, block.pairs), []).append(block)
    loads: list[_Load] = []
    for (source, sample, pairs), same in together.items():
        loads += _packed(pairs, source, sample, same, costs, budget)
    waves = [_wave(load, costs, tail_weights) for load in _joined(loads, budget, cut)]
    return sorted(waves, key=lambda w: -w.flops)


def _packed(
    pairs: range, source: int, sample: int, members: list[Block], costs: Costs, budget: int
) -> list[_Load]:
    """Blocks of the same pairs and source put together, costliest first, each where it fits."""
    always = costs.beside(source, sample).part(pairs, range(1), 1)
    parts = [(b, costs.of_block(b)) for b in members]
    parts.sort(key=lambda part: -int(part[1].tokens.sum()))
    held: list[list[tuple[Block, Part]]] = []
    tokens = np.tile(always.tokens, (len(members), 1))  # [load, layer]
    for block, part in parts:
        fits = (tokens[: len(held)] + part.tokens <= budget).all(1)
        at = int(fits.argmax()) if fits.any() else len(held)
        if at == len(held):
            held.append([])
        held[at].append((block, part))
        tokens[at] += part.tokens
    return [
        _Load(
            pairs,
            source,
            sample,
            [block for block, _ in some],
            Part(
                tokens[at],
                always.reads + sum(part.reads for _, part in some),
                always.rows + sum(part.rows for _, part in some),
            ),
        )
        for at, some in enumerate(held)
    ]


def _joined(loads: Sequence[_Load], budget: int, cut: Cut | None) -> list[_Load]:
    """Pairs that follow one another, each with all their blocks in one load, put together."""
    apart = cut.apart if cut else 0
    alone = Counter((x.source, x.sample, x.pairs) for x in loads)
    out: list[_Load] = []
    for load in sorted(loads, key=lambda x: (x.source, x.sample, x.pairs.start)):
        last = out[-1] if out else None
        if (
            last is not None
            and (last.source, last.sample, last.pairs.stop)
            == (load.source, load.sample, load.pairs.start)
            and alone[load.source, load.sample, load.pairs] == 1
            and alone[last.source, last.sample, last.blocks[-1].pairs] == 1
            and (last.pairs.stop <= apart) == (load.pairs.stop <= apart)
            and last.takes(load.part, budget)
        ):
            pairs = range(last.pairs.start, load.pairs.stop)
            whole = [*last.blocks, *load.blocks]
            out[-1] = replace(last, pairs=pairs, blocks=whole, part=last.part + load.part)
        else:
            out.append(load)
    return out


def _wave(load: _Load, costs: Costs, tail_weights: int) -> Wave:
    d, held = costs.layouts.dimensions, load.part
    return Wave(
        index=0,
        pairs=load.pairs,
        source=load.source,
        sample=load.sample,
        runs=carried_runs(costs.layouts, load.source),
        blocks=tuple(load.blocks),
        owner=False,
        tokens=int(held.tokens.max()),
        rows=held.rows,
        flops=2 * d.layer_weights * int(held.tokens.sum())
        + 4 * d.d_head * held.reads
        + 2 * d.d_model * tail_weights * held.rows
        + _encoding(load, costs),
    )


def _encoding(load: _Load, costs: Costs) -> int:
    """FLOPs of an autoencoder: it encodes the unpatched runs once per wave if a feature is patched,
    features that sets patch where they stand, and those that metrics read in every row."""
    layouts = costs.layouts
    f = layouts.features
    if f is None:
        return 0
    rows = load.part.rows // layouts.reads.positions.shape[1]
    tokens = rows * sum(r.metric.name == "sae_feature" for r in layouts.reads.inner)
    grids = sets = 0
    for b in (b for b in load.blocks if b.component != EDGES):
        grids += int(b.component == "sae_feature" and costs.of_block(b).rows > 0)
        layout = layouts.layout(b.component, Variant(b.direction, b.source, b.sample))
        sets += int(layout.encoded[entries_of(b)].sum())
    if grids or sets:
        tokens += sets + base_tokens(layouts, load.pairs, load.source, load.sample)
    flops: int = 2 * f.width * f.features * tokens
    return flops
