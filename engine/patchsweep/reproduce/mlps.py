"""Effects of MLPs by layer and by window of adjacent layers, under both corruptions.

Effects are as in `heads`: positive towards the clean run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patchsweep.pairs import Pair
from patchsweep.reproduce.experiment import SIGMA, Setting
from patchsweep.reproduce.heads import METRICS, NAMES, UNITS, number
from patchsweep.results import Results, drawing
from patchsweep.statistics import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by the colour-blind (Okabe & Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


@dataclass(frozen=True)
class Peak:
    """The largest value of a curve [first layer]: `height`, the `layers` of that window, how many
    standard deviations it lies above the curve's mean, and the largest of the windows without the
    model's first layer."""

    height: float
    layers: range
    deviations: float
    past_first: float

    def __str__(self) -> str:
        first, last = self.layers[0], self.layers[-1]
        layers = first if first == last else f"{first}–{last}"
        return f"{number(self.height)} at {layers}"


@dataclass(frozen=True)
class Curve:
    """Effects [first layer] of every window of `size` layers; broken: drawn dashed."""

    label: str
    values: Array
    size: int
    broken: bool = False


def sweeps(
    setting: Setting, name: str, pairs: Sequence[Pair], noised: Sequence[str], **settings: Any
) -> dict[str, Results]:
    """MLP outputs denoised under both corruptions, from the same pairs: STR replaces tokens, GN
    adds noise to the tokens with the labels `noised`."""
    corruptions = {"STR": "pairs", "GN": setting.gaussian(noised)}
    return {
        corruption: setting.sweep(
            f"{name}-{corruption.lower()}",
            pairs,
            corrupt=corrupt,
            components=["mlp_out"],
            **{"metrics": METRICS, **settings},
        )
        for corruption, corrupt in corruptions.items()
    }


def by_window(results: Results, metric: str, size: int) -> tuple[Array, Array]:
    """Joint effect of every window of `size` layers, and the sum of its single layers, [first
    layer]; of a sweep at one position."""
    if size == 1:
        joint = total = results.effect("mlp_out", metric, "denoise").values[:, 0, 0]
    else:
        joint, total = (x[:, 0] for x in results.windows("mlp_out", size, metric, "denoise"))
    scale = 1.0
    if metric != "logit_diff":
        clean, corrupt = results.baseline(metric)
        scale = float((clean - corrupt).mean()) * (-1 if metric == "kl" else 1)
    return joint * scale, total * scale


def peak(curve: Array, size: int, among: range | None = None) -> Peak:
    """The peak of a curve [first layer] of windows of `size` layers; among: of these only."""
    start, stop = (among.start, among.stop) if among else (0, len(curve))
    first, spread = start + int(curve[start:stop].argmax()), float(curve.std())
    return Peak(
        height=float(curve[first]),
        layers=range(first, first + size),
        deviations=float(curve[first] - curve.mean()) / spread if spread else 0.0,
        past_first=float(curve[1:].max(initial=-np.inf)),
    )


def peaks(
    results: Results, metric: str, size: int, among: range | None = None
) -> tuple[Peak, Peak]:
    """The peaks of the joint effect, and of the sum of single layers."""
    joint, total = by_window(results, metric, size)
    return peak(joint, size, among), peak(total, size, among)


def middle_half(layers: int) -> tuple[float, float]:
    """The second and third quarter of a model's layers, from where to where, in layers from 0."""
    return (layers - 1) / 2 - layers / 4, (layers - 1) / 2 + layers / 4


def middle(layers: int, size: int) -> range:
    """The first layers of the windows whose middle lies in the middle half of the layers."""
    low, high = middle_half(layers)
    inside = [i for i in range(layers - size + 1) if low <= i + (size - 1) / 2 <= high]
    return range(inside[0], inside[-1] + 1)


def figure(
    title: Sequence[str],
    panels: Mapping[tuple[str, str], Sequence[Curve]],
    shaded: tuple[float, float] | None = None,
) -> Figure:
    """Curves over layers, (corruption, metric) -> its curves: a column of panels per corruption, a
    row per metric, which has one scale. shaded: from which layer to which."""
    drawing.needed()
    from matplotlib.figure import Figure

    corruptions = list(dict.fromkeys(corruption for corruption, _ in panels))
    metrics = list(dict.fromkeys(metric for _, metric in panels))
    size = (4.2 * len(corruptions) + 0.6, 2.4 * len(metrics) + 1.0)
    drawn = Figure(figsize=size, layout="constrained")
    grid = drawn.subplots(len(metrics), len(corruptions), squeeze=False, sharex=True, sharey="row")
    for (corruption, metric), curves in panels.items():
        axes = grid[metrics.index(metric)][corruptions.index(corruption)]
        if shaded:
            axes.axvspan(*shaded, color="0.92", linewidth=0)
        _draw(axes, curves)
    windows = any(curve.size > 1 for curves in panels.values() for curve in curves)
    middle = " (middle of the window)" if windows else ""
    for column, corruption in enumerate(corruptions):
        noise = f" ({SIGMA:g} SD)" if corruption == "GN" else ""
        grid[0][column].set_title(corruption + noise, fontsize=9)
        grid[-1][column].set_xlabel(f"layer{middle}", fontsize=8)
    for row, metric in enumerate(metrics):
        grid[row][0].set_ylabel(f"{NAMES[metric]}\n({UNITS[metric]})", fontsize=8)
    grid[0][-1].legend(fontsize=7)
    drawn.suptitle("\n".join(title), fontsize=9)
    return drawn


def _draw(axes: Axes, curves: Sequence[Curve]) -> None:
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.tick_params(labelsize=8)
    colour = -1
    for curve in curves:
        colour += not curve.broken  # a broken curve has the colour of the one that it follows
        axes.plot(
            np.arange(len(curve.values)) + (curve.size - 1) / 2,
            curve.values,
            color=COLOURS[colour % len(COLOURS)],
            linestyle="--" if curve.broken else "-",
            marker="" if curve.broken else "o",
            markersize=2.5,
            linewidth=1.2,
            label=curve.label,
        )
