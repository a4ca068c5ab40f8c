"""What was estimated: cells, and how well they were."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import BadInput
from patchsweep.prefilter import Choice, Verdict, judge
from patchsweep.results.columns import Columns
from patchsweep.results.edges import OfEdges
from patchsweep.results.effects import OverPairs
from patchsweep.results.reader import one_of
from patchsweep.sites import EDGES, RUN
from patchsweep.statistics import Agreement, Array, agreement, ratio

if TYPE_CHECKING:
    import xarray as xr

UNSIGNED = "atp_star"  # an estimator of magnitudes


class Estimates(OfEdges):
    """Estimated effects beside those that were measured."""

    def estimated_effect(
        self,
        component: str,
        metric: str,
        direction: str | None = None,
        source: str | None = None,
        *,
        align: str | None = None,
        min_pairs: int | None = None,
    ) -> xr.DataArray:
        """The effect over all pairs and samples as estimated, [layer, unit, position], a ratio of
        means, in all like `effect`; of the estimator atp_star a magnitude. BadInput if the sweep
        did not estimate the component."""
        columns = self.columns(component, align)
        effect, pairs = self._estimated(component, metric, direction, source, columns, min_pairs)
        return self.labelled(component, columns, effect, pairs, f"{metric}_estimate")

    def _estimated(
        self,
        component: str,
        metric: str,
        direction: str | None,
        source: str | None,
        columns: Columns,
        min_pairs: int | None,
    ) -> tuple[Array, NDArray[np.int64]]:
        """The estimated effect, and in how many pairs there is a value."""
        grid, d, s = self._at(component, metric, direction, source)
        self._estimator(component)
        ends = [end[d, s][..., None, None, None] for end in self.ends(metric, grid)]
        moved, span, count = np.zeros((3, grid.layers, grid.units, len(columns.names)))
        for pairs in grid.pair_tiles():
            tile = slice(pairs.start, pairs.stop)
            values = self.store.read(f"{component}/{metric}_estimate", (d, s, slice(None), tile))
            destination, donor = (end[:, tile] for end in ends)
            use = ~np.isnan(values) & np.isfinite(donor - destination)
            change, there = columns.mean(values - destination, use, tile)
            moved += change.sum(axis=(0, 1))
            span += np.where(there, donor - destination, 0.0).sum(axis=(0, 1))
            count += there.any(0).sum(0)
        effect = ratio(moved, span)
        effect[count < self.least(component, min_pairs)] = np.nan
        return effect, count.astype(np.int64)

    def shown(
        self,
        component: str,
        metric: str,
        direction: str | None = None,
        source: str | None = None,
        *,
        align: str | None = None,
        min_pairs: int | None = None,
    ) -> OverPairs:
        """What is drawn: what was measured over pairs, or of a component that was only estimated
        the estimates in its place."""
        columns = self.columns(component, align)
        asked = component, metric, direction, source, columns, min_pairs
        found = self.over_pairs(*asked)
        if component not in self.only_estimated:
            return found
        effect, pairs = self._estimated(*asked)
        return replace(found, effect=effect, pairs=pairs)

    def audit(
        self, component: str, metric: str, direction: str | None = None, source: str | None = None
    ) -> Verdict | None:
        """What the prefilter's cells that were run say of those that were not; None without a
        prefilter, for a component that was not estimated, and where nothing was kept."""
        from patchsweep.spec import Prefilter  # imports pydantic

        grid, d, s = self._at(component, metric, direction, source)
        estimated = self.store.estimators
        given = self.attrs["spec"].get(EDGES if component == EDGES else "prefilter")
        if given is None or component not in estimated or not self.complete:
            return None
        chosen = [
            self.store.read(f"choice/{component}_{name}", (d, s)) for name in ("status", "stratum")
        ]
        columns = self.columns(component)
        return judge(
            self.over_pairs(component, metric, direction, source, columns, 1).effect,
            Choice(*chosen),
            Prefilter(**{k: v for k, v in given.items() if k != "estimator"}),
            components=len(estimated) * len(grid.directions) * len(grid.sources),
            metrics=len(self.metrics),
        )

    def agreement(self, component: str, metric: str) -> Agreement:
        """The estimated change of every cell that was run against its exact change, patched −
        destination, over all directions, sources, samples and pairs; the magnitude of the exact one
        where the estimator has no sign. BadInput if the sweep did not estimate the component.
        """
        grid = self.grid(component)
        how = self._estimator(component)
        destination = self.ends(one_of("metric", metric, self.metrics), grid)[0]
        moved: list[tuple[Array, Array]] = []
        for pairs in grid.pair_tiles():
            tile = (slice(None),) * 3 + (slice(pairs.start, pairs.stop),)
            exact, estimate, status = (
                self.store.read(f"{component}/{metric}{kind}", tile)
                for kind in ("", "_estimate", "_status")
            )
            at, ran = destination[tile][..., None, None, None], np.isin(status, RUN)
            moved.append(((estimate - at)[ran], (exact - at)[ran]))
        estimated, true = (np.concatenate(side) for side in zip(*moved, strict=True))
        return agreement(estimated, np.abs(true) if how == UNSIGNED else true)

    def _estimator(self, component: str) -> str:
        """How a component was estimated; BadInput if it was not."""
        if component not in self.store.estimators:
            raise BadInput(
                f"{component} has no estimates in these results: run with estimate or prefilter"
            )
        return self.store.estimators[component]
