"""Edges and paths again: two full forwards, the first of which is made for every receiver.

In the first all heads, and unless the path leads through them all MLPs, put out what they do in the
destination, but for the senders; in the second the receivers have what they had in the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from patchsweep.judge.forwards import Edit, Key
from patchsweep.plan.layout import Layouts
from patchsweep.sites import EDGES, Node

# What of a receiver is seen.
SEEN = {"mlp_in": "mlp_out"}


@dataclass(frozen=True)
class Asked:
    """What a cell of edges or of a path is: from where to where, at which clean positions."""

    senders: Sequence[Node]
    receivers: Sequence[Node]
    positions: Sequence[int]
    through_mlps: bool


def asked(layouts: Layouts, grid: str, pair: int, place: tuple[int, int, int]) -> Asked:
    """`place`: where the cell is in its grid, along the last three dimensions."""
    if grid == EDGES:
        entry, receiver, sender = place
        table = layouts.edges
        assert table is not None
        senders, receivers = [table.senders[sender]], [table.receivers[receiver]]
        members, through = table.positions.members[pair, entry], table.asked.through
    else:
        layer, unit, entry = place
        path = layouts.paths[grid]
        given = path.asked.senders
        if isinstance(given, str):
            name, numbers = given, {"embed": (), "mlp_out": (layer,)}.get(given, (layer, unit))
            given = (Node(name, *numbers),)
        senders, receivers = [*given], [*path.asked.receivers]
        members, through = path.positions.members[pair, entry], path.asked.through
    return Asked(senders, receivers, np.flatnonzero(members).tolist(), through == "mlps")


def reads(sender: Node, receiver: Node, parallel: Sequence[int]) -> bool:
    """Whether a receiver reads what a sender writes."""
    if sender.layer is None or receiver.layer is None or sender.layer < receiver.layer:
        return True
    own = (sender.component, receiver.component) == ("head_z", "mlp_in")
    return own and sender.layer == receiver.layer and receiver.layer not in parallel


def place_of(node: Node) -> Key:
    """The activation that a node is seen in."""
    if node.component == "embed":
        return "resid_pre", 0
    return SEEN.get(node.component, node.component), node.layer or 0


def put(key: Key, value: torch.Tensor, positions: Sequence[int], unit: int | None = None) -> Edit:
    """An edit that puts `value` [position, unit, width] there, of one unit or of all."""
    units = range(value.shape[1]) if unit is None else [unit]
    pairs = [(u, p) for u in units for p in positions]
    at, where = (torch.tensor(x) for x in zip(*pairs, strict=True))
    return Edit(*key, at, where, value[where, at])
