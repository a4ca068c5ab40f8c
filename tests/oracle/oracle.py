"""Activation patching with plain forward hooks: one full forward per cell, and metrics in numpy.

Nothing is shared with the engine: the family's own modules run, with the family's own attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from oracle import hooks
from oracle.families import Family

Ids = Sequence[int]
# component, layer, unit (head of head_z, else None), positions
Place = tuple[str, int, int | None, Iterable[int]]
Reduce = Literal["mean", "sum"]

# In the order of the forward.
COMPONENTS = ("resid_pre", "head_z", "attn_out", "resid_mid", "mlp_out", "resid_post")


def baseline(model: PreTrainedModel, ids: Ids) -> Tensor:
    """Logits [vocab] (float64) at the last token of a plain forward.

    The attention is the one the model is set to; `run_set` with no places uses the family's own.
    """
    with torch.no_grad():
        out = model(torch.tensor([ids], device=model.device), use_cache=False)
    logits: Tensor = out.logits[0, -1].double()
    return logits


def record(model: PreTrainedModel, family: Family, ids: Ids) -> dict[tuple[str, int], Tensor]:
    """Activations [position, width] of one forward by (component, layer).

    `attn_out` and `mlp_out` are recorded before a residual multiplier: they are swapped at the same
    place, and swapping x is swapping x times a constant.
    """
    seen: dict[tuple[str, int], Tensor] = {}

    def keep(component: str, layer: int, value: Tensor) -> Tensor:
        seen[component, layer] = value.reshape(-1, value.shape[-1]).clone()
        return value

    with hooks.attention(model, family.attention), ExitStack() as stack:
        for layer in range(model.config.num_hidden_layers):
            for component, (module, at) in hooks.modules(model, family, layer).items():
                see = partial(keep, component, layer)
                stack.enter_context(hooks.changed(module, at, see))
        baseline(model, ids)
    return seen


def run(
    model: PreTrainedModel,
    family: Family,
    destination_ids: Ids,
    source_ids: Ids,
    component: str,
    layer: int,
    unit: int | None,
    positions: Iterable[int],
) -> Tensor:
    """Logits [vocab] (float64) at the last token of the patched destination run.

    The component's activation at (layer, unit, positions) is replaced by the source run's; `unit`
    is the head for head_z, else None. ValueError for resid_mid of a parallel block.
    """
    places = [(component, layer, unit, positions)]
    return run_set(model, family, destination_ids, source_ids, places)


def run_set(
    model: PreTrainedModel,
    family: Family,
    destination_ids: Ids,
    source_ids: Ids,
    places: Iterable[Place],
) -> Tensor:
    """Like `run`, with several places patched in one forward.

    Where two meet, the one that comes later in the forward wins.
    """
    return _patched(model, family, destination_ids, record(model, family, source_ids), places)


def grid(
    model: PreTrainedModel,
    family: Family,
    destination_ids: Ids,
    source_ids: Ids,
    component: str,
    positions: Literal["each", "all"] = "each",
) -> Tensor:
    """Logits [layer, unit, position, vocab] (float64), one full forward per cell.

    The axis position has size 1 for "all"; unit has size 1 where there is none.
    """
    source = record(model, family, source_ids)
    n = len(destination_ids)
    wanted = [[p] for p in range(n)] if positions == "each" else [list(range(n))]
    heads = range(model.config.num_attention_heads) if component == "head_z" else [None]
    cells = [
        [
            [
                _patched(model, family, destination_ids, source, [(component, layer, unit, at)])
                for at in wanted
            ]
            for unit in heads
        ]
        for layer in range(model.config.num_hidden_layers)
    ]
    return torch.stack([torch.stack([torch.stack(u) for u in layer]) for layer in cells])


def _patched(
    model: PreTrainedModel,
    family: Family,
    destination_ids: Ids,
    source: dict[tuple[str, int], Tensor],
    places: Iterable[Place],
) -> Tensor:
    """Logits [vocab] of the destination run with the places taken from recorded activations."""
    # In order, so that a hook sees what earlier patches of the layer have done.
    ordered = sorted(places, key=lambda place: COMPONENTS.index(place[0]))
    with hooks.attention(model, family.attention), ExitStack() as stack:
        for component, layer, unit, positions in ordered:
            modules = hooks.modules(model, family, layer)
            if component not in modules:
                raise ValueError(f"{component}: none in a parallel block ({family.model_type})")
            if (unit is not None) != (component == "head_z"):
                raise ValueError(f"{component}: unit {unit}; head_z wants a head, others none")
            value, rows = source[component, layer], sorted(positions)
            if component == "resid_mid":
                stack.enter_context(_mid(modules, value, rows, family.residual_multiplier))
                continue
            columns = slice(None)
            if unit is not None:
                width = value.shape[1] // model.config.num_attention_heads
                columns = slice(unit * width, (unit + 1) * width)
            change = partial(_replaced, value, rows, columns)
            stack.enter_context(hooks.changed(*modules[component], change))
        return baseline(model, destination_ids)


def _replaced(value: Tensor, rows: list[int], columns: slice, hidden: Tensor) -> Tensor:
    """`hidden` with value[rows, columns] in their places."""
    new = hidden.reshape(-1, hidden.shape[-1]).clone()
    new[rows, columns] = value[rows, columns]
    return new.view_as(hidden)


@contextmanager
def _mid(
    modules: dict[str, tuple[Module, str]], value: Tensor, rows: list[int], multiplier: float
) -> Iterator[None]:
    """Replaces the residual stream after attention, by making attention add just what is missing.

    (The MLP block reads that stream twice, through its norm and as the residual; no one module's
    input is both.)
    """
    before: list[Tensor] = []

    def see(hidden: Tensor) -> Tensor:
        before.append(hidden[0])
        return hidden

    def swap(out: Tensor) -> Tensor:
        new = out.clone()
        new[0, rows] = (value[rows] - before[-1][rows]) / multiplier
        return new

    with (
        hooks.changed(*modules["resid_pre"], see),
        hooks.changed(*modules["attn_out"], swap),
    ):
        yield


# Metrics: logits [..., vocab] -> values [...], in float64.

Logits = NDArray[np.float64] | Tensor
Values = NDArray[np.float64]


def logit(logits: Logits, tokens: Ids, reduce: Reduce = "mean") -> Values:
    """The logit of a set of tokens: mean or sum over the set."""
    chosen = _array(logits)[..., list(tokens)]
    return np.asarray(chosen.mean(-1) if reduce == "mean" else chosen.sum(-1))


def logit_diff(logits: Logits, answer: Ids, wrong: Ids, reduce: Reduce = "mean") -> Values:
    """Logit of the answers minus logit of the wrong tokens, each reduced over its set."""
    return logit(logits, answer, reduce) - logit(logits, wrong, reduce)


def logprob(logits: Logits, tokens: Ids) -> Values:
    """Log (nats) of the summed probability of a set of tokens."""
    x = _array(logits)
    return _logsumexp(x[..., list(tokens)]) - _logsumexp(x)


def prob(logits: Logits, tokens: Ids) -> Values:
    """Summed probability of a set of tokens."""
    return np.exp(logprob(logits, tokens))


def prob_diff(logits: Logits, answer: Ids, wrong: Ids) -> Values:
    """Summed probability of the answers minus that of the wrong tokens."""
    return np.asarray(prob(logits, answer) - prob(logits, wrong))


def sequence_logprob(logits: Logits, tokens: Ids, start: int) -> Values:
    """Log-probability (nats) of tokens [token], predicted from position `start` of logits
    [position, vocab] on."""
    x = _array(logits)
    return np.asarray(sum(logprob(x[start + i], [token]) for i, token in enumerate(tokens)))


def relative_prob(logits: Logits, corrupt: Logits, answer: Ids, wrong: Ids) -> Values:
    """((P(a) - C(a)) / C(a) + (C(w) - P(w)) / P(w)) / 2, with C of the corrupt run.

    Stolfo et al. 2023, as in equation 2 of Zhang & Nanda 2023.
    """
    gain = prob(logits, answer) / prob(corrupt, answer) - 1
    loss = prob(corrupt, wrong) / prob(logits, wrong) - 1
    return np.asarray((gain + loss) / 2)


def rank(logits: Logits, tokens: Ids) -> NDArray[np.int64]:
    """Number of tokens with a strictly larger logit; of a set: the best (smallest)."""
    x = _array(logits)
    ranks = [(x > x[..., token, None]).sum(-1) for token in tokens]
    return np.asarray(np.min(ranks, axis=0), dtype=np.int64)


def accuracy(logits: Logits, tokens: Ids, k: int = 1) -> Values:
    """1.0 where the set's rank is below k, else 0.0."""
    return np.asarray(rank(logits, tokens) < k, dtype=np.float64)


def kl(reference: Logits, patched: Logits) -> Values:
    """KL(reference || patched) in nats; the two broadcast against each other."""
    p, q = _array(reference), _array(patched)
    log_p = p - _logsumexp(p)[..., None]
    log_q = q - _logsumexp(q)[..., None]
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(-1))


def total_variation(p: Logits, q: Logits) -> Values:
    """Half of the summed absolute difference of two distributions."""
    x, y = _array(p), _array(q)
    difference = np.exp(x - _logsumexp(x)[..., None]) - np.exp(y - _logsumexp(y)[..., None])
    return np.asarray(np.abs(difference).sum(-1) / 2)


def _array(logits: Logits) -> Values:
    return np.asarray(logits, dtype=np.float64)


def _logsumexp(x: Values) -> Values:
    top = x.max(-1, keepdims=True)
    return np.asarray((np.log(np.exp(x - top).sum(-1, keepdims=True)) + top)[..., 0])
