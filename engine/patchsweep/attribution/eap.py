"""Scores of all edges of a model (EAP, EAP-IG): what each sender changes in what each receiver
reads, times the gradient there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchsweep.attribution.ends import heads_read, mlp_reads, written
from patchsweep.attribution.estimators import check
from patchsweep.attribution.gradients import Inputs, Observed, Place, follow, frozen, observe
from patchsweep.attribution.runs import Frames, passes_of
from patchsweep.errors import BadInput
from patchsweep.passes import Forward, Values
from patchsweep.plan import Dimensions, Plan, receivers, senders, upstream
from patchsweep.sites import Node
from patchsweep.spec import Metric

INPUT: Place = ("resid_pre", 0)
READ = ("head_q", "head_k", "head_v")
# Gradients at all receivers add up to that at the input but for rounding. As a share of the largest
# gradient, on SmolLM2 it is less than 1e-5 in float32 and less than 1e-2 in bfloat16.
ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
READ_ELSEWHERE = (
    "edges: {} depends on the residual stream through more than this model's queries, keys, "
    "values, MLPs and logits: leave edges out, or use another metric"
)

# By metric column, [direction, pair, sender, receiver].
Scores = dict[str, NDArray[np.floating]]
# By metric column, gradients at some receivers, [receiver, token, d_model].
Slopes = dict[str, Tensor]


def score_edges(
    forward: Forward,
    plan: Plan,
    pairs: range,
    metrics: Sequence[Metric],
    values: Values,
    steps: int = 1,
    *,
    source: int = 0,
    sample: int = 0,
) -> Scores:
    """Score every edge of some pairs against one source's sample, in all directions; NaN where
    there is no edge. Senders and receivers are those of `edges`, in their order.

    With one step EAP (Syed et al. 2023, arXiv 2310.10348): Σ over positions and d_model of
    (sender's output in the source − in the destination) · ∂m/∂(residual stream as the receiver
    alone reads it), the gradient at the destination. The embedding's output is the stream that the
    first layer receives; a head's is z through the output projection (a norm behind it to first
    order, at the destination); an MLP's what it adds to the stream. A receiver reads the stream
    before its norm. The scores of one sender add up to its attribution patching (`atp`, summed
    over positions).

    With m steps EAP-IG (Hanna et al. 2024, arXiv 2403.17806): the gradient's mean where the
    embeddings are moved from the destination's by 0, 1/m, … (m − 1)/m of the way to the source's,
    all nodes following.

    Passes: one forward of both runs; for every step a forward and one backward per metric of the
    destinations, then per layer and metric one vector-Jacobian product for all of its heads (of
    copies of the tokens) and one for its MLP. That is the cheaper order: J applied to senders
    instead would take one product per layer for every sender below it. Positions are taken in
    tiles, so that what all senders write fits beside a wave of the token budget.

    The model must be using patchsweep's attention (`passes.attention_is`). BadInput for metrics
    without a gradient, and for a model whose layers read more of the stream than receivers do.
    """
    check({}, metrics, plan.directions if steps == 1 else ())
    passes = passes_of(plan, pairs, source, sample)
    inputs = Inputs(forward, passes, metrics, values)
    layers = range(plan.dimensions.layers)
    seen = {(name, layer) for name in ("resid_pre", "head_z", "mlp_out") for layer in layers}
    frames = [passes.frames(i, forward.device) for i in range(len(plan.directions))]
    job = _Job(inputs, observe(inputs, seen), frames)
    with frozen(forward.hf_model):
        for step in range(steps):
            job.add(step / steps)
    return job.means(steps)


@dataclass(frozen=True, eq=False)
class _Tile:
    """Some tokens of one direction, [token] each: the pair within the pass, the position, and the
    tokens of the passes (see `Frames`)."""

    direction: int
    pair: Tensor
    position: Tensor
    destination: Tensor
    source: Tensor
    own: Tensor

    def by_pair(self) -> Iterator[tuple[int, slice]]:
        """Each pair and its tokens, which lie side by side."""
        start = 0
        for pair, count in Counter(self.pair.tolist()).items():
            yield pair, slice(start, start + count)
            start += count


@dataclass(frozen=True, eq=False)
class _Job:
    """Sums of scores over steps and tiles; `frames` by direction. `parallel` [layer] is found on
    the way: whether attention and MLP read the same."""

    inputs: Inputs
    observed: Observed
    frames: Sequence[Frames]
    parallel: dict[int, bool] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        return self.inputs.passes.plan

    @property
    def dimensions(self) -> Dimensions:
        return self.plan.dimensions

    @cached_property
    def total(self) -> dict[str, Tensor]:
        """By column, [direction, pair, sender, receiver]."""
        forward, d = self.inputs.forward, self.dimensions
        exact = torch.float64 if forward.hf_model.dtype == torch.float64 else torch.float32
        pairs = len(self.inputs.passes.wave.pairs)
        shape = len(self.frames), pairs, len(senders(d)), len(receivers(d))
        columns = [m.column for m in self.inputs.metrics]
        return {c: torch.zeros(shape, dtype=exact, device=forward.device) for c in columns}

    def add(self, way: float) -> None:
        """Add the scores with gradients where the inputs are moved `way` to the source's."""
        layers = range(self.dimensions.layers)
        places = {(name, layer) for name in READ for layer in layers}
        places |= {(self._of_mlp(layer), layer) for layer in layers}
        graph = follow(
            self.inputs,
            self.observed,
            {INPUT, *places, ("resid_post", layers[-1])},
            shift={INPUT: way * self._moved()},
            kept={(name, layer) for name in ("resid_pre", "attn_out") for layer in layers},
        )
        activations = graph.activations
        gradients = {column: graph.gradient(column) for column in self.total}
        del graph  # its memory is for the tiles
        for tile in self._tiles():
            outputs, first = self._written(tile), 0
            left = {c: g[INPUT][tile.own][:, 0] for c, g in gradients.items()}
            largest = {c: g.abs().max() for c, g in left.items()}
            for slopes in self._read(activations, gradients, tile):
                reached = outputs[: self._upstream(self.receivers[first])]
                for column, slope in slopes.items():
                    left[column] = left[column] - slope.sum(0)
                    largest[column] = torch.maximum(largest[column], slope.abs().max())
                    self._score(column, tile, reached, first, slope)
                first += len(slope)
            for column, rest in left.items():
                if bool(rest.abs().max() > ROUNDING[rest.dtype] * largest[column]):
                    raise BadInput(READ_ELSEWHERE.format(column))

    def means(self, steps: int) -> Scores:
        """The steps' mean, NaN where there is no edge."""
        out = {column: (total / steps).cpu().numpy() for column, total in self.total.items()}
        for number, node in enumerate(self.receivers):
            for scores in out.values():
                scores[:, :, self._upstream(node) :, number] = np.nan
        return out

    @cached_property
    def receivers(self) -> list[Node]:
        return receivers(self.dimensions)

    def _upstream(self, node: Node) -> int:
        parallel = node.layer is not None and self.parallel.get(node.layer, False)
        return upstream(self.dimensions, node, parallel)

    def _moved(self) -> Tensor:
        """The source's input minus the destinations', [token, 1, d_model]."""
        x = self.observed.activations[INPUT]
        out = x.new_zeros(self.inputs.passes.destinations.base, *x.shape[1:])
        for f in self.frames:
            out[f.own[f.patched]] = x[f.source[f.patched]] - x[f.destination[f.patched]]
        return out

    def _tiles(self) -> Iterator[_Tile]:
        """The tokens at which the runs can differ, in tiles of bounded memory."""
        d, passes = self.dimensions, self.inputs.passes
        values = 2 * len(senders(d)) * d.d_model * max(4, d.bytes_per_value)
        copies = max(d.heads + 2 * d.kv_heads, -(-values // d.bytes_per_token))
        for direction, f in enumerate(self.frames):
            variant = passes.variant(direction)
            first = []
            for i in passes.wave.pairs:
                other = self.plan.layouts.other(variant.source, variant.sample, i)
                assert other is not None
                first.append(int(other.differs.argmax()))  # 0 where positions are not the same
            at = torch.arange(f.patched.shape[1], device=f.patched.device)
            reached = at >= torch.tensor(first, device=at.device)[:, None]
            where = (f.patched & reached).nonzero()
            for tile in where.split(max(1, self.plan.token_budget // copies)):
                p, s = tile.unbind(1)
                yield _Tile(direction, p, s, f.destination[p, s], f.source[p, s], f.own[p, s])

    def _written(self, tile: _Tile) -> Tensor:
        """What every sender changes in the stream, [sender, token, d_model]."""
        forward, seen = self.inputs.forward, self.observed.activations

        def change(place: Place) -> Tensor:
            return seen[place][tile.source] - seen[place][tile.destination]

        out = [change(INPUT).transpose(0, 1)]
        for layer in range(self.dimensions.layers):
            stream, z = (seen[n, layer][tile.destination] for n in ("resid_pre", "head_z"))
            parts = (
                x.to(forward.devices[layer]) for x in (stream[:, 0], z, change(("head_z", layer)))
            )
            out.append(written(forward, layer, tile.position, *parts).to(forward.device))
            out.append(change(("mlp_out", layer)).transpose(0, 1))
        return torch.cat(out)

    def _read(
        self,
        activations: Mapping[Place, Tensor],
        gradients: Mapping[str, Mapping[Place, Tensor]],
        tile: _Tile,
    ) -> Iterator[Slopes]:
        """Gradients at the stream as each receiver reads it, some receivers at a time, in order."""
        forward, columns = self.inputs.forward, gradients.values()

        def of(x: Mapping[Place, Tensor], name: str, layer: int) -> Tensor:
            return x[name, layer][tile.own].to(forward.devices[layer])

        def slopes(found: Sequence[Tensor]) -> Slopes:
            return {c: x.to(forward.device) for c, x in zip(gradients, found, strict=True)}

        for layer in range(self.dimensions.layers):
            stream, position = of(activations, "resid_pre", layer)[:, 0], tile.position
            at_heads = [[of(g, name, layer) for name in READ] for g in columns]
            yield slopes(heads_read(forward, layer, stream, position, at_heads))
            attention, place = of(activations, "attn_out", layer), self._of_mlp(layer)
            at_mlp = [of(g, place, layer) for g in columns]
            found, self.parallel[layer] = mlp_reads(
                forward, layer, stream, attention, position, place, at_mlp
            )
            yield slopes(found)
        last = "resid_post", self.dimensions.layers - 1
        yield slopes([g[last][tile.own].transpose(0, 1) for g in columns])

    def _of_mlp(self, layer: int) -> str:
        """Where gradients come into an MLP from above: at neurons, if a metric reads them."""
        layouts = self.plan.layouts
        inner = [i.metric for i in layouts.reads.inner if layouts.inner_layer(i) == layer]
        return "neuron" if any("neuron" in (m.name, m.component) for m in inner) else "mlp_out"

    def _score(self, column: str, tile: _Tile, outputs: Tensor, first: int, slope: Tensor) -> None:
        """Add what senders' outputs times gradients at receivers, `first` and on, come to."""
        total = self.total[column]
        receiver = slice(first, first + len(slope))
        for pair, tokens in tile.by_pair():
            a, b = (x[:, tokens].flatten(1).to(total.dtype) for x in (outputs, slope))
            total[tile.direction, pair, : len(outputs), receiver] += a @ b.T
