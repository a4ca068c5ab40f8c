"""Attention of whole rows in plain terms: for autograd, and to see patterns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchsweep_kernels import Rows


@dataclass(frozen=True, eq=False)
class How:
    """What an attention function is told beside queries, keys and values; sinks [head]."""

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def scores(query: Tensor, key: Tensor, how: How) -> Tensor:
    """Scores [row, head, query, key] before the mask, of query [row, query, head, d] and key
    [row, key, kv_head, d]."""
    group = query.shape[2] // key.shape[2]
    key = key.repeat_interleave(group, 2)
    found: Tensor = torch.einsum("rqhd,rkhd->rhqk", query * how.scaling, key)
    return found if how.softcap is None else how.softcap * torch.tanh(found / how.softcap)


def log_pattern(found: Tensor, how: How) -> Tensor:
    """Log-probabilities [row, head, query, key] of scores, −inf where a query sees no key."""
    k = torch.arange(found.shape[-1], device=found.device)
    q = k[:, None]
    hidden = k > q if how.window is None else (k > q) | (q - k >= how.window)
    found = found.masked_fill(hidden, float("-inf"))
    if how.sinks is None:
        return found.log_softmax(-1)
    sink = how.sinks.to(found.dtype).view(1, -1, 1, 1).expand(*found.shape[:3], 1)
    return torch.cat([found, sink], -1).log_softmax(-1)[..., :-1]


def weigh(pattern: Tensor, value: Tensor) -> Tensor:
    """z [row, query, head, d_head] from a pattern [row, head, query, key] and value [row, key,
    kv_head, d_head]."""
    value = value.repeat_interleave(pattern.shape[1] // value.shape[2], 2)
    found: Tensor = torch.einsum("rhqk,rkhd->rqhd", pattern, value)
    return found


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Sequence[Rows],
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    *,
    fixed: bool = False,
) -> Tensor:
    """`packed_attention` of rows without prefixes that hold all tokens, for autograd; patterns have
    no gradient if they are `fixed`."""
    how = How(scaling, window, softcap, sinks)
    parts = []
    for r in rows:
        own = slice(r.start, r.start + r.count * r.length)
        q, k, v = (
            x[:, own].transpose(0, 1).unflatten(0, (r.count, r.length)) for x in (query, key, value)
        )
        pattern = log_pattern(scores(q, k, how), how).exp()
        parts.append(weigh(pattern.detach() if fixed else pattern, v).flatten(0, 1))
    return torch.cat(parts)
