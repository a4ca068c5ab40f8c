"""Edge attribution by its definition: a full forward and backward for every receiver, plain hooks.

At a receiver the residual stream gets a leaf that this receiver alone reads: of the norm before
attention or the MLP, after which all other heads are given what they had without it. As in
`heads.py` nothing is shared with the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oracle import gradients, heads, hooks
from oracle.families import Family

HEADS = ("head_q", "head_k", "head_v")
Node = tuple[str, int, int]  # component, layer, unit; 0 where there is none


def outputs(
    model: PreTrainedModel, family: Family, dst: Sequence[int], src: Sequence[int]
) -> dict[Node, Tensor]:
    """Output of every sender in the source minus in the destination, [position, d_model]; through
    a norm behind attention its derivative at the destination."""
    before, after = (heads.activations(model, family, heads.Prompt(tuple(x))) for x in (dst, src))
    out = {("embed", 0, 0): (after["resid_pre", 0] - before["resid_pre", 0])[:, 0]}
    for layer in range(model.config.num_hidden_layers):
        block = model.get_submodule(family.layer.format(layer))
        project = block.get_submodule(family.o_proj)
        z, other = before["head_z", layer], after["head_z", layer]
        for head in range(z.shape[1]):
            one = z.clone()
            one[:, head] = other[:, head]
            change = project(one.flatten(1)) - project(z.flatten(1))
            if family.attn_norm:
                norm = block.get_submodule(family.attn_norm)
                at = project(z.flatten(1))
                change = torch.autograd.functional.jvp(norm, at, change)[1]
            out["head_z", layer, head] = change
        name = "mlp_out", layer
        out[*name, 0] = (after[name] - before[name])[:, 0]
    return out


def slope(
    model: PreTrainedModel,
    family: Family,
    ids: Sequence[int],
    metric: gradients.Metric,
    receiver: Node,
    moved: Tensor | None = None,
) -> Tensor:
    """∂m/∂(the residual stream as one receiver reads it), [position, d_model]; `moved` is added to
    the embeddings [position, d_model]."""
    component, layer, unit = receiver

    def move(name: str, at: int, x: Tensor) -> None:
        if moved is not None and (name, at) == ("resid_pre", 0):
            x += moved[:, None]

    def change(name: str, at: int, x: Tensor) -> None:
        move(name, at, x)
        if component in HEADS and name in HEADS and at == layer:
            own = x.clone()
            x.copy_(plain[name, at])
            if name == component:
                x[:, unit] = own[:, unit]
        if (component, name, at) == ("logits", "resid_post", model.config.num_hidden_layers - 1):
            x += leaf[:, None]

    with torch.no_grad():
        plain = gradients.forward(model, family, ids, move)[1]
    leaf = torch.zeros(len(ids), model.config.hidden_size, dtype=model.dtype, requires_grad=True)
    entry: Any = nullcontext()
    if component != "logits":
        block = model.get_submodule(family.layer.format(layer))
        first = "ln_1" if family.mid == "ln_2" else "input_layernorm"
        norm = block.get_submodule(family.mid if component == "mlp_in" else first)
        entry = hooks.changed(norm, "input", lambda x: x + leaf)
    with entry:
        value = metric(*gradients.forward(model, family, ids, change))
    [found] = torch.autograd.grad(value, [leaf])
    return found


def exists(sender: Node, receiver: Node, parallel: bool) -> bool:
    """Whether the receiver reads what the sender writes."""
    if sender[0] == "embed" or receiver[0] == "logits" or sender[1] < receiver[1]:
        return True
    after_attention = (sender[0], receiver[0]) == ("head_z", "mlp_in") and not parallel
    return after_attention and sender[1] == receiver[1]
