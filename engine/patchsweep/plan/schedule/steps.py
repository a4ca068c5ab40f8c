"""A wave's rows and replacements, and every layer call that they make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchsweep.plan import Ints
from patchsweep.plan.layout import CODES, NAMES, OWN
from patchsweep_kernels import Rows

NOWHERE = 1 << 40  # the first position of a row that is not carried yet
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Edit:
    """Replacements of one component by values of one source, in columns [edit].

    target: the token of the layer call that is overwritten, in `unit`; donor: the token that has
    the source's value (−1 where the source takes no run). own: a token with the activation that the
    target has before. position: the target's. row: the runs, as numbers in RowTokens.
    """

    component: str
    source: int
    target: Ints
    donor: Ints
    own: Ints
    unit: Ints
    position: Ints
    row: Ints


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
class Climbers:
    """The tokens that runs of edges and paths begin with, in columns [climber], and what they carry
    up, [send].

    A climber stands for the base token `dst`, at `position`; `first` is the first layer call that
    it is in, of a head that sends its own, `last` the last one that reads it; `mlps`: it goes
    through MLPs, else through nothing but the residual stream. Climber `of` carries the output of
    `component`, `layer` and `unit` in the base token `src` in place of that in its own.
    """

    dst: Ints
    position: Ints
    first: Ints
    last: Ints
    mlps: Bools
    of: Ints
    component: Ints
    layer: Ints
    unit: Ints
    src: Ints

    def __len__(self) -> int:
        return len(self.dst)


@dataclass(frozen=True)
class Climb:
    """What climbers do in one layer call. By the place where it is seen, what is sent: (climber,
    token with it, token without), [sent] each, by which the climber's change grows. To what the
    tokens `lifted` were gathered from, the changes `by` (climbers) are added."""

    sent: dict[str, tuple[Ints, Ints, Ints]]
    lifted: Ints
    by: Ints


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
class Embedding:
    """The tokens that are embedded: those of the base rows, then embeddings that are patched in.

    tokens, positions [token]. Noise: token `noised` takes value `slot` (of the noised positions of
    its pair) times the standard deviations of its source. `edits` replace embeddings by constants.
    """

    tokens: Ints
    positions: Ints
    noised: Ints
    pair: Ints
    source: Ints
    slot: Ints
    edits: list[Edit]


@dataclass(frozen=True)
class Runs:
    """The patched rows of a wave in packed order, [run].

    `block` counts within the wave, `cell` is the flat index in the block's values, `pair` counts
    within the wave. dst is the first base token of the destination, `base` its number among the
    base rows; a row holds `length` tokens from position `start` on and is first carried into layer
    call `joins`. `set`: whether it patches a set of sites.
    """

    block: Ints
    cell: Ints
    pair: Ints
    direction: Ints
    start: Ints
    joins: Ints
    dst: Ints
    base: Ints
    length: Ints
    set: Ints


@dataclass(frozen=True)
class Patched:
    """Every replacement of every run, in columns [place]; `donor` is a base token, −1 for none;
    `climber` the one that is the donor instead, −1 for none; `slot` numbers the injected tokens,
    −1 for none; `moved`: the donor is to be rotated."""

    run: Ints
    component: Ints
    layer: Ints
    unit: Ints
    position: Ints
    source: Ints
    donor: Ints
    call: Ints
    slot: Ints
    moved: Bools
    climber: Ints


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
                    *self._sent(layer, climber),
                ],
                row_tokens=tokens,
                base=base,
                reading=np.arange(len(self.row_pair)),
                climb=self._climb(layer, up, climber) if len(c) else None,
            )

    def _sent(self, layer: int, climber: Ints) -> list[Edit]:
        """What climbers are given in a layer call: heads, and MLPs where one goes through them."""
        c, edits = self.climbers, []
        late = c.mlps & (c.first <= layer)  # an MLP that a climber begins with is added to it
        for name, which in (("head_z", True), ("mlp_out", late[c.of])):
            own = (c.component == CODES[name]) & (c.layer == layer) & which
            if len(sent := np.flatnonzero(own)):
                of, src, unit = c.of[sent], c.src[sent], c.unit[sent]
                at, row = climber[of], np.zeros_like(of)
                edits.append(Edit(name, OWN, at, src, at, unit, c.position[of], row))
        return edits

    def _climb(self, layer: int, up: Ints, climber: Ints) -> Climb:
        c, sent = self.climbers, {}
        here, begins = c.layer == layer, c.first[c.of] == layer + (c.component == CODES["mlp_out"])
        added = ~c.mlps[c.of] | begins
        for place, name in (("resid_pre", "embed"), ("mlp_out", "mlp_out")):
            some = np.flatnonzero((c.component == CODES[name]) & here & added)
            if len(some):
                sent[place] = (c.of[some], c.src[some], c.dst[c.of[some]])
        heads = (c.component == CODES["head_z"]) & here & ~c.mlps[c.of]
        if len(of := np.unique(c.of[heads])):  # several of a layer go together
            sent["attn_out"] = (of, climber[of], c.dst[of])
        # Through MLPs a change is added once, and the climber goes on with what it has become. What
        # heads send is in their own layer's call already.
        late = c.first[up] < layer
        by = up[np.where(c.mlps[up], ~late, True)]
        return Climb(sent, climber[by], by)

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
