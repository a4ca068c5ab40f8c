"""A wave as batches of full forwards: its unpatched and patched runs, one beside another. Pure.

The same runs and replacements as on the wavefront (`plan.schedule.Schedule`), told in the terms of
whole sequences: for models that only run as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from patchsweep.plan import Ints, Plan, Wave, total_context
from patchsweep.plan.layout import CODES, NAMES
from patchsweep.plan.schedule import (
    Edit,
    Embedding,
    Patched,
    RowTokens,
    Runs,
    Schedule,
    Step,
    make_schedule,
)


@dataclass(frozen=True, eq=False)
class Batch:
    """Some rows of a schedule (base rows first, then runs, as it numbers them) as sequences.

    tokens [row, position], padded on the right, where padding cannot be seen from earlier tokens.
    `new` are the rows that no batch before had: the base rows of a pair are in all of its batches.
    """

    schedule: Schedule
    rows: Ints
    new: Ints
    length: int

    @property
    def bases(self) -> int:
        return len(self.schedule.base_offset)

    @cached_property
    def _copied(self) -> Ints:
        """[row]: the base row whose tokens it has."""
        known = np.concatenate([np.arange(self.bases), self.schedule.runs.base])
        return known[self.rows]

    @cached_property
    def tokens(self) -> Ints:
        s, slots = self.schedule, np.arange(self.length)
        inside = slots < s.base_length[self._copied][:, None]
        token = np.where(inside, s.base_offset[self._copied][:, None] + slots, 0)
        return np.where(inside, s.embedding.tokens[token], 0)

    @cached_property
    def _first(self) -> Ints:
        """[row of the schedule]: its first token in this batch."""
        first = np.full(self.bases + len(self.schedule.runs.pair), -self.length)
        first[self.rows] = np.arange(len(self.rows)) * self.length
        return first

    @property
    def _base(self) -> int:
        """Tokens of its base rows, which come first."""
        return self.length * int((self.rows < self.bases).sum())

    @property
    def encoded(self) -> int:
        """Tokens whose features are computed because some are patched: of the base rows, and where
        sets patch rows that have changed before."""
        p = self.schedule.patched
        mine = self._mine[p.component[self._mine] == CODES["sae_feature"]]
        in_sets = int((self.schedule.runs.set[p.run[mine]] != 0).sum())
        return self._base + in_sets if len(mine) else 0

    @cached_property
    def _mine(self) -> Ints:
        """The replacements of the batch's runs."""
        return np.flatnonzero(self._first[self.bases + self.schedule.patched.run] >= 0)

    def _here(self, base_token: Ints) -> Ints:
        """Tokens of base rows in this batch; −1 stays."""
        offset = self.schedule.base_offset
        row = np.searchsorted(offset, base_token, side="right") - 1
        return np.where(base_token < 0, -1, self._first[row] + base_token - offset[row])

    def step(self, layer: int) -> Step:
        """What is replaced and read in one layer; the last is what the tail reads."""
        none = np.zeros(0, np.int64)
        p = self.schedule.patched
        here = (p.call[self._mine] == layer) & (p.component[self._mine] != CODES["embed"])
        start = np.zeros_like(self._first)
        return Step(
            gather=none,
            positions=np.tile(np.arange(self.length), len(self.rows)),
            rows=[],
            borrowers=none,
            lenders=none,
            edits=self._edits(self._mine[here]),
            row_tokens=RowTokens(start, self._first, start),
            base=self._base,
            reading=self.new,
        )

    @cached_property
    def embedding(self) -> Embedding:
        """The tokens of all rows, with the noise of base rows and all that replaces embeddings."""
        e, offset = self.schedule.embedding, self.schedule.base_offset
        base = int(self.schedule.base_length.sum())
        noised = np.flatnonzero(e.noised < base)  # others are patched in below
        of = np.searchsorted(offset, e.noised[noised], side="right") - 1
        row, which = np.nonzero(self._copied[:, None] == of)
        position = e.noised[noised] - offset[of]
        chosen = noised[which]
        mine = self._mine[self.schedule.patched.component[self._mine] == CODES["embed"]]
        return replace(
            e,
            tokens=self.tokens.ravel(),
            positions=np.tile(np.arange(self.length), len(self.rows)),
            noised=row * self.length + position[which],
            pair=e.pair[chosen],
            source=e.source[chosen],
            slot=e.slot[chosen],
            edits=self._edits(mine),
        )

    def _edits(self, mine: Ints) -> list[Edit]:
        p, runs = self.schedule.patched, self.schedule.runs
        edits = []
        keys = np.stack([p.component[mine], p.source[mine]])
        for code, source in np.unique(keys, axis=1).T:
            chosen = mine[(keys == [[code], [source]]).all(0)]
            run, position = p.run[chosen], p.position[chosen]
            target = self._first[self.bases + run] + position
            fresh = self._here(runs.dst[run] + position)
            edits.append(
                Edit(
                    component=NAMES[code],
                    source=int(source),
                    target=target,
                    donor=self._here(p.donor[chosen]),
                    own=np.where(runs.set[run] == 0, fresh, target),
                    unit=p.unit[chosen],
                    position=position,
                    row=self.bases + run,
                )
            )
        return edits


def batches(schedule: Schedule, tokens: int) -> Iterator[Batch]:
    """Batches of about `tokens` tokens: of one pair each; of one length each if nothing is
    patched."""
    bases, length = len(schedule.base_offset), schedule.base_length
    if not len(schedule.runs.pair):
        for n in np.unique(length):
            rows, size = np.flatnonzero(length == n), max(1, tokens // int(n))
            for i in range(0, len(rows), size):
                yield Batch(schedule, rows[i : i + size], rows[i : i + size], int(n))
        return
    for pair in np.unique(schedule.row_pair[:bases]):
        base = np.flatnonzero(schedule.row_pair[:bases] == pair)
        runs = bases + np.flatnonzero(schedule.runs.pair == pair)
        n = int(length[base].max())
        size = max(1, tokens // n - len(base))
        for i in range(0, max(1, len(runs)), size):
            mine = runs[i : i + size]
            rows = np.concatenate([base, mine])
            yield Batch(schedule, rows, rows if i == 0 else mine, n)


def only(schedule: Schedule, runs: Ints) -> Schedule:
    """A schedule for batches with only some of its runs, in this order."""
    bases = len(schedule.base_offset)
    rows = np.concatenate([np.arange(bases), bases + runs])
    number = np.full(len(schedule.runs.pair), -1)
    number[runs] = np.arange(len(runs))
    places = np.flatnonzero(number[schedule.patched.run] >= 0)
    patched = Patched(**{k: v[places] for k, v in vars(schedule.patched).items()})
    return replace(
        schedule,
        row_pair=schedule.row_pair[rows],
        reads=schedule.reads[rows],
        inner=schedule.inner[rows],
        keys=schedule.keys[rows],
        runs=Runs(**{k: v[runs] for k, v in vars(schedule.runs).items()}),
        patched=replace(patched, run=number[patched.run]),
    )


def as_full_forwards(plan: Plan) -> Plan:
    """The plan with what its waves take where runs are full forwards in batches."""
    units = (tuple(_as_full_forwards(plan, wave) for wave in unit) for unit in plan.units)
    return replace(plan, units=tuple(units))


def _as_full_forwards(plan: Plan, wave: Wave) -> Wave:
    d, schedule = plan.dimensions, make_schedule(plan, wave)
    tokens, keys, scores, encoded = [], 0, [], 0
    for batch in batches(schedule, plan.token_budget):
        rows, n = len(batch.rows), batch.length
        tokens.append(rows * n)
        keys += rows * sum(int(total_context(n, window)[-1]) for window in d.windows)
        scores.append(rows * d.heads * n * n)
        encoded += batch.encoded
    flops = 2 * d.layer_weights * d.layers * sum(tokens) + 4 * d.d_head * d.heads * keys
    flops += 2 * d.d_model * plan.tail_weights * wave.rows
    if f := plan.layouts.features:
        read = sum(r.metric.name == "sae_feature" for r in plan.layouts.reads.inner)
        flops += 2 * f.width * f.features * (encoded + read * len(schedule.row_pair))
    return replace(wave, tokens=max(tokens), flops=flops, passes=len(tokens), scores=max(scores))
