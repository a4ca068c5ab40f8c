"""Results as arrays and tables, with the effect of every patch computed on reading.

effect = (patched − destination) / (source − destination). The destination run is the one that is
patched (corrupt for `denoise`, clean for `noise`), the source run is the donor. 0: nothing changed;
1: the source's behaviour; in both directions. Across pairs it is the ratio of means, never the mean
of ratios. Raw metrics stay raw.
"""

from __future__ import annotations

from collections.abc import Iterator
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

from patchsweep.errors import BadInput
from patchsweep.sites import DIMENSIONS, Grid, Status, component
from patchsweep.store import RUNS, Store

if TYPE_CHECKING:
    import pyarrow as pa

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


@dataclass(frozen=True)
class Results:
    """The results of a sweep, read from its folder when asked for."""

    store: Store

    @property
    def path(self) -> Path:
        """The results folder."""
        return self.store.path

    @property
    def attrs(self) -> dict[str, Any]:
        """The root attributes: spec, model, versions and so on."""
        return self.store.attrs

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the patched components."""
        return tuple(self.store.grids)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return self.store.metrics

    @property
    def complete(self) -> bool:
        """Whether every block is done."""
        return all(self.store.done(name).all() for name in self.components)

    def grid(self, component: str) -> Grid:
        """The grid of a component; BadInput if it was not patched."""
        return self.store.grids[_one_of("component", component, self.components)]

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
                self.store, f"{component}/{metric}", grid, *self._ends(metric, grid)
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
        return pd.concat(list(self._frames()), ignore_index=True)

    def export(self, path: Path) -> None:
        """Write `to_frame` as Parquet, pair by pair: memory does not grow with the results."""
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as exc:
            raise BadInput("Parquet needs pyarrow: pip install 'patchsweep[report]'") from exc
        schema = self._schema()
        partial = path.with_name(f".{path.name}.partial")
        try:
            with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
                for frame in self._frames():
                    writer.write_table(pa.Table.from_pandas(frame, schema, preserve_index=False))
            partial.replace(path)
        except OSError as exc:
            reason = (exc.strerror or str(exc)).lower()
            raise BadInput(f"cannot write {path}: {reason}; choose another path") from exc
        finally:
            partial.unlink(missing_ok=True)

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
        for pairs in _tiles(grid):
            region = (slice(None),) * 3 + (slice(pairs.start, pairs.stop),)
            status = self.store.read(f"{component}/{metric}_status", region)
            total += np.bincount(status.ravel(), minlength=256)
        return {status: int(total[status]) for status in Status}

    def baseline(self, metric: str) -> Array:
        """The metric of the unpatched runs, [run = clean, corrupt; sample; pair]."""
        name = _one_of("metric", metric, self.metrics)
        return self.store.read(f"baseline/{name}").astype(np.float64)

    def noise_floor(self, metric: str) -> Array:
        """Distance of a null patch from the baseline, [run = clean, corrupt; sample; pair]."""
        name = _one_of("metric", metric, self.metrics)
        return self.store.read(f"baseline/{name}_noise_floor").astype(np.float64)

    def position_tokens(self, component: str) -> list[str]:
        """The token text at each position of the grid, where all pairs have the same one.

        "clean/corrupt" where the two runs differ; empty where pairs differ or for `all`. Pairs that
        end before the position do not count.
        """
        grid = self.grid(component)
        columns = [self._token_column(run, grid) for run in RUNS]
        out = []
        for clean, corrupt in zip(*columns, strict=True):
            seen = {(a, b) for a, b in zip(clean, corrupt, strict=True) if a is not None}
            both = seen.pop() if len(seen) == 1 else ("", "")
            out.append(both[0] if both[0] == both[1] else f"{both[0]}/{both[1]}")
        return out

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

    @cached_property
    def _text(self) -> dict[str, NDArray[Any]]:
        return {run: self.store.read(f"prompts/{run}_text") for run in RUNS}

    @cached_property
    def _lengths(self) -> list[int]:
        lengths: list[int] = self.store.read("prompts/length").tolist()
        return lengths

    @cached_property
    def _labels(self) -> list[dict[str, int]]:
        labels: list[dict[str, int]] = self.store.group_attrs("prompts")["labels"]
        return labels

    def _token_column(self, run: str, grid: Grid) -> list[list[str | None]]:
        """Token texts [position of the grid, pair]; None where the pair has no such position."""
        rows = [self._tokens(run, grid, pair) for pair in range(grid.pairs)]
        return [list(column) for column in zip(*rows, strict=True)]

    def _tokens(self, run: str, grid: Grid, pair: int) -> list[str | None]:
        """Token texts of one prompt at the positions of the grid; None outside, "" for `all`."""
        out: list[str | None] = []
        for position in grid.positions:
            labelled = self._labels[pair].get(position) if isinstance(position, str) else position
            if labelled is None:
                out.append("" if position == "all" else None)
            else:
                inside = labelled < self._lengths[pair]
                out.append(str(self._text[run][pair, labelled]) if inside else None)
        return out

    def _ends(self, metric: str, grid: Grid) -> tuple[Array, Array]:
        """The metric of the destination and of the source run, [direction, sample, pair] each."""
        clean, corrupt = self.baseline(metric)
        denoise = [direction == "denoise" for direction in grid.directions]
        destination = np.stack([corrupt if d else clean for d in denoise])
        source = np.stack([clean if d else corrupt for d in denoise])
        return destination, source

    def _over_pairs(self, component: str, metric: str, direction: str) -> tuple[Array, Array]:
        """Mean of the patched metric, and effect, over all pairs: [layer, unit, position] each."""
        grid = self.grid(component)
        _one_of("metric", metric, self.metrics)
        d = grid.directions.index(_one_of("direction", direction, grid.directions))
        ends = [end[d][..., None, None, None] for end in self._ends(metric, grid)]
        # changed, span, patched, number of runs
        sums = np.zeros((4, grid.layers, grid.units, len(grid.positions)))
        for pairs in _tiles(grid):
            tile = slice(pairs.start, pairs.stop)
            values = self.store.read(f"{component}/{metric}", (d, 0, slice(None), tile))
            status = self.store.read(f"{component}/{metric}_status", (d, 0, slice(None), tile))
            patched = values.astype(np.float64)
            destination, source = (end[:, tile] for end in ends)
            span = source - destination
            use = np.isin(status, MEASURED) & np.isfinite(patched) & np.isfinite(span)
            for i, term in enumerate((patched - destination, span, patched, 1.0)):
                sums[i] += np.where(use, term, 0.0).sum(axis=(0, 1))
        changed, span, patched, runs = sums
        return _ratio(patched, runs), _ratio(changed, span)

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

    def _frames(self) -> Iterator[pd.DataFrame]:
        """The table in pieces: one per component and pair."""
        for name in self.components:
            grid = self.grid(name)
            ends = {metric: self._ends(metric, grid) for metric in self.metrics}
            for pairs in _tiles(grid):
                region = (slice(None), 0, 0, slice(pairs.start, pairs.stop))
                arrays = {
                    array: self.store.read(f"{name}/{array}", region)
                    for metric in self.metrics
                    for array in (metric, f"{metric}_status")
                }
                for i, pair in enumerate(pairs):
                    cells = {array: data[:, i] for array, data in arrays.items()}
                    yield self._frame(grid, pair, cells, ends)

    def _frame(
        self,
        grid: Grid,
        pair: int,
        cells: dict[str, NDArray[Any]],
        ends: dict[str, tuple[Array, Array]],
    ) -> pd.DataFrame:
        """The rows of one pair; `cells` are [direction, layer, unit, position]."""
        left_out = (Status.NOT_DONE, Status.OUTSIDE)
        status = np.stack([cells[f"{metric}_status"] for metric in self.metrics])
        keep = ~np.isin(status, left_out).all(axis=0)
        direction, layer, unit, position = np.nonzero(keep)
        tokens = np.array(
            [
                [token or "" for token in self._tokens(_destination(way), grid, pair)]
                for way in grid.directions
            ],
            dtype=object,
        )
        has_units = component(grid.component).unit != ""
        positions: Any = np.array(grid.positions, dtype=object)[position]
        rows = len(layer)
        columns: dict[str, Any] = {
            "component": _categories([0] * rows, (grid.component,), self.components),
            "direction": _categories(direction, grid.directions, ("denoise", "noise")),
            "pair": np.full(rows, pair, dtype=np.int32),
            "layer": layer.astype(np.int32),
            "head": pd.arrays.IntegerArray(unit.astype(np.int32), np.full(rows, not has_units)),
            "position": _strings(positions) if self._labelled else positions.astype(np.int32),
            "token": _strings(tokens[direction, position]),
        }
        names = [s.name.lower() for s in Status]
        for metric, (destination, source) in ends.items():
            raw = cells[metric][keep]
            start = destination[direction, 0, pair]
            columns[metric] = raw
            columns[f"{metric}_effect"] = _ratio(
                raw.astype(np.float64) - start, source[direction, 0, pair] - start
            )
            columns[f"{metric}_status"] = _categories(
                cells[f"{metric}_status"][keep], names, tuple(names)
            )
        return pd.DataFrame(columns)

    @cached_property
    def _labelled(self) -> bool:
        grids = self.store.grids.values()
        return any(isinstance(position, str) for grid in grids for position in grid.positions)

    def _schema(self) -> pa.Schema:
        """The Parquet types of `to_frame`."""
        import pyarrow as pa

        names = pa.dictionary(pa.int8(), pa.string())
        value = pa.float64() if self.attrs["dtype"] == "float64" else pa.float32()
        fields = {
            "component": names,
            "direction": names,
            "pair": pa.int32(),
            "layer": pa.int32(),
            "head": pa.int32(),
            "position": pa.string() if self._labelled else pa.int32(),
            "token": pa.string(),
        }
        for metric in self.metrics:
            fields |= {metric: value, f"{metric}_effect": pa.float64(), f"{metric}_status": names}
        return pa.schema(list(fields.items()))


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
        patched = self._store.read(self._name, key).astype(np.float64)
        return _ratio(patched - destination, self._source[key] - destination)


def _ratio(numerator: Array, denominator: Array) -> Array:
    """Their quotient, NaN where the denominator is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)


def _tiles(grid: Grid) -> Iterator[range]:
    for start in range(0, grid.pairs, grid.pair_tile):
        yield range(start, min(start + grid.pair_tile, grid.pairs))


def _destination(direction: str) -> str:
    return "corrupt" if direction == "denoise" else "clean"


def _categories(codes: Any, names: Any, categories: tuple[str, ...]) -> pd.Categorical:
    """A column of names given by number, with the same categories in every piece of the table."""
    place = np.array([categories.index(name) for name in names], dtype=np.int8)
    return pd.Categorical.from_codes(place[np.asarray(codes, dtype=np.intp)], list(categories))


def _strings(values: Any) -> Any:
    return pd.array([str(value) for value in values], dtype="str")


def _one_of(what: str, name: str, known: tuple[str, ...]) -> str:
    if name not in known:
        raise BadInput(f"no {what} '{name}' in these results: use one of {', '.join(known)}")
    return name


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _listed(items: list[int], most: int = 10) -> str:
    text = ", ".join(str(item) for item in items[:most])
    return text if len(items) <= most else f"{text} and {len(items) - most} more"
