"""Paths: from every unit of a component, or from a set of senders, to a set of receivers.

As with edges (`layout.edges`) a climber goes up at each position, from the lowest sender on. In the
run all receivers that it reaches have their inputs replaced by what it had there: of several, each
is pinned to the first pass, also at positions to which nothing was sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from patchsweep.pairs import Positions
from patchsweep.plan.cone import Map
from patchsweep.plan.dimensions import Dimensions
from patchsweep.plan.layout.columns import CODES, OWN, Frame, Ints, Places
from patchsweep.plan.layout.ends import SEEN_IN, Ends, ends
from patchsweep.sites import Node
from patchsweep.spec import PatchedPath


@dataclass(frozen=True, eq=False)
class PathTable:
    """One path. Its cells are those of a component, by layer, unit and position; of a set of
    senders there is one layer and one unit."""

    asked: PatchedPath
    positions: Positions
    dimensions: Dimensions
    layers: int
    units: int

    @property
    def through_mlps(self) -> bool:
        return self.asked.through == "mlps"

    @cached_property
    def senders(self) -> tuple[Ints, Ints, Ints]:
        """[sender]: its component and layer; its unit, or 0 where cells have that of their own."""
        given = self.asked.senders
        if isinstance(given, str):
            given = tuple(Node(given, layer) for layer in range(self.layers))
        return _columns((node.component, node.layer, node.unit) for node in given)

    @cached_property
    def layer(self) -> Ints:
        """[sender]: the layer of the cells that it sends in."""
        count = len(self.senders[0])
        return np.arange(count) if self.layers > 1 else np.zeros(count, np.int64)

    @cached_property
    def receivers(self) -> tuple[Ints, Ints, Ints]:
        """[receiver]: the component, layer and unit of what is overwritten."""
        last = self.dimensions.layers - 1
        return _columns(
            (
                SEEN_IN.get(node.component, node.component),
                last if node.component == "logits" else node.layer,
                node.unit,
            )
            for node in self.asked.receivers
        )

    @cached_property
    def below(self) -> Map:
        """[sender, receiver]: whether what is sent gets there."""
        component, layer, _ = self.senders
        of, at, _ = self.receivers
        found = layer[:, None] < at
        found |= (component == CODES["embed"])[:, None] | (of == CODES["resid_post"])
        same = (layer[:, None] == at) & (component == CODES["head_z"])[:, None]
        beside = np.isin(at, self.dimensions.parallel)
        found |= same & (of == CODES["mlp_out"]) & ~beside
        return np.asarray(found)

    @cached_property
    def first(self) -> Ints:
        """[sender]: the first layer call that its climbers are in."""
        component, layer, _ = self.senders
        return np.asarray(layer + (component == CODES["mlp_out"]))


@dataclass(frozen=True, eq=False)
class Climbs:
    """The climbers of one pair: [climber] which cell they belong to, as a flat index over [layer,
    entry], each unit's own; the clean position; the first layer call and the last. [send]: what
    they carry: the climber's number, component, layer and unit (0: the cell's)."""

    cell: Ints
    position: Ints
    first: Ints
    last: Ints
    of: Ints
    component: Ints
    layer: Ints
    unit: Ints


def path(table: PathTable, frame: Frame, members: Map, call: Ints) -> tuple[Places, Climbs]:
    """What the runs of one pair replace, and their climbers. `members` [entry, clean position] are
    the entries, `call` [receiver] the layer calls in which inputs are replaced."""
    component, layer, unit = table.receivers
    found = ends(frame, table.dimensions.windows, table.senders[:2], (component, layer))
    members = members[:, : len(found.known)] & found.known
    # [sender, receiver, clean position], then by layer of cells.
    gets: Map = table.below[:, :, None] & found.differs[:, None] & found.matters
    reaches: Map = np.zeros((table.layers, *gets.shape[1:]), bool)
    np.logical_or.at(reaches, table.layer, gets)
    there: Map = reaches[:, None] & members[:, None]  # [layer, entry, receiver, clean position]
    if len(component) > 1:
        there = there | _pinned(table, found, members, there)
    at, entry, receiver, position = np.nonzero(there)
    cell = at * len(members) + entry
    columns = (component[receiver], layer[receiver], unit[receiver])
    places = Places(cell, *columns, position, np.full_like(cell, OWN))

    active: Map = np.asarray(gets.any(1))  # [sender, clean position]
    none = table.dimensions.layers
    first = np.full((table.layers, active.shape[1]), none)
    np.minimum.at(first, table.layer, np.where(active, table.first[:, None], none))
    read: Map = np.asarray(there.any(1))  # [layer, receiver, clean position]
    last = np.where(read, call[:, None], -1).max(1)  # [layer, clean position]
    # What is only pinned begins where it is read.
    first = np.minimum(first, np.where(read, call[:, None], none).min(1))
    at, entry, position = np.nonzero(there.any(2))
    send, own = np.nonzero(active[:, position] & (table.layer[:, None] == at))
    order = np.argsort(own, kind="stable")
    send, own = send[order], own[order]
    what, from_layer, from_unit = (x[send] for x in table.senders)
    climbers = (at * len(members) + entry, position, first[at, position], last[at, position])
    return places, Climbs(*climbers, own, what, from_layer, from_unit)


def _pinned(table: PathTable, found: Ends, members: Map, there: Map) -> Map:
    """Where receivers would not be as in the first pass for what others put out, though nothing
    that is sent gets there: from the first changed position on, [layer, entry, receiver, clean
    position]."""
    below = np.zeros((table.layers, table.below.shape[1]), bool)
    np.logical_or.at(below, table.layer, table.below)
    far = found.position.max(initial=0) + 1
    start = np.where(there.any(2), found.position, far).min(2, initial=far)
    after = found.position >= start[:, :, None]  # [layer, entry, clean position]
    return np.asarray(
        below[:, None, :, None] & found.matters & members[:, None] & after[:, :, None]
    )


def _columns(nodes: Iterable[tuple[str, int | None, int | None]]) -> tuple[Ints, Ints, Ints]:
    component, layer, unit = zip(*nodes, strict=True)
    numbers = ([CODES[c] for c in component], *([n or 0 for n in x] for x in (layer, unit)))
    return tuple(np.array(x) for x in numbers)  # type: ignore[return-value]
