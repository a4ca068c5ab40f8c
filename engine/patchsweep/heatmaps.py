"""Heatmaps of the effect, [layer, unit] and [layer, position]: what they show, how one is drawn.

A dimension left out is reduced to its effect of largest absolute value, sign kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from patchsweep.effect import Array
from patchsweep.errors import BadInput
from patchsweep.reader import Reader
from patchsweep.sites import unit_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST_TOKEN = 20
LONGEST_NAME = 50
COLOURS = "RdBu_r"  # diverging, and told apart by the colour-blind
# What metrics count in, by the first word of their name where that says it.
UNITS = {"logit": "logits", "logprob": "nats", "kl": "nats", "prob": "probability", "rank": "ranks"}
UNITS |= {"attention": "probability", "sequence": "nats"}


@dataclass(frozen=True)
class Heatmap:
    """One picture: values [layer, column] with the names of its rows and columns."""

    view: str
    values: Array
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    axes: tuple[str, str]
    note: str


def views(results: Reader, component: str, effect: Array) -> list[Heatmap]:
    """The pictures of an effect [layer, unit, position]: layer × unit where a layer has several,
    and layer × position but for all positions of several units at once."""
    grid = results.grid(component)
    unit = unit_name(component)
    layers = tuple(str(layer + grid.first_layer) for layer in range(grid.layers))
    out = []
    if unit:
        note = "max-|effect| over positions"
        if len(grid.positions) == 1:
            note = f"position: {grid.positions[0]}"
        units, axes = tuple(map(str, range(grid.units))), ("layer", unit)
        out.append(Heatmap(f"layer_{unit}", largest(effect, 2), layers, units, axes, note))
    if not unit or grid.positions != ("all",):
        notes = [f"max-|effect| over {unit}s"] if unit else []
        lengths = results.store.read("prompts/length")
        if isinstance(grid.positions[0], int) and len(set(lengths.tolist())) > 1:
            notes.append("prompts aligned at their first token")
        names, axes = position_names(results, component), ("layer", "position")
        values = largest(effect, 1)
        out.append(Heatmap("layer_position", values, layers, names, axes, "; ".join(notes)))
    return out


def window(results: Reader, component: str, view: str, values: Array, note: str) -> Heatmap:
    """The picture of sliding windows of layers, values [first layer, position]."""
    rows = tuple(str(first) for first in range(len(values)))
    axes = ("first layer of the window", "position")
    return Heatmap(view, values, rows, position_names(results, component), axes, note)


def largest(effect: Array, axis: int) -> Array:
    """The value of largest absolute size along an axis; NaN where none has any size, and not all
    are known."""
    size = np.where(np.isfinite(effect), np.abs(effect), np.finfo(effect.dtype).tiny)
    best = np.expand_dims(size.argmax(axis), axis)
    return np.take_along_axis(effect, best, axis).squeeze(axis)


def position_names(results: Reader, component: str) -> tuple[str, ...]:
    """Index or label of each position, with its token where all pairs have the same one."""
    positions = results.grid(component).positions
    names = []
    for position, token in zip(positions, results.position_tokens(component), strict=True):
        names.append(f"{_drawable(token)}  {position}" if token else str(position))
    return tuple(names)


def needed() -> None:
    """BadInput without matplotlib."""
    if find_spec("matplotlib") is None:
        raise BadInput("figures need matplotlib: pip install 'patchsweep[report]'")


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


def draw(
    results: Reader, component: str, metric: str, direction: str, heatmap: Heatmap, source: int = 0
) -> Figure:
    """A heatmap as a figure of matplotlib; BadInput without it."""
    needed()
    from matplotlib.figure import Figure

    layers, columns = heatmap.values.shape
    width = float(np.clip(0.3 * columns + 2.4, 5.5, 22))
    height = float(np.clip(0.17 * layers + 2.2, 3.6, 14))
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.8")
    known = np.abs(heatmap.values[np.isfinite(heatmap.values)])
    limit = float(known.max(initial=0.0)) or 1.0
    image = axes.imshow(
        np.ma.masked_invalid(heatmap.values),
        cmap=COLOURS,
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
    )
    estimated = component in results.only_estimated and not heatmap.view.startswith("window")
    what = f"{'estimated effect' if estimated else 'effect'} on {metric}"
    label = f"{what}\n({scale(results.normalised(source), metric)})"
    bar = figure.colorbar(image, ax=axes, label=label, fraction=0.08, aspect=30)
    bar.ax.tick_params(labelsize=8)
    axes.set_ylabel(heatmap.axes[0])
    axes.set_yticks(*_ticks(heatmap.rows, height / 0.17), fontsize=8)
    axes.set_xlabel(heatmap.axes[1])
    room = (width - 1.8) / columns / 0.08  # characters that fit beside one another
    rotated = max(map(len, heatmap.columns)) > max(2, room)
    axes.set_xticks(
        *_ticks(heatmap.columns, (width - 1.8) / 0.16),
        fontsize=8,
        rotation=90 if rotated else 0,
        parse_math=False,
    )
    title = _title(results, component, direction, heatmap, source)
    if known.size < heatmap.values.size:
        title.append("grey: no value")
    axes.set_title("\n".join(line for line in title if line), fontsize=9, parse_math=False)
    return figure


def _title(
    results: Reader, component: str, direction: str, heatmap: Heatmap, source: int
) -> list[str]:
    grid = results.grid(component)
    what = [component, direction, *([grid.sources[source]] if len(grid.sources) > 1 else [])]
    swept = ", ".join([*what, f"n = {counted(grid.pairs)}"])
    lines = [heading(results), str(results.attrs.get("weights", "")), swept, heatmap.note]
    how = results.store.estimators.get(component)
    if how and not heatmap.view.startswith("window"):  # windows are run, all of them
        said = "estimated" if component in results.only_estimated else "chosen"
        lines.append(f"{said} by attribution patching ({how})")
    return lines


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


def _ticks(names: Sequence[str], most: float) -> tuple[Any, list[str]]:
    """Places and names of the ticks: every one, or every k-th so that they stay legible."""
    step = max(1, int(np.ceil(len(names) / most)))
    return range(0, len(names), step), list(names[::step])
