"""From hidden states to what a metric needs of the logits, without ever holding all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Finish = Callable[[Tensor], Tensor]

DIVERGENCES = frozenset({"kl", "kl_reverse", "tv"})


@dataclass(frozen=True)
class Reference:
    """Whose distribution a row's divergences are taken from: `rows` [reference] are rows of the
    call, and `of` [row] says which of them is the row's; a reference is its own."""

    rows: Tensor
    of: Tensor


@dataclass(frozen=True)
class MetricHead:
    """What `metric_head` returns, in float32 or float64; all but the logits None if not asked for.

    logits [row, wanted]; logsumexp [row] in nats; rank [row, ranked], the number of tokens with a
    larger logit; kl [row] = KL(reference ‖ row) and kl_reverse [row] = KL(row ‖ reference) in nats;
    tv [row], the total variation ½ Σ_v |P_reference(v) − P_row(v)|, between 0 and 1.
    """

    logits: Tensor
    logsumexp: Tensor | None = None
    rank: Tensor | None = None
    kl: Tensor | None = None
    kl_reverse: Tensor | None = None
    tv: Tensor | None = None


def metric_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    wanted: Tensor,
    *,
    occurring: Tensor | None = None,
    finish: Finish | None = None,
    logsumexp: bool = False,
    ranked: int = 0,
    reference: Reference | None = None,
    divergences: frozenset[str] = frozenset({"kl"}),
    tile: int = 4096,
) -> MetricHead:
    """Logits of chosen tokens, and sums over the whole vocabulary, tile by tile.

    hidden is [row, d_model], after the final norm; weight [vocab, d_model] and bias [vocab] are the
    unembedding; wanted [row, wanted] holds token ids, of which the first `ranked` are ranked, and
    `occurring` [token] those in it, ascending: not given, a GPU is waited for to know how many;
    `finish` is what the model does to the logits after the unembedding, element by element (scale,
    soft-cap). With `reference`, the divergences named (of kl, kl_reverse, tv), summed in float64.
    A reference's own are exactly 0, and rounding never makes one negative: it is clamped at 0.
    A token of logit −inf has no probability and adds nothing, unless the other distribution has it:
    that KL is inf. Of a row with a NaN or +inf they are NaN. At most [row, tile] logits exist at a
    time; tv takes the unembedding twice, as it needs the normalisers first.
    """
    assert divergences <= DIVERGENCES, f"unknown divergences {set(divergences - DIVERGENCES)}"
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    asked = frozenset[str]() if reference is None else divergences

    def logits_of(w: Tensor, b: Tensor | None) -> Tensor:
        raw = F.linear(hidden, w, b)
        return (raw if finish is None else finish(raw)).to(exact)

    def tiles() -> Iterator[tuple[int, Tensor]]:
        """The first token of each tile, and its logits [row, token]."""
        for begin in range(0, weight.shape[0], tile):
            part = slice(begin, begin + tile)
            yield begin, logits_of(weight[part], None if bias is None else bias[part])

    tokens = torch.unique(wanted) if occurring is None else occurring
    where = torch.searchsorted(tokens, wanted)
    picked = logits_of(weight[tokens], None if bias is None else bias[tokens]).gather(1, where)
    if not (logsumexp or ranked or asked):
        return MetricHead(picked)

    sums = None
    if logsumexp or asked:
        sums = _Sums(picked.new_empty(len(hidden), dtype=torch.float64 if asked else exact))
    if sums is not None and reference is not None and asked & {"kl", "kl_reverse"}:
        sums.compare(reference, "kl" in asked, "kl_reverse" in asked)
    above = torch.zeros_like(picked[:, :ranked])
    for begin, z in tiles():
        if ranked:
            _count_above(above, z, picked, wanted - begin)
        if sums is not None:
            sums.add(z)

    total = None if sums is None else sums.logsumexp()
    tv = None
    if reference is not None and total is not None and "tv" in asked:
        tv = _total_variation((z for _, z in tiles()), reference, total)
    kl = sums.kl() if sums is not None and "kl" in asked else None
    reverse = sums.kl_reverse() if sums is not None and "kl_reverse" in asked else None
    return MetricHead(
        picked,
        total.to(exact) if logsumexp and total is not None else None,
        above.long() if ranked else None,
        *(None if x is None else x.to(exact) for x in (kl, reverse, tv)),
    )


def _steps(z: Tensor) -> Iterator[slice]:
    """Rows of z [row, token] that are worked on at once: few enough to stay in a processor's cache,
    many enough for a GPU."""
    elements = 1 << (17 if z.device.type == "cpu" else 21)
    step = max(1, elements // z.shape[1])
    for first in range(0, z.shape[0], step):
        yield slice(first, first + step)


def _count_above(above: Tensor, z: Tensor, picked: Tensor, wanted: Tensor) -> None:
    """Add to above [row, ranked] how many of a tile's logits z [row, token] are larger than the
    first of picked [row, wanted], of the tokens `wanted`, counted from the tile's first."""
    for rows in _steps(z):
        tile = z[rows]
        larger = torch.empty_like(tile)
        for j in range(above.shape[1]):
            own = wanted[rows, j, None]
            torch.gt(tile, picked[rows, j, None], out=larger)  # counted as floats: 3 times as fast
            # Not the token itself, whose logit may have rounded differently here.
            inside = (own >= 0) & (own < tile.shape[1])
            itself = larger.gather(1, own.clamp(0, tile.shape[1] - 1)) * inside
            above[rows, j] += larger.sum(-1) - itself[:, 0]


class _Sums:
    """Σ_v exp(z) of every row, and what two KL need of it, tile by tile before the normalisers Z
    are known: weights are exp(z − largest z so far), and sums are rescaled as that grows.

    KL(P ‖ Q) = Σ_v P(v) (z_P − z_Q) − log Z_P + log Z_Q. Both parts are far larger than the KL of
    nearly equal rows, hence float64 sums of a float32 model's logits.
    """

    def __init__(self, like: Tensor) -> None:
        """like [row] says dtype and device of the sums."""
        self.top = torch.full_like(like, float("-inf"))  # the largest logit so far
        self.mass = torch.zeros_like(like)  # Σ exp(z − top)
        self.reference: Reference | None = None

    def compare(self, reference: Reference, kl: bool, kl_reverse: bool) -> None:
        """Also sum what KL(reference ‖ row), KL(row ‖ reference), or both need."""
        self.reference = reference
        self.source = reference.rows[reference.of]  # [row]: the row that a row is compared to
        self.cross = torch.zeros_like(self.mass) if kl else None  # Σ p z, p of the source
        self.reverse = torch.zeros_like(self.mass) if kl_reverse else None  # Σ q (z − z_P)

    def add(self, z: Tensor) -> None:
        """Take in a tile of logits [row, token]."""
        dtype = self.mass.dtype
        top = torch.maximum(self.top, z.amax(-1).to(dtype))
        shift = _shift(top)
        shrink = torch.exp(self.top - shift)
        self.top = top
        self.mass *= shrink
        p = z
        if self.reference is not None:
            if self.cross is not None:
                self.cross *= shrink[self.source]
                rows = self.reference.rows
                p = (z[rows].to(dtype) - shift[rows, None]).exp_()
            if self.reverse is not None:
                self.reverse *= shrink
        for part in _steps(z):
            own = z[part].to(dtype)
            q = (own - shift[part, None]).exp_()
            self.mass[part] += q.sum(-1)
            if self.reference is None:
                continue
            if self.cross is not None:
                self.cross[part] += _weighted(p[self.reference.of[part]], own)
            if self.reverse is not None:
                self.reverse[part] += _weighted(q, own - z[self.source[part]])

    def logsumexp(self) -> Tensor:
        """[row] in nats."""
        return _shift(self.top) + self.mass.log()

    def kl(self) -> Tensor:
        """KL(reference ‖ row) [row] in nats."""
        assert self.cross is not None
        total, source = self.logsumexp(), self.source
        gap = (self.cross[source] - self.cross) / self.mass[source]
        return (gap - total[source] + total).clamp(min=0)

    def kl_reverse(self) -> Tensor:
        """KL(row ‖ reference) [row] in nats."""
        assert self.reverse is not None
        total = self.logsumexp()
        return (self.reverse / self.mass - total + total[self.source]).clamp(min=0)


def _shift(top: Tensor) -> Tensor:
    """What is taken from logits before exp: the largest, but 0 while there was none but −inf."""
    return top.masked_fill(top == float("-inf"), 0)


def _weighted(weight: Tensor, x: Tensor) -> Tensor:
    """Σ_v weight · x, [row], where what has no weight counts nothing, even if it is infinite."""
    total: Tensor = torch.linalg.vecdot(weight, x.masked_fill(weight == 0, 0))
    return total


def _total_variation(tiles: Iterator[Tensor], reference: Reference, logsumexp: Tensor) -> Tensor:
    """½ Σ_v |P_reference(v) − P_row(v)|, [row], from the logits [row, token] of every tile."""
    total = torch.zeros_like(logsumexp)
    rows = reference.rows
    for z in tiles:
        p = (z[rows].to(total.dtype) - logsumexp[rows, None]).exp_()
        for part in _steps(z):
            q = (z[part].to(total.dtype) - logsumexp[part, None]).exp_()
            total[part] += q.sub_(p[reference.of[part]]).abs_().sum(-1)
    return total / 2
