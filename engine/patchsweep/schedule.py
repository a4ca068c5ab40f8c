"""A wave as index arrays: which token goes where in every layer call. Pure, no tensors.

The packed tokens of a layer call are [base rows | patched rows | injected tokens]. The base rows
are the clean and the corrupt prompt of every pair. Patched rows are grouped by (pair, direction,
first position); the rows of a group share the destination's prefix. What enters a layer is gathered
from what left the layer below: one index array moves, repeats, injects and patches at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchsweep.plan import Cells, Ints, Plan, Wave, differs
from patchsweep.sites import Block
from patchsweep_kernels import Rows

NULL = -1  # the block of null patches, which belong to none


@dataclass(frozen=True)
class Edit:
    """Injected tokens that take over an activation (one unit of it) of base tokens. [edit]"""

    target: Ints
    source: Ints
    unit: Ints


@dataclass(frozen=True)
class Step:
    """One layer call, or at the end what the tail reads.

    gather [token]: for every packed token, which token of the layer below's output (of the
    embedding, at the first layer) it is. positions [token]. rows: who attends to whom. The tokens
    from `injected` on stand for the base tokens `copied` [injected] with an activation edited.
    """

    gather: Ints
    positions: Ints
    rows: list[Rows]
    injected: int
    copied: Ints
    edits: dict[str, Edit]


@dataclass(frozen=True)
class Runs:
    """The patched rows of a wave in packed order, [run].

    `block` counts within the wave, `cell` is the flat index in the block's values, `pair` counts
    within the wave. dst and src are the first base tokens of the two prompts; a row holds `length`
    tokens from position `start` on and is first carried into layer `joins`.
    """

    component: Ints
    block: Ints
    cell: Ints
    pair: Ints
    direction: Ints
    layer: Ints
    unit: Ints
    start: Ints
    joins: Ints
    dst: Ints
    src: Ints
    length: Ints


@dataclass(frozen=True)
class Schedule:
    """The base tokens, runs and layer calls of one wave.

    token_run, token_position and token_injected list every patched token of every run.
    """

    tokens: Ints
    positions: Ints
    lengths: Ints  # [pair]
    offsets: Ints  # [pair] first base token of the clean prompt; the corrupt one follows
    components: list[str]
    runs: Runs
    token_run: Ints
    token_position: Ints
    token_injected: NDArray[np.bool_]
    layers: int

    def steps(self) -> Iterator[Step]:
        """Every layer's call from the bottom up, then the tail's: both prompts' last tokens per
        pair [pair, clean and corrupt], followed by those of the runs."""
        runs, base = self.runs, len(self.tokens)
        group = _group(runs)
        at = np.zeros(len(runs.start), np.int64)  # first token of each row below
        slot = np.zeros(len(self.token_run), np.int64)  # of each injected token below
        for layer in range(self.layers + 1):
            alive = np.flatnonzero(runs.joins <= layer)
            born = runs.joins == layer
            tail = layer == self.layers
            skip = runs.length - 1 if tail else np.zeros_like(runs.length)
            count = runs.length - skip
            row, offset = ragged(count[alive])
            run = alive[row]
            source = np.where(born, runs.dst + runs.start, at)[run] + skip[run] + offset
            here = np.zeros_like(at)
            here[alive] = np.cumsum(count[alive]) - count[alive]

            place = self.token_position - (runs.start + skip)[self.token_run]
            new = born[self.token_run] & (place >= 0)
            r = self.token_run[new]
            source[here[r] + place[new]] = np.where(
                self.token_injected[new], slot[new], runs.src[r] + self.token_position[new]
            )
            if tail:
                last = np.stack([self.offsets, self.offsets + self.lengths], 1).ravel()
                last += np.repeat(self.lengths, 2) - 1
                gather = np.concatenate([last, source])
                yield Step(gather, gather, [], len(gather), gather[:0], {})
                return
            at = base + here
            inject = np.flatnonzero(self.token_injected & (runs.layer[self.token_run] == layer))
            slot[inject] = base + len(source) + np.arange(len(inject))
            copied = runs.dst[self.token_run[inject]] + self.token_position[inject]
            yield Step(
                gather=np.concatenate([np.arange(base), source, copied]),
                positions=np.concatenate(
                    [self.positions, runs.start[run] + offset, self.token_position[inject]]
                ),
                rows=self._rows(alive, at, group),
                injected=base + len(source),
                copied=copied,
                edits=self._edits(inject, slot),
            )

    def _edits(self, inject: Ints, slot: Ints) -> dict[str, Edit]:
        run = self.token_run[inject]
        edits = {}
        for code in np.unique(self.runs.component[run]):
            mine = self.runs.component[run] == code
            source = self.runs.src[run] + self.token_position[inject]
            edits[self.components[code]] = Edit(
                slot[inject][mine], source[mine], self.runs.unit[run][mine]
            )
        return edits

    def _rows(self, alive: Ints, at: Ints, group: Ints) -> list[Rows]:
        runs = self.runs
        rows = [
            Rows(int(offset), 2, int(length))
            for offset, length in zip(self.offsets, self.lengths, strict=True)
        ]
        _, first, count = np.unique(group[alive], return_index=True, return_counts=True)
        for r, n in zip(alive[first], count, strict=True):
            rows.append(
                Rows(int(at[r]), int(n), int(runs.length[r]), int(runs.dst[r]), int(runs.start[r]))
            )
        return rows


def make_schedule(plan: Plan, wave: Wave) -> Schedule:
    """Lay a wave out."""
    pairs = [plan.pairs[i] for i in wave.pairs]
    lengths = np.array([len(p) for p in pairs])
    offsets = np.cumsum(2 * lengths) - 2 * lengths
    names = list(plan.cells)
    parts = [_null(plan, wave)]
    for number, block in enumerate(wave.blocks):
        parts.append(_of_block(plan.cells[block.component], names, block, number))
    columns = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    pair = columns["pair"]
    columns["length"] = lengths[pair] - columns["start"]
    noise = np.array([d == "noise" for d in plan.directions])[columns["direction"]]
    columns["dst"] = offsets[pair] + np.where(noise, 0, lengths[pair])
    columns["src"] = offsets[pair] + np.where(noise, lengths[pair], 0)
    keys = ("unit", "layer", "component", "joins", "start", "direction", "pair")
    order = np.lexsort([columns[k] for k in keys])
    runs = Runs(**{k: v[order] for k, v in columns.items()})

    token_run, token_position = _patched_tokens(plan, wave, runs, names)
    injected = np.array([plan.cells[n].injected for n in names])
    return Schedule(
        tokens=np.concatenate([np.array(x) for p in pairs for x in (p.clean, p.corrupt)]),
        positions=np.concatenate([np.arange(n) for n in np.repeat(lengths, 2)]),
        lengths=lengths,
        offsets=offsets,
        components=names,
        runs=runs,
        token_run=token_run,
        token_position=token_position,
        token_injected=injected[runs.component[token_run]],
        layers=plan.dimensions.layers,
    )


def _null(plan: Plan, wave: Wave) -> dict[str, Ints]:
    """A null patch per pair and direction: a row from the first differing token, not patched."""
    pair, direction = np.divmod(
        np.arange(len(wave.pairs) * len(plan.directions)), len(plan.directions)
    )
    first = np.array([differs(plan.pairs[i]).argmax() for i in wave.pairs])
    zero = np.zeros_like(pair)
    return {
        "component": zero,
        "block": zero + NULL,
        "cell": zero,
        "pair": pair,
        "direction": direction,
        "layer": zero - 1,
        "unit": zero,
        "start": first[pair],
        "joins": zero,
    }


def _of_block(c: Cells, names: list[str], block: Block, number: int) -> dict[str, Ints]:
    """The runs of one block."""
    part = np.s_[
        block.pairs.start : block.pairs.stop, :, block.positions.start : block.positions.stop
    ]
    exists = c.exists[part]
    pair, layer, entry = (np.repeat(a, len(block.units)) for a in np.nonzero(exists))
    unit = np.tile(np.arange(len(block.units)), int(exists.sum()))
    shape = (len(block.pairs), exists.shape[1], len(block.units), exists.shape[2])
    return {
        "component": np.full_like(pair, names.index(c.grid.component)),
        "block": np.full_like(pair, number),
        "cell": np.ravel_multi_index((pair, layer, unit, entry), shape),
        "pair": pair,
        "direction": np.full_like(pair, block.direction),
        "layer": layer,
        "unit": block.units.start + unit,
        "start": c.start[part][pair, layer, entry],
        "joins": layer + c.joins,
    }


def _patched_tokens(plan: Plan, wave: Wave, runs: Runs, names: list[str]) -> tuple[Ints, Ints]:
    """(run, position) of every patched token."""
    single = np.array([plan.cells[n].places is None for n in names])[runs.component]
    run = [np.flatnonzero(single & (runs.block != NULL))]
    position = [runs.start[run[0]]]
    for code, name in enumerate(names):
        places = plan.cells[name].places
        if places is not None:
            mine = np.flatnonzero((runs.component == code) & (runs.block != NULL))
            at = places[wave.pairs.start + runs.pair[mine], runs.layer[mine]]
            which, where = np.nonzero(at)
            run.append(mine[which])
            position.append(where)
    return np.concatenate(run), np.concatenate(position)


def _group(runs: Runs) -> Ints:
    """[run]: numbers the rows that share a destination and a first position."""
    change = np.zeros(len(runs.pair), bool)
    for column in (runs.pair, runs.direction, runs.start):
        change[1:] |= column[1:] != column[:-1]
    return np.cumsum(change)


def ragged(lengths: Ints) -> tuple[Ints, Ints]:
    """(row, offset) of every token of rows that lie one after another."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    offset = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return row, offset
