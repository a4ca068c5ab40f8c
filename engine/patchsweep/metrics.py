"""Metrics: from the logits at a pair's last token to one number per row.

Definitions follow Zhang & Nanda 2023 (arXiv 2309.16042, §2) and Heimersheim & Nanda 2024
(arXiv 2404.15255): logit difference, logit, log-probability and probability of a set of answer
tokens, rank, accuracy, and KL(clean ‖ patched).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchsweep.errors import BadInput
from patchsweep.pairs import Pair
from patchsweep.spec import Metric
from patchsweep_kernels import MetricHead

LOGIT_METRICS = frozenset({"logit_diff", "logit"})
PADDING = -1


@dataclass(frozen=True)
class Wanted:
    """Token sets of pairs: tokens [pair, wanted], answers before wrongs; `answers` is how many."""

    tokens: Tensor
    answers: int

    def rows(self, pair: Tensor) -> Wanted:
        """The sets of rows, by each row's pair [row]."""
        return Wanted(self.tokens[pair], self.answers)


def whole_vocabulary(metrics: Sequence[Metric]) -> bool:
    """Whether any metric needs the logits of every token."""
    return any(m.name not in LOGIT_METRICS for m in metrics)


def wanted(pairs: Sequence[Pair], metrics: Sequence[Metric], device: torch.device) -> Wanted:
    """The answer and wrong sets of the pairs, padded. BadInput if a metric's set is missing."""
    for i, pair in enumerate(pairs):
        if not pair.wrong and any(m.name == "logit_diff" for m in metrics):
            raise BadInput(f"pair {i} has no wrong answer, logit_diff needs one: add 'wrong'")
    answers = max(len(p.answer) for p in pairs)
    wrongs = max(len(p.wrong) for p in pairs)
    table = [_padded(p.answer, answers) + _padded(p.wrong, wrongs) for p in pairs]
    return Wanted(torch.tensor(table, device=device), answers)


def _padded(tokens: tuple[int, ...], length: int) -> list[int]:
    return list(tokens) + [PADDING] * (length - len(tokens))


def evaluate(metrics: Sequence[Metric], head: MetricHead, sets: Wanted) -> dict[str, Tensor]:
    """Each metric's values [row], by its column; `sets` are those of the rows."""
    n = sets.answers
    real = sets.tokens != PADDING
    answers, wrongs = (head.logits[:, :n], real[:, :n]), (head.logits[:, n:], real[:, n:])
    out = {}
    for m in metrics:
        if m.name == "logit_diff":
            value = _reduce(*answers, m.reduce) - _reduce(*wrongs, m.reduce)
        elif m.name == "logit":
            value = _reduce(*answers, m.reduce)
        elif m.name in ("logprob", "prob"):
            assert head.logsumexp is not None
            together = answers[0].masked_fill(~answers[1], float("-inf")).logsumexp(-1)
            value = together - head.logsumexp
            value = value.exp() if m.name == "prob" else value
        elif m.name in ("rank", "accuracy"):
            assert head.rank is not None
            never = torch.iinfo(head.rank.dtype).max
            best = head.rank[:, :n].masked_fill(~answers[1], never).amin(-1)
            value = best if m.name == "rank" else best < m.k
            value = torch.where(head.logits.isfinite().all(-1), value, float("nan"))
        else:
            assert head.kl is not None
            value = head.kl
        out[m.column] = value.to(head.logits.dtype)
    return out


def _reduce(logits: Tensor, real: Tensor, how: str) -> Tensor:
    total = logits.masked_fill(~real, 0).sum(-1)
    return total if how == "sum" else total / real.sum(-1)
