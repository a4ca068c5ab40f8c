"""Causal attention of packed rows, each against a shared prefix and its own suffix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Scores, or gathered keys, held at once, in elements: rows are taken in steps, and a row too long
# for that by groups of heads, so that memory does not grow with their number.
SCORES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Rows:
    """`count` rows of `length` tokens each, packed one after another from token `start`.

    All of them read the keys and values of the tokens `prefix_start` .. `prefix_start +
    prefix_length`, which stand at positions 0 .. `prefix_length`; the rows' own tokens follow.
    """

    start: int
    count: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Sequence[Rows],
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention output z, before the output projection.

    query is [head, token, d], key [kv_head, token, d], value [kv_head, token, d_head], where heads
    are grouped by their key-value head; sinks [head] are extra scores that take weight and add
    nothing. A query sees the last `window` tokens up to itself (all if None). Returns
    [token, head, d_head] in query's dtype; tokens that belong to no row are left unset.
    """
    heads, tokens, _ = query.shape
    kv = key.shape[0]
    group = heads // kv
    out = query.new_empty(tokens, heads, value.shape[-1])
    masks: dict[tuple[int, int], Tensor | None] = {}
    for r in rows:
        shape = (r.prefix_length, r.length)
        if shape not in masks:
            masks[shape] = _hidden(*shape, window, query.device)
        scores = group * r.length * (r.prefix_length + r.length)  # of one row and kv head
        together = min(kv, max(1, SCORES_AT_ONCE // scores))
        step = max(1, SCORES_AT_ONCE // (together * scores))
        for g in range(0, kv, together):
            k, h = slice(g, g + together), slice(g * group, (g + together) * group)
            sink = None if sinks is None else sinks[h]
            for first in range(0, r.count, step):
                count = min(step, r.count - first)
                begin = r.start + first * r.length
                part = Rows(begin, count, r.length, r.prefix_start, r.prefix_length)
                z = _attend(query[h], key[k], value[k], part, masks[shape], scaling, softcap, sink)
                out[begin : begin + count * r.length, h] = z
    return out


def attention_rows(
    query: Tensor,
    key: Tensor,
    tokens: Tensor,
    keys: Tensor,
    count: Tensor,
    head: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention probabilities of single queries, [query, key slot], in query's dtype.

    query is [head, token, d] and key [kv_head, token, d], heads grouped as in packed_attention;
    tokens [query] and head [query] say whose query and which head it is; keys [query, key slot] are
    the tokens at the positions 0 .. count − 1 of its row, of which it stands at the last; slots
    from count [query] on are padding (any valid token) and get 0, as do those that the window
    hides. Sinks [head] take weight: a row then sums to less than 1.
    """
    out = query.new_empty(keys.shape)
    group = query.shape[0] // key.shape[0]
    slot = torch.arange(keys.shape[1], device=keys.device)
    step = max(1, SCORES_AT_ONCE // max(1, keys.shape[1] * key.shape[2]))
    for first in range(0, len(keys), step):
        part = slice(first, first + step)
        own, last = head[part], count[part, None]
        q = query[own, tokens[part]] * scaling
        scores = (key[(own // group)[:, None], keys[part]] @ q[:, :, None])[:, :, 0]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        hidden = slot >= last
        if window is not None:
            hidden = hidden | (slot < last - window)
        scores = scores.masked_fill(hidden, float("-inf"))
        out[part] = _pattern(scores, None if sinks is None else sinks[own, None])
    return out


def _hidden(prefix: int, length: int, window: int | None, device: torch.device) -> Tensor | None:
    """[query, key] True where a query must not see a key; None if every query sees every key."""
    if length == 1 and (window is None or prefix < window):
        return None
    q = torch.arange(prefix, prefix + length, device=device)[:, None]
    k = torch.arange(prefix + length, device=device)[None]
    hidden = k > q
    return hidden if window is None else hidden | (q - k >= window)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    r: Rows,
    hidden: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """z [row·token, head, d_head] of rows that are few enough for their scores to fit."""
    kv, n, length, p = key.shape[0], r.count, r.length, r.prefix_length
    group = query.shape[0] // kv
    own = slice(r.start, r.start + n * length)
    prefix = slice(r.prefix_start, r.prefix_start + p)

    # [kv, row, group, token, d]: the queries of a row that read the same keys lie together.
    q = query[:, own].view(kv, group, n, length, -1).transpose(1, 2)
    q = q.reshape(kv, n, group * length, -1) * scaling
    k = key[:, own].unflatten(1, (n, length))
    v = value[:, own].unflatten(1, (n, length))

    scores = q @ k.transpose(-1, -2)
    if p:
        shared = (q.flatten(1, 2) @ key[:, prefix].transpose(-1, -2)).view(kv, n, group * length, p)
        scores = torch.cat([shared, scores], -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(kv, n, group, length, p + length)
    if hidden is not None:
        scores.masked_fill_(hidden, float("-inf"))
    pattern = _pattern(scores, None if sinks is None else sinks.view(kv, 1, group, 1, 1))
    pattern = pattern.reshape(kv, n, group * length, p + length)

    z = pattern[..., p:] @ v
    if p:
        z += (pattern[..., :p].flatten(1, 2) @ value[:, prefix]).view_as(z)
    z = z.view(kv, n, group, length, -1).permute(1, 3, 0, 2, 4)  # [row, token, kv, group, d_head]
    out: Tensor = z.reshape(n * length, kv * group, -1)
    return out


def _pattern(scores: Tensor, sink: Tensor | None) -> Tensor:
    """Probabilities of the last axis, of which a sink (last axis 1) takes its part."""
    if sink is None:
        return scores.softmax(-1)
    sink = sink.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
