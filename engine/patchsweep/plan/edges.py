"""Edges of a model: who writes to the residual stream, and who reads it further on. Pure.

Senders are the embedding, every head's z and every MLP's output; receivers are the queries, keys
and values of heads (keys and values of physical key-value heads), the inputs of MLPs, and the
logits. A node is written as a site without position is, component.layer.unit: `head_z.3.1`,
`mlp_out.2`, `embed`; `head_q.5.0`, `mlp_in.5`, `logits`; an edge as sender->receiver.
"""

from __future__ import annotations

from patchsweep.plan.dimensions import Dimensions
from patchsweep.sites import Node


def senders(d: Dimensions) -> list[Node]:
    """All senders in the order of the forward: the embedding, then each layer's heads and MLP."""
    out = [Node("embed")]
    for layer in range(d.layers):
        out += [Node("head_z", layer, head) for head in range(d.heads)]
        out.append(Node("mlp_out", layer))
    return out


def receivers(d: Dimensions) -> list[Node]:
    """All receivers: each layer's queries, keys, values and MLP, and at last the logits."""
    out = []
    for layer in range(d.layers):
        out += [Node("head_q", layer, head) for head in range(d.heads)]
        out += [Node(name, layer, kv) for name in ("head_k", "head_v") for kv in range(d.kv_heads)]
        out.append(Node("mlp_in", layer))
    return [*out, Node("logits")]


def upstream(d: Dimensions, receiver: Node, parallel: bool) -> int:
    """How many of `senders`, from the first on, a receiver reads: an edge exists from each of them
    and from no other. `parallel`: its layer's MLP reads what the layer's heads read."""
    if receiver.layer is None:
        return 1 + d.layers * (d.heads + 1)
    below = 1 + receiver.layer * (d.heads + 1)
    return below + d.heads if receiver.component == "mlp_in" and not parallel else below
