"""Which edges are run: from every sender to every receiver above it, in one pair and variant.

The first pass of an edge, in which everything but the sender is as in the destination, never leaves
its position: one token, the *climber* of (sender, position), goes up from the sender, and every
receiver above reads its new query, key, value or MLP output off it. The second pass is a run in
which these replace the receiver's own, at all positions of an entry at once.

Senders of a kind (the embedding, a layer's heads, its MLP) are alike here, and so are receivers of
a kind (a layer's queries, keys, values, its MLP, the logits).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from patchsweep.pairs import Positions
from patchsweep.plan.cone import Map
from patchsweep.plan.dimensions import Dimensions
from patchsweep.plan.edges import receivers, senders, upstream
from patchsweep.plan.layout.columns import CODES, Frame, Ints
from patchsweep.plan.layout.ends import SEEN_IN, ends
from patchsweep.sites import Node
from patchsweep.spec import Edges


@dataclass(frozen=True, eq=False)
class EdgeTable:
    """All edges of a sweep, and its positions: those of a sender, and of the receivers that read it
    there."""

    asked: Edges
    positions: Positions
    dimensions: Dimensions

    @cached_property
    def senders(self) -> list[Node]:
        return senders(self.dimensions)

    @cached_property
    def receivers(self) -> list[Node]:
        return receivers(self.dimensions)

    @cached_property
    def of_sender(self) -> Ints:
        """[sender]: its kind: 0 for the embedding, then each layer's heads and its MLP."""
        return np.array([_kind(node) for node in self.senders])

    @cached_property
    def sent(self) -> tuple[Ints, Ints]:
        """[sender kind]: the component and layer of what is sent."""
        _, first = np.unique(self.of_sender, return_index=True)
        nodes = [self.senders[n] for n in first]
        component = np.array([CODES[node.component] for node in nodes])
        return component, np.array([node.layer or 0 for node in nodes])

    @cached_property
    def first(self) -> Ints:
        """[sender kind]: the first layer call that its climbers are in."""
        return np.append(0, np.arange(2 * self.dimensions.layers) // 2 + [0, 1] * self._layers)

    @cached_property
    def of_receiver(self) -> Ints:
        """[receiver]: its kind."""
        return np.unique(self._seen_in, axis=0, return_inverse=True)[1].ravel()

    @cached_property
    def unit(self) -> Ints:
        """[receiver]: which of its layer's it is; 0 where there is one."""
        return np.array([node.unit or 0 for node in self.receivers])

    @property
    def component(self) -> Ints:
        """[receiver kind]: what is overwritten."""
        return self._kinds[:, 1]

    @property
    def layer(self) -> Ints:
        """[receiver kind]: in which layer."""
        return self._kinds[:, 0]

    @cached_property
    def below(self) -> Map:
        """[sender kind, receiver kind]: whether there are edges."""
        _, first = np.unique(self.of_receiver, return_index=True)
        out = np.zeros((1 + 2 * self.dimensions.layers, len(first)), bool)
        for kind, number in enumerate(first):
            out[self.of_sender[: self.upstream[number]], kind] = True
        return out

    @cached_property
    def upstream(self) -> Ints:
        """[receiver]: how many senders, from the first on, it has an edge from."""
        d = self.dimensions
        return np.array([upstream(d, r, r.layer in d.parallel) for r in self.receivers])

    def exist(self, units: range, entries: range) -> Map:
        """[receiver, sender], of some: whether there is an edge."""
        found: Map = (
            np.arange(entries.start, entries.stop) < self.upstream[units.start : units.stop, None]
        )
        return found

    @property
    def _layers(self) -> int:
        return self.dimensions.layers

    @cached_property
    def _seen_in(self) -> Ints:
        """[receiver, 2]: the layer and the component that it is seen in."""
        last = self.dimensions.layers - 1
        return np.array(
            [
                (last if r.layer is None else r.layer, CODES[SEEN_IN.get(r.component, r.component)])
                for r in self.receivers
            ]
        )

    @cached_property
    def _kinds(self) -> Ints:
        return np.unique(self._seen_in, axis=0)


def _kind(node: Node) -> int:
    if node.layer is None:
        return 0
    return 1 + 2 * node.layer + (node.component == "mlp_out")


@dataclass(frozen=True, eq=False)
class Reached:
    """The edges of one pair in one variant.

    position [clean position]: the destination's. differs [sender kind, clean position]: whether
    what is sent can differ there; matters [receiver kind, clean position]: whether what is read
    there can change what the metrics read; context: how many keys a query reads that is patched
    there. members [entry, clean position]; inside [entry]: whether the prompt has it. `length` is
    the destination's.
    """

    table: EdgeTable
    length: int
    position: Ints
    differs: Map
    matters: Map
    context: Ints
    members: Map

    @property
    def inside(self) -> Map:
        return np.asarray(self.members.any(1))

    def patched(self, entry: int) -> Map:
        """[sender kind, receiver kind, clean position]: what the runs of an entry patch."""
        found: Map = self.differs[:, None] & self.matters & self.members[entry]
        return found & self.table.below[:, :, None]

    @cached_property
    def runs(self) -> EdgeRuns:
        """All of its runs."""
        found = [self._runs(entry) for entry in range(len(self.members))]
        return EdgeRuns(*(np.stack(columns) for columns in zip(*found, strict=True)))

    def _runs(self, entry: int) -> tuple[Map, Ints, Ints, Ints]:
        there = self.patched(entry)
        start = np.where(there, self.position, self.length).min(2, initial=self.length)
        return np.asarray(there.any(2)), start, there.sum(2), (there * self.context).sum(2)


@dataclass(frozen=True, eq=False)
class EdgeRuns:
    """Runs of edges, [entry, sender kind, receiver kind]: whether there are any, their rows' first
    position, how many positions they patch, how many keys the queries read that they patch."""

    exists: Map
    start: Ints
    count: Ints
    keys: Ints


def reached(table: EdgeTable, frame: Frame, members: Map) -> Reached:
    """The edges of a pair; `members` [entry, clean position] are its entries."""
    windows, component, layer = table.dimensions.windows, table.component, table.layer
    found = ends(frame, windows, table.sent, (component, layer))
    sizes = np.array([w or frame.length for w in windows])[layer, None]
    context = np.minimum(found.position + 1, sizes) * (component == CODES["head_q"])[:, None]
    return Reached(
        table=table,
        length=frame.length,
        position=found.position,
        differs=found.differs,
        matters=found.matters,
        context=context,
        members=members[:, : len(found.known)] & found.known,
    )
