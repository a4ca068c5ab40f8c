"""Every metric of logits that are given, in place of a model, against plain numpy."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from oracle import oracle
from patchsweep.pairs import Pair
from patchsweep.passes.metrics import Rows, evaluate
from patchsweep.plan.reads import resolve_reads
from patchsweep.spec import parse_metric

VOCAB = 20
# With sets of other sizes and continuations of other lengths.
PAIRS = [
    Pair((1, 2, 3, 4, 5), (1, 9, 3, 4, 5), (7, 8), (9,), continuation=(5, 6)),
    Pair((4, 2, 3, 4), (1, 9, 3, 4), (11,), (12, 13, 14), continuation=(6,)),
    Pair((4, 2, 3, 6, 6, 7), (1, 9, 3, 6, 6, 7), (3, 0), (5, 2), continuation=(6, 7, 4)),
]
METRICS = [
    parse_metric(m)
    for m in (
        "logit_diff", {"logit_diff": {"reduce": "sum"}}, "logit", "logprob", "prob", "prob_diff",
        "rank", "accuracy", {"accuracy": {"k": 4}}, "kl", "kl_reverse", "total_variation",
        "relative_prob", "sequence_logprob", {"kl": {"at": -2}}, {"prob": {"at": 1}},
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def found() -> tuple[Rows, np.ndarray, dict[str, np.ndarray]]:
    reads = resolve_reads(PAIRS, METRICS)
    per_pair, runs = 3, 14
    rng = np.random.default_rng(0)
    pair = np.concatenate([np.repeat(np.arange(3), per_pair), np.sort(rng.integers(3, size=runs))])
    rows = Rows(PAIRS, pair, 3 * per_pair, reads.positions[pair], reads.of, other=2)
    logits = 2 * rng.normal(size=(len(pair), reads.positions.shape[1], VOCAB))
    logits[..., 7:9] += 2  # so that some answers come first
    one = torch.eye(VOCAB, dtype=torch.float64)
    forward: Any = SimpleNamespace(
        final_norm=lambda hidden: hidden,
        finishes=False,
        unembedding=lambda: nullcontext((one, None)),
    )
    return rows, logits, evaluate(forward, torch.from_numpy(logits), rows, METRICS, {})


def wanted(metric: Any, p: Pair, own: Any, clean: Any, corrupt: Any, tail: Any) -> float:
    """Of logits [token] where the metric reads, and of `tail` [read, token] where the answer's
    tokens are."""
    told = (oracle.logprob(at, [token]) for at, token in zip(tail, p.continuation, strict=True))
    values = {
        "logit_diff": oracle.logit_diff(own, p.answer, p.wrong, metric.reduce),
        "logit": oracle.logit(own, p.answer),
        "logprob": oracle.logprob(own, p.answer),
        "prob": oracle.prob(own, p.answer),
        "prob_diff": oracle.prob_diff(own, p.answer, p.wrong),
        "rank": oracle.rank(own, p.answer),
        "accuracy": oracle.accuracy(own, p.answer, metric.k),
        "kl": oracle.kl(clean, own),
        "kl_reverse": oracle.kl(own, clean),
        "total_variation": oracle.total_variation(clean, own),
        "relative_prob": oracle.relative_prob(own, corrupt, p.answer, p.wrong),
        "sequence_logprob": sum(told),
    }
    return float(values[metric.name])


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.column)
def test_values(metric: Any, found: Any) -> None:
    rows, logits, values = found
    seen, ranks = set(), set()
    for row, number in enumerate(rows.pair):
        p, places = PAIRS[number], rows.reads[row].tolist()
        at = places.index({None: p.read, -2: p.read - 1, 1: 1}[metric.at])
        own, clean, corrupt = (logits[r, at] for r in (row, 3 * number, 3 * number + 2))
        tail = [logits[row, places.index(p.read + k)] for k in range(len(p.continuation))]
        value = wanted(metric, p, own, clean, corrupt, tail)
        assert values[metric.column][row] == pytest.approx(value, abs=1e-10)
        seen.add(value)
        ranks.add(int(oracle.rank(own, p.answer)))
    assert len(seen) > 1
    assert metric.name != "accuracy" or metric.k in ranks  # the first that is too many
