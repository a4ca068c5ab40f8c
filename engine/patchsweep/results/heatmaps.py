"""Heatmaps of the effect, [layer, unit] and [layer, position]: what they show, how one is drawn.

A dimension left out is reduced to its effect of largest absolute value, sign kept, and the note
says where the largest of these are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from patchsweep.results.reader import Reader
from patchsweep.sites import Status, unit_name
from patchsweep.statistics import Array

if TYPE_CHECKING:
    from patchsweep.results.columns import Columns
    from patchsweep.results.effects import Effects, OverPairs

T = TypeVar("T", bound=np.generic)
LONGEST_TOKEN = 20
LONGEST_NAME = 50
# What metrics count in, by the first word of their name where that says it.
UNITS = {"logit": "logits", "logprob": "nats", "kl": "nats", "prob": "probability", "rank": "ranks"}
UNITS |= {"attention": "probability", "sequence": "nats"}


@dataclass(frozen=True, eq=False)
class Heatmap:
    """One picture: values [layer, column] with the names of its rows and columns.

    `status` [layer, column]: what a cell is (a Status); `pairs`: how many it is over. `cells`
    [layer, column, 3]: which cell [layer, unit, position] it shows; None of windows.
    """

    view: str
    values: Array
    status: NDArray[np.uint8]
    pairs: NDArray[np.int64]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    axes: tuple[str, str]
    note: str
    cells: NDArray[np.intp] | None = None

    def part(self, layers: slice, first: str | None = None) -> Heatmap:
        """Some of the rows, the first one under another name."""
        rows = self.rows[layers]
        return replace(
            self,
            values=self.values[layers],
            status=self.status[layers],
            pairs=self.pairs[layers],
            rows=(first, *rows[1:]) if first else rows,
            cells=None if self.cells is None else self.cells[layers],
        )


def views(results: Effects, component: str, found: OverPairs, columns: Columns) -> list[Heatmap]:
    """The pictures of effects over pairs: layer × unit where a layer has several, and layer ×
    position but for all positions of several units at once."""
    grid, unit = results.grid(component), unit_name(component)
    layers = tuple(str(layer + grid.first_layer) for layer in range(grid.layers))
    name = results.cell_namer(component, columns)
    out = []
    if unit:
        note = "largest |effect| over positions: " + _best(found.effect, name)
        if len(columns.names) == 1:
            note = f"position: {columns.names[0]}"
        units = tuple(map(str, range(grid.units)))
        out.append(_reduced(found, 2, f"layer_{unit}", (layers, units), ("layer", unit), note))
    if not unit or columns.names != ("all",):
        notes = [f"largest |effect| over {unit}s: {_best(found.effect, name)}"] if unit else []
        unequal = len(set(results.store.read("prompts/length").tolist())) > 1
        if columns.align == "start" and unequal:
            notes.append("prompts aligned at their first token")
        if columns.align == "end":
            notes.append("prompts aligned at their last token")
        names = column_names(results, component, columns, found.pairs)
        view = _reduced(found, 1, "layer_position", (layers, names), ("layer", "position"), "")
        out.append(replace(view, note="; ".join(notes)))
    return out


def _reduced(
    found: OverPairs,
    axis: int,
    view: str,
    names: tuple[tuple[str, ...], tuple[str, ...]],
    axes: tuple[str, str],
    note: str,
) -> Heatmap:
    """The picture of [layer, unit, column] without that axis."""
    best = _where_largest(found.effect, axis)

    def at_best(x: NDArray[T]) -> NDArray[T]:
        return np.take_along_axis(x, best, axis).squeeze(axis)

    values = at_best(found.effect)
    layer, kept = np.indices(values.shape)
    taken = best.squeeze(axis)
    cells = np.stack((layer, kept, taken) if axis == 2 else (layer, taken, kept), axis=-1)
    status, pairs = at_best(found.status), at_best(found.pairs)
    return Heatmap(view, values, status, pairs, *names, axes, note, cells)


def _best(effect: Array, name: Any, most: int = 4) -> str:
    """The cells of largest effect, each with its effect, on one line with it."""
    size = np.where(np.isfinite(effect), np.abs(effect), 0.0)
    order = np.argsort(-size, axis=None, kind="stable")[:most]
    cells = [tuple(map(int, np.unravel_index(i, size.shape))) for i in order]
    said = [f"{name(c)}\N{NO-BREAK SPACE}{effect[c]:+.2f}" for c in cells if size[c]]
    return ", ".join(said) or "none"


def window(
    results: Effects, component: str, view: str, values: Array, columns: Columns, note: str
) -> Heatmap:
    """The picture of sliding windows of layers, values [first layer, position]."""
    rows = tuple(str(first) for first in range(len(values)))
    axes = ("first layer of the window", "position")
    pairs = np.full(values.shape, results.grid(component).pairs)
    status = np.where(np.isfinite(values), Status.EXACT, Status.OUTSIDE).astype(np.uint8)
    names = column_names(results, component, columns, pairs)
    return Heatmap(view, values, status, pairs, rows, names, axes, note)


def _where_largest(effect: Array, axis: int) -> NDArray[np.intp]:
    """Where along an axis the value of largest absolute size is, the axis kept; where none has any
    size, one that is not known if there is one."""
    size = np.where(np.isfinite(effect), np.abs(effect), np.finfo(effect.dtype).tiny)
    return np.expand_dims(size.argmax(axis), axis)


def column_names(
    results: Effects, component: str, columns: Columns, pairs: NDArray[np.int64]
) -> tuple[str, ...]:
    """Index or label of each column, with its token where all pairs have the same one, and with the
    number of pairs [layer, unit, column] where these are not all."""
    total = results.grid(component).pairs
    count = pairs.reshape(-1, pairs.shape[-1]).max(0, initial=0)
    labels = results.labels_at(columns)
    names = []
    for i, token in enumerate(results.column_tokens(component, columns)):
        said = [_drawable(token)] if token else []
        said.append(f"{labels[i]} {columns.names[i]}" if labels[i] else str(columns.names[i]))
        said += [f"n={count[i]}"] if 0 < count[i] < total else []
        names.append("  ".join(said))
    return tuple(names)


def heading(results: Reader) -> str:
    """The model, and the tasks or files of the prompts where they are known."""
    names = str(results.attrs.get("model", "")), results.origin
    return ", ".join(name[-LONGEST_NAME:] for name in names if name)


def counted(pairs: int) -> str:
    """How many pairs, in words."""
    return "1 pair" if pairs == 1 else f"{pairs:,} pairs"


def scale(normalised: bool, metric: str) -> str:
    """What an effect counts in."""
    if normalised:
        return "0 = destination, 1 = source"
    unit = UNITS.get(metric.split("_")[0])
    return f"patched − destination, {unit}" if unit else "patched − destination"


def _drawable(token: str) -> str:
    """A token as it can be drawn: spaces visible, what the font lacks escaped, not too long."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    text = token.replace(" ", "·")
    text = "".join(
        c
        if c.isprintable() and font.get_char_index(ord(c))
        else c.encode("unicode_escape").decode("ascii")
        for c in text
    )
    return text if len(text) <= LONGEST_TOKEN else f"{text[: LONGEST_TOKEN - 1]}…"
