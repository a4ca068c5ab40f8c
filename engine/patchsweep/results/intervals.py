"""How sure effects are: over pairs and templates, and over samples of noise."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from patchsweep.results.effects import Effects, layer_parts
from patchsweep.sites import MEASURED, Status
from patchsweep.statistics import (
    Array,
    adjusted,
    bootstrap,
    change,
    p_values,
    ratio,
    standard_error,
)


class Intervals(Effects):
    """Intervals, p-values and standard errors of effects."""

    @cached_property
    def groups(self) -> list[str]:
        """The template of every pair, empty where it has none."""
        names: list[str] = self.store.read("prompts/group").tolist()
        return names

    def interval(
        self,
        component: str,
        metric: str,
        direction: str | None = None,
        source: str | None = None,
        *,
        samples: int = 1000,
        level: float = 0.95,
        seed: int = 0,
        align: str | None = None,
    ) -> tuple[Array, Array]:
        """Bootstrap interval of the effect over pairs, [layer, unit, position]: lower, upper end,
        with `level` of `samples` resampled effects between them, drawn by `seed`. BadInput for less
        than one sample, and a level not between 0 and 1.

        Pairs of one template (`group`) are drawn together; NaN with fewer than two templates.
        """
        ends = []
        for part in layer_parts(self.grid(component)):
            moved, span = self.changes(component, metric, direction, source, part, align)
            ends.append(
                bootstrap(moved, span, self.groups, samples=samples, level=level, seed=seed)
            )
        low, high = (np.concatenate(side) for side in zip(*ends, strict=True))
        return low, high

    def sure(
        self,
        component: str,
        metric: str,
        direction: str | None,
        source: str | None,
        cells: NDArray[np.intp] | None,
        align: str | None = None,
    ) -> NDArray[np.bool_] | None:
        """Where the interval of some cells [..., (layer, unit, position)] excludes 0."""
        if cells is None:
            return None
        found = np.zeros(cells.shape[:-1], np.bool_)
        for part in layer_parts(self.grid(component)):
            here = (cells[..., 0] >= part.start) & (cells[..., 0] < part.stop)
            layer, unit, position = cells[here].T
            moved, span = self.changes(component, metric, direction, source, part, align)
            some = moved[:, layer - part.start, unit, position]
            low, high = bootstrap(some, span, self.groups)
            found[here] = (low > 0) | (high < 0)
        return found

    def p_values(
        self,
        component: str,
        metric: str,
        direction: str | None = None,
        source: str | None = None,
        *,
        align: str | None = None,
    ) -> Array:
        """P-values of the changes over templates, adjusted for the false discovery rate over the
        cells that changed at all, [layer, unit, position]; 1 for the others, NaN with fewer than
        two templates. Positions are those of `effect`."""
        found = [
            p_values(
                self.changes(component, metric, direction, source, part, align)[0], self.groups
            )
            for part in layer_parts(self.grid(component))
        ]
        p = np.concatenate(found)
        tested = p < 1  # what cannot change was never in doubt
        p[tested] = adjusted(p[tested])
        return p

    def standard_error(
        self,
        component: str,
        metric: str,
        direction: str | None = None,
        source: str | None = None,
        *,
        align: str | None = None,
    ) -> Array:
        """Standard error over noise samples of the effect over pairs, [layer, unit, position]; NaN
        for one sample. Positions are those of `effect`."""
        grid, d, s = self._at(component, metric, direction, source)
        columns = self.columns(component, align)
        ends = [end[d, s] for end in self.ends(metric, grid)]
        per_sample, partly = [], np.zeros((grid.layers, grid.units, len(columns.names)), bool)
        for n in range(grid.samples):
            values = self.store.read(f"{component}/{metric}", (d, s, n)).astype(np.float64)
            status = self.store.read(f"{component}/{metric}_status", (d, s, n))
            destination, donor = (end[n][:, None, None, None] for end in ends)
            use = np.isin(status, MEASURED) & np.isfinite(values) & np.isfinite(donor - destination)
            partly |= columns.any((status == Status.ESTIMATED)[None]).any(axis=(0, 1))
            if not use.any():
                continue
            moved, there = columns.mean(change(values, status, destination)[None], use[None])
            span = np.where(there[0], donor - destination, 0.0)
            per_sample.append(ratio(moved[0].sum(0), span.sum(0)))
        if not per_sample:
            return np.full(partly.shape, np.nan)
        return np.where(partly, np.nan, standard_error(np.stack(per_sample), 0))
