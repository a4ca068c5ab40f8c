"""From hidden states to what a metric needs of the logits, without ever holding all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Finish = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MetricHead:
    """What `metric_head` returns, in float32 or float64.

    logits [row, wanted]; logsumexp [row] in nats; rank [row, wanted], the number of tokens with a
    larger logit; kl [row] in nats. The last three are None if they were not asked for.
    """

    logits: Tensor
    logsumexp: Tensor | None = None
    rank: Tensor | None = None
    kl: Tensor | None = None


def metric_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    wanted: Tensor,
    *,
    finish: Finish | None = None,
    logsumexp: bool = False,
    rank: bool = False,
    reference: Tensor | None = None,
    tile: int = 4096,
) -> MetricHead:
    """Logits of chosen tokens, and sums over the whole vocabulary, tile by tile.

    hidden is [row, d_model], after the final norm; weight [vocab, d_model] and bias [vocab] are the
    unembedding; wanted [row, wanted] holds token ids; `finish` is what the model does to the logits
    after the unembedding, element by element (scale, soft-cap). `reference` [row] is the row whose
    distribution is P in KL(P ‖ row). At most [row, tile] logits exist at a time.
    """
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def logits_of(w: Tensor, b: Tensor | None) -> Tensor:
        raw = F.linear(hidden, w, b)
        return (raw if finish is None else finish(raw)).to(exact)

    unique, where = torch.unique(wanted, return_inverse=True)
    picked = logits_of(weight[unique], None if bias is None else bias[unique]).gather(1, where)
    if not (logsumexp or rank or reference is not None):
        return MetricHead(picked)

    rows = hidden.shape[0]
    total = hidden.new_full((rows,), float("-inf"), dtype=exact)
    above = torch.zeros_like(wanted) if rank else None
    # KL(P ‖ Q) = Σ_v P(v) (log P(v) − log Q(v)), with Σ P z_P and Σ P z_Q gathered before the
    # normalisers are known: weights are exp(z_P − running maximum of z_P), rescaled as it grows.
    top = torch.full_like(total, float("-inf"))
    mass = torch.zeros_like(total)
    gap = torch.zeros_like(total)
    for begin in range(0, weight.shape[0], tile):
        part = slice(begin, min(begin + tile, weight.shape[0]))
        z = logits_of(weight[part], None if bias is None else bias[part])
        total = torch.logaddexp(total, z.logsumexp(-1))
        if above is not None:
            own = wanted - begin
            for j in range(wanted.shape[1]):
                larger = z > picked[:, j : j + 1]
                inside = (own[:, j] >= 0) & (own[:, j] < z.shape[1])
                # the token itself, in case its logit rounded differently here
                larger[inside, own[inside, j]] = False
                above[:, j] += larger.sum(-1)
        if reference is not None:
            peak = torch.maximum(top, z.amax(-1))
            shrink = torch.exp(top - peak)
            p = torch.exp(z - peak[:, None])[reference]
            shrink = shrink[reference]
            mass = mass * shrink + p.sum(-1)
            gap = gap * shrink + (p * (z[reference] - z)).sum(-1)
            top = peak
    kl = None
    if reference is not None:
        kl = gap / mass - total[reference] + total
    return MetricHead(picked, total, above, kl)
