"""Results as arrays and tables, with the effect of every patch computed on reading.

effect = (patched − destination) / (source − destination). The destination run is the one that is
patched (corrupt for `denoise`, clean for `noise`), the source run is the donor. 0: nothing changed;
1: the source's behaviour; in both directions. Across pairs it is the ratio of means, never the mean
of ratios. Raw metrics stay raw.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from patchsweep import table
from patchsweep.effect import change, ratio
from patchsweep.reader import Reader, one_of
from patchsweep.sites import DIMENSIONS, Grid, Status
from patchsweep.store import Store

Array = NDArray[np.float64]

# The statuses whose values are those of a patched run.
MEASURED = (Status.EXACT, Status.STRUCTURAL, Status.AUDITED)
SMALL_DENOMINATOR = 0.05  # of the largest


@dataclass(frozen=True)
class CellEffect:
    """A cell of one component, metric and direction, over all pairs.

    `token` is the text at the position where all pairs have the same one ("clean/corrupt" if the
    two runs differ), else empty. `patched` is the mean of the patched run's metric.
    """

    layer: int
    unit: int
    position: int | str
    token: str
    patched: float
    effect: float


class Results(Reader):
    """The results of a sweep, read from its folder when asked for."""

    def to_xarray(self, component: str) -> xr.Dataset:
        """One component, opened lazily: nothing but coordinates is read until values are used.

        Per metric: `<metric>` (raw, of the patched run), `<metric>_status` and `<metric>_effect`
        (float64), over [direction, source, sample, pair, layer, unit, position]; of the first four
        and `unit` those of size 1 are squeezed, and `unit` is renamed to what it counts (`head`).
        """
        grid = self.grid(component)
        ds = xr.open_zarr(self.path, group=component, consolidated=False, chunks=None)
        for metric in self.metrics:
            effect = _LazyEffect(
                self.store, f"{component}/{metric}", grid, *self.ends(metric, grid)
            )
            name = f"effect on {metric} (0 = destination, 1 = source)"
            ds[f"{metric}_effect"] = xr.Variable(
                DIMENSIONS, indexing.LazilyIndexedArray(effect), {"long_name": name}
            )
        order = [name for m in self.metrics for name in (m, f"{m}_effect", f"{m}_status")]
        ds = ds[order]
        optional = ("direction", "source", "sample", "pair", "unit")
        squeezed: xr.Dataset = ds.squeeze([dim for dim in optional if ds.sizes[dim] == 1])
        unit_name = ds.attrs["unit_name"]
        return squeezed.rename(unit=unit_name) if unit_name else squeezed.drop_vars("unit")

    def to_frame(self) -> pd.DataFrame:
        """A row per patching experiment; cells not done or outside their prompt are left out.

        Columns: component, direction, pair, layer, head (missing where there is none), position,
        token (of the destination run), and per metric its raw value, `_effect` and `_status`.
        """
        return pd.concat(list(table.frames(self)), ignore_index=True)

    def export(self, path: Path) -> None:
        """Write `to_frame` as Parquet, pair by pair: memory does not grow with the results."""
        table.write_parquet(self, path)

    def effect(self, component: str, metric: str, direction: str) -> Array:
        """The effect over all pairs, [layer, unit, position], as a ratio of means.

        Sum over pairs of (patched − destination) / sum over pairs of (source − destination).
        Exact and structural cells count; a pair where the cell is outside the prompt, not done,
        only estimated or not finite is left out of both sums. NaN where no pair is left.
        """
        return self._over_pairs(component, metric, direction)[1]

    def top(self, component: str, metric: str, direction: str, n: int = 10) -> list[CellEffect]:
        """The `n` cells of largest absolute effect, largest first."""
        patched, effect = self._over_pairs(component, metric, direction)
        return self._ranked(component, patched, effect, np.isfinite(effect))[:n]

    def detections(
        self, component: str, metric: str, direction: str, sd: float = 2.0
    ) -> list[CellEffect]:
        """The cells whose effect lies more than `sd` standard deviations from the mean effect.

        Mean and (population) standard deviation are over all finite cells, layer × unit × position.
        The rule is that of Zhang & Nanda, arXiv 2309.16042. Largest absolute effect first.
        """
        patched, effect = self._over_pairs(component, metric, direction)
        finite = effect[np.isfinite(effect)]
        if not finite.size:
            return []
        far = np.abs(effect - finite.mean()) > sd * finite.std()
        return self._ranked(component, patched, effect, far)

    def counts(self, component: str, metric: str) -> dict[Status, int]:
        """How many cells of a component have which status."""
        grid = self.grid(component)
        total = np.zeros(256, dtype=np.int64)
        for pairs in grid.pair_tiles():
            region = (slice(None),) * 3 + (slice(pairs.start, pairs.stop),)
            status = self.store.read(f"{component}/{metric}_status", region)
            total += np.bincount(status.ravel(), minlength=256)
        return {status: int(total[status]) for status in Status}

    def warnings(self) -> list[str]:
        """What a reader of these results must know: one line each."""
        out = []
        for name in self.components:
            done = self.store.done(name)
            if not done.all():
                missing = int((~done).sum())
                out.append(
                    f"{name}: {missing} of {done.size} blocks not done: continue with --resume"
                )
        for name in self.components:
            for metric in self.metrics:
                bad = self.counts(name, metric)[Status.NOT_FINITE]
                if bad:
                    out.append(f"{name}: {metric} is not finite in {_count(bad, 'cell')}")
        for metric in self.metrics:
            clean, corrupt = self.baseline(metric).mean(axis=1)
            size = np.abs(clean - corrupt)
            known = np.isfinite(size)
            largest = size[known].max(initial=0.0)
            small = np.flatnonzero(known & ((size < SMALL_DENOMINATOR * largest) | (size == 0)))
            if small.size:
                out.append(
                    f"{metric}: |clean − corrupt| is below {SMALL_DENOMINATOR:.0%} of the largest "
                    f"in pair {_listed(small.tolist())}: their own effects are unreliable"
                )
        return out

    def _over_pairs(self, component: str, metric: str, direction: str) -> tuple[Array, Array]:
        """Mean of the patched metric, and effect, over all pairs: [layer, unit, position] each."""
        grid = self.grid(component)
        one_of("metric", metric, self.metrics)
        d = grid.directions.index(one_of("direction", direction, grid.directions))
        ends = [end[d][..., None, None, None] for end in self.ends(metric, grid)]
        # changed, span, patched, number of runs
        sums = np.zeros((4, grid.layers, grid.units, len(grid.positions)))
        for pairs in grid.pair_tiles():
            tile = slice(pairs.start, pairs.stop)
            values = self.store.read(f"{component}/{metric}", (d, 0, slice(None), tile))
            status = self.store.read(f"{component}/{metric}_status", (d, 0, slice(None), tile))
            patched = values.astype(np.float64)
            destination, source = (end[:, tile] for end in ends)
            span = source - destination
            use = np.isin(status, MEASURED) & np.isfinite(patched) & np.isfinite(span)
            moved = change(patched, status, destination)
            for i, term in enumerate((moved, span, patched, 1.0)):
                sums[i] += np.where(use, term, 0.0).sum(axis=(0, 1))
        changed, span, patched, runs = sums
        return ratio(patched, runs), ratio(changed, span)

    def _ranked(
        self, component: str, patched: Array, effect: Array, keep: NDArray[np.bool_]
    ) -> list[CellEffect]:
        positions, tokens = self.grid(component).positions, self.position_tokens(component)
        cells = np.argwhere(keep)
        order = np.argsort(-np.abs(effect[keep]), kind="stable")
        return [
            CellEffect(
                layer=int(layer),
                unit=int(unit),
                position=positions[position],
                token=tokens[position],
                patched=float(patched[layer, unit, position]),
                effect=float(effect[layer, unit, position]),
            )
            for layer, unit, position in cells[order]
        ]


def open(path: str | Path) -> Results:
    """The results in a folder; BadInput if it is not a results folder."""
    return Results(Store.open(Path(path)))


class _LazyEffect(BackendArray):
    """The effect of every cell, [DIMENSIONS], computed for the region that is asked for."""

    def __init__(
        self, store: Store, name: str, grid: Grid, destination: Array, source: Array
    ) -> None:
        self.shape = grid.shape
        self.dtype = np.dtype(np.float64)
        self._store, self._name = store, name
        # Views without a copy: baselines seen at every cell.
        self._destination, self._source = (
            np.broadcast_to(end[:, None, :, :, None, None, None], grid.shape)
            for end in (destination, source)
        )

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.BASIC, self._region
        )

    def _region(self, key: tuple[Any, ...]) -> Array:
        destination = self._destination[key]
        patched = self._store.read(self._name, key)
        status = self._store.read(f"{self._name}_status", key)
        return ratio(change(patched, status, destination), self._source[key] - destination)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _listed(items: list[int], most: int = 10) -> str:
    text = ", ".join(str(item) for item in items[:most])
    return text if len(items) <= most else f"{text} and {len(items) - most} more"
