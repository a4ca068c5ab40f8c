"""Both ends of edges, layer by layer, through the model's own layers: what heads write to the
residual stream, and gradients at the residual stream as one receiver alone reads it.

Everything between the stream and queries, keys, values or an MLP's output, and between z and the
stream, is done to each token by itself. So tokens are taken in any number and order, and many
receivers or senders of a layer at once, as copies of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad

from patchsweep.device import weights_of
from patchsweep.passes import Attend, Forward, LayerCall, ResidualStream, Tap, attention_call


class _Enough(Exception):
    """Ends a layer's call once what was wanted of it is known."""


@torch.no_grad()
def written(
    forward: Forward, layer: int, position: Tensor, stream: Tensor, z: Tensor, change: Tensor
) -> Tensor:
    """What a change of each head's z alone adds to the residual stream, [head, token, d_model].

    stream [token, d_model] is what the layer receives; z and change [token, head, d_head]. Through
    a norm behind attention this is of first order (a derivative in forward mode), else exact.
    """
    tokens, heads = z.shape[:2]
    each = torch.arange(heads, device=z.device)
    tangent = z.new_zeros(heads, *z.shape)
    tangent[each, :, each] = change.transpose(0, 1)
    found: list[Tensor] = []

    def attend(*_: object) -> Tensor:
        dual: Tensor = forward_ad.make_dual(z.repeat(heads, 1, 1), tangent.flatten(0, 1))
        return dual

    def keep(x: Tensor) -> None:
        found.append(forward_ad.unpack_dual(x).tangent.clone())
        raise _Enough

    with forward_ad.dual_level():
        _call(forward, layer, stream.repeat(heads, 1), position, attend, {"attn_out": keep})
    return found[0].view(heads, tokens, -1)


def heads_read(
    forward: Forward,
    layer: int,
    stream: Tensor,
    position: Tensor,
    gradients: Sequence[Sequence[Tensor]],
) -> list[Tensor]:
    """Gradients at the stream as each query, each key and each value of a layer alone reads it,
    [receiver, token, d_model]: queries first, then keys, then values.

    stream [token, d_model] is what the layer receives; gradients are, for each metric, those at
    queries, keys and values [token, head, d].
    """
    counts = [g.shape[1] for g in gradients[0]]
    tokens, copies = len(stream), sum(counts)
    found: list[Tensor] = []

    def attend(*projected: object) -> Tensor:
        first = 0
        for x, count in zip(projected[:3], counts, strict=True):
            assert isinstance(x, Tensor)
            own = torch.arange(count, device=x.device)
            by_copy = x.unflatten(1, (copies, tokens))  # [head, copy, token, d]
            found.append(by_copy[own, first + own])
            first += count
        raise _Enough

    with torch.enable_grad():
        leaf = stream.repeat(copies, 1).requires_grad_()
        _call(forward, layer, leaf, position, attend, {})
    return [
        torch.autograd.grad(found, leaf, [x.transpose(0, 1) for x in g], retain_graph=True)[0].view(
            copies, tokens, -1
        )
        for g in gradients
    ]


def mlp_reads(
    forward: Forward,
    layer: int,
    stream: Tensor,
    attention: Tensor,
    position: Tensor,
    place: str,
    gradients: Sequence[Tensor],
) -> tuple[list[Tensor], bool]:
    """Gradients at the stream as a layer's MLP reads it, [1, token, d_model] for each metric, and
    whether it reads it beside the layer's attention (parallel blocks), not after it.

    stream [token, d_model] is what the layer receives, attention what its attention adds;
    gradients [token, unit, width], for each metric, are those at `place`: what the MLP adds
    (mlp_out), or its neurons.
    """
    found: dict[str, Tensor] = {}

    def attend(query: Tensor, _: Tensor, value: Tensor, *__: object) -> Tensor:
        return query.new_zeros(query.shape[1], query.shape[0], value.shape[-1])

    def dictate(x: Tensor) -> None:
        x.copy_(attention.view_as(x))

    def keep(x: Tensor) -> None:
        found["mlp_out"] = x
        raise _Enough

    taps: dict[str, Tap] = {"attn_out": dictate, "mlp_out": keep}
    if place == "neuron":
        taps[place] = partial(found.__setitem__, place)
    with torch.enable_grad():
        leaf = stream.clone().requires_grad_()
        places = _call(forward, layer, leaf, position, attend, taps)
    end = found[place]
    at_input = [torch.autograd.grad(end, leaf, g, retain_graph=True)[0][None] for g in gradients]
    return at_input, "resid_mid" not in places


def _call(
    forward: Forward,
    layer: int,
    stream: Tensor,
    position: Tensor,
    attend: Attend,
    taps: Mapping[str, Tap],
) -> set[str]:
    """A layer's call for copies of tokens [copy · token, d_model] at `position` [token], until it
    has given enough; the places of the stream that were found by then."""
    watched = ResidualStream({k: tap for k, tap in taps.items() if k in ResidualStream.PLACES})
    none = torch.zeros(0, dtype=torch.long, device=stream.device)
    call = LayerCall((), none, none, {}, (), (), watched, attend)
    # Weights that a hook brings in are put away even if the call ends early.
    whole = weights_of(*forward.layers[layer].modules())
    with attention_call(call), whole, suppress(_Enough):
        positions = position.to(stream.device).repeat(len(stream) // len(position))
        forward.layer(layer, stream, positions, watched, taps.get("neuron"))
    return watched.found
