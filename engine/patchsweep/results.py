"""Results as arrays and tables, with the effect of every patch computed on reading.

effect = (patched − destination) / (source − destination). The destination run is the one that is
patched (corrupt for `denoise`, clean for `noise`), the source run is the donor. 0: nothing changed;
1: the source's behaviour; in both directions. Across pairs it is the ratio of means, never the mean
of ratios. Raw metrics stay raw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from patchsweep import diagnostics, heatmaps, table
from patchsweep.circuits import OUTSIDE, Curve, curve
from patchsweep.effect import change, ratio
from patchsweep.errors import BadInput
from patchsweep.integrity import Check, check, refuse_missing
from patchsweep.prefilter import Choice, Verdict, judge
from patchsweep.reader import Reader, one_of
from patchsweep.sites import (
    DIMENSIONS,
    MEASURED,
    RUN,
    SETS,
    WINDOWED,
    Grid,
    Status,
    unit_name,
    window_name,
)
from patchsweep.spec import INNER, Prefilter
from patchsweep.statistics import (
    Agreement,
    adjusted,
    agreement,
    beyond_sd,
    bootstrap,
    p_values,
    standard_error,
)
from patchsweep.store import EDGES, Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

AT_ONCE = 1 << 22  # values in memory: 32 MiB for each of a few arrays
UNSIGNED = "atp_star"  # an estimator of magnitudes


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
        (float64), and where the sweep has it `<metric>_estimate` (its attribute `approximation`
        says how), over [direction, source, sample, pair, layer, unit, position]; of the first four
        and `unit` those of size 1 are squeezed, and `unit` is renamed to what it counts (`head`).
        "sets" has the dimension `set`, with the sets' names, in place of the last three.
        """
        grid = self.grid(component)
        ds = self.store.opened(component)
        for metric in self.metrics:
            effect = _LazyEffect(
                self.store, f"{component}/{metric}", grid, *self.ends(metric, grid)
            )
            name = f"effect on {metric} (0 = destination, 1 = source)"
            ds[f"{metric}_effect"] = xr.Variable(
                DIMENSIONS, indexing.LazilyIndexedArray(effect), {"long_name": name}
            )
        kinds = ["", "_effect", "_status"]
        kinds += ["_estimate"] if component in self.store.estimators else []
        ds = ds[[f"{metric}{kind}" for metric in self.metrics for kind in kinds]]
        optional = ["direction", "source", "sample", "pair", "unit"]
        if component == SETS:
            ds, optional = ds.rename(position="set"), [*optional, "layer"]
        squeezed: xr.Dataset = ds.squeeze([dim for dim in optional if ds.sizes[dim] == 1])
        if component == SETS:
            return squeezed.drop_vars(["layer", "unit"])
        unit_name = ds.attrs["unit_name"]
        return squeezed.rename(unit=unit_name) if unit_name else squeezed.drop_vars("unit")

    def to_frame(self) -> pd.DataFrame:
        """A row per patching experiment; cells not done or outside their prompt are left out.

        Columns: component, direction, source, sample, pair, layer, unit (missing where there is
        none), position (of "sets": the set), token (of the destination run), and per metric its raw
        value, `_effect` and `_status`, and `_estimate` where the sweep has estimates.
        """
        return pd.concat(list(table.frames(self)), ignore_index=True)

    def check(self) -> Check:
        """Decode every chunk: what is damaged and must be redone."""
        return check(self.path)

    def export(self, path: Path) -> None:
        """Write `to_frame` as Parquet, pair by pair: memory does not grow with the results."""
        table.write_parquet(self, path)

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

    def estimated_effect(
        self, component: str, metric: str, direction: str, source: str | None = None
    ) -> Array:
        """The effect over all pairs and samples as estimated, [layer, unit, position], a ratio of
        means like `effect`; of the estimator atp_star a magnitude. BadInput if the sweep did not
        estimate the component."""
        grid, d, s = self._at(component, metric, direction, source)
        self._estimator(component)
        ends = [end[d, s][..., None, None, None] for end in self.ends(metric, grid)]
        moved, span = np.zeros((2, grid.layers, grid.units, len(grid.positions)))
        for pairs in grid.pair_tiles():
            tile = slice(pairs.start, pairs.stop)
            values = self.store.read(f"{component}/{metric}_estimate", (d, s, slice(None), tile))
            destination, donor = (end[:, tile] for end in ends)
            use = ~np.isnan(values) & np.isfinite(donor - destination)
            moved += np.where(use, values - destination, 0.0).sum(axis=(0, 1))
            span += np.where(use, donor - destination, 0.0).sum(axis=(0, 1))
        return ratio(moved, span)

    def shown_effect(
        self, component: str, metric: str, direction: str, source: str | None = None
    ) -> Array:
        """What is drawn: `effect`, or of a component that was only estimated `estimated_effect`."""
        only = component in self.only_estimated
        of = self.estimated_effect if only else self.effect
        return of(component, metric, direction, source)

    def plot(
        self,
        component: str | None = None,
        metric: str | None = None,
        direction: str | None = None,
        view: str | None = None,
        source: str | None = None,
    ) -> Figure:
        """A heatmap of the effect over all pairs, as a figure of matplotlib (shown by notebooks).

        What is left out is the first there is; `view` is "layer_position" or,
        for a component of several units a layer, "layer_head" (or _kv_head, _neuron, _feature).
        BadInput for what the results do not have, and without matplotlib.
        """
        heatmaps.needed()
        from matplotlib import pyplot

        pyplot.install_repl_displayhook()  # else a notebook shows a figure's name only

        component = component or self.components[0]
        metric = metric or self.metrics[0]
        direction = direction or self.grid(component).directions[0]
        _, _, number = self._at(component, metric, direction, source)
        effect = self.shown_effect(component, metric, direction, source)
        found = {picture.view: picture for picture in heatmaps.views(self, component, effect)}
        chosen = found[one_of("view", view or next(iter(found)), tuple(found))]
        return heatmaps.draw(self, component, metric, direction, chosen, number)

    def audit(
        self, component: str, metric: str, direction: str, source: str | None = None
    ) -> Verdict | None:
        """What the prefilter's cells that were run say of those that were not; None without a
        prefilter, for a component that was not estimated, and where nothing was kept."""
        given, estimated = self.attrs["spec"].get("prefilter"), self.store.estimators
        if given is None or component not in estimated or not self.complete:
            return None
        grid, d, s = self._at(component, metric, direction, source)
        chosen = [
            self.store.read(f"choice/{component}_{name}", (d, s)) for name in ("status", "stratum")
        ]
        return judge(
            self.effect(component, metric, direction, source),
            Choice(*chosen),
            Prefilter(**given),
            components=len(estimated) * len(grid.directions) * len(grid.sources),
            metrics=len(self.metrics),
        )

    def _estimator(self, component: str) -> str:
        """How a component was estimated; BadInput if it was not."""
        if component not in self.store.estimators:
            raise BadInput(
                f"{component} has no estimates in these results: run with estimate or prefilter"
            )
        return self.store.estimators[component]

    def top(
        self,
        component: str,
        metric: str,
        direction: str,
        n: int = 10,
        source: str | None = None,
    ) -> list[CellEffect]:
        """The `n` cells of largest absolute effect, largest first; of a component that was only
        estimated by that estimate, `patched` being NaN."""
        patched, effect = self._over_pairs(component, metric, direction, source)
        if component in self.only_estimated:
            effect = self.estimated_effect(component, metric, direction, source)
        return self._ranked(component, patched, effect, np.isfinite(effect), n)

    def detections(
        self,
        component: str,
        metric: str,
        direction: str,
        sd: float = 2.0,
        source: str | None = None,
    ) -> list[CellEffect]:
        """The cells whose effect lies more than `sd` standard deviations from the mean effect.

        Mean and (population) standard deviation are over all finite cells, layer × unit × position.
        The rule is that of Zhang & Nanda, arXiv 2309.16042. Largest absolute effect first.
        """
        patched, effect = self._over_pairs(component, metric, direction, source)
        far = beyond_sd(effect, sd)
        return self._ranked(component, patched, effect, far)

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
        moved = np.where(np.isin(status, MEASURED) & ~_partly(status), moved, np.nan)
        # A source may have fewer samples than others.
        known = [n for n, x in enumerate(moved) if np.isfinite(x).any()] or [0]
        span = (donor - destination)[known].mean(0) if self.normalised(s) else None
        return moved[known].mean(0), span

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

    def edges(self, metric: str, direction: str, source: str | None = None) -> xr.DataArray:
        """Edge attribution, the estimated change of the metric, [sender, receiver]: its mean over
        the pairs and samples that are scored; NaN where there is no edge. BadInput if the sweep
        scored none."""
        if not self.attrs.get(EDGES):
            raise BadInput("these results have no edges: add edges: eap to the spec")
        _, d, s = self._at(self.components[0], metric, direction, source)
        done = np.argwhere(self.store.scored()[s])
        parts = (self.store.read(f"{EDGES}/{metric}", (d, s, *at)) for at in done)
        total: Any = sum(part.astype(np.float64) for part in parts)
        senders, receivers = (self.store.read(f"{EDGES}/{end}") for end in ("sender", "receiver"))
        mean = total / len(done) if len(done) else np.full((len(senders), len(receivers)), np.nan)
        said = {"approximation": self.store.array_attrs(f"{EDGES}/{metric}")["approximation"]}
        ends = {"sender": senders, "receiver": receivers}
        return xr.DataArray(mean, ends, ("sender", "receiver"), metric, said)

    def top_edges(
        self, metric: str, direction: str, n: int = 10, source: str | None = None
    ) -> list[tuple[str, float]]:
        """The `n` edges of largest absolute score, largest first, as sender->receiver."""
        found = self.edges(metric, direction, source)
        flat = np.abs(found.values).ravel()
        order = np.argsort(-np.nan_to_num(flat, nan=-1), kind="stable")
        best = (np.unravel_index(i, found.shape) for i in order[:n] if np.isfinite(flat[i]))
        names = found.sender.values, found.receiver.values
        return [(f"{names[0][i]}->{names[1][j]}", float(found.values[i, j])) for i, j in best]

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
            use = np.isin(status, MEASURED) & np.isfinite(values)
            partly |= _partly(status[None])
            if not use.any():
                continue
            moved = np.where(use, change(values, status, destination), 0.0).sum(0)
            per_sample.append(ratio(moved, np.where(use, donor - destination, 0.0).sum(0)))
        if not per_sample:
            return np.full(partly.shape, np.nan)
        return np.where(partly, np.nan, standard_error(np.stack(per_sample), 0))

    @cached_property
    def inner_metrics(self) -> list[str]:
        """The metrics that read inside the model: their cells are not about the answer."""
        said = self.attrs["spec"].get("metrics", [])
        return [
            m
            for m, given in zip(self.metrics, said, strict=False)
            if set(given) & INNER and isinstance(given, dict)
        ]

    @cached_property
    def groups(self) -> list[str]:
        """The template of every pair, empty where it has none."""
        names: list[str] = self.store.read("prompts/group").tolist()
        return names

    def windows(
        self, component: str, size: int, metric: str, direction: str
    ) -> tuple[Array, Array]:
        """Sliding windows of `size` adjacent layers: their joint effect, and the sum of the effects
        of their single layers, [first layer, position] each.

        BadInput if the sweep had no such windows, or not the component on its own.
        """
        grid, sets = self.grid(component), self.grid(SETS)
        joint = self.effect(SETS, metric, direction)[0, 0]
        single = self.effect(component, metric, direction)[:, 0]
        where = {name: i for i, name in enumerate(sets.positions)}
        firsts = range(grid.layers - size + 1)
        try:
            found = [
                [where[window_name(component, range(i, i + size), p)] for p in grid.positions]
                for i in firsts
            ]
        except KeyError as error:
            raise BadInput(
                f"no windows of {size} layers of {component} in these results"
            ) from error
        total = np.stack([single[i : i + size].sum(0) for i in firsts])
        return joint[np.array(found)], total

    def window_sizes(self, component: str) -> tuple[int, ...]:
        """The sizes of the sliding windows of a component, in layers."""
        sizes: list[int] = self.attrs["spec"].get("windows", [])
        return tuple(sizes) if component in WINDOWED and SETS in self.store.grids else ()

    @property
    def has_circuit(self) -> bool:
        """Whether the sweep measured a circuit's curve."""
        sets = self.store.grids.get(SETS)
        return sets is not None and any(str(name).startswith(OUTSIDE) for name in sets.positions)

    def circuit(self, metric: str, source: str | None = None) -> Curve:
        """Performance against circuit size; BadInput if the sweep had no circuit."""
        grid = self.grid(SETS)
        effects = {d: self.effect(SETS, metric, d, source)[0, 0] for d in grid.directions}
        names = [str(name) for name in grid.positions]
        return curve(names, effects.get("noise"), effects.get("denoise"), self._circuit_sites())

    def _circuit_sites(self) -> int:
        """How many sites a circuit's ranking and all others are together."""
        names = [str(name) for name in self.grid(SETS).positions]
        owner = self.store.read(f"{SETS}/site_set")
        outside = [i for i, name in enumerate(names) if name.startswith(OUTSIDE)]
        if not outside:
            raise BadInput(
                "these results have no circuit: add circuit: {ranking: [...]} to the spec"
            )
        size = int(names[outside[0]].removeprefix(OUTSIDE))
        return int((owner == outside[0]).sum()) + size

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
        if self.store.estimators and (missing := self._missing(self.store.estimated())):
            out.append(f"estimates of {_count(missing, 'pair')} not done: continue with --resume")
        if self.attrs.get(EDGES) and (missing := self._missing(self.store.scored())):
            out.append(f"edges of {_count(missing, 'pair')} not scored: continue with --resume")
        for name in self.components:
            for metric in self.metrics:
                bad = self.counts(name, metric)[Status.NOT_FINITE]
                if bad:
                    out.append(f"{name}: {metric} is not finite in {_count(bad, 'cell')}")
        return [*out, *diagnose(self)]

    def _missing(self, done: NDArray[np.bool_]) -> int:
        """How many pairs have something that is not done [source, sample, pair] yet."""
        sources = self.attrs["sources"]
        missing = [~of[: said["samples"]].all(0) for of, said in zip(done, sources, strict=True)]
        return int(np.any(missing, axis=0).sum())

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
            partly |= _partly(status)
        sums[:, partly] = np.nan
        changed, span, patched, runs = sums
        return ratio(patched, runs), ratio(changed, span)

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

    def _ranked(
        self,
        component: str,
        patched: Array,
        effect: Array,
        keep: NDArray[np.bool_],
        n: int | None = None,
    ) -> list[CellEffect]:
        positions, tokens = self.grid(component).positions, self.position_tokens(component)
        cells = np.argwhere(keep)
        order = np.argsort(-np.abs(effect[keep]), kind="stable")[:n]
        return [
            CellEffect(
                layer=int(layer) + self.grid(component).first_layer,
                unit=int(unit),
                position=positions[position],
                token=tokens[position],
                patched=float(patched[layer, unit, position]),
                effect=float(effect[layer, unit, position]),
            )
            for layer, unit, position in cells[order]
        ]


def layer_parts(grid: Grid) -> list[slice]:
    """The layers of a grid in parts, as many at a time as memory takes: chunks hold all of them, so
    every part reads them again."""
    layer = grid.samples * grid.pairs * grid.units * len(grid.positions)
    step = max(1, AT_ONCE // layer)
    return [slice(first, first + step) for first in range(0, grid.layers, step)]


def _partly(status: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The cells [layer, unit, position] that are only estimated in some sample or pair, of statuses
    [sample, pair, layer, unit, position]: where they are structural says nothing of all pairs."""
    found: NDArray[np.bool_] = (status == Status.ESTIMATED).any(axis=(0, 1))
    return found


def open(path: str | Path) -> Results:
    """The results in a folder, in a zip file of one, or at a URL; BadInput if there are none, or if
    chunks that are marked done are missing. Other damage is noticed when it is read, or by
    `check`."""
    store = Store.open(path)
    refuse_missing(store)
    return Results(store)


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
            np.broadcast_to(end[..., None, None, None], grid.shape) for end in (destination, source)
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


def diagnose(results: Results) -> list[str]:
    """What the diagnostics say of every component and direction, by the first source."""
    lines: list[str] = []
    ends = {m: results.baseline(m)[:, 0].mean(1) for m in results.metrics}
    for metric, (clean, corrupt) in ends.items():
        if results.normalised(0):
            lines += diagnostics.small_denominators(clean - corrupt, metric)
        for direction in results.grid(results.components[0]).directions:
            if metric.startswith(("prob", "logprob")) and not metric.startswith("prob_diff"):
                destination = corrupt if direction == "denoise" else clean
                lines += diagnostics.saturated(metric, destination, direction)
    for component in results.components:
        for direction in results.grid(component).directions:
            said = _diagnose_cells(results, component, direction)
            lines += [f"{component}, {direction}: {line}" for line in said]
        if results.grid(component).directions == ("denoise", "noise"):
            metric = results.metrics[0]
            denoise, noise = (results.effect(component, metric, d) for d in ("denoise", "noise"))
            if component != SETS:
                said = diagnostics.and_or(denoise, noise, results.cell_namer(component))
                lines += [f"{component}: {line}" for line in said]
    return lines


def _diagnose_cells(results: Results, component: str, direction: str) -> list[str]:
    """The diagnoses of one component in one direction."""
    lines: list[str] = []
    name, grid = results.cell_namer(component), results.grid(component)
    outcomes = [m for m in results.metrics if m not in results.inner_metrics]
    effects = {m: results.effect(component, m, direction) for m in outcomes}
    run = np.zeros((grid.layers, grid.units, len(grid.positions)), np.bool_)
    for metric in outcomes:
        floor = results.noise_floor(metric)[int(direction == "denoise"), 0, 0]
        runs = changed = under = 0
        for part in layer_parts(grid):
            region = (grid.directions.index(direction), 0, 0, slice(None), part)
            status = results.store.read(f"{component}/{metric}_status", region)
            ran = np.isin(status, RUN)
            size = np.abs(results.changes(component, metric, direction, None, part)[0])
            runs += int(ran.sum())
            changed += int((ran & (size > 0)).sum())
            under += int((ran & (size <= floor[:, None, None, None])).sum())
            run[part] |= ran.any(0)
        if metric.startswith(("rank", "accuracy")):
            lines += diagnostics.never_changed(metric, changed, runs)
        else:
            highest = float(np.nanmax(floor, initial=0.0))
            lines += diagnostics.below_noise(metric, under, runs, highest)
    if component != SETS:
        lines += diagnostics.disagreement(effects, run, name)
        if outcomes:
            lines += diagnostics.negative(effects[outcomes[0]], name)
        joint = results.attrs.get("joint", {}).get(component, {}).get(direction)
        if joint:
            lines += diagnostics.backup(joint["joint"], joint["singles"], direction)
    return lines
