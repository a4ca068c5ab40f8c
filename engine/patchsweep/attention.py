"""The attention and mask functions that are registered with transformers.

Attention is the one place of a model that knows rows and prefixes, and where a head's z can be
replaced before the output projection. What a call has to do is set by `packed` (one layer of a
wave) or `stacked` (full forwards under the masks that the model itself makes, for the self-test).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from patchsweep.errors import BadInput
from patchsweep.stream import ResidualStream
from patchsweep_kernels import Rows, packed_attention

NAME = "patchsweep"


@dataclass(frozen=True)
class HeadOverwrite:
    """z of head `head` of token `target` is taken from the same head of token `source`. [edit]"""

    target: Tensor
    source: Tensor
    head: Tensor


@dataclass(frozen=True)
class LayerCall:
    """What attention has to do in one layer.

    `rows` say who attends to whom in a packed call. The tokens from `injected` on belong to no row:
    their z is that of the tokens `copied` [token]. `heads` are overwritten last, and `stream` is
    told which tensor is z.
    """

    rows: Sequence[Rows]
    injected: int
    copied: Tensor
    heads: HeadOverwrite | None
    stream: ResidualStream | None


@dataclass(frozen=True)
class Stacked:
    """A full forward of a batch, under the model's masks; tokens are counted through the batch.

    `seen` collects every attention call inside: heads, window and queries.
    """

    heads: HeadOverwrite | None = None
    stream: ResidualStream | None = None
    seen: list[tuple[int, int | None, int]] = field(default_factory=list)


_call: ContextVar[LayerCall | Stacked | None] = ContextVar("patchsweep_call", default=None)


@contextmanager
def attention_call(call: LayerCall | Stacked) -> Iterator[None]:
    """Attention computes as `call` says while inside."""
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)


@contextmanager
def attention_is(hf_model: PreTrainedModel, name: str = NAME) -> Iterator[None]:
    """The model uses this attention function inside (patchsweep's), and its own again after."""
    before = hf_model.config._attn_implementation
    hf_model.set_attn_implementation(name)
    if hf_model.config._attn_implementation != name:
        raise BadInput(
            f"{type(hf_model).__name__} does not call transformers' attention interface: "
            "this family cannot run on the wavefront"
        )
    try:
        yield
    finally:
        hf_model.set_attn_implementation(before)


def _attention(
    _: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **__: Any,
) -> tuple[Tensor, None]:
    """z [batch, token, head, d_head], from query, key, value [batch, head, token, d]."""
    call = _call.get()
    assert call is not None, "patchsweep's attention was called outside a sweep"
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with BaseTorchFunctionMode():
        if isinstance(call, LayerCall):
            z = packed_attention(
                query[0], key[0], value[0], call.rows, scaling, sliding_window, softcap, s_aux
            )
            z[call.injected :] = z[call.copied]
        else:
            call.seen.append((query.shape[1], sliding_window, query.shape[2]))
            _check_mask(attention_mask, sliding_window)
            z = _own_mask(query, key, value, attention_mask, scaling, softcap, s_aux)
        if call.heads is not None:
            tokens, edit = z.view(-1, *z.shape[-2:]), call.heads
            tokens[edit.target, edit.head] = tokens[edit.source, edit.head]
        z = z.view(query.shape[0], query.shape[2], *z.shape[-2:])
    if call.stream is not None:
        call.stream.from_attention(z)
    return z, None


def _own_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of whole sequences under the model's own mask, in plain terms."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    pattern = scores.softmax(-1)[..., : key.shape[2]]
    z = pattern @ value.repeat_interleave(group, 1)
    return z.transpose(1, 2).contiguous()


def _check_mask(mask: Tensor | None, window: int | None) -> None:
    """The wave assumes causal attention, within a window if the layer has one."""
    if mask is None:
        raise BadInput("this model attends without a causal mask: it cannot run on the wavefront")
    k = torch.arange(mask.shape[-1], device=mask.device)
    q = k[:, None]
    assumed = k <= q if window is None else (k <= q) & (q - k < window)
    if not bool((mask == assumed).all()):
        raise BadInput(
            "this model's attention mask is neither causal nor a causal window at this prompt "
            "length: it cannot run on the wavefront"
        )


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The model's own mask for full forwards; none for packed calls, whose rows say it all."""
    if isinstance(_call.get(), Stacked):
        mask: Tensor = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
        return mask
    return None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
