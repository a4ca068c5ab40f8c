"""The effect of every cell over pairs, and the changes of every pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from patchsweep.effect import Array, change, ratio
from patchsweep.reader import Reader, one_of
from patchsweep.sites import MEASURED, SETS, Grid, Status, unit_name

AT_ONCE = 1 << 22  # values in memory: 32 MiB for each of a few arrays


class Effects(Reader):
    """What was measured, as effects."""

    def effect(
        self, component: str, metric: str, direction: str, source: str | None = None
    ) -> Array:
        """The effect over all pairs and samples, [layer, unit, position], as a ratio of means.

        Sum over pairs of (patched − destination) / sum over pairs of (source − destination); of a
        source without a run (zero, mean, vector) the mean of patched − destination. `source`: the
        first if left out. Exact and structural cells count; a pair where the cell is outside the
        prompt, not done or not finite is left out of both sums. NaN where no pair is left, and
        where a cell is only estimated in any pair.
        """
        return self._over_pairs(component, metric, direction, source)[1]

    def changes(
        self,
        component: str,
        metric: str,
        direction: str,
        source: str | None = None,
        layers: slice = slice(None),
    ) -> tuple[Array, Array | None]:
        """patched − destination of every pair, mean over samples, [pair, layer, unit, position],
        NaN where there is no measured value, and in all pairs where a cell is only estimated in
        any; and source − destination [pair], None where effects are differences."""
        grid, d, s = self._at(component, metric, direction, source)
        destination, donor = (end[d, s] for end in self.ends(metric, grid))  # [sample, pair]
        region = (d, s, slice(None), slice(None), layers)
        patched = self.store.read(f"{component}/{metric}", region).astype(np.float64)
        status = self.store.read(f"{component}/{metric}_status", region)
        moved = change(patched, status, destination[..., None, None, None])
        moved = np.where(np.isin(status, MEASURED) & ~some_estimated(status), moved, np.nan)
        # A source may have fewer samples than others.
        known = [n for n, x in enumerate(moved) if np.isfinite(x).any()] or [0]
        span = (donor - destination)[known].mean(0) if self.normalised(s) else None
        return moved[known].mean(0), span

    def counts(self, component: str, metric: str) -> dict[Status, int]:
        """How many cells of a component have which status."""
        grid = self.grid(component)
        total = np.zeros(256, dtype=np.int64)
        for pairs in grid.pair_tiles():
            region = (slice(None),) * 3 + (slice(pairs.start, pairs.stop),)
            status = self.store.read(f"{component}/{metric}_status", region)
            total += np.bincount(status.ravel(), minlength=256)
        return {status: int(total[status]) for status in Status}

    def cell_namer(self, component: str) -> Callable[[Sequence[int]], str]:
        """How a cell [layer, unit, position] is called: layer.unit@position, or the set's name."""
        grid = self.grid(component)

        def name(cell: Sequence[int]) -> str:
            layer, unit, position = cell
            place = str(grid.positions[position])
            if component == SETS:
                return place
            where = str(layer + grid.first_layer)
            return f"{where}.{unit}@{place}" if unit_name(component) else f"{where}@{place}"

        return name

    def _at(
        self, component: str, metric: str, direction: str, source: str | None
    ) -> tuple[Grid, int, int]:
        """The grid, and the numbers of a direction and a source; BadInput for unknown names."""
        grid = self.grid(component)
        one_of("metric", metric, self.metrics)
        d = grid.directions.index(one_of("direction", direction, grid.directions))
        s = grid.sources.index(one_of("source", source or grid.sources[0], grid.sources))
        return grid, d, s

    def _over_pairs(
        self, component: str, metric: str, direction: str, source: str | None
    ) -> tuple[Array, Array]:
        """Mean of the patched metric, and effect, over all pairs: [layer, unit, position] each."""
        grid, d, s = self._at(component, metric, direction, source)
        ends = [end[d, s][..., None, None, None] for end in self.ends(metric, grid)]
        # changed, span, patched, number of runs
        sums = np.zeros((4, grid.layers, grid.units, len(grid.positions)))
        partly = np.zeros(sums.shape[1:], bool)
        for pairs in grid.pair_tiles():
            tile = slice(pairs.start, pairs.stop)
            values = self.store.read(f"{component}/{metric}", (d, s, slice(None), tile))
            status = self.store.read(f"{component}/{metric}_status", (d, s, slice(None), tile))
            patched = values.astype(np.float64)
            destination, donor = (end[:, tile] for end in ends)
            span = donor - destination
            use = np.isin(status, MEASURED) & np.isfinite(patched) & np.isfinite(span)
            moved = change(patched, status, destination)
            for i, term in enumerate((moved, span, patched, 1.0)):
                sums[i] += np.where(use, term, 0.0).sum(axis=(0, 1))
            partly |= some_estimated(status)
        sums[:, partly] = np.nan
        changed, span, patched, runs = sums
        return ratio(patched, runs), ratio(changed, span)


def layer_parts(grid: Grid) -> list[slice]:
    """The layers of a grid in parts, as many at a time as memory takes: chunks hold all of them, so
    every part reads them again."""
    layer = grid.samples * grid.pairs * grid.units * len(grid.positions)
    step = max(1, AT_ONCE // layer)
    return [slice(first, first + step) for first in range(0, grid.layers, step)]


def some_estimated(status: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The cells [layer, unit, position] that are only estimated in some sample or pair, of statuses
    [sample, pair, layer, unit, position]: where they are structural says nothing of all pairs."""
    found: NDArray[np.bool_] = (status == Status.ESTIMATED).any(axis=(0, 1))
    return found
