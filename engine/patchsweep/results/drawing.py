"""A heatmap as a figure of matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import BadInput
from patchsweep.results.heatmaps import Heatmap, counted, heading, scale
from patchsweep.sites import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from patchsweep.results.effects import Effects

COLOURS = "RdBu_r"  # diverging, and told apart by the colour-blind
FEW, NOT_RUN = "0.87", "0.6"  # greys
HATCH = "////"
DARK = 0.6  # share of the colours' range beyond which dots are light
# Cells without a value, by status: what the legend says.
WITHOUT = {
    Status.ESTIMATED: "not run (estimated only)",
    Status.NOT_DONE: "not done yet",
    Status.NOT_FINITE: "not finite",
}


def needed() -> None:
    """BadInput without matplotlib."""
    if find_spec("matplotlib") is None:
        raise BadInput("figures need matplotlib: pip install 'patchsweep[report]'")


def folded(heatmap: Heatmap) -> Heatmap:
    """The same with the lowest rows, where nothing was run, as one."""
    idle = heatmap.status == Status.STRUCTURAL
    idle |= heatmap.status == Status.OUTSIDE
    low = int(np.argmin(idle.all(1))) if not idle.all() else 0
    if low < 2:
        return heatmap
    return heatmap.part(slice(low - 1, None), f"{heatmap.rows[0]}–{heatmap.rows[low - 1]}")


def draw(
    results: Effects,
    component: str,
    metric: str,
    direction: str,
    heatmap: Heatmap,
    source: int = 0,
    *,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    title: str | None = None,
    vmax: float | None = None,
    sure: NDArray[np.bool_] | None = None,
) -> Figure:
    """A heatmap as a figure of matplotlib; BadInput without it.

    `ax`: drawn there instead of in a new figure. `vmax`: the effect at the ends of the colours.
    `sure` [layer, column]: cells to be marked, whose interval excludes 0.
    """
    needed()
    from matplotlib.figure import Figure

    layers, columns = heatmap.values.shape
    width = float(np.clip(0.3 * columns + 2.4, 5.5, 22))
    room = (width - 1.8) / columns / 0.08  # characters that fit beside one another
    longest = max(map(len, heatmap.columns))
    below = 0.08 * longest if longest > max(2, room) else 0.2  # inches, of names that stand upright
    height = float(np.clip(0.17 * layers + 2.4 + below, 3.8, 16))
    axes = ax or _new_axes(figsize or (width, height))
    known = np.abs(heatmap.values[np.isfinite(heatmap.values)])
    limit = vmax or float(known.max(initial=0.0)) or 1.0
    image = axes.imshow(
        np.ma.masked_invalid(heatmap.values),
        cmap=COLOURS,
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
    )
    keys = _without_value(axes, heatmap)
    if sure is not None and (sure := sure & np.isfinite(heatmap.values)).any():
        keys.append(_marks(axes, sure, np.abs(heatmap.values) > DARK * limit))
    estimated = component in results.only_estimated and not heatmap.view.startswith("window")
    what = f"{'estimated effect' if estimated else 'effect'} on {metric}"
    label = f"{what}\n({scale(results.normalised(source), metric)})"
    bar = axes.figure.colorbar(image, ax=axes, label=label, fraction=0.08, aspect=30)
    bar.ax.tick_params(labelsize=8)
    axes.set_ylabel(heatmap.axes[0])
    axes.set_yticks(*_ticks(heatmap.rows, height / 0.17), fontsize=8)
    axes.set_xticks(
        *_ticks(heatmap.columns, (width - 1.8) / 0.16),
        fontsize=8,
        rotation=90 if below > 0.2 else 0,
        parse_math=False,
    )
    axes.set_xlabel(heatmap.axes[1])
    if keys:
        place = "outside lower center" if ax is None else "upper left"
        of: Any = axes.figure if ax is None else axes
        of.legend(handles=keys, fontsize=7, ncols=2, frameon=ax is not None, loc=place)
    lines = [title] if title is not None else _title(results, component, direction, heatmap, source)
    wrapped = (part for line in lines for part in wrap(line, int(width * 11)))
    axes.set_title("\n".join(wrapped), fontsize=9, parse_math=False)
    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure


def _new_axes(size: tuple[float, float]) -> Axes:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").add_subplot()


def _without_value(axes: Axes, heatmap: Heatmap) -> list[Any]:
    """Draw what is structural hatched, and in greys what has no value; their keys."""
    from matplotlib.patches import Patch

    keys = []
    structural = heatmap.status == Status.STRUCTURAL
    missing = ~np.isfinite(heatmap.values)
    structural &= ~missing
    if structural.any():
        _cover(axes, structural, facecolor="none", edgecolor="0.72", hatch=HATCH)
        look: dict[str, Any] = {"facecolor": "white", "edgecolor": "0.72", "hatch": HATCH}
        keys.append(Patch(label="cannot differ, not run (structural)", **look))
    known = {s: missing & (heatmap.status == s) for s in WITHOUT}
    not_run = np.any(list(known.values()), axis=0)
    axes.set_facecolor(FEW)
    if (missing & ~not_run).any():
        few = (missing & ~not_run & (heatmap.pairs > 0)).any()
        keys.append(Patch(facecolor=FEW, label="in too few pairs" if few else "outside the prompt"))
    if not_run.any():
        _cover(axes, not_run, facecolor=NOT_RUN)
        said = ", ".join(WITHOUT[s] for s, where in known.items() if where.any())
        keys.append(Patch(facecolor=NOT_RUN, label=said))
    return keys


def _cover(axes: Axes, where: NDArray[np.bool_], **look: Any) -> None:
    """Rectangles over some cells, one for each run of neighbours in a row."""
    from matplotlib.patches import Rectangle

    edges = np.diff(np.pad(where.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, first = np.nonzero(edges == 1)
    last = np.nonzero(edges == -1)[1]
    for row, a, b in zip(rows.tolist(), first.tolist(), last.tolist(), strict=True):
        axes.add_patch(Rectangle((a - 0.5, row - 0.5), b - a, 1, linewidth=0, **look))


def _marks(axes: Axes, sure: NDArray[np.bool_], dark: NDArray[np.bool_]) -> Any:
    """A dot in every cell whose interval excludes 0, a light one where the cell is dark."""
    from matplotlib.lines import Line2D

    for where, colour in ((sure & ~dark, "0.15"), (sure & dark, "1")):
        rows, columns = np.nonzero(where)
        axes.scatter(columns, rows, s=2.5, c=colour, linewidths=0)
    label = "95 % interval over pairs excludes 0"
    return Line2D([], [], color="0.15", marker=".", markersize=3, linestyle="", label=label)


def _title(
    results: Effects, component: str, direction: str, heatmap: Heatmap, source: int
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


def _ticks(names: Sequence[str], most: float) -> tuple[Any, list[str]]:
    """Places and names of the ticks: every one, or every k-th so that they stay legible."""
    step = max(1, int(np.ceil(len(names) / most)))
    return range(0, len(names), step), list(names[::step])
