"""A wave's rows and replacements, and every layer call that they make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from patchsweep.plan import Ints
from patchsweep.plan.layout import CODES, NAMES
from patchsweep.plan.schedule.climb import Climb, Climbers, climb_of, given
from patchsweep.plan.schedule.columns import Bools, Edit, Embedding, Patched, Runs
from patchsweep_kernels import Rows

NOWHERE = 1 << 40  # the first position of a row that is not carried yet


@dataclass(frozen=True)
class RowTokens:
    """Where the tokens of every row are in a call: of base rows and then of runs, in columns [row].

    From position `start` on a row's tokens lie one after another from `first`; those before are the
    destination's, from `prefix`.
    """

    start: Ints
    first: Ints
    prefix: Ints

    def token(self, row: Ints, position: Ints) -> Ints:
        """The token of a row at a position; the arguments broadcast."""
        own = self.first[row] + position - self.start[row]
        return np.where(position >= self.start[row], own, self.prefix[row] + position)


@dataclass(frozen=True)
class Step:
    """One layer call, or at the end what the tail reads.

    gather [token]: for every packed token, which token of the layer below's output (of the
    embedding, at the first layer) it is. positions [token]. rows: who attends to whom. The z of the
    tokens `borrowers` is that of the tokens `lenders`. `edits` are in the order of the forward. The
    first `base` tokens are those of unpatched runs. Inside, metrics read the rows `reading`.
    """

    gather: Ints
    positions: Ints
    rows: list[Rows]
    borrowers: Ints
    lenders: Ints
    edits: list[Edit]
    row_tokens: RowTokens
    base: int
    reading: Ints
    climb: Climb | None = None


@dataclass(frozen=True)
class Schedule:
    """The base rows, runs and layer calls of one wave."""

    embedding: Embedding
    base_offset: Ints  # [base row] its first token
    base_length: Ints  # [base row]
    # Of every row, base rows first: its pair within the wave; where logits are read and activations
    # inside (for attention, with the key), −1 for none: [row], [row, read], [row, inner metric].
    row_pair: Ints
    reads: Ints
    inner: Ints
    keys: Ints
    runs: Runs
    patched: Patched
    injected_run: Ints  # [injected]
    injected_position: Ints
    injected_call: Ints
    injected_attends: Bools
    layers: int
    climbers: Climbers

    @property
    def base(self) -> int:
        """How many tokens the base rows have."""
        return int(self.base_length.sum())

    def steps(self) -> Iterator[Step]:
        """Every layer's call from the bottom up, then what the tail reads."""
        runs, base = self.runs, self.base
        group = _group(runs)
        at = np.zeros(len(runs.start), np.int64)  # first token of each row below
        slot = np.zeros(len(self.injected_run), np.int64)  # token of each injected one below
        climber = np.zeros(len(self.climbers), np.int64)  # and of each climber
        for layer in range(self.layers + 1):
            alive = np.flatnonzero(runs.joins <= layer)
            born = runs.joins == layer
            row, offset = ragged(runs.length[alive])
            run = alive[row]
            source = np.where(born, runs.dst + runs.start, at)[run] + offset
            here = np.zeros_like(at)
            here[alive] = np.cumsum(runs.length[alive]) - runs.length[alive]

            new = np.flatnonzero(born[self.injected_run])
            r = self.injected_run[new]
            source[here[r] + self.injected_position[new] - runs.start[r]] = slot[new]
            if layer == 0:
                self._embed(source, here)
            at = base + here
            tokens = RowTokens(
                start=np.concatenate(
                    [
                        np.zeros_like(self.base_offset),
                        np.where(runs.joins <= layer, runs.start, NOWHERE),
                    ]
                ),
                first=np.concatenate([self.base_offset, at]),
                prefix=np.concatenate([self.base_offset, runs.dst]),
            )
            inject = np.flatnonzero(self.injected_call == layer)
            slot[inject] = base + len(source) + np.arange(len(inject))
            copied = runs.dst[self.injected_run[inject]] + self.injected_position[inject]

            here_patched = np.flatnonzero(self.patched.call == layer)
            moved = here_patched[self.patched.moved[here_patched]]
            donors = self.patched.donor[moved]
            donor_slot = np.full(len(self.patched.run), -1)
            donor_slot[moved] = base + len(source) + len(inject) + np.arange(len(moved))
            silent = inject[~self.injected_attends[inject]]
            c = self.climbers
            up = np.flatnonzero((c.first <= layer) & (layer <= c.last))
            below = np.where(c.mlps & (c.first < layer), climber, c.dst)[up]
            climber[up] = base + len(source) + len(inject) + len(moved) + np.arange(len(up))
            yield Step(
                gather=np.concatenate([np.arange(base), source, copied, donors, below]),
                positions=np.concatenate(
                    [
                        self.embedding.positions[:base],
                        runs.start[run] + offset,
                        self.injected_position[inject],
                        self.patched.position[moved],
                        c.position[up],
                    ]
                ),
                rows=[*self._rows(alive, at, group), *self._queries(inject, slot)],
                borrowers=np.concatenate([slot[silent], donor_slot[moved], climber[up]]),
                lenders=np.concatenate(
                    [
                        runs.dst[self.injected_run[silent]] + self.injected_position[silent],
                        donors,
                        c.dst[up],
                    ]
                ),
                edits=[
                    *self._edits(here_patched, tokens, slot, donor_slot, climber),
                    *given(self.climbers, layer, climber),
                ],
                row_tokens=tokens,
                base=base,
                reading=np.arange(len(self.row_pair)),
                climb=climb_of(c, layer, up, climber) if len(c) else None,
            )

    def _embed(self, source: Ints, here: Ints) -> None:
        """Rows whose embeddings are patched take them from behind those of the base rows."""
        mine = np.flatnonzero(self.patched.component == CODES["embed"])
        run = self.patched.run[mine]
        place = here[run] + self.patched.position[mine] - self.runs.start[run]
        source[place] = self.base + np.arange(len(mine))

    def _edits(
        self, mine: Ints, tokens: RowTokens, slot: Ints, donor_slot: Ints, climber: Ints
    ) -> list[Edit]:
        """The replacements of one layer call, by component in the order of the forward."""
        p, bases = self.patched, len(self.base_offset)
        edits = []
        mine = mine[p.component[mine] != CODES["embed"]]
        keys = np.stack([p.component[mine], p.source[mine]])
        for code, source in np.unique(keys, axis=1).T:
            chosen = mine[(keys == [[code], [source]]).all(0)]
            run, position = p.run[chosen], p.position[chosen]
            injected = p.slot[chosen] >= 0
            target = tokens.token(bases + run, position)
            target[injected] = slot[p.slot[chosen][injected]]
            donor = np.where(donor_slot[chosen] >= 0, donor_slot[chosen], p.donor[chosen])
            climbs = p.climber[chosen] >= 0
            donor[climbs] = climber[p.climber[chosen][climbs]]
            fresh = self.runs.set[run] == 0
            own = np.where(fresh, self.runs.dst[run] + position, target)
            edits.append(
                Edit(
                    NAMES[code],
                    int(source),
                    target,
                    donor,
                    own,
                    p.unit[chosen],
                    position,
                    bases + run,
                )
            )
        return edits

    def _rows(self, alive: Ints, at: Ints, group: Ints) -> list[Rows]:
        runs = self.runs
        length = self.base_length
        new = np.flatnonzero(np.diff(length, prepend=-1))  # neighbours of one length go together
        count = np.diff(np.append(new, len(length)))
        rows = [
            Rows(int(self.base_offset[i]), int(n), int(length[i]))
            for i, n in zip(new, count, strict=True)
        ]
        _, first, count = np.unique(group[alive], return_index=True, return_counts=True)
        for r, n in zip(alive[first], count, strict=True):
            rows.append(
                Rows(int(at[r]), int(n), int(runs.length[r]), int(runs.dst[r]), int(runs.start[r]))
            )
        return rows

    def _queries(self, inject: Ints, slot: Ints) -> list[Rows]:
        """Injected tokens that attend: rows of one token behind the destination's prefix."""
        mine = inject[self.injected_attends[inject]]
        if not len(mine):
            return []
        dst, position = self.runs.dst[self.injected_run[mine]], self.injected_position[mine]
        change = np.ones(len(mine), bool)
        change[1:] = (dst[1:] != dst[:-1]) | (position[1:] != position[:-1])
        first = np.flatnonzero(change)
        count = np.diff(np.append(first, len(mine)))
        return [
            Rows(int(slot[mine[i]]), int(n), 1, int(dst[i]), int(position[i]))
            for i, n in zip(first, count, strict=True)
        ]


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
