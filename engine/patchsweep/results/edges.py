"""Edges: scored, or run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from patchsweep.errors import BadInput
from patchsweep.results.effects import Effects
from patchsweep.sites import EDGES, MEASURED
from patchsweep.statistics import Array, change, ratio

if TYPE_CHECKING:
    import xarray as xr

NO_EDGES = "these results have no edges: add edges: eap, or edges: exact, to the spec"


class OfEdges(Effects):
    """What edges do."""

    @property
    def has_edges(self) -> bool:
        """Whether the sweep scored edges, or ran them."""
        return bool(self.attrs.get(EDGES))

    def edges(
        self, metric: str, direction: str | None = None, source: str | None = None
    ) -> xr.DataArray:
        """What patching each edge alone changes in the metric, [sender, receiver], of exact edges
        at several positions [position, sender, receiver]: patched − destination, or as it was
        scored (the attribute `approximation` says how). Its mean over the pairs and samples that
        are done; of exact edges 0 where nothing can differ. NaN where there is no edge. BadInput if
        the sweep has none."""
        import xarray as xr

        if not self.has_edges:
            raise BadInput(NO_EDGES)
        _, d, s = self._at(self.components[0], metric, direction, source)
        exact = EDGES in self.store.grids
        mean = self._run(metric, d, s) if exact else self._scored(metric, d, s)
        said = self.store.node_attrs(f"{EDGES}/{metric}")
        ends = {name: self.store.read(f"{EDGES}/{name}") for name in ("sender", "receiver")}
        if exact and len(mean) > 1:
            ends = {"position": self.store.read(f"{EDGES}/position"), **ends}
        return xr.DataArray(mean.reshape([*map(len, ends.values())]), ends, [*ends], metric, said)

    def _scored(self, metric: str, d: int, s: int) -> Array:
        done = np.argwhere(self.store.scored()[s])
        shape = [self.store.shape(f"{EDGES}/{end}")[0] for end in ("sender", "receiver")]
        if not len(done):
            return np.full(shape, np.nan)
        parts = (self.store.read(f"{EDGES}/{metric}", (d, s, *at)) for at in done)
        total: Any = sum(part.astype(np.float64) for part in parts)
        return np.asarray(total / len(done))

    def _run(self, metric: str, d: int, s: int) -> Array:
        """[position, sender, receiver]."""
        grid = self.store.grids[EDGES]
        destination = self.ends(metric, grid)[0][d, s]  # [sample, pair]
        total, count = np.zeros((2, *grid.shape[4:]))
        for n, pair in np.ndindex(*destination.shape):
            at = (d, s, n, pair)
            patched, status = (
                self.store.read(f"{EDGES}/{metric}{kind}", at) for kind in ("", "_status")
            )
            moved = change(patched.astype(np.float64), status, destination[n, pair])
            use = np.isin(status, MEASURED) & np.isfinite(moved)
            total += np.where(use, moved, 0)
            count += use
        return ratio(total, count).swapaxes(1, 2)

    def top_edges(
        self,
        metric: str,
        direction: str | None = None,
        n: int = 10,
        source: str | None = None,
    ) -> list[tuple[str, float]]:
        """The `n` edges of largest absolute change, largest first, as sender->receiver, with
        @position where edges were run at several."""
        found = self.edges(metric, direction, source)
        order = np.argsort(-np.nan_to_num(np.abs(found.values), nan=-1), None, kind="stable")[:n]
        best = []
        for place in zip(*np.unravel_index(order, found.shape), strict=True):
            one = found[place]
            if np.isfinite(one):
                at = f"@{one.position.item()}" if "position" in found.dims else ""
                best.append((f"{one.sender.item()}->{one.receiver.item()}{at}", float(one)))
        return best
