"""The unpatched runs that estimates are made from, and where their tokens lie.

Of every pair the destination's positions are laid out as [pair, position], padded; tokens are
counted in the packed rows of a pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchsweep.plan import Plan, Wave
from patchsweep.plan.layout import OWN, Variant
from patchsweep.plan.schedule import Schedule, Step, base_only

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Frames:
    """The pairs of a pass in one direction, all [pair, position] but `members`. Tokens are those of
    the pass that observes both runs, `own` those of the pass over destinations alone; 0 for none.

    there: whether the destination has the position. patched: whether the source has a value for it.
    destination, source, rotated, own: tokens, `rotated` those of the source's queries and keys.
    members [pair, entry, position]: which patched positions an entry of the results holds.
    """

    there: Tensor
    patched: Tensor
    destination: Tensor
    source: Tensor
    rotated: Tensor
    own: Tensor
    members: Tensor


@dataclass(frozen=True)
class Moved(Schedule):
    """A schedule with tokens that pass every layer beside the rows at another position, so that
    their queries and keys are rotated there: copies of the tokens `donors` at `positions`."""

    donors: Ints
    positions: Ints

    def steps(self) -> Iterator[Step]:
        for step in super().steps():
            beside = step.positions.size + np.arange(len(self.donors))
            yield replace(
                step,
                gather=np.concatenate([step.gather, self.donors]),
                positions=np.concatenate([step.positions, self.positions]),
                borrowers=beside,
                lenders=self.donors,
            )


@dataclass(frozen=True, eq=False)
class Passes:
    """What is run for a range of pairs (`wave`, of one source and sample): `observed` holds every
    pair's clean run and the one it is set against, `destinations` the rows `kept` of them."""

    plan: Plan
    wave: Wave

    @property
    def per_pair(self) -> int:
        """Observed rows of a pair."""
        return 1 + len(self.wave.runs)

    @cached_property
    def kept(self) -> Bools:
        """[observed row]: whether it is the destination of a direction."""
        clean, other = ("noise" in self.plan.directions), ("denoise" in self.plan.directions)
        return np.tile([clean, other][: self.per_pair], len(self.wave.pairs))

    @cached_property
    def destinations(self) -> Schedule:
        return base_only(self.plan, self.wave, self.kept)

    @cached_property
    def observed(self) -> Moved:
        both = base_only(self.plan, self.wave, np.ones_like(self.kept))
        donors, positions = (np.concatenate(x) for x in zip(*self._moved, strict=True))
        return Moved(
            **{f.name: getattr(both, f.name) for f in fields(both)},
            donors=donors + np.repeat(both.base_offset[self._donor_rows], self._counts),
            positions=positions,
        )

    def variant(self, direction: int) -> Variant:
        return Variant(direction, self.wave.source, self.wave.sample)

    def rows(self, direction: int) -> Ints:
        """[pair]: the observed row of the destination."""
        return np.array([self._rows(direction, n)[0] for n in range(len(self.wave.pairs))])

    def frames(self, direction: int, device: torch.device) -> Frames:
        """Where everything lies in one direction."""
        layouts, pairs = self.plan.layouts, self.wave.pairs
        of = [layouts.frames(self.variant(direction))[i] for i in pairs]
        shape = (len(pairs), max(f.length for f in of))
        there, patched = np.zeros(shape, bool), np.zeros(shape, bool)
        destination, source, rotated, own = np.zeros((4, *shape), np.int64)
        members = np.zeros((shape[0], layouts.positions.members.shape[1], shape[1]), bool)
        first, own_first = self.observed.base_offset, self.destinations.base_offset
        own_row = np.cumsum(self.kept) - 1
        moved = self.observed.base + np.cumsum([0, *self._counts])
        for n, (i, frame) in enumerate(zip(pairs, of, strict=True)):
            dst, src = self._rows(direction, n)
            clean, at, from_ = self._aligned(direction, i)
            each = np.arange(frame.length)
            there[n, each] = True
            destination[n, each] = first[dst] + each
            own[n, each] = own_first[own_row[dst]] + each
            patched[n, at] = True
            source[n, at] = first[src] + from_
            rotated[n] = source[n]
            changed = at[at != from_]
            rotated[n, changed] = moved[direction * len(pairs) + n] + np.arange(len(changed))
            members[n][:, at] = layouts.positions.members[i][:, clean]
        arrays = (there, patched, destination, source, rotated, own, members)
        return Frames(*(torch.from_numpy(x).to(device) for x in arrays))

    def _rows(self, direction: int, n: int) -> tuple[int, int]:
        """The observed rows of a pair's destination and source."""
        clean, last = n * self.per_pair, (n + 1) * self.per_pair - 1
        return (clean, last) if self.plan.directions[direction] == "noise" else (last, clean)

    def _aligned(self, direction: int, pair: int) -> tuple[Ints, Ints, Ints]:
        """The positions that are patched: of the clean prompt, the destination and the source."""
        layouts, variant = self.plan.layouts, self.variant(direction)
        to_dst, to_src = layouts.frames(variant)[pair].to_dst, layouts.to_src(variant, OWN, pair)
        clean = np.flatnonzero((to_dst >= 0) & (to_src >= 0))
        return clean, to_dst[clean], to_src[clean]

    @cached_property
    def _moved(self) -> list[tuple[Ints, Ints]]:
        """By direction and pair: the source's positions that are rotated, and where to."""
        out = []
        for direction in range(len(self.plan.directions)):
            for pair in self.wave.pairs:
                _, at, from_ = self._aligned(direction, pair)
                out.append((from_[at != from_], at[at != from_]))
        return out

    @property
    def _counts(self) -> list[int]:
        return [len(positions) for positions, _ in self._moved]

    @property
    def _donor_rows(self) -> Ints:
        ways = range(len(self.plan.directions))
        return np.array([self._rows(d, n)[1] for d in ways for n in range(len(self.wave.pairs))])


def passes_of(plan: Plan, pairs: range, source: int, sample: int) -> Passes:
    """The passes of some pairs, set against one source's sample."""
    runs = (source,) if plan.sources[source].kind == "run" else ()
    return Passes(plan, Wave(0, pairs, source, sample, runs, (), False, 0, 0, 0))


def pair_ranges(plan: Plan, pairs: range) -> list[range]:
    """Some of the plan's pairs in ranges that are estimated together: a pass holds the activations
    of all layers, where a wave of the token budget holds those of one."""
    budget, out = plan.token_budget // plan.dimensions.layers, []
    first, tokens = pairs.start, 0
    for i in pairs:
        pair = plan.pairs[i]
        others = [o.tokens for s in plan.sources for row in s.others for o in (row[i],)]
        own = len(pair) + max(map(len, others), default=0)
        if i > first and tokens + own > budget:
            out.append(range(first, i))
            first, tokens = i, 0
        tokens += own
    return [*out, range(first, pairs.stop)]
