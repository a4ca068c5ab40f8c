"""Edges and paths by their definition: two full forwards per sender and receivers, plain hooks.

In the first all heads put out what they do in the destination, and MLPs too unless the path leads
through them; the sender puts out what it does in the source. In the second the receivers get their
queries, keys, values or MLP outputs of the first, and all that follows them is live. Of the logits
the first is all there is. As in `heads.py` nothing is shared with the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oracle import gradients
from oracle.edges import Node, exists
from oracle.families import Family

Seen = dict[tuple[str, int], Tensor]


@dataclass(frozen=True, eq=False)
class Two:
    """A model's destination and source runs."""

    model: PreTrainedModel
    family: Family
    dst: Sequence[int]
    src: Sequence[int]
    own: Seen
    other: Seen

    def below(self, sender: Node, receiver: Node) -> bool:
        """Whether the receiver reads what the sender writes."""
        if receiver[0] == "resid_pre":
            return sender[0] == "embed" or sender[1] < receiver[1]
        return exists(sender, receiver, self.family.parallel)

    def first(
        self, senders: Sequence[Node], positions: Mapping[int, int], through: str
    ) -> tuple[Tensor, Seen]:
        """Logits, and what every activation was before it was frozen. `positions`: where something
        is sent, in the destination, and what stands for it in the source."""
        to, of = list(positions), list(positions.values())
        sent = [("resid_pre" if c == "embed" else c, layer, unit) for c, layer, unit in senders]
        would_be: Seen = {}

        def change(name: str, at: int, x: Tensor) -> None:
            would_be[name, at] = x.clone()
            if name == "head_z" or (name == "mlp_out" and through == "nothing"):
                x.copy_(self.own[name, at])
            for place, layer, unit in sent:
                if (name, at) == (place, layer):
                    x[to, unit] = self.other[name, at][of, unit]

        return _forward(self, change)[0], would_be

    def second(self, receivers: Sequence[Node], positions: Sequence[int], would_be: Seen) -> Tensor:
        """Logits with these receivers reading what they did in the first forward, at some
        positions."""

        def change(name: str, at: int, x: Tensor) -> None:
            for component, layer, unit in receivers:
                if (name, at) == ("mlp_out" if component == "mlp_in" else component, layer):
                    x[list(positions), unit] = would_be[name, at][list(positions), unit]

        return _forward(self, change)[0]


def two(model: PreTrainedModel, family: Family, dst: Sequence[int], src: Sequence[int]) -> Two:
    """Both runs of a model."""
    with torch.no_grad():
        own, other = (gradients.forward(model, family, x, lambda *_: None)[1] for x in (dst, src))
    return Two(model, family, dst, src, own, other)


def _forward(runs: Two, change: gradients.Touch) -> tuple[Tensor, Seen]:
    with torch.no_grad():
        return gradients.forward(runs.model, runs.family, runs.dst, change)
