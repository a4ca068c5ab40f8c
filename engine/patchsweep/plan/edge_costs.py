"""What runs of edges take, and how many there are: by sender, for some of the receivers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from patchsweep.plan.context import total_context
from patchsweep.plan.layout import OWN, EdgeTable, Layouts, Places, Reached, Variant

Ints = NDArray[np.int64]
# Of some receivers how many of a kind are run, [entry, sender kind or sender, receiver kind].
Number = Ints


@dataclass(frozen=True, eq=False)
class EdgeKinds:
    """Where runs of edges join, by receiver kind: call: the layer call in which its input is
    replaced; joins: the one from which its row is carried; injected: whether what it patches goes
    through the call before, token by token, beside the rows."""

    call: Ints
    joins: Ints
    injected: NDArray[np.bool_]


def edge_kinds(layouts: Layouts) -> EdgeKinds:
    """Those of a sweep's receivers."""
    table = layouts.edges
    assert table is not None
    zero = np.zeros_like(table.layer)
    own = np.full_like(zero, OWN)
    call, joins = layouts.calls(Places(zero, table.component, table.layer, zero, zero, own))
    return EdgeKinds(call, joins, joins == call + 1)


def number_of(table: EdgeTable, units: range, ran: NDArray[np.bool_] | None) -> Number:
    """How many of some receivers are run: all, or those that `ran` [entry, receiver, sender]
    says."""
    kinds = np.arange(len(table.layer))
    own = table.of_receiver[units.start : units.stop, None] == kinds  # [receiver, kind]
    if ran is None:
        return np.broadcast_to(own.sum(0), (1, 1, len(kinds)))
    found: Ints = np.einsum("ers,rk->esk", ran.astype(np.int64), own.astype(np.int64))
    return found


def climbing(table: EdgeTable, reached: Reached, number: Number, call: Ints) -> tuple[Ints, Ints]:
    """The climbers that some runs begin with: the first layer call that each is in, [sender kind or
    sender], and the last, [.., clean position] (−1: there is none)."""
    of = senders_of(table, number)
    last = np.full((len(of), len(reached.position)), -1)
    for entry in range(len(reached.members)):
        run = number[min(entry, len(number) - 1)] > 0
        there = reached.patched(entry)[of] & run[:, :, None]
        np.maximum(last, np.where(there, call[:, None], -1).max(1), out=last)
    return table.first[of], last


def senders_of(table: EdgeTable, number: Number) -> Ints:
    """The sender kinds that `number` is by: all of them, or that of every sender."""
    return np.arange(len(table.first)) if number.shape[1] == 1 else table.of_sender


@dataclass(frozen=True, eq=False)
class EdgeCosts:
    """What runs of edges take."""

    layouts: Layouts

    @cached_property
    def kinds(self) -> EdgeKinds:
        return edge_kinds(self.layouts)

    @property
    def table(self) -> EdgeTable:
        assert self.layouts.edges is not None
        return self.layouts.edges

    def of(
        self, variant: Variant, units: range, ran: NDArray[np.bool_] | None = None
    ) -> tuple[Ints, Ints, Ints]:
        """The runs of some receivers (of all their edges, or those that `ran` [entry, receiver,
        sender] says), with their climbers: tokens [pair, layer call, sender]; keys read by all
        queries of all heads, and rows, [pair, sender]."""
        layouts, number = self.layouts, number_of(self.table, units, ran)
        expand = slice(None) if number.shape[1] > 1 else self.table.of_sender
        pairs, senders = len(layouts.pairs), len(self.table.senders)
        tokens = np.zeros((pairs, layouts.dimensions.layers, senders), np.int64)
        reads, rows = np.zeros((2, pairs, senders), np.int64)
        if not layouts.exists_at_all(variant):
            return tokens, reads, rows
        known: dict[int, tuple[Ints, Ints, Ints]] = {}
        for i in range(pairs):
            reached = layouts.reached(variant, i)
            if id(reached) not in known:
                known[id(reached)] = self._of_pair(reached, number)
            tokens[i], reads[i], rows[i] = (x[..., expand] for x in known[id(reached)])
        return tokens, reads, rows * layouts.reads.positions.shape[1]

    def _of_pair(self, reached: Reached, number: Number) -> tuple[Ints, Ints, Ints]:
        """Tokens [layer call, sender], keys and runs [sender], by what `number` is by."""
        d, of = self.layouts.dimensions, senders_of(self.table, number)
        found = reached.runs
        exists, start, count, keys = (x[:, of] for x in vars(found).values())
        runs = number * exists
        calls = np.arange(d.layers + 1)
        joined, injected = self.kinds.joins[:, None] == calls, self.kinds.call[:, None] == calls
        injected = injected & self.kinds.injected[:, None]  # [receiver kind, layer call]
        rows = ((runs * (reached.length - start)).sum(0) @ joined).cumsum(1)
        tokens = rows + (runs * count).sum(0) @ injected + self._climbers(reached, number)
        read = d.heads * (runs * keys).sum(0) @ self.kinds.injected
        for window in dict.fromkeys(d.windows):
            total = total_context(max(1, reached.length), window)
            context = (runs * (total[reached.length] - total[start])).sum(0) @ joined
            of_window = np.array([w == window for w in d.windows])
            read = read + d.heads * context.cumsum(1)[:, :-1] @ of_window
        return tokens[:, :-1].T, read, runs.sum((0, 2))

    def _climbers(self, reached: Reached, number: Number) -> Ints:
        """Climbers in every layer call, [sender, layer call]."""
        first, last = climbing(self.table, reached, number, self.kinds.call)
        calls = np.arange(self.layouts.dimensions.layers + 1)
        within = (first[:, None, None] <= calls) & (calls <= last[:, :, None])
        return np.asarray(within.sum(1))

    def counts(self, variant: Variant, ran: NDArray[np.bool_] | None) -> tuple[int, int, int]:
        """Edges, those of them that can change anything, and those that are run."""
        layouts, table = self.layouts, self.table
        if not layouts.exists_at_all(variant):
            return 0, 0, 0
        every = range(len(table.receivers))
        all_of = number_of(table, every, None) * np.bincount(table.of_sender)[:, None]
        number = all_of if ran is None else number_of(table, every, ran)
        of = np.arange(len(table.first)) if ran is None else table.of_sender
        edges = possible = runs = 0
        for i in range(len(layouts.pairs)):
            reached = layouts.reached(variant, i)
            exists = reached.runs.exists
            edges += int(table.upstream.sum()) * int(reached.inside.sum())
            possible += int((exists * all_of).sum())
            runs += int((exists[:, of] * number).sum())
        return edges, possible, runs
