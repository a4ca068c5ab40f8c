"""Metrics from logits, each by its definition, in float64 (the guide says what they are)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchsweep.spec import Metric


def logit_metric(
    m: Metric,
    logits: Tensor,
    answer: Sequence[int],
    wrong: Sequence[int],
    clean: Tensor,
    corrupt: Tensor | None,
) -> float:
    """A metric of logits [vocab] at one position; `clean` [vocab] are the clean run's there,
    `corrupt` [vocab] those of the run that the pair is set against, if there is one."""
    x = logits.double().cpu()
    answers, wrongs = list(answer), list(wrong)
    if m.name in ("logit", "logit_diff"):
        reduce = torch.sum if m.reduce == "sum" else torch.mean
        of = reduce(x[answers])
        return float(of if m.name == "logit" else of - reduce(x[wrongs]))
    if m.name in ("rank", "accuracy"):
        if not bool(x[[*answers, *wrongs]].isfinite().all()):
            return float("nan")
        rank = min(int((x > x[a]).sum()) for a in answers)
        return float(rank if m.name == "rank" else rank < m.k)
    logp = x.log_softmax(-1)
    if m.name in ("kl", "kl_reverse", "total_variation"):
        reference = clean.double().cpu().log_softmax(-1)
        if m.name == "total_variation":
            return float((logp.exp() - reference.exp()).abs().sum() / 2)
        return _kl(logp, reference) if m.name == "kl_reverse" else _kl(reference, logp)
    if m.name == "logprob":
        return float(logp[answers].logsumexp(-1))
    p = logp.exp()
    if m.name == "prob":
        return float(p[answers].sum())
    if m.name == "prob_diff":
        return float(p[answers].sum() - p[wrongs].sum())
    assert m.name == "relative_prob", m.name
    assert corrupt is not None
    before = corrupt.double().cpu().log_softmax(-1)

    def apart(tokens: list[int]) -> Tensor:
        return logp[tokens].logsumexp(-1) - before[tokens].logsumexp(-1)

    return float((torch.expm1(apart(answers)) + torch.expm1(-apart(wrongs))) / 2)


def _kl(p: Tensor, q: Tensor) -> float:
    """KL(p ‖ q) in nats, of log-probabilities [vocab]; a token without probability adds nothing."""
    terms = torch.where(p == float("-inf"), 0.0, p.exp() * (p - q))
    return max(0.0, float(terms.sum())) if not bool(terms.isnan().any()) else float("nan")
