"""The attention and mask functions that are registered with transformers.

Attention is the one place of a model that knows rows and prefixes, and where queries, keys, values,
patterns and z of heads are seen. What a call has to do is said by a LayerCall (one layer of a
wave), Stacked (full forwards under the masks that the model makes) or Shown (only looked at).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from patchsweep.errors import NotOnWavefront
from patchsweep.passes.stream import ResidualStream, Tap
from patchsweep_kernels import Rows, attention_rows, packed_attention

NAME = "patchsweep"
METHOD = "_attn"  # of families without the interface: (query, key, value, mask) → (z, pattern)
# What makes z [token, head, d_head] of a packed call, from all that `packed_attention` takes.
Attend = Callable[..., Tensor]
# Values gathered at once where a pattern is applied, in elements.
GATHERED = 1 << 22


@dataclass(frozen=True)
class PatternEdit:
    """Rows of attention that are replaced: of head `head` of the tokens `target`. [edit]

    The probabilities are those of the query of token `donor` over the tokens `keys` [edit, slot],
    of which the first `count` are there; or `given` [edit, slot]. They weigh the values of the
    tokens `values` [edit, slot].
    """

    target: Tensor
    head: Tensor
    donor: Tensor
    keys: Tensor
    values: Tensor
    count: Tensor
    given: Tensor | None = None


@dataclass(frozen=True)
class PatternRead:
    """Attention probabilities that a metric reads: those of the `edited` edits are already known.

    tokens [row]: whose query; keys [row, slot]; count [row]; of one head, at the slots `key` [row].
    `out` takes the values [row]. edited: (row, edit) pairs, edits counted over all.
    """

    tokens: Tensor
    keys: Tensor
    count: Tensor
    head: int
    key: Tensor
    edited: Tensor  # [2, edited]
    out: Callable[[Tensor], None]


@dataclass(frozen=True)
class LayerCall:
    """What attention has to do in one layer.

    `rows` say who attends to whom in a packed call; `attend` computes it if it is given. The tokens
    `borrowers` belong to no row: their z is that of the tokens `lenders`. `taps` see head_q,
    head_k, head_v and head_z, and `stream` is told which tensor is z.
    """

    rows: Sequence[Rows]
    borrowers: Tensor
    lenders: Tensor
    taps: Mapping[str, Tap]
    patterns: Sequence[PatternEdit]
    pattern_reads: Sequence[PatternRead]
    stream: ResidualStream | None
    attend: Attend | None = None


@dataclass(frozen=True)
class Stacked:
    """A full forward of a batch, under the model's masks; tokens are counted through the batch.

    `seen` collects every attention call inside: heads, key-value heads, window and queries. Of
    pattern edits only target, head and donor are used.
    """

    taps: Mapping[str, Tap] = field(default_factory=dict)
    patterns: Sequence[PatternEdit] = ()
    stream: ResidualStream | None = None
    seen: list[tuple[int, int, int | None, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Shown:
    """A full forward that only shows what attention is given. Every token attends to itself alone:
    z is its value, [batch, token, head, d_head]. `see` gets the module that called attention, query
    and key [batch, head, token, d] and z."""

    see: Callable[[nn.Module, Tensor, Tensor, Tensor], None]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            own = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
            z = own.transpose(1, 2).contiguous()
        self.see(module, query, key, z)
        return z


_call: ContextVar[LayerCall | Stacked | Shown | None] = ContextVar("patchsweep_call", default=None)


@contextmanager
def attention_call(call: LayerCall | Stacked | Shown) -> Iterator[None]:
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
    if not hf_model._can_set_attn_implementation():
        with _method_is(hf_model, _as_method if name == NAME else None):
            hf_model.config._attn_implementation = name  # for the masks
            try:
                yield
            finally:
                hf_model.config._attn_implementation = before
        return
    # Parts may have others each, which not all of them can be told to set.
    each = [(config, config._attn_implementation_internal) for config in _configs(hf_model)]
    try:
        hf_model.set_attn_implementation(name)
        yield
    finally:
        for config, own in each:
            config._attn_implementation_internal = own


def _configs(hf_model: PreTrainedModel) -> list[Any]:
    """The configs of a model and of its parts."""
    found = [m.config for m in hf_model.modules() if isinstance(m, PreTrainedModel)]
    for config in found:
        parts = (getattr(config, name, None) for name in config.sub_configs)
        found += [part for part in parts if part is not None and part not in found]
    return list({id(config): config for config in found}.values())


@contextmanager
def _method_is(hf_model: PreTrainedModel, method: Callable[..., Any] | None) -> Iterator[None]:
    """For families that attend in a method of their own (GPT-J, GPT-Neo, CodeGen): `method` in its
    place; None for their own."""
    found = [m for m in hf_model.modules() if _attends(getattr(m, METHOD, None))]
    if method is not None and not found:
        raise NotOnWavefront(
            f"{type(hf_model).__name__} does not call transformers' attention interface: "
            "this family cannot run on the wavefront"
        )
    before = [m.__dict__.pop(METHOD, None) for m in found]
    try:
        for module in found:
            if method is not None:
                setattr(module, METHOD, partial(method, module))
        yield
    finally:
        for module, own in zip(found, before, strict=True):
            module.__dict__.pop(METHOD, None)
            if own is not None:
                setattr(module, METHOD, own)


def _attends(method: Any) -> bool:
    """Whether it takes what `_as_method` does (that of OpenAI GPT takes more)."""
    return callable(method) and len(inspect.signature(method).parameters) <= 4


def _as_method(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """z [batch, head, token, d_head]. Windows are a mask [1, 1, query, key] that the module has."""
    if isinstance(call := _call.get(), Shown):
        return call.attend(module, query, key, value).transpose(1, 2), None
    within, window = getattr(module, "bias", None), None
    if isinstance(within, Tensor):
        last = int(within[0, 0, -1].sum())
        window = last if last < within.shape[-1] else None
        mask = None if mask is None else mask & within[..., : mask.shape[-2], : mask.shape[-1]]
    scaling = 1 / float(getattr(module, "scale_attn", 1.0))
    z, _ = _attention(module, query, key, value, mask, scaling, window)
    return z.transpose(1, 2), None


def _attention(
    module: nn.Module,
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
    if isinstance(call, Shown):
        return call.attend(module, query, key, value), None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch._C.DisableTorchFunction():
        query = _tapped(query, call.taps.get("head_q"))
        key = _tapped(key, call.taps.get("head_k"))
        value = _tapped(value, call.taps.get("head_v"))
        if isinstance(call, LayerCall):
            how = (scaling, sliding_window, softcap, s_aux)
            z = (call.attend or packed_attention)(query[0], key[0], value[0], call.rows, *how)
            z[call.borrowers] = z[call.lenders]
            _patterns(call, z, query[0], key[0], value[0], *how)
        else:
            call.seen.append((query.shape[1], key.shape[1], sliding_window, query.shape[2]))
            _check_mask(attention_mask, sliding_window)
            z = _own_mask(query, key, value, attention_mask, scaling, softcap, s_aux, call.patterns)
        if "head_z" in call.taps:
            call.taps["head_z"](z.view(-1, *z.shape[-2:]))
        z = z.view(query.shape[0], query.shape[2], *z.shape[-2:])
    if call.stream is not None:
        call.stream.from_attention(z)
    return z, None


def _tapped(x: Tensor, tap: Tap | None) -> Tensor:
    """[batch, head, token, d] after a tap has seen, and perhaps changed, a copy of it."""
    if tap is None:
        return x
    tokens = x.transpose(1, 2).flatten(0, 1).clone(memory_format=torch.contiguous_format)
    tap(tokens)
    return tokens.view(x.shape[0], x.shape[2], *tokens.shape[1:]).transpose(1, 2)


def _patterns(
    call: LayerCall,
    z: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Replace rows of attention in z [token, head, d_head], and read those that metrics ask for."""
    how = (scaling, window, softcap, sinks)
    known = [_replaced(edit, z, query, key, value, how) for edit in call.patterns]
    for read in call.pattern_reads:
        head = torch.full_like(read.tokens, read.head)
        rows = attention_rows(query, key, read.tokens, read.keys, read.count, head, *how)
        found = rows.gather(1, read.key[:, None])[:, 0]
        if read.edited.shape[1]:
            row, edit = read.edited
            wide = [nn.functional.pad(p, (0, rows.shape[1] - p.shape[1])) for p in known]
            found[row] = torch.cat(wide).to(rows.dtype)[edit, read.key[row]]
        read.out(found)


def _replaced(
    edit: PatternEdit,
    z: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    how: tuple[float, int | None, float | None, Tensor | None],
) -> Tensor:
    """Make a pattern edit in z; its probabilities [edit, slot]."""
    rows = edit.given
    if rows is None:
        rows = attention_rows(query, key, edit.donor, edit.keys, edit.count, edit.head, *how)
    kv_head = edit.head // (query.shape[0] // value.shape[0])
    step = max(1, GATHERED // (edit.values.shape[1] * value.shape[-1]))
    for i in range(0, len(edit.target), step):
        part = slice(i, i + step)
        weighed = value[kv_head[part, None], edit.values[part]]
        z[edit.target[part], edit.head[part]] = torch.einsum(
            "nk,nkd->nd", rows[part].to(value.dtype), weighed
        )
    return rows


def _own_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    edits: Sequence[PatternEdit],
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
    for edit in edits:
        rows = pattern.transpose(1, 2).flatten(0, 1).clone()  # [token, head, key]
        rows[edit.target, edit.head] = rows[edit.donor, edit.head]
        pattern = rows.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2)
    z = pattern @ value.repeat_interleave(group, 1)
    return z.transpose(1, 2).contiguous()


def _check_mask(mask: Tensor | None, window: int | None) -> None:
    """The wave assumes causal attention, within a window if the layer has one."""
    if mask is None:
        raise NotOnWavefront(
            "this model attends without a causal mask: it cannot run on the wavefront"
        )
    k = torch.arange(mask.shape[-1], device=mask.device)
    q = k[:, None]
    assumed = k <= q if window is None else (k <= q) & (q - k < window)
    if not bool((mask == assumed).all()):
        raise NotOnWavefront(
            "this model's attention mask is neither causal nor a causal window at this prompt "
            "length: it cannot run on the wavefront"
        )


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The model's own mask for full forwards; none for packed calls, whose rows say it all."""
    if isinstance(_call.get(), Stacked | Shown):
        mask: Tensor = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
        return mask
    return None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
