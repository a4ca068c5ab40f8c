"""Where metrics are read: positions of logits, and activations inside the model. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import BadInput
from patchsweep.pairs import Pair, resolve_positions
from patchsweep.spec import INNER, Metric, Place

Ints = NDArray[np.int64]
# Logits held at once where metrics are read, in elements, and how many arrays of that size.
TAIL_ELEMENTS, TAIL_ARRAYS = 1 << 23, 5
TAIL_TILE = 256
# Metrics that only need the logits of chosen tokens.
LOGIT_METRICS = frozenset({"logit_diff", "logit"})


@dataclass(frozen=True, eq=False)
class Inner:
    """A metric that reads an activation: its positions [pair] in the clean prompts, and for an
    attention probability those of the key."""

    metric: Metric
    position: Ints
    key: Ints


@dataclass(frozen=True, eq=False)
class Reads:
    """positions [pair, read] of the clean prompts where logits are read, −1 where a pair has fewer;
    `of` says which of them each logit metric takes, [pair, token]; `inner` are the others."""

    positions: Ints
    of: dict[str, Ints]
    inner: tuple[Inner, ...]


def resolve_reads(pairs: Sequence[Pair], metrics: Sequence[Metric]) -> Reads:
    """BadInput for a position that a pair does not have, or a sequence without a continuation."""
    inner, wanted = [], {}
    for m in metrics:
        if m.name in INNER:
            query = m.query if m.name == "attention" else m.position
            position = _places(pairs, query, m)
            key = _places(pairs, m.key, m) if m.name == "attention" else position
            if (key > position).any():
                raise BadInput(f"{m.column}: the key comes after the query, which cannot see it")
            inner.append(Inner(m, position, key))
        elif m.name == "sequence_logprob":
            wanted[m.column] = _sequence(pairs)
        elif m.at is None:
            wanted[m.column] = np.array([[p.read] for p in pairs])
        else:
            wanted[m.column] = _places(pairs, m.at, m)[:, None]
    rows: list[list[int]] = [
        sorted({int(n) for w in wanted.values() for n in w[i] if n >= 0}) or [p.read]
        for i, p in enumerate(pairs)
    ]
    width = max(map(len, rows))
    positions = np.array([row + [-1] * (width - len(row)) for row in rows])
    of = {name: (w[:, :, None] == positions[:, None]).argmax(2) for name, w in wanted.items()}
    for name, w in wanted.items():
        of[name][w < 0] = -1
    return Reads(positions, of, tuple(inner))


def _places(pairs: Sequence[Pair], place: Place, metric: Metric) -> Ints:
    """Clean position [pair] of an index or label."""
    members = resolve_positions(pairs, (place,)).members[:, 0]
    if not members.any(1).all():
        missing = int(members.any(1).argmin())
        raise BadInput(f"{metric.column}: pair {missing} has no position {place!r}")
    found: Ints = members.argmax(1)
    return found


def _sequence(pairs: Sequence[Pair]) -> Ints:
    """[pair, token]: where each token of the continuation is predicted, −1 padded."""
    for i, p in enumerate(pairs):
        if not p.continuation:
            raise BadInput(f"sequence_logprob: pair {i} has no continuation: add its text")
    longest = max(len(p.continuation) for p in pairs)
    return np.array(
        [[p.read + k if k < len(p.continuation) else -1 for k in range(longest)] for p in pairs]
    )


def whole_vocabulary(metrics: Sequence[Metric]) -> bool:
    """Whether any metric needs the logits of every token."""
    return any(m.name not in LOGIT_METRICS | INNER for m in metrics)
