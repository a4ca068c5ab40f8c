"""Paths, as path patching follows them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, StrictStr

from patchsweep.sites import RECEIVERS, SENDERS, Node, parse_node
from patchsweep.spec.data import Data, list_of
from patchsweep.spec.edges import Through
from patchsweep.spec.positions import AnyPositions


def _receivers(value: object) -> tuple[Node, ...]:
    found = tuple(
        node if isinstance(node, Node) else parse_node(str(node), RECEIVERS)
        for node in list_of(value, "receiver")
    )
    if len(found) > 1 and any(node.component == "logits" for node in found):
        raise ValueError("logits is read behind all others: make it a path of its own")
    return found


def _senders(value: object) -> object:
    if isinstance(value, str):
        if value not in SENDERS:
            known = ", ".join(SENDERS)
            raise ValueError(f"'{value}' is no component that sends: use {known}, or a list")
        return value
    return tuple(
        node if isinstance(node, Node) else parse_node(str(node), SENDERS)
        for node in list_of(value, "sender")
    )


def _text(nodes: str | tuple[Node, ...]) -> Any:
    return nodes if isinstance(nodes, str) else list(map(str, nodes))


Receivers = Annotated[tuple[Node, ...], BeforeValidator(_receivers), PlainSerializer(_text)]
Senders = Annotated[StrictStr | tuple[Node, ...], BeforeValidator(_senders), PlainSerializer(_text)]


class PatchedPath(Data):
    """From every unit of a component alone, or from a list of senders together, to all `receivers`
    together, at `positions`: `through` nothing but the residual stream, or through the MLPs that
    lie between."""

    senders: Senders
    receivers: Receivers
    through: Through = "nothing"
    positions: AnyPositions = "all"

    @property
    def begins(self) -> str:
        """What its senders are: a component, or "set"."""
        return self.senders if isinstance(self.senders, str) else "set"
