"""Estimates of every cell of some pairs, as arrays shaped like the exact results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchsweep.attribution.changes import Changes, place_of, seen_by
from patchsweep.attribution.estimators import check
from patchsweep.attribution.gradients import Graph, Inputs, Observed, Place, follow, observe
from patchsweep.attribution.runs import Passes, passes_of
from patchsweep.passes import Forward, Values
from patchsweep.plan import Plan
from patchsweep.plan.layout import Layouts
from patchsweep.sites import Status
from patchsweep.spec import Metric

STEPS = 8  # of integrated gradients, nodes of the Gauss-Legendre rule

# By metric column.
Floats = NDArray[np.floating]
Found = dict[str, Floats]
Statuses = dict[str, NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class Estimates:
    """By component and metric column, [direction, 1, 1, pair, layer, unit, position]: `values`, the
    estimated metric of the patched run (the destination's plus the estimated change; infinite where
    that is not finite, NaN outside the prompt), and `status` (ESTIMATED, STRUCTURAL where nothing
    can change, OUTSIDE, NOT_FINITE). `baseline` by column is that of the runs, [run = clean, other;
    pair], NaN where there is no other."""

    values: Mapping[str, Found]
    status: Mapping[str, Statuses]
    baseline: Found


def estimate_pairs(
    forward: Forward,
    plan: Plan,
    pairs: range,
    estimators: Mapping[str, str],
    metrics: Sequence[Metric],
    values: Values,
    *,
    source: int = 0,
    sample: int = 0,
    steps: int = STEPS,
) -> Estimates:
    """Estimate all cells of some pairs against one source's sample, in all directions.

    estimators, by component (`estimators.DEFAULT`), is what is estimated and how:

    - atp: Σ δ·∂m/∂a, with δ = a(source) − a(destination), the gradient at the destination and the
      sum over the numbers of an activation (Nanda 2022, attribution patching).
    - atp_qk: for head_q, head_k and head_pattern the change of attention patterns, computed again,
      times ∂m/∂pattern (Kramár et al. 2024, arXiv 2403.00745, the QK fix of AtP*; keys in
      closed form); atp for all others.
    - atp_star: the mean over all layers of |atp_qk| with the gradient of what that layer writes to
      the residual stream dropped (GradDrop of AtP*, up to a constant factor). A magnitude:
      the destination's metric plus it has no sign, so it is for ranking only.
    - relp: δ times relevance instead of the gradient (RelP, arXiv 2508.21258; `rules`).
    - ig: δ times the mean of ∂m/∂a on the straight way from the destination's to the source's
      activations of one layer, all units and positions of the component together (Sundararajan et
      al. 2017), by Gauss-Legendre quadrature with `steps` nodes. Complete: a layer's sum is the
      change of the metric when all of it is patched (but for quadrature). Of head_pattern, the way
      of patterns.

    An entry of several positions has the sum of its positions' estimates (of atp_star its
    magnitude). Passes: one forward of both runs; then, of the destinations alone, for atp, atp_qk
    and atp_star together one forward, for relp one more, each with one backward per metric (of
    atp_star as many as there are layers); for ig, per component, as many as layers times steps.

    The model must be using patchsweep's attention (`passes.attention_is`). BadInput for what has
    no estimate (`estimators.check`), and for a place that the model does not have.
    """
    check(estimators, metrics, plan.directions)
    assert sample < plan.sources[source].samples
    passes = passes_of(plan, pairs, source, sample)
    inputs = Inputs(forward, passes, metrics, values)
    seen = {
        (place, layer)
        for name, how in estimators.items()
        for place in seen_by(plan.layouts, name, how)
        for layer in plan.layouts.layers(name)
    }
    observed = observe(inputs, seen)
    changes = [
        Changes(passes, observed, values, passes.frames(direction, forward.device))
        for direction in range(len(plan.directions))
    ]
    job = _Job(inputs, observed, changes, estimators, steps)
    found = job.by_gradient(GRADIENT) | job.by_gradient(("relp",)) | job.by_path()
    arrays = {name: _arrays(job, name, found) for name in estimators}
    return Estimates(
        values={name: of_column for name, (of_column, _) in arrays.items()},
        status={name: of_column for name, (_, of_column) in arrays.items()},
        baseline={column: _baseline(passes, v) for column, v in observed.baseline.items()},
    )


# Estimated changes [direction, pair, layer, unit, entry], by component and metric column.
Changed = dict[tuple[str, str], Tensor]
GRADIENT = ("atp", "atp_qk", "atp_star")


@dataclass(frozen=True, eq=False)
class _Job:
    """What is estimated, and from what; `changes` by direction."""

    inputs: Inputs
    observed: Observed
    changes: Sequence[Changes]
    estimators: Mapping[str, str]
    steps: int

    @property
    def layouts(self) -> Layouts:
        return self.inputs.passes.plan.layouts

    @property
    def columns(self) -> list[str]:
        return [m.column for m in self.inputs.metrics]

    def names(self, *estimators: str) -> list[str]:
        """The components that are estimated in one of these ways."""
        return [name for name, how in self.estimators.items() if how in estimators]

    def places(self, name: str) -> list[Place]:
        """Where a component's gradient is taken, by layer."""
        place = place_of(self.layouts, name, self.estimators[name])
        return [(place, layer) for layer in self.layouts.layers(name)]

    def by_gradient(self, estimators: Sequence[str]) -> Changed:
        """Estimates from the gradient at the destinations themselves, in one graph."""
        names, found = self.names(*estimators), Changed()
        if not names:
            return found
        places = {place for name in names for place in self.places(name)}
        star = self.names("atp_star") if "atp_star" in estimators else []
        graph = follow(
            self.inputs,
            self.observed,
            places,
            relevance="relp" in estimators,
            gated=bool(star),
        )
        for column in self.columns:
            signed = [name for name in names if name not in star]
            if signed:
                gradient = graph.gradient(column)
                found |= {(name, column): self.all_layers(name, gradient) for name in signed}
            if star:
                found |= self._dropped(graph, column, star)
        return found

    def _dropped(self, graph: Graph, column: str, names: Sequence[str]) -> Changed:
        """The mean magnitude where each layer in turn drops the gradient of what it writes."""
        found: Changed = {}
        layers = self.layouts.dimensions.layers
        for closed in range(layers):
            gradient = graph.gradient(column, closed)
            for name in names:
                part = self.all_layers(name, gradient).abs() / layers
                found[name, column] = found.get((name, column), 0) + part
        return found

    def by_path(self) -> Changed:
        """Integrated gradients, layer by layer."""
        found: Changed = {}
        node, weight = np.polynomial.legendre.leggauss(self.steps)  # on [−1, 1]
        for name in self.names("ig"):
            parts = [
                self._integrated(name, place, (node + 1) / 2, weight / 2)
                for place in self.places(name)
            ]
            found |= {(name, c): torch.stack([p[c] for p in parts], 2) for c in self.columns}
        return found

    def _integrated(
        self, name: str, place: Place, nodes: Floats, weights: Floats
    ) -> dict[str, Tensor]:
        """[direction, pair, unit, entry] of one layer, by metric column."""
        shift = self._shift(name, place[1])
        mean: dict[str, Tensor] = {}
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            moved = {place: node * shift}
            graph = follow(self.inputs, self.observed, {place}, shift=moved)
            for column in self.columns:
                part = weight * graph.gradient(column)[place]
                mean[column] = mean[column] + part if column in mean else part
        return {c: self.one_layer(name, place[1], {place: g}) for c, g in mean.items()}

    def _shift(self, name: str, layer: int) -> Tensor:
        """What patching a whole layer adds to the destinations' tokens, [token, unit, width]."""
        tokens, out = self.inputs.passes.destinations.base, None
        for change in self.changes:
            patched = change.frames.patched
            shift = change.shift(name, self.estimators[name], layer)[patched]
            out = shift.new_zeros(tokens, *shift.shape[1:]) if out is None else out
            out[change.frames.own[patched]] = shift
        assert out is not None
        return out

    def all_layers(self, name: str, gradient: Mapping[Place, Tensor]) -> Tensor:
        """[direction, pair, layer, unit, entry], from ∂m/∂a [token, unit, width] at every place."""
        layers = self.layouts.layers(name)
        return torch.stack([self.one_layer(name, layer, gradient) for layer in layers], 2)

    def one_layer(self, name: str, layer: int, gradient: Mapping[Place, Tensor]) -> Tensor:
        """[direction, pair, unit, entry]: the entries' sums over their positions."""
        parts = []
        for change in self.changes:
            effect = change.effect(name, self.estimators[name], layer, gradient)
            members, known = change.frames.members.to(effect.dtype), effect.isfinite()
            # Of an entry's own positions alone: zero times what is not finite is not zero.
            total, failed = (
                torch.einsum("pes,psu->pue", members, x)
                for x in (effect.where(known, 0), (~known).to(effect.dtype))
            )
            parts.append(total.masked_fill(failed > 0, torch.nan))
        return torch.stack(parts)


def _arrays(job: _Job, name: str, changed: Changed) -> tuple[Found, Statuses]:
    """A component's values and statuses: the baseline where nothing can change."""
    passes, pairs = job.inputs.passes, job.inputs.passes.wave.pairs
    part = slice(pairs.start, pairs.stop)
    values, statuses = Found(), Statuses()
    directions = range(len(passes.plan.directions))
    layouts = [job.layouts.layout(name, passes.variant(d)) for d in directions]
    exists = np.stack([layout.exists[part][:, :, None] for layout in layouts])
    inside = np.stack([layout.inside[part][:, None, None] for layout in layouts])
    for column, by_row in job.observed.baseline.items():
        destination = np.stack([by_row[passes.rows(d)] for d in directions])
        wide = torch.from_numpy(by_row).dtype  # numpy knows no bfloat16
        change = changed[name, column].detach().cpu().to(wide).numpy()
        found = destination[:, :, None, None, None] + np.where(exists, change, 0)
        status = np.where(exists, Status.ESTIMATED, Status.STRUCTURAL)
        status = np.where(np.isfinite(found), status, Status.NOT_FINITE)
        found = np.where(np.isfinite(found), found, np.inf)
        found = np.where(inside, found, np.nan).astype(by_row.dtype)
        status = np.where(inside, status, Status.OUTSIDE).astype(np.uint8)
        values[column], statuses[column] = found[:, None, None], status[:, None, None]
    return values, statuses


def _baseline(passes: Passes, by_row: Floats) -> Floats:
    """[run = clean, other; pair]"""
    by_pair = by_row.reshape(-1, passes.per_pair).T
    return by_pair if passes.per_pair == 2 else np.stack([by_pair[0], by_pair[0] * np.nan])
