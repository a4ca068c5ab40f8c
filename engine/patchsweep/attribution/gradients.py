"""The passes: activations of both runs, and gradients of metrics at the destinations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from patchsweep.attribution.patterns import How, plain_attention
from patchsweep.attribution.rules import RelevanceForward
from patchsweep.attribution.runs import Passes
from patchsweep.errors import BadInput
from patchsweep.passes import (
    Attend,
    Editor,
    Forward,
    Rows,
    Seen,
    Tap,
    Values,
    across,
    embedding_tap,
    evaluate,
    measure,
    wavefront,
)
from patchsweep.plan.schedule import Embedding, Schedule, Step
from patchsweep.spec import Metric
from patchsweep_kernels import MetricHead, Reference, packed_attention

# The component whose activation is seen there, and its layer.
Place = tuple[str, int]
EMBEDDING: Place = ("embed", 0)
WRITES = ("attn_out", "mlp_out")  # what a layer adds to the residual stream


@dataclass(frozen=True, eq=False)
class Inputs:
    """What all passes need."""

    forward: Forward
    passes: Passes
    metrics: Sequence[Metric]
    values: Values

    def rows(self, schedules: Sequence[Schedule]) -> Rows:
        """The rows of the observing pass, and of those after it as patched ones."""
        plan, wave = self.passes.plan, self.passes.wave
        return Rows(
            pairs=[plan.pairs[i] for i in wave.pairs],
            pair=np.concatenate([s.row_pair for s in schedules]),
            base=len(schedules[0].base_offset),
            reads=np.concatenate([s.reads for s in schedules]),
            of={
                name: slots[wave.pairs.start : wave.pairs.stop]
                for name, slots in plan.layouts.reads.of.items()
            },
            other=len(wave.runs),
        )


@dataclass(frozen=True, eq=False)
class Observed:
    """The activations [token, unit, width] of both runs, how each layer attends, what the metrics
    read (hidden [row, read, d_model], inner [row]), and their values [row]."""

    activations: Mapping[Place, Tensor]
    how: Mapping[int, How]
    hidden: Tensor
    inner: Mapping[str, Tensor]
    baseline: Mapping[str, NDArray[np.floating]]


@dataclass(eq=False)
class Gates:
    """Which layer's writes to the residual stream drop their gradient; −1 for none."""

    closed: int = -1


class _Gate(torch.autograd.Function):
    """Passes an activation on, and its gradient back unless its layer is closed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Gates, layer: int) -> Tensor:
        ctx.gates, ctx.layer = gates, layer
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None, None]:
        [g] = gradient
        return torch.zeros_like(g) if ctx.gates.closed == ctx.layer else g, None, None


@dataclass(frozen=True, eq=False)
class Graph:
    """Metrics of the destinations' rows, [row] by column, and the places where autograd follows
    them: leaves of zeros [token, unit, width] that were added to the activations. Of some places
    the `activations` [token, unit, width] themselves."""

    values: Mapping[str, Tensor]
    leaves: Mapping[Place, Tensor]
    gates: Gates
    device: torch.device  # where gradients are wanted
    activations: Mapping[Place, Tensor]

    def gradient(self, column: str, closed: int = -1) -> dict[Place, Tensor]:
        """∂m/∂a of every row's metric at every place, [token, unit, width], in one backward: rows
        do not depend on each other. Layer `closed` drops the gradient of what it writes."""
        self.gates.closed = closed
        total = self.values[column].sum()
        leaves = list(self.leaves.values())
        found = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        by_place = zip(self.leaves.items(), found, strict=True)
        return {
            place: torch.zeros_like(leaf, device=self.device) if g is None else g.to(self.device)
            for (place, leaf), g in by_place
        }


@torch.no_grad()
def observe(inputs: Inputs, places: Collection[Place]) -> Observed:
    """One plain pass over both runs of every pair."""
    activations: dict[Place, Tensor] = {}
    device = inputs.forward.device  # wherever a layer is
    how: dict[int, How] = {}

    def see(place: Place, x: Tensor) -> None:
        activations[place] = x.to(device, copy=True)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, rows: Any, *of: Any) -> Any:
        scaling, window, softcap, sinks = of
        sinks = None if sinks is None else sinks.to(device)
        how[layer] = How(scaling, window, softcap, sinks)
        return packed_attention(query, key, value, rows, *of)

    schedule = inputs.passes.observed
    with inputs.forward.once():
        hidden, inner = _carry(inputs, inputs.forward, schedule, places, see, attend)
        rows = inputs.rows([schedule])
        found = evaluate(inputs.forward, hidden, rows, inputs.metrics, inner)
    return Observed(activations, how, hidden, inner, found)


def follow(
    inputs: Inputs,
    observed: Observed,
    places: Collection[Place],
    *,
    relevance: bool = False,
    gated: bool = False,
    shift: Mapping[Place, Tensor] | None = None,
    kept: Collection[Place] = (),
) -> Graph:
    """One pass over the destinations that autograd follows from `places` on.

    With `relevance` gradients are RelP's; with `gated` layers can drop theirs; `shift` is added to
    activations; those of the places `kept` are. BadInput for a user's metric that autograd cannot
    follow.
    """
    forward = RelevanceForward.of(inputs.forward) if relevance else inputs.forward
    gates, leaves, shift = Gates(), dict[Place, Tensor](), shift or {}
    activations: dict[Place, Tensor] = {}
    layers = range(inputs.passes.plan.dimensions.layers)
    wanted = {EMBEDDING, *places}  # from the bottom on, so that the rules see every activation
    writes = {(name, layer) for name in WRITES for layer in layers} if gated else set()

    def see(place: Place, x: Tensor) -> None:
        if place in shift:
            x += shift[place].to(x.device)
        if place in kept:
            activations[place] = x.detach().to(forward.device, copy=True)
        if place in wanted:
            leaves[place] = torch.zeros_like(x, requires_grad=True)
            x += leaves[place]
        if place in writes:
            x.copy_(_Gate.apply(x.clone(), gates, place[1]))  # type: ignore[no-untyped-call]

    def attend(_: int, *args: Any) -> Tensor:
        return plain_attention(*args, fixed=relevance)

    seen, schedule = wanted | writes | shift.keys() | set(kept), inputs.passes.destinations
    with torch.enable_grad(), frozen(forward.hf_model), forward.once():
        hidden, inner = _carry(inputs, forward, schedule, seen, see, attend)
        rows = inputs.rows([inputs.passes.observed, schedule])
        inner = {k: torch.cat([observed.inner[k], v]) for k, v in inner.items()}
        both = torch.cat([observed.hidden, hidden])
        values = measure(forward, both, rows, inputs.metrics, inner, plain_head)
    for column, value in values.items():
        if not value.requires_grad:
            raise BadInput(f"{column} cannot be estimated: its values have no gradient")
    of_rows = {column: value[rows.base :] for column, value in values.items()}
    followed = {place: leaves[place] for place in places}
    return Graph(of_rows, followed, gates, forward.device, activations)


def _carry(
    inputs: Inputs,
    forward: Forward,
    schedule: Schedule,
    places: Collection[Place],
    see: Callable[[Place, Tensor], None],
    attend: Attend,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Take a schedule up the layers: what the last one returns where logits are read, and what
    metrics read inside. `see` is shown the places, before metrics read there."""
    wave = inputs.passes.wave
    editor = Editor(
        layouts=inputs.passes.plan.layouts,
        values=inputs.values,
        source=wave.source,
        positions=schedule.inner,
        keys=schedule.keys,
        inner={},
        device=forward.device,
    )

    on_device = across(forward, editor)

    def seen(layer: int, step: Step) -> Seen:
        reads = on_device(layer, step)
        taps = {name: _in_order([tap]) for name, tap in reads.taps.items()}
        for place in places:
            name, at = place
            if name != "embed" and at + (name == "resid_post") == layer:
                both = [partial(see, place), reads.taps.get(name)]
                taps[name] = _in_order([tap for tap in both if tap])
        return replace(reads, taps=taps, attend=partial(attend, layer))

    def embedding(of: Embedding) -> Tap:
        mine = partial(see, EMBEDDING) if EMBEDDING in places else None
        return _in_order([tap for tap in (embedding_tap(of, editor, wave.sample), mine) if tap])

    return wavefront(forward, schedule, seen, embedding), editor.inner


def _in_order(taps: Sequence[Tap]) -> Tap:
    """Taps one after another, unseen by the modes that watch the model."""

    def tap(x: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            for each in taps:
                each(x)

    return tap


def plain_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    wanted: Tensor,
    *,
    finish: Callable[[Tensor], Tensor] | None = None,
    logsumexp: bool = False,
    reference: Reference | None = None,
    **_: Any,
) -> MetricHead:
    """`metric_head` for autograd, with all logits [row, vocab] at once: rows are few."""

    def logits_of(w: Tensor, b: Tensor | None) -> Tensor:
        raw = F.linear(hidden, w, b)
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return (raw if finish is None else finish(raw)).to(exact)

    if reference is None and not logsumexp:
        unique, where = torch.unique(wanted, return_inverse=True)
        return MetricHead(
            logits_of(weight[unique], None if bias is None else bias[unique]).gather(1, where)
        )
    logits = logits_of(weight, bias)
    total = logits.logsumexp(-1)
    head = MetricHead(logits.gather(1, wanted), total)
    if reference is None:
        return head
    log_q = logits - total[:, None]
    log_p = log_q[reference.rows[reference.of]]
    p, q = log_p.exp(), log_q.exp()
    gap = log_p - log_q  # of a token that has no probability it counts nothing
    return replace(
        head,
        kl=(p * gap.masked_fill(p == 0, 0)).sum(-1),
        kl_reverse=(q * -gap.masked_fill(q == 0, 0)).sum(-1),
        tv=(p - q).abs().sum(-1) / 2,
    )


@contextmanager
def frozen(hf_model: PreTrainedModel) -> Iterator[None]:
    """No parameter takes a gradient inside."""
    learnt = {name for name, p in hf_model.named_parameters() if p.requires_grad}
    hf_model.requires_grad_(False)
    try:
        yield
    finally:
        for name, p in hf_model.named_parameters():
            p.requires_grad_(name in learnt)
