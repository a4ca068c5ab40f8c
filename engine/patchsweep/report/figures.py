"""Still figures: heatmaps of the effect, one per component, metric, direction and view."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import BadInput
from patchsweep.results import Results
from patchsweep.sites import SETS, unit_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST_TOKEN = 20
LONGEST_MODEL = 50
DPI = 150


@dataclass(frozen=True)
class _Heatmap:
    """One picture: values [layer, column] with the names of its columns."""

    view: str
    values: NDArray[np.float64]
    columns: tuple[str, ...]
    axis: str
    note: str


def plot(results: Results, out: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Draw every component × metric × direction into the folder `out`; returns the files.

    Layer × position, and for components with heads also layer × head; sliding windows of layers
    with the sum of their single layers; a circuit's curve. A dimension left out is reduced to its
    effect of largest absolute value, sign kept. BadInput if `out` cannot be written or matplotlib
    is missing.
    """
    if find_spec("matplotlib") is None:
        raise BadInput("figures need matplotlib: pip install 'patchsweep[report]'")
    files = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in _figures(results):
            for suffix in formats:
                files.append(out / f"{name}.{suffix}")
                figure.savefig(files[-1], dpi=DPI)
    except OSError as exc:
        reason = (exc.strerror or str(exc)).lower()
        raise BadInput(f"cannot write figures to {out}: {reason}; choose another --out") from exc
    return files


def _figures(results: Results) -> Iterator[tuple[str, Figure]]:
    """Every figure and its name."""
    singles = [c for c in results.components if c != SETS]
    for component, metric in itertools.product(singles, results.metrics):
        for direction in results.grid(component).directions:
            only = component in results.only_estimated
            over_pairs = results.estimated_effect if only else results.effect
            effect = over_pairs(component, metric, direction)
            for heatmap in _views(results, component, effect):
                name = f"{component}-{metric}-{direction}-{heatmap.view}"
                yield name, _draw(results, component, metric, direction, heatmap)
            for size in results.window_sizes(component):
                joint, total = results.windows(component, size, metric, direction)
                names = _position_names(results, component)
                for view, values, note in (
                    ("joint", joint, f"windows of {size} layers, patched together"),
                    ("sum", total, f"windows of {size} layers, sum of single layers"),
                ):
                    heatmap = _Heatmap(f"window_{size}_{view}", values, names, "position", note)
                    name = f"{component}-{metric}-{direction}-{heatmap.view}"
                    yield name, _draw(results, component, metric, direction, heatmap)
    if results.has_circuit:
        for metric in results.metrics:
            yield f"circuit-{metric}", _curve(results, metric)


def _curve(results: Results, metric: str) -> Figure:
    """Performance against circuit size."""
    from matplotlib.figure import Figure

    found = results.circuit(metric)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for values, label in (
        (found.faithfulness, "everything outside noised (faithfulness)"),
        (found.recovered, "the circuit alone denoised"),
    ):
        if np.isfinite(values).any():
            axes.plot(found.sizes, values, marker="o", label=label)
    for level in (0, 1):
        axes.axhline(level, color="0.7", linewidth=0.8)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(found.sizes, [str(size) for size in found.sizes])
    axes.set_xlabel("sites in the circuit")
    axes.set_ylabel(f"{metric} recovered\n(0 = corrupt run, 1 = clean run)")
    model = str(results.attrs.get("model", ""))[-LONGEST_MODEL:]
    axes.set_title(f"{model}\nCPR {found.cpr:.3f}, CMD {found.cmd:.3f}", fontsize=9)
    axes.legend(fontsize=8)
    return figure


def _views(results: Results, component: str, effect: NDArray[np.float64]) -> list[_Heatmap]:
    """The pictures of an effect [layer, unit, position]."""
    grid = results.grid(component)
    unit = unit_name(component)
    views = []
    if unit:
        note = "" if grid.positions == ("all",) else "max-|effect| over positions"
        names = tuple(str(i) for i in range(grid.units))
        views.append(_Heatmap(f"layer_{unit}", _largest(effect, 2), names, unit, note))
    if not unit or grid.positions != ("all",):
        notes = [f"max-|effect| over {unit}s"] if unit else []
        lengths = results.store.read("prompts/length")
        if isinstance(grid.positions[0], int) and len(set(lengths.tolist())) > 1:
            notes.append("prompts aligned at their first token")
        views.append(
            _Heatmap(
                "layer_position",
                _largest(effect, 1),
                _position_names(results, component),
                "position",
                "; ".join(notes),
            )
        )
    return views


def _largest(effect: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """The value of largest absolute size along an axis; NaN where none has any size, and not all
    are known."""
    size = np.where(np.isfinite(effect), np.abs(effect), np.finfo(effect.dtype).tiny)
    best = np.expand_dims(size.argmax(axis), axis)
    return np.take_along_axis(effect, best, axis).squeeze(axis)


def _position_names(results: Results, component: str) -> tuple[str, ...]:
    """Index or label of each position, with its token where all pairs have the same one."""
    positions = results.grid(component).positions
    names = []
    for position, token in zip(positions, results.position_tokens(component), strict=True):
        names.append(f"{_drawable(token)}  {position}" if token else str(position))
    return tuple(names)


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


def _draw(
    results: Results, component: str, metric: str, direction: str, heatmap: _Heatmap
) -> Figure:
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
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
    )
    scale = "0 = destination, 1 = source" if results.normalised(0) else "patched − destination"
    window = heatmap.view.startswith("window")
    estimated = component in results.only_estimated and not window
    label = f"{'estimated effect' if estimated else 'effect'} on {metric}\n({scale})"
    figure.colorbar(image, ax=axes, label=label)
    axes.set_ylabel("first layer of the window" if window else "layer")
    axes.set_yticks(*_ticks([str(layer) for layer in range(layers)], height / 0.17), fontsize=8)
    axes.set_xlabel(heatmap.axis)
    rotated = max(map(len, heatmap.columns)) > 2
    axes.set_xticks(
        *_ticks(heatmap.columns, (width - 1.8) / 0.16),
        fontsize=8,
        rotation=90 if rotated else 0,
        parse_math=False,
    )
    pairs = results.grid(component).pairs
    counted = "1 pair" if pairs == 1 else f"{pairs} pairs"
    model = str(results.attrs.get("model", ""))[-LONGEST_MODEL:]
    lines = [model, f"{component}, {direction}, {counted}", heatmap.note]
    how = results.store.estimators.get(component)
    if how and not window:  # windows are run, all of them
        lines.append(f"{'estimated' if estimated else 'chosen'} by attribution patching ({how})")
    if known.size < heatmap.values.size:
        lines.append("grey: no value")
    axes.set_title("\n".join(line for line in lines if line), fontsize=9, parse_math=False)
    return figure


def _ticks(names: Sequence[str], most: float) -> tuple[Any, list[str]]:
    """Places and names of the ticks: every one, or every k-th so that they stay legible."""
    step = max(1, int(np.ceil(len(names) / most)))
    return range(0, len(names), step), list(names[::step])
