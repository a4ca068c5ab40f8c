"""From hidden states to what a metric needs of the logits, without ever holding all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Finish = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reference:
    """Whose distribution a row's KL is taken from: `rows` [reference] are rows of the call, and
    `of` [row] says which of them is the row's; a reference is its own."""

    rows: Tensor
    of: Tensor


@dataclass(frozen=True)
class MetricHead:
    """What `metric_head` returns, in float32 or float64.

    logits [row, wanted]; logsumexp [row] in nats; rank [row, ranked], the number of tokens with a
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
    ranked: int = 0,
    reference: Reference | None = None,
    tile: int = 4096,
) -> MetricHead:
    """Logits of chosen tokens, and sums over the whole vocabulary, tile by tile.

    hidden is [row, d_model], after the final norm; weight [vocab, d_model] and bias [vocab] are the
    unembedding; wanted [row, wanted] holds token ids, of which the first `ranked` are ranked;
    `finish` is what the model does to the logits after the unembedding, element by element (scale,
    soft-cap). With `reference`, KL(reference ‖ row). At most [row, tile] logits exist at a time.
    """
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def logits_of(w: Tensor, b: Tensor | None) -> Tensor:
        raw = F.linear(hidden, w, b)
        return (raw if finish is None else finish(raw)).to(exact)

    unique, where = torch.unique(wanted, return_inverse=True)
    picked = logits_of(weight[unique], None if bias is None else bias[unique]).gather(1, where)
    if not (logsumexp or ranked or reference is not None):
        return MetricHead(picked)

    rows = hidden.shape[0]
    top = hidden.new_full((rows,), float("-inf"), dtype=exact)  # the largest logit so far
    mass = torch.zeros_like(top)  # Σ exp(z − top)
    above = torch.zeros_like(picked[:, :ranked])
    divergence = None if reference is None else _Divergence(reference, top)
    for begin in range(0, weight.shape[0], tile):
        part = slice(begin, min(begin + tile, weight.shape[0]))
        z = logits_of(weight[part], None if bias is None else bias[part])
        larger = torch.empty_like(z) if ranked else z
        for j in range(ranked):
            own = wanted[:, j, None] - begin
            torch.gt(z, picked[:, j, None], out=larger)  # counted as floats: three times as fast
            # Not the token itself, whose logit may have rounded differently here.
            inside = (own >= 0) & (own < z.shape[1])
            itself = larger.gather(1, own.clamp(0, z.shape[1] - 1)) * inside
            above[:, j] += larger.sum(-1) - itself[:, 0]
        if begin == 0:
            anchor = z.amax(-1)  # sums of logits cancel less when they are small
        z = z.sub_(anchor[:, None])
        if divergence is not None:
            divergence.add(z)
        peak = torch.maximum(top, z.amax(-1))
        mass = mass * torch.exp(top - peak) + z.sub_(peak[:, None]).exp_().sum(-1)
        top = peak
    total = top + mass.log()
    kl = None if divergence is None else divergence.kl(total)
    return MetricHead(picked, anchor + total, above.long() if ranked else None, kl)


class _Divergence:
    """KL(P ‖ Q) = Σ_v P(v) (z_P − z_Q) − log Z_P + log Z_Q, summed tile by tile before Z_P is
    known: P is taken as exp(z_P − largest z_P so far); sums are rescaled as that grows."""

    def __init__(self, reference: Reference, like: Tensor) -> None:
        self.reference = reference
        self.top = torch.full_like(like[reference.rows], float("-inf"))  # [reference]
        self.mass = torch.zeros_like(self.top)
        self.cross = torch.zeros_like(like)  # [row] Σ P z_Q

    def add(self, z: Tensor) -> None:
        """Take in a tile of logits [row, token]."""
        of = self.reference.of
        z_p = z[self.reference.rows]
        top = torch.maximum(self.top, z_p.amax(-1))
        shrink = torch.exp(self.top - top)
        p = torch.exp(z_p - top[:, None])
        self.mass = self.mass * shrink + p.sum(-1)
        self.cross = self.cross * shrink[of] + (z @ p.T).gather(1, of[:, None])[:, 0]
        self.top = top

    def kl(self, logsumexp: Tensor) -> Tensor:
        """[row] in nats, given every row's log Z [row]."""
        rows, of = self.reference.rows, self.reference.of
        gap = (self.cross[rows][of] - self.cross) / self.mass[of]
        return gap - logsumexp[rows][of] + logsumexp
