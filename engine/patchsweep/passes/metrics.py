"""Metrics: from the logits where they are read to one number per row.

Definitions follow Zhang & Nanda 2023 (arXiv 2309.16042, section 2) and Heimersheim & Nanda 2024
(arXiv 2404.15255): logit difference, logit, log-probability and probability of a set of answer
tokens, rank, accuracy, KL and total variation against the clean run; the relative probability is
that of Stolfo et al. 2023 as in Zhang & Nanda's equation 2.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchsweep.device import to_device, to_host
from patchsweep.errors import BadInput
from patchsweep.pairs import Pair
from patchsweep.passes.forward import Forward
from patchsweep.plan import TAIL_ELEMENTS, TAIL_TILE, whole_vocabulary
from patchsweep.spec import INNER, Metric
from patchsweep_kernels import MetricHead, Reference, metric_head

PADDING = -1
DIVERGENCES = {"kl": "kl", "kl_reverse": "kl_reverse", "total_variation": "tv"}
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a wave whose logits are read: `base` unpatched ones, for every pair the clean run
    and those it is set against, then the patched runs.

    pair [row] counts in `pairs`; reads [row, read] are positions, −1 where there is none; `of` says
    which reads a metric takes, [pair, token]. The wave's own run is base row `other` of each pair.
    """

    pairs: Sequence[Pair]
    pair: Ints
    base: int
    reads: Ints
    of: Mapping[str, Ints]
    other: int

    @property
    def per_pair(self) -> int:
        """Base rows of every pair."""
        return self.base // len(self.pairs)

    @cached_property
    def corrupt(self) -> Ints:
        """[row]: the run that the row's pair is set against."""
        return self.pair * self.per_pair + self.other


@dataclass(frozen=True, eq=False)
class Context:
    """What a user's metric is told of the rows whose logits [row, vocab] it gets: `pairs` [row],
    and `run` [row], int8, whether a row is an unpatched run (clean: 0, a run it is set against: 1)
    or a patched one (2)."""

    pairs: Sequence[Pair]
    run: NDArray[np.int8]


def check_metrics(pairs: Sequence[Pair], metrics: Sequence[Metric]) -> None:
    """BadInput if a metric lacks what it needs of a pair."""
    for i, pair in enumerate(pairs):
        for m in metrics:
            if m.name in ("logit_diff", "prob_diff", "relative_prob") and not pair.wrong:
                raise BadInput(f"pair {i} has no wrong answer, {m.name} needs one: add 'wrong'")


def evaluate(
    forward: Forward,
    hidden: Tensor,
    rows: Rows,
    metrics: Sequence[Metric],
    inner: Mapping[str, Tensor],
) -> dict[str, NDArray[np.floating]]:
    """Each metric's values [row], by column, from hidden [row, read, d_model] and from what was
    read inside (`inner`)."""
    return to_host(measure(forward, hidden, rows, metrics, inner)).result()


def measure(
    forward: Forward,
    hidden: Tensor,
    rows: Rows,
    metrics: Sequence[Metric],
    inner: Mapping[str, Tensor],
    head: Callable[..., MetricHead] = metric_head,
) -> dict[str, Tensor]:
    """What `evaluate` returns, as tensors; `head` does what `metric_head` does."""
    logit_metrics = [m for m in metrics if m.name not in INNER]
    out = dict(inner)
    if logit_metrics:
        with forward.unembedding() as (weight, bias):
            hidden = hidden.to(weight.device)
            table = _Table(rows, hidden.device)
            of_logits = read(forward, hidden, rows, table, logit_metrics, weight, bias, head)
            for m in logit_metrics:
                if m.name == "callable":
                    out[m.column] = _called(forward, hidden, rows, m, len(weight))
                else:
                    out[m.column] = _value(m, of_logits, table, rows)
    return {m.column: out[m.column] for m in metrics}


class _Table:
    """The tokens that metrics ask for, [row, read, wanted]: answers, wrongs, then the token of the
    continuation that is predicted there; padded."""

    def __init__(self, rows: Rows, device: torch.device) -> None:
        pairs = rows.pairs
        self.answers = max(len(p.answer) for p in pairs)
        self.wrongs = max(len(p.wrong) for p in pairs)
        sets = [_padded(p.answer, self.answers) + _padded(p.wrong, self.wrongs) for p in pairs]
        reads = rows.reads.shape[1]
        table = np.repeat(np.array(sets)[:, None], reads, 1)
        sequence = np.full((len(pairs), reads, 1), PADDING)
        if "sequence_logprob" in rows.of:
            for i, p in enumerate(pairs):
                for token, slot in zip(
                    p.continuation, rows.of["sequence_logprob"][i], strict=False
                ):
                    sequence[i, slot] = token
        wanted = np.concatenate([table, sequence], 2)
        self.occurring = to_device(np.unique(np.maximum(wanted, 0)), device)
        self.pair = to_device(rows.pair, device)
        self.tokens = to_device(wanted, device)[self.pair]

    def slot(self, rows: Rows, column: str) -> Tensor:
        """[row, token]: which reads a metric takes, −1 padded."""
        return to_device(rows.of[column], self.pair.device)[self.pair]


def _padded(tokens: tuple[int, ...], length: int) -> list[int]:
    return list(tokens) + [PADDING] * (length - len(tokens))


def read(
    forward: Forward,
    hidden: Tensor,
    rows: Rows,
    table: _Table,
    metrics: Sequence[Metric],
    weight: Tensor,
    bias: Tensor | None,
    head: Callable[..., MetricHead] = metric_head,
) -> MetricHead:
    """What the metrics need of the logits of hidden [row, read, d_model], of every [row · read];
    weight [vocab, d_model] and bias [vocab] are the unembedding's."""
    names = {m.name for m in metrics}
    count, reads = hidden.shape[:2]
    divergences = frozenset(DIVERGENCES[n] for n in names & DIVERGENCES.keys())
    reference = None
    if divergences:  # of every read of every pair, the clean run's
        each = np.arange(reads)
        clean = np.arange(len(rows.pairs))[:, None] * rows.per_pair * reads + each
        of = rows.pair[:, None] * reads + each
        device = hidden.device
        reference = Reference(*(to_device(x.ravel(), device) for x in (clean, of)))
    return head(
        forward.final_norm(hidden.flatten(0, 1)),
        weight,
        bias,
        table.tokens.flatten(0, 1).clamp(min=0),
        occurring=table.occurring,
        finish=forward.finish if forward.finishes else None,
        logsumexp=whole_vocabulary(metrics),
        ranked=table.answers if names & {"rank", "accuracy"} else 0,
        reference=reference,
        divergences=divergences,
        tile=max(TAIL_TILE, TAIL_ELEMENTS // (count * reads)),
    )


def _value(m: Metric, head: MetricHead, table: _Table, rows: Rows) -> Tensor:
    """A logit metric's value [row], NaN where the row has no such position."""
    slots = table.slot(rows, m.column)  # [row, token]
    reads = rows.reads.shape[1]
    row = torch.arange(len(slots), device=slots.device)
    absent = to_device(rows.reads < 0, slots.device)

    def at(values: Tensor, slot: Tensor) -> Tensor:
        """Of values [row · read, ...] those of one read of every row."""
        return values.view(-1, reads, *values.shape[1:])[row, slot]

    if m.name == "sequence_logprob":
        assert head.logsumexp is not None
        total = torch.zeros_like(head.logits[: len(row), 0])
        for column in slots.T:
            slot = column.clamp(min=0)
            logprob = at(head.logits[:, -1], slot) - at(head.logsumexp, slot)
            logprob = logprob.masked_fill(absent[row, slot], float("nan"))
            total += logprob.masked_fill(column < 0, 0.0)
        return total
    slot = slots[:, 0]
    logits, real = at(head.logits, slot), at(table.tokens.flatten(0, 1), slot) != PADDING
    n, end = table.answers, table.answers + table.wrongs
    answers, wrongs = (logits[:, :n], real[:, :n]), (logits[:, n:end], real[:, n:end])
    value = _of_logits(m, answers, wrongs)
    if value is None:
        value = _of_distribution(
            m, answers, wrongs, lambda name: at(getattr(head, name), slot), rows
        )
    return value.to(logits.dtype).masked_fill(absent[row, slot], float("nan"))


_Set = tuple[Tensor, Tensor]  # logits [row, token], and which of them are real


def _of_logits(m: Metric, answers: _Set, wrongs: _Set) -> Tensor | None:
    """The metrics that need no other logits."""
    if m.name == "logit_diff":
        return _reduce(*answers, m.reduce) - _reduce(*wrongs, m.reduce)
    return _reduce(*answers, m.reduce) if m.name == "logit" else None


def _of_distribution(
    m: Metric, answers: _Set, wrongs: _Set, of: Callable[[str], Tensor], rows: Rows
) -> Tensor:
    """The metrics that need the whole vocabulary; `of` gives a field of the metric head [row]."""
    if m.name in DIVERGENCES:
        return of(DIVERGENCES[m.name])
    if m.name in ("rank", "accuracy"):
        rank = of("rank")
        best = rank.masked_fill(~answers[1], torch.iinfo(rank.dtype).max).amin(-1)
        value = best if m.name == "rank" else best < m.k
        # Every comparison with a NaN is false, which would make of it the best rank there is.
        return torch.where(of("logsumexp").isfinite(), value, float("nan"))
    answer = _logsumexp(*answers) - of("logsumexp")
    if m.name == "logprob":
        return answer
    if m.name == "prob":
        return answer.exp()
    wrong = _logsumexp(*wrongs) - of("logsumexp")
    if m.name == "prob_diff":
        return answer.exp() - wrong.exp()
    assert m.name == "relative_prob"
    corrupt = to_device(rows.corrupt, answer.device)
    # Of P / P_corrupt the logarithm is a difference: nothing is lost where both are tiny.
    gain = torch.expm1(answer - answer[corrupt])
    loss = torch.expm1(wrong[corrupt] - wrong)
    return (gain + loss) / 2


def _logsumexp(logits: Tensor, real: Tensor) -> Tensor:
    return logits.masked_fill(~real, float("-inf")).logsumexp(-1)


def _reduce(logits: Tensor, real: Tensor, how: str) -> Tensor:
    total = logits.masked_fill(~real, 0).sum(-1)
    return total if how == "sum" else total / real.sum(-1)


Function = Callable[[Tensor, Context], Any]


_given: dict[str, Function] = {}


@contextmanager
def given_functions(functions: Mapping[str, Function]) -> Iterator[None]:
    """Inside, these functions are those of their names, package.module:name; nothing is imported
    for them."""
    _given.update(functions)
    try:
        yield
    finally:
        for path in functions:
            _given.pop(path, None)


def load_function(path: str) -> Function:
    """The function that package.module:name means; modules beside the user are found too."""
    if path in _given:
        return _given[path]
    module, _, name = path.partition(":")
    here = str(Path.cwd())
    try:
        sys.path.insert(0, here)
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BadInput(f"callable {path}: {error}: write package.module:function") from error
    finally:
        sys.path.remove(here)
    if not callable(function):
        raise BadInput(f"callable {path}: is no function")
    return function  # type: ignore[no-any-return]


def _called(forward: Forward, hidden: Tensor, rows: Rows, m: Metric, vocab: int) -> Tensor:
    """A user's metric, given all logits of some rows at a time."""
    function = load_function(m.path)
    slot = rows.of[m.column][rows.pair][:, 0]
    row = torch.arange(len(slot), device=hidden.device)
    at = hidden[row, to_device(slot, hidden.device)]
    run = np.full(len(slot), 2, np.int8)
    run[: rows.base] = np.minimum(np.arange(rows.base) % rows.per_pair, 1)
    step = max(1, TAIL_ELEMENTS // vocab)
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    out = []
    for i in range(0, len(slot), step):
        logits = forward.logits(at[i : i + step]).to(exact)
        pairs = [rows.pairs[p] for p in rows.pair[i : i + step]]
        value = function(logits, Context(pairs, run[i : i + step]))
        value = value if isinstance(value, Tensor) else torch.as_tensor(value)
        if value.shape != (len(logits),):
            raise BadInput(
                f"callable {m.path} returned the shape {list(value.shape)} for {len(logits)} rows "
                f"of logits: return one value per row, [{len(logits)}]"
            )
        out.append(value.to(logits))
    return torch.cat(out)
