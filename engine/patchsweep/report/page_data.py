"""The numbers of the page: what is embedded in it as JSON, five significant digits each.

Where pairs are of unequal length, once by what positions mean and once by index. Of large results
only a part: the units and positions of largest effects, and the first pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchsweep.results import Columns, Results, drawing, heatmaps, layer_parts
from patchsweep.sites import COMPONENTS, SETS, Grid, Status, unit_name
from patchsweep.statistics import Array, beyond_sd, bootstrap, known_mean

# How many numbers a page holds; one takes some 8 bytes, so that it stays under 5 MB.
OVER_PAIRS = 200_000
OF_PAIRS = 280_000
NUMBERS = 5  # that a cell has over all pairs, for each metric, direction and source
DIGITS = 5


# How the page calls an alignment.
WORDS = {
    "labels": "by label",
    "end": "from the end",
    "start": "by index, from the start",
    "given": "as asked for",
}


@dataclass(frozen=True, eq=False)
class Part:
    """What the page shows of a component: its columns, and the indices of units and columns in
    order."""

    of_positions: Columns
    units: NDArray[np.intp]
    positions: NDArray[np.intp]

    @property
    def columns(self) -> int:
        """How many cells of a layer are shown."""
        return len(self.units) * len(self.positions)

    def of(self, values: NDArray[Any]) -> NDArray[Any]:
        """The part of an array [..., unit, position]."""
        return values[..., self.units, :][..., self.positions]


def page_data(results: Results) -> dict[str, Any]:
    """Everything that the page's script shows. Cells are flat, [layer, unit, position]."""
    components = [c for c in results.components if c != SETS]
    grid = results.grid(components[0])
    values = len(results.metrics) * len(_ways(grid))  # that a cell has of every kind
    by_meaning = {c: results.columns(c) for c in components}
    by_index = {c: results.columns(c, "start") for c in components}
    shown = [by_meaning]
    if any(by_meaning[c].members is not None for c in components):
        shown.append(by_index)
    room = OVER_PAIRS // (NUMBERS * values * len(shown))
    parts = [_parts(results, columns, room) for columns in shown]
    cells = sum(results.grid(c).layers * p.columns for some in parts for c, p in some.items())
    pairs = min(grid.pairs, OF_PAIRS // (cells * values))
    return {
        "heading": heatmaps.heading(results),
        "colours": _colours(),
        "metrics": results.metrics,
        "pairs": grid.pairs,
        "pairs_here": pairs,
        "alignments": [
            {
                "name": WORDS[_align(columns)],
                "components": [_component(results, c, part, pairs) for c, part in some.items()],
            }
            for columns, some in zip(shown, parts, strict=True)
        ],
    }


def _align(columns: Mapping[str, Columns]) -> str:
    """How positions are aligned, of the component of which that says most."""
    return min((c.align for c in columns.values()), key=list(WORDS).index)


def _colours() -> list[str]:
    """The diverging map from lowest to highest, an odd number of colours: 0 has its own."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps[drawing.COLOURS](x)) for x in np.linspace(0, 1, 65)]


def _ways(grid: Grid) -> list[tuple[str, str]]:
    return [(direction, source) for direction in grid.directions for source in grid.sources]


def _parts(results: Results, columns: Mapping[str, Columns], room: int) -> dict[str, Part]:
    """What is shown of every component, `room` cells in all: what the small ones leave of their
    share is for the large ones."""
    left, parts = room, {}
    sizes = {c: int(np.prod(results.grid(c).shape[-3:])) for c in columns}
    for number, c in enumerate(sorted(columns, key=sizes.__getitem__)):
        share = left // (len(columns) - number)
        parts[c] = _part(results, c, columns[c], max(1, share // results.grid(c).layers))
        left -= results.grid(c).layers * parts[c].columns
    return {c: parts[c] for c in columns}


def _part(results: Results, component: str, columns: Columns, room: int) -> Part:
    """The units, then positions, of largest effect that make so many cells; all if they fit."""
    grid, width = results.grid(component), len(columns.names)
    if grid.units * width <= room:
        return Part(columns, np.arange(grid.units), np.arange(width))
    size = np.zeros((grid.units, width))
    for metric in results.metrics:
        for way in _ways(grid):
            effect = np.abs(results.shown(component, metric, *way, align=columns.align).effect)
            effect[~np.isfinite(effect)] = 0
            size = np.maximum(size, effect.max(0) / (effect.max() or 1))
    units = _best(size.max(1), max(1, room // width))
    return Part(columns, units, _best(size[units].max(0), max(1, room // len(units))))


def _best(size: Array, most: int) -> NDArray[np.intp]:
    """The indices of the largest, in order."""
    return np.sort(np.argsort(-size, kind="stable")[:most])


def _component(results: Results, component: str, part: Part, pairs: int) -> dict[str, Any]:
    grid, columns = results.grid(component), part.of_positions
    texts = [_at(row, part) for row in results.tokens_of(component, columns, range(pairs))]
    tokens = {
        run: [[two[i] if two else "" for two in row] for row in texts]
        for i, run in enumerate(("clean", "corrupt"))
    }
    return {
        "name": component,
        "unit": unit_name(component),
        "layers": [layer + grid.first_layer for layer in range(grid.layers)],
        "units": part.units.tolist(),
        "positions": [str(p) for p in _at(columns.names, part)],
        "labels": _at(results.labels_at(columns), part),
        "counts": _at(results.pairs_of(columns, grid).tolist(), part),
        "all": {"units": grid.units, "positions": len(columns.names)},
        "tokens": {"all": _at(results.column_tokens(component, columns), part), **tokens},
        "estimator": results.store.estimators.get(component, ""),
        "shown": "estimate" if component in results.only_estimated else "effect",
        "ways": [_way(results, component, way, part, pairs) for way in _ways(grid)],
    }


def _at(values: Sequence[Any], part: Part) -> list[Any]:
    return [values[i] for i in part.positions]


def _way(
    results: Results, component: str, way: tuple[str, str], part: Part, pairs: int
) -> dict[str, Any]:
    """One direction and source."""
    grid = results.grid(component)
    direction, source = way
    number = grid.sources.index(source)
    normalised = results.normalised(number)
    metrics = {m: _metric(results, component, m, way, part, pairs) for m in results.metrics}
    return {
        "name": direction if len(grid.sources) == 1 else f"{direction}, from {source}",
        "direction": direction,
        "source": source,
        "normalised": normalised,
        "scale": {m: heatmaps.scale(normalised, m) for m in results.metrics},
        "audit": {
            m: found.audit.statement
            for m in results.metrics
            if (found := results.audit(component, m, direction, source))
        },
        "metrics": metrics,
    }


def _metric(
    results: Results, component: str, metric: str, way: tuple[str, str], part: Part, pairs: int
) -> dict[str, Any]:
    """Of every cell: over all pairs its effect with a bootstrap interval, the mean of the patched
    metric, an estimate where there is one; of each pair patched − destination; what was run."""
    grid = results.grid(component)
    d, s = grid.directions.index(way[0]), grid.sources.index(way[1])
    layers, columns = layer_parts(grid), part.of_positions
    align = columns.align
    changes = (results.changes(component, metric, *way, layer, align) for layer in layers)
    moved = np.concatenate([part.of(of_layers) for of_layers, _ in changes], axis=1)
    span = results.changes(component, metric, *way, layers[0])[1]
    low, high = bootstrap(moved, span, results.groups)
    destination = known_mean(results.ends(metric, grid)[0][d, s])
    out = {
        "effect": part.of(results.effect(component, metric, *way, align=align).values),
        "low": low,
        "high": high,
        "patched": known_mean(moved + destination[:, None, None, None]),
    }
    if component in results.store.estimators:
        estimate = results.estimated_effect(component, metric, *way, align=align)
        out["estimate"] = part.of(estimate.values)
    array = f"{component}/{metric}_status"
    regions = ((d, s, slice(results.samples(s)), slice(None), layer) for layer in layers)
    counts = np.concatenate(
        [_counted(results.store.read(array, region), part) for region in regions], axis=2
    )
    found: dict[str, Any] = {name: rounded(values) for name, values in out.items()}
    found["destination"] = rounded(destination[:pairs], 2 * DIGITS)  # changes are added to it
    found["changes"] = [rounded(pair) for pair in moved[:pairs]]
    found["span"] = None if span is None else rounded(span[:pairs])
    found |= _statuses(counts, pairs)
    found["detections"] = _detections(results, component, metric, way, part)
    found["windows"] = _windows(results, component, metric, way, part)
    return found


def _counted(status: NDArray[np.uint8], part: Part) -> NDArray[np.int64]:
    """How many samples and positions of a pair have which status, [status, pair, layer, ...]."""
    counts = [part.of(part.of_positions.count(status == s)).sum(0) for s in Status]
    return np.stack(counts).astype(np.int64)


def _statuses(counts: NDArray[np.int64], pairs: int) -> dict[str, Any]:
    """What was run of each cell, of counts [status, pair, ...], over all pairs and in each: one
    letter a cell, which stands for one of `phrases`, such as "7 exact, 1 structural"."""
    phrases: dict[str, str] = {}
    rows = [counts.sum(1), *(counts[:, pair] for pair in range(pairs))]
    letters = []
    for row in rows:
        kinds, which = np.unique(row.reshape(len(row), -1).T, axis=0, return_inverse=True)
        known = [phrases.setdefault(_phrase(kind), chr(ord("A") + len(phrases))) for kind in kinds]
        letters.append("".join(np.array(known)[which.ravel()].tolist()))
    names = {letter: phrase for phrase, letter in phrases.items()}
    return {"phrases": names, "status": letters[0], "statuses": letters[1:]}


def _phrase(counts: NDArray[np.int64]) -> str:
    """How many runs have which status, in words; of one run or all alike the status alone."""
    words = [status.name.lower().replace("_", " ") for status in Status]
    there = [(int(n), word) for n, word in zip(counts, words, strict=True) if n]
    if len(there) == 1:
        return there[0][1]
    return ", ".join(f"{n} {word}" for n, word in there)


def _detections(
    results: Results, component: str, metric: str, way: tuple[str, str], part: Part
) -> list[int]:
    """The numbers of the cells here that the 2-SD rule finds, largest first."""
    if component in results.only_estimated:
        return []
    found = results.over_pairs(component, metric, *way, part.of_positions).effect
    far = beyond_sd(found)
    size = np.where(part.of(far), np.abs(part.of(found)), -1).ravel()
    order = np.argsort(-size, kind="stable")
    return [int(cell) for cell in order if size[cell] >= 0]


def _windows(
    results: Results, component: str, metric: str, way: tuple[str, str], part: Part
) -> dict[int, Any]:
    """By size the effects of sliding windows and the sums of their layers, [layer, position]."""
    found: dict[int, Any] = {}
    if component not in COMPONENTS or COMPONENTS[component].enters == "stream":
        return found  # adjacent layers hold the same thing
    for size in results.window_sizes(component):
        both = results.windows(component, size, metric, *way, align=part.of_positions.align)
        found[size] = [[rounded(row[part.positions]) for row in values] for values in both]
    return found


def rounded(values: NDArray[Any], digits: int = DIGITS) -> list[float | int | None]:
    """All numbers of an array, flat, with so many significant digits; None where not finite."""
    return [_short(x, digits) for x in np.asarray(values, np.float64).ravel().tolist()]


def _short(x: float, digits: int) -> float | int | None:
    if not math.isfinite(x):
        return None
    short = float(f"{x:.{digits}g}")
    return int(short) if short.is_integer() else short
