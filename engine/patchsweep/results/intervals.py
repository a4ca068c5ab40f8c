"""How sure effects are: over pairs and templates, and over samples of noise."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from patchsweep.effect import Array, change, ratio
from patchsweep.results.effects import Effects, layer_parts, some_estimated
from patchsweep.sites import MEASURED
from patchsweep.statistics import adjusted, bootstrap, p_values, standard_error


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
        direction: str,
        source: str | None = None,
        *,
        samples: int = 1000,
        level: float = 0.95,
        seed: int = 0,
    ) -> tuple[Array, Array]:
        """Bootstrap interval of the effect over pairs, [layer, unit, position]: lower, upper end.

        Pairs of one template (`group`) are drawn together; NaN with fewer than two templates.
        """
        ends = []
        for part in layer_parts(self.grid(component)):
            moved, span = self.changes(component, metric, direction, source, part)
            ends.append(
                bootstrap(moved, span, self.groups, samples=samples, level=level, seed=seed)
            )
        low, high = (np.concatenate(side) for side in zip(*ends, strict=True))
        return low, high

    def p_values(
        self, component: str, metric: str, direction: str, source: str | None = None
    ) -> Array:
        """P-values of the changes over templates, adjusted for the false discovery rate over the
        cells that changed at all, [layer, unit, position]; 1 for the others, NaN with fewer than
        two templates."""
        found = [
            p_values(self.changes(component, metric, direction, source, part)[0], self.groups)
            for part in layer_parts(self.grid(component))
        ]
        p = np.concatenate(found)
        tested = p < 1  # what cannot change was never in doubt
        p[tested] = adjusted(p[tested])
        return p

    def standard_error(
        self, component: str, metric: str, direction: str, source: str | None = None
    ) -> Array:
        """Standard error over noise samples of the effect over pairs, [layer, unit, position]; NaN
        for one sample."""
        grid, d, s = self._at(component, metric, direction, source)
        ends = [end[d, s] for end in self.ends(metric, grid)]
        per_sample, partly = [], np.zeros((grid.layers, grid.units, len(grid.positions)), bool)
        for n in range(grid.samples):
            values = self.store.read(f"{component}/{metric}", (d, s, n)).astype(np.float64)
            status = self.store.read(f"{component}/{metric}_status", (d, s, n))
            destination, donor = (end[n][:, None, None, None] for end in ends)
            span = donor - destination
            use = np.isin(status, MEASURED) & np.isfinite(values) & np.isfinite(span)
            partly |= some_estimated(status[None])
            if not use.any():
                continue
            moved = np.where(use, change(values, status, destination), 0.0).sum(0)
            per_sample.append(ratio(moved, np.where(use, span, 0.0).sum(0)))
        if not per_sample:
            return np.full(partly.shape, np.nan)
        return np.where(partly, np.nan, standard_error(np.stack(per_sample), 0))
