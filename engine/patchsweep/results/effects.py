"""The effect of every cell over pairs, and the changes of every pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from patchsweep.results.columns import Columns, as_given, columns_of, pairs_of
from patchsweep.results.reader import Reader, one_of
from patchsweep.sites import EDGES, MEASURED, RUN, SETS, Grid, Status, unit_name
from patchsweep.statistics import Array, change, ratio

if TYPE_CHECKING:
    import xarray as xr

AT_ONCE = 1 << 22  # values in memory: 32 MiB for each of a few arrays


@dataclass(frozen=True, eq=False)
class OverPairs:
    """Cells over all pairs and samples, [layer, unit, column] each: the mean of the `patched`
    metric, the `effect`, in how many `pairs` there is a value, and the cell's `status` (a Status;
    STRUCTURAL: in all pairs; EXACT: run in some)."""

    patched: Array
    effect: Array
    pairs: NDArray[np.int64]
    status: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class _Tile:
    """Some pairs: values and statuses [sample, pair, layer, unit, position], their baselines."""

    pairs: slice
    values: Array
    status: NDArray[np.uint8]
    destination: Array
    span: Array


class Effects(Reader):
    """What was measured, as effects."""

    def columns(self, component: str, align: str | None = None) -> Columns:
        """What positions are shown as over pairs (`results.columns`). `align`: labels, end or
        start; if left out, start for pairs of one length whose labels lie at the same index, else
        labels where pairs share some, else end. Positions that the sweep was asked for by name or
        index stay as they are."""
        positions = self.grid(component).positions
        if component in (SETS, EDGES):
            return as_given(positions)
        align = align or ("start" if component in self.chosen_by_index else None)
        return columns_of(positions, self.lengths, self._reads, self.labels, align)

    def effect(
        self,
        component: str,
        metric: str,
        direction: str | None = None,
        source: str | None = None,
        *,
        align: str | None = None,
        min_pairs: int | None = None,
    ) -> xr.DataArray:
        """The effect over all pairs and samples, [layer, unit, position] (`unit` by its name, such
        as `head`), as a ratio of means.

        Sum over pairs of (patched − destination) / sum over pairs of (source − destination); of a
        source without a run (zero, mean, vector) the mean of patched − destination. `direction`,
        `source`: the first if left out. `align`: what is a position over pairs (see `columns`);
        of a segment of several tokens the mean within each pair comes first. Exact and structural
        cells count; a pair where the cell is outside the prompt, not done or not finite is left
        out of both sums. NaN where fewer than `min_pairs` are left (half of them if left out), and
        where a cell is only estimated in any pair. The coordinate `n_pairs` [layer, unit, position]
        counts the pairs, `token` [position] is the text there, where all pairs have the same.
        """
        columns = self.columns(component, align)
        found = self.over_pairs(component, metric, direction, source, columns, min_pairs)
        return self.labelled(component, columns, found.effect, found.pairs, f"{metric}_effect")

    def labelled(
        self, component: str, columns: Columns, values: Array, pairs: NDArray[np.int64], name: str
    ) -> xr.DataArray:
        """`values` [layer, unit, column], over so many `pairs` each, with the names of its places
        and a `name`."""
        import xarray as xr

        grid = self.grid(component)
        dims = ("layer", unit_name(component) or "unit", "set" if component == SETS else "position")
        coordinates = {
            dims[0]: np.arange(grid.first_layer, grid.first_layer + grid.layers),
            dims[1]: np.arange(grid.units),
            dims[2]: list(columns.names),
            "token": (dims[2], self.column_tokens(component, columns)),
            "n_pairs": (dims, pairs),
        }
        return xr.DataArray(values, coordinates, dims, name, {"align": columns.align})

    def changes(
        self,
        component: str,
        metric: str,
        direction: str | None = None,
        source: str | None = None,
        layers: slice = slice(None),
        align: str | None = "start",
    ) -> tuple[Array, Array | None]:
        """patched − destination of every pair, of these `layers` of the grid's, mean over samples,
        [pair, layer, unit, position], NaN where there is no measured value, and in all pairs where
        a cell is only estimated in any; and source − destination [pair], None where effects are
        differences. `align`: as in `effect`, but by index if left out."""
        grid, d, s = self._at(component, metric, direction, source)
        columns = self.columns(component, align)
        destination, donor = (end[d, s] for end in self.ends(metric, grid))  # [sample, pair]
        region = (d, s, slice(None), slice(None), layers)
        patched = self.store.read(f"{component}/{metric}", region).astype(np.float64)
        status = self.store.read(f"{component}/{metric}_status", region)
        moved = change(patched, status, destination[..., None, None, None])
        use = np.isin(status, MEASURED) & np.isfinite(moved)
        moved, there = columns.mean(moved, use)
        partly = columns.any(status == Status.ESTIMATED).any(axis=(0, 1))
        moved = np.where(there & ~partly, moved, np.nan)
        # A source may have fewer samples than others.
        known = [n for n, x in enumerate(moved) if np.isfinite(x).any()] or [0]
        span = (donor - destination)[known].mean(0) if self.normalised(s) else None
        return moved[known].mean(0), span

    def counts(self, component: str, metric: str) -> dict[Status, int]:
        """How many cells of a component have which status in a metric, over all pairs and so on."""
        grid = self.grid(component)
        total = np.zeros(256, dtype=np.int64)
        for pairs in grid.pair_tiles():
            region = (slice(None),) * 3 + (slice(pairs.start, pairs.stop),)
            status = self.store.read(f"{component}/{metric}_status", region)
            total += np.bincount(status.ravel(), minlength=256)
        return {status: int(total[status]) for status in Status}

    def cell_namer(
        self, component: str, columns: Columns | None = None
    ) -> Callable[[Sequence[int]], str]:
        """How a cell [layer, unit, column] is called: layer.unit@position, or the set's name."""
        grid = self.grid(component)
        names = (columns or self.columns(component)).names

        def name(cell: Sequence[int]) -> str:
            layer, unit, column = cell
            place = str(names[column])
            if component == SETS:
                return place
            where = str(layer + grid.first_layer)
            return f"{where}.{unit}@{place}" if unit_name(component) else f"{where}@{place}"

        return name

    def column_tokens(self, component: str, columns: Columns) -> list[str]:
        """The text at each column, where all pairs have the same one.

        "clean/corrupt" where the two prompts differ and both are run; empty where pairs differ or
        for `all`. Pairs that have no such position do not count.
        """
        texts = self.tokens_of(component, columns)
        out = []
        for column in zip(*texts, strict=True):
            seen = set(column) - {None}
            both = seen.pop() if len(seen) == 1 else ("", "")
            out.append(both[0] if both[0] == both[1] else f"{both[0]}/{both[1]}")
        return out

    def pairs_of(self, columns: Columns, grid: Grid) -> NDArray[np.int64]:
        """How many pairs have each column, [column]; of given ones that is not counted."""
        if columns.align == "given":
            return np.full(len(columns.names), grid.pairs)
        return pairs_of(columns, self.lengths)

    def labels_at(self, columns: Columns) -> list[str]:
        """The labels that lie at an index in all pairs, by column; empty where columns are no
        indices."""
        if columns.align != "start":
            return [""] * len(columns.names)
        shared = [n for n in self.labels[0] if all(n in pair for pair in self.labels)]
        places = {n: {pair[n] for pair in self.labels} for n in shared}
        return [" ".join(n for n in shared if places[n] == {at}) for at in columns.names]

    def tokens_of(
        self, component: str, columns: Columns, pairs: Sequence[int] | None = None
    ) -> list[list[tuple[str, str] | None]]:
        """The clean and the corrupt text at each column of each of `pairs` (all if left out),
        [pair][column]; None where a pair has no such position, "" for `all`, groups of positions
        and sets."""
        grid = self.grid(component)
        rows = []
        for pair in range(grid.pairs) if pairs is None else pairs:
            clean, corrupt = (self.tokens(run, grid, pair) for run in ("clean", "corrupt"))
            rows.append([_joined(clean, corrupt, at) for at in columns.places(pair)])
        return rows

    def over_pairs(
        self,
        component: str,
        metric: str,
        direction: str | None,
        source: str | None,
        columns: Columns,
        min_pairs: int | None = None,
        cells: NDArray[np.intp] | None = None,
    ) -> OverPairs:
        """What `effect` says, as plain arrays. `cells` [layer, position]: of sets, which of them
        stands at each layer and position."""
        grid, d, s = self._at(component, metric, direction, source)
        sums, seen = None, None
        for tile in self._tiles(grid, metric, d, s, cells):
            use = np.isin(tile.status, MEASURED) & np.isfinite(tile.values) & np.isfinite(tile.span)
            moved = change(tile.values, tile.status, tile.destination)
            terms = []
            for term in (moved, tile.span, tile.values):
                mean, there = columns.mean(np.broadcast_to(term, use.shape), use, tile.pairs)
                terms.append(mean.sum(axis=(0, 1)))
            terms += [there.sum(axis=(0, 1)), there.any(0).sum(0)]
            said = [columns.any(tile.status == s, tile.pairs).any(axis=(0, 1)) for s in Status]
            sums = np.stack(terms) if sums is None else sums + np.stack(terms)
            seen = np.stack(said) if seen is None else seen | np.stack(said)
        assert sums is not None and seen is not None
        few = (sums[4] < self.least(component, min_pairs)) | seen[Status.ESTIMATED]
        pairs = sums[4].astype(np.int64)
        changed, span, patched, runs = np.where(few, np.nan, sums[:4])
        return OverPairs(ratio(patched, runs), ratio(changed, span), pairs, _status(seen))

    def least(self, component: str, min_pairs: int | None) -> int:
        """How many pairs a cell must have to count: half of them if nothing else is asked for."""
        return -(-self.grid(component).pairs // 2) if min_pairs is None else min_pairs

    def _at(
        self, component: str, metric: str, direction: str | None, source: str | None
    ) -> tuple[Grid, int, int]:
        """The grid, and the numbers of a direction and a source; BadInput for unknown names."""
        grid = self.grid(component)
        one_of("metric", metric, self.metrics)
        ways, sources = grid.directions, grid.sources
        d = ways.index(one_of("direction", direction or ways[0], ways))
        s = sources.index(one_of("source", source or sources[0], sources))
        return grid, d, s

    def _tiles(
        self, grid: Grid, metric: str, d: int, s: int, cells: NDArray[np.intp] | None
    ) -> Iterator[_Tile]:
        """What was measured, a tile of pairs at a time; read as many at once as memory takes."""
        ends = [end[d, s][..., None, None, None] for end in self.ends(metric, grid)]
        tiles = [slice(pairs.start, pairs.stop) for pairs in grid.pair_tiles()]
        cell = grid.samples * grid.layers * grid.units * len(grid.positions)
        step = max(1, AT_ONCE // (cell * grid.pair_tile))
        for some in (tiles[first : first + step] for first in range(0, len(tiles), step)):
            start = some[0].start
            region = (d, s, slice(None), slice(start, some[-1].stop))
            values = self.store.read(f"{grid.component}/{metric}", region).astype(np.float64)
            status = self.store.read(f"{grid.component}/{metric}_status", region)
            if cells is not None:
                values, status = (x[:, :, 0, 0][..., cells[:, None]] for x in (values, status))
            for tile in some:
                at = (slice(None), slice(tile.start - start, tile.stop - start))
                destination, donor = (end[:, tile] for end in ends)
                yield _Tile(tile, values[at], status[at], destination, donor - destination)


def _joined(
    clean: Sequence[str | None], corrupt: Sequence[str | None], at: NDArray[np.intp]
) -> tuple[str, str] | None:
    if not len(at) or clean[at[0]] is None:
        return None
    return "".join(clean[i] or "" for i in at), "".join(corrupt[i] or "" for i in at)


def _status(seen: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """What cells are, by which statuses [status, ...] their runs have."""
    ran = seen[list(RUN)].any(0)
    others = (Status.STRUCTURAL, Status.NOT_FINITE, Status.NOT_DONE)
    found = [seen[Status.ESTIMATED], ran, *(seen[s] for s in others)]
    codes = (Status.ESTIMATED, Status.EXACT, *others)
    return np.select(found, codes, Status.OUTSIDE).astype(np.uint8)


def layer_parts(grid: Grid) -> list[slice]:
    """The layers of a grid in parts, as many at a time as memory takes: chunks hold all of them, so
    every part reads them again."""
    layer = grid.samples * grid.pairs * grid.units * len(grid.positions)
    step = max(1, AT_ONCE // layer)
    return [slice(first, first + step) for first in range(0, grid.layers, step)]
