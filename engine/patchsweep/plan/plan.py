"""A plan: the blocks and waves of a sweep, and their totals."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import BadInput
from patchsweep.inputs import BLOCKS, by_name
from patchsweep.pairs import Pair
from patchsweep.plan.chunks import Chunks, chunked
from patchsweep.plan.costs import Choice, Costs, base_tokens, entries_of, variants
from patchsweep.plan.dimensions import WHOLE, Dimensions, Offload
from patchsweep.plan.edge_costs import EdgeCosts
from patchsweep.plan.halves import split_wave
from patchsweep.plan.layout import (
    EdgeTable,
    Features,
    Layout,
    Layouts,
    PathTable,
    Reached,
    Variant,
    make_layouts,
)
from patchsweep.plan.reads import (
    TAIL_ARRAYS,
    TAIL_ELEMENTS,
    TAIL_TILE,
    resolve_reads,
    whole_vocabulary,
)
from patchsweep.plan.sources import Source, resolve
from patchsweep.plan.waves import SCORES_ARRAYS, Cut, Wave, packed_units, tiled
from patchsweep.sae import TILE as FEATURES_TILE
from patchsweep.sites import EDGES, SETS, Block, Direction, Grid
from patchsweep.spec import Sweep


@dataclass(frozen=True)
class Plan:
    """Everything a sweep will do, before it does it."""

    layouts: Layouts
    token_budget: int
    grids: dict[str, Grid]  # in blocks
    chunks: Chunks
    units: tuple[tuple[Wave, ...], ...]  # of waves that settle whole chunks together
    metric_count: int
    tail_weights: int  # vocabulary rows that multiply one read token
    cut: Cut | None = None
    offload: Offload = WHOLE
    choice: Choice = field(default_factory=dict)

    @cached_property
    def waves(self) -> tuple[Wave, ...]:
        return tuple(wave for unit in self.units for wave in unit)

    @property
    def pairs_per_block(self) -> int:
        return max(grid.pair_tile for grid in self.grids.values())

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

    def chosen(self, block: Block, pairs: range | None = None) -> NDArray[np.uint8] | None:
        """What the cells [pair, layer, unit, entry] of a block are to be if they are not
        structural, in its pairs or in some of them, one for all where these are alike; None if all
        are run."""
        found = self.choice.get((block.component, block.direction, block.source))
        if found is None:
            return None
        return found.of(pairs or block.pairs, block.units, block.positions)

    def counts(self) -> dict[str, int]:
        """Totals: cells, structural ones, those only estimated, runs, blocks, waves, tokens of the
        largest layer call, FLOPs, files (of cells and baselines), bytes (moved: weights brought in,
        at most, over all waves)."""
        cells = possible = runs = disk = 0
        value = stored_bytes(self.dimensions)
        for name, grid in self.grids.items():
            for variant in variants(self.layouts):
                if name == EDGES:
                    ran = self.edges_run(variant, range(grid.units))
                    found = self.edge_costs.counts(variant, ran)
                    cells, possible, runs = (
                        a + b for a, b in zip((cells, possible, runs), found, strict=True)
                    )
                    continue
                layout = self.layouts.layout(name, variant)
                cells += int(layout.inside.sum()) * grid.layers * grid.units
                possible += int(layout.exists.sum()) * grid.units
                chosen = self.choice.get((name, variant.direction, variant.source))
                number = grid.units if chosen is None else chosen.number(range(grid.units))
                runs += int((layout.exists * number).sum())
            disk += int(np.prod(grid.shape)) * self.metric_count * (value + 1)
        return {
            "cells": cells,
            "structural": cells - possible,
            "estimated": possible - runs,
            "runs": runs,
            "blocks": sum(len(w.blocks) for w in self.waves),
            "waves": len(self.waves),
            "peak_tokens": max((w.tokens for w in self.waves), default=0),
            "flops": sum(w.flops for w in self.waves),
            "peak_bytes": self.peak_bytes,
            "moved_bytes": self.offload.moved * sum(w.passes for w in self.waves),
            "files": self.chunks.files,
            "disk_bytes": disk,
        }

    @property
    def edge_costs(self) -> EdgeCosts:
        """What edges take, and how they are run."""
        return self._costs.edges

    def edges_run(self, variant: Variant, units: range) -> NDArray[np.bool_] | None:
        """[entry, receiver, sender] of some receivers: which edges are chosen to be run; None if
        all are."""
        return self._costs.edges_run(variant, units)

    def cells_of(self, wave: Wave) -> int:
        """Cells of the grid that a wave settles, structural ones counted."""
        return sum(int(self.inside(b).sum()) for b in wave.blocks)

    def inside(self, b: Block) -> NDArray[np.bool_]:
        """[pair, layer, unit, entry] of a block: whether the prompt has the entry; of edges,
        whether there is one and the prompt has its positions."""
        shape = (len(b.pairs), self.grids[b.component].layers, len(b.units), len(b.positions))
        if b.component == EDGES:
            found = self._of_edges(b, lambda reached: reached.inside[:, None, None])
        else:
            found = self.layout(b).inside[entries_of(b)][:, None, None]
        return np.broadcast_to(found, shape)

    def possible(self, b: Block) -> NDArray[np.bool_]:
        """[pair, layer, unit or 1, entry] of a block: where a patch can change what is read."""
        if b.component == EDGES:
            a = self._table.of_sender[b.positions.start : b.positions.stop]
            k = self._table.of_receiver[b.units.start : b.units.stop, None]
            return self._of_edges(b, lambda reached: reached.runs.exists[:, a, k])
        pairs, entries = entries_of(b)
        return self.layout(b).exists[pairs, :, entries][:, :, None]

    def _of_edges(self, b: Block, of: Callable[[Reached], NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """[pair, entry, receiver, sender] of a block, where there are edges."""
        shape = (len(b.pairs), self.grids[EDGES].layers, len(b.units), len(b.positions))
        variant = self.variant(b)
        if not self.layouts.exists_at_all(variant):
            return np.zeros(shape, bool)
        found = np.stack([of(self.layouts.reached(variant, i)) for i in b.pairs])
        return found & self._table.exist(b.units, b.positions)

    @property
    def _table(self) -> EdgeTable:
        assert self.layouts.edges is not None
        return self.layouts.edges

    def split(self, wave: Wave, depth: int) -> tuple[Wave, ...]:
        """A wave of this plan in parts (`halves.split_wave`)."""
        return split_wave(wave, depth, self._costs, self.tail_weights)

    @cached_property
    def _costs(self) -> Costs:
        return Costs(self.layouts, self.choice)

    @property
    def peak_bytes(self) -> int:
        """Upper bound of the memory that a wave takes beside the model's weights that stay, and of
        what waits for its chunk to be whole."""
        d = self.dimensions
        tokens = max((w.tokens for w in self.waves), default=0)
        rows = max((w.rows for w in self.waves), default=0)
        tail = max(TAIL_ELEMENTS, rows * TAIL_TILE) * TAIL_ARRAYS + 3 * rows * d.d_model
        scores = max((w.scores for w in self.waves), default=0) * SCORES_ARRAYS
        beside = (tail + scores + self._features) * max(4, d.bytes_per_value)
        return tokens * d.bytes_per_token + beside + self.offload.held + self._waiting

    @property
    def _waiting(self) -> int:
        """Bytes of a unit's cells with their statuses, where its chunks are more than blocks."""
        if self.chunks.grids == self.grids:
            return 0
        cells = max(
            sum(
                self.grids[b.component].layers * len(b.pairs) * len(b.units) * len(b.positions)
                for wave in unit
                for b in wave.blocks
            )
            for unit in self.units
        )
        return cells * self.metric_count * (stored_bytes(self.dimensions) + 1)

    @property
    def _features(self) -> int:
        """Features of an autoencoder that are there at one time."""
        if self.layouts.features is None:
            return 0
        base = max(
            (base_tokens(self.layouts, w.pairs, w.source, w.sample) for w in self.waves), default=0
        )
        return 2 * (base * self.layouts.features.features + FEATURES_TILE)

    @cached_property
    def hash(self) -> str:
        """Identifies the waves: equal for equal pairs, sources, dimensions, grids and budget."""
        table = self.layouts.table
        said = {
            "pairs": [_said(p) for p in self.pairs],
            "sources": [_said_of(s) for s in self.sources],
            "dimensions": _said_of_sizes(self.dimensions),
            "features": self.layouts.features and asdict(self.layouts.features),
            "grids": [asdict(g) for g in self.grids.values()],
            "members": _digest(self.layouts.positions.members),
            "sites": table
            and {k: _digest(v) for k, v in vars(table).items() if k not in ("names", "entries")},
            **({"edges": _said_of_edges(self.layouts.edges)} if self.layouts.edges else {}),
            **({"paths": _said_of_paths(self.layouts.paths)} if self.layouts.paths else {}),
            "waves": [[(b.component, b.index) for b in w.blocks] for w in self.waves],
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def make_plan(
    pairs: Sequence[Pair],
    settings: Sweep,
    dimensions: Dimensions,
    token_budget: int,
    features: Features | None = None,
    cut: Cut | None = None,
) -> Plan:
    """Plan a sweep; `features` are those of its autoencoder, `cut` that of results that go on.
    BadInput for what the pairs or the model do not have."""
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
    names += [*([EDGES] if layouts.edges else []), *layouts.paths]
    tail_weights = dimensions.vocab if whole_vocabulary(settings.metrics) else 2
    costs = Costs(layouts)
    grids = tiled({name: layouts.grid(name) for name in names}, costs, token_budget, cut)
    if (number := sum(math.prod(grid.tiles) for grid in grids.values())) > BLOCKS:
        raise BadInput(
            f"the sweep has {number:,} blocks, at most {BLOCKS:,} can be planned: raise "
            "token_budget, or make several sweeps"
        )
    count = len(settings.metrics)
    estimated = settings.prefilter is not None or settings.estimate is not False
    chunks = chunked(
        grids,
        arrays=(3 if estimated else 2) * count,
        baselines=2 * count,
        value=stored_bytes(dimensions),
        blocks=cut.blocks if cut else None,
    )
    units = packed_units(grids, chunks.grids, costs, token_budget, tail_weights, cut)
    return Plan(layouts, token_budget, grids, chunks, units, count, tail_weights, cut)


def narrowed(plan: Plan, choice: Choice) -> Plan:
    """The same blocks with only chosen cells run, packed into waves anew."""
    costs = Costs(plan.layouts, choice)
    units = packed_units(
        plan.grids, plan.chunks.grids, costs, plan.token_budget, plan.tail_weights, plan.cut
    )
    return replace(plan, units=units, choice=choice)


def stored_bytes(dimensions: Dimensions) -> int:
    """Bytes of a number in the results."""
    return 8 if dimensions.bytes_per_value == 8 else 4


def _said(pair: Pair) -> dict[str, object]:
    said = {k: v for k, v in vars(pair).items() if k != "origin"}
    return {k: dict(v) if k in ("labels", "others") else v for k, v in said.items()}


def _said_of_sizes(dimensions: Dimensions) -> dict[str, object]:
    """Without what says nothing more: so older plans have the same hash."""
    d = dimensions
    usual = {"d_qk": d.d_head, "uneven": (), "parallel": d.parallel}
    return {k: v for k, v in asdict(d).items() if k not in usual or v != usual[k]}


def _said_of_edges(table: EdgeTable) -> list[object]:
    members, parallel = _digest(table.positions.members), list(table.dimensions.parallel)
    return [table.asked.through, members, parallel]


def _said_of_paths(paths: Mapping[str, PathTable]) -> dict[str, object]:
    return {
        name: [
            table.through_mlps,
            _digest(table.positions.members),
            _digest(table.below),
            [x.tolist() for x in (*table.senders, *table.receivers)],
        ]
        for name, table in paths.items()
    }


def _said_of(source: Source) -> dict[str, object]:
    given = by_name(source.given.model_dump(mode="json")) if source.given else None
    others = [[(o.tokens, o.align.tolist(), o.noised) for o in row] for row in source.others]
    return {"name": source.name, "given": given, "others": others}


def _digest(array: NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
