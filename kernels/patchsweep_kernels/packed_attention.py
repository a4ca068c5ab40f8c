"""Causal attention of packed rows, each against a shared prefix and its own suffix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Scores held at once: rows are taken in steps so that memory does not grow with their number.
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
    out = query.new_empty(tokens, heads, value.shape[-1])
    for r in rows:
        keys = r.prefix_length + r.length
        mask = _hidden(r.prefix_length, r.length, window, query.device)
        step = max(1, SCORES_AT_ONCE // (heads * r.length * keys))
        for first in range(0, r.count, step):
            count = min(step, r.count - first)
            begin = r.start + first * r.length
            part = Rows(begin, count, r.length, r.prefix_start, r.prefix_length)
            z = _attend(query, key, value, part, mask, scaling, softcap, sinks)
            out[begin : begin + count * r.length] = z
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
    if sinks is None:
        pattern = scores.softmax(-1)
    else:
        sink = sinks.to(scores.dtype).view(kv, 1, group, 1, 1).expand(kv, n, group, length, 1)
        pattern = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    pattern = pattern.reshape(kv, n, group * length, p + length)

    z = pattern[..., p:] @ v
    if p:
        z += (pattern[..., :p].flatten(1, 2) @ value[:, prefix]).view_as(z)
    z = z.view(kv, n, group, length, -1).permute(1, 3, 0, 2, 4)  # [row, token, kv, group, d_head]
    out: Tensor = z.reshape(n * length, kv * group, -1)
    return out
