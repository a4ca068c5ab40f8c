"""Heatmaps side by side: rows and columns of [layer, column] pictures in one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from patchsweep.results import drawing
from patchsweep.statistics import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


@dataclass(frozen=True)
class Picture:
    """Values [layer, column], what they count in, and which of them are framed, if any."""

    title: str
    values: Array
    unit: str
    columns: tuple[str, ...]
    framed: NDArray[np.bool_] | None = None


def figure(title: Sequence[str], rows: Sequence[Sequence[Picture]]) -> Figure:
    """Pictures [row][column], each with its own scale, centred at 0; grey: no value."""
    drawing.needed()
    from matplotlib.figure import Figure

    layers, columns = rows[0][0].values.shape
    width = float(np.clip(0.16 * columns + 1.0, 2.2, 5)) * len(rows[0]) + 0.6
    named = 0.06 * max(len(name) for picture in rows[0] for name in picture.columns)
    height = (float(np.clip(0.1 * layers, 1.6, 6)) + named + 0.9) * len(rows) + 0.6
    drawn = Figure(figsize=(width, height), layout="constrained")
    grid = drawn.subplots(len(rows), len(rows[0]), sharey=True, squeeze=False)
    for row, axes_row in zip(rows, grid, strict=True):
        for picture, axes in zip(row, axes_row, strict=True):
            _draw(axes, picture)
        axes_row[0].set_ylabel("layer", fontsize=8)
    drawn.suptitle("\n".join(title), fontsize=9)
    return drawn


def draw(axes: Axes, values: Array, limit: float, framed: NDArray[np.bool_] | None) -> AxesImage:
    """An effect [layer, column] on a scale from -limit to limit; cells of `framed` get a frame."""
    from matplotlib.patches import Rectangle

    image = axes.imshow(
        np.ma.masked_invalid(values),
        cmap=drawing.COLOURS,
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
    )
    for layer, column in () if framed is None else np.argwhere(framed):
        frame = Rectangle((column - 0.5, layer - 0.5), 1, 1, fill=False, linewidth=0.7)
        axes.add_patch(frame)
    return image


def _draw(axes: Axes, picture: Picture) -> None:
    known = np.abs(picture.values[np.isfinite(picture.values)])
    limit = float(known.max(initial=0.0)) or 1.0
    axes.set_facecolor("0.8")
    image = draw(axes, picture.values, limit, picture.framed)
    axes.set_title(picture.title, fontsize=8)
    step = max(1, len(picture.columns) // 12)
    turned = 90 if max(map(len, picture.columns)) > 2 else 0
    axes.set_xticks(range(0, len(picture.columns), step), picture.columns[::step], rotation=turned)
    axes.tick_params(labelsize=7)
    parent = axes.get_figure()
    assert parent is not None
    bar = parent.colorbar(image, ax=axes, location="bottom", ticks=[-limit, 0, limit])
    bar.ax.set_xticklabels([f"{-limit:.2g}", "0", f"{limit:.2g}"])
    bar.ax.tick_params(labelsize=7)
    bar.set_label(picture.unit, fontsize=7)
