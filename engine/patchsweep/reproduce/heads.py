"""Effects of heads by corruption and metric, side by side: detections, tables, figures.

Effects are as Zhang & Nanda have them, denoising, positive towards the clean run: on the logit
difference normalised (0 = corrupt run, 1 = clean run), on the probability patched − corrupt, on the
divergence from the clean run corrupt − patched, in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from patchsweep.reproduce.experiment import Table
from patchsweep.reproduce.pictures import draw
from patchsweep.reproduce.published import List, compare, ordered, signed
from patchsweep.results import Results, drawing
from patchsweep.statistics import Array, beyond_sd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = ("logit_diff", "prob", "kl")
NAMES = {
    "logit_diff": "logit difference",
    "logit_diff_sum": "logit difference of sums",
    "prob": "probability",
    "kl": "KL divergence",
}
NORMALISED = ("logit_diff", "logit_diff_sum")
UNITS = {
    "logit_diff": "0 = corrupt, 1 = clean",
    "logit_diff_sum": "0 = corrupt, 1 = clean",
    "prob": "patched − corrupt",
    "kl": "corrupt − patched, nats",
}
SCALES = "Effects: " + "; ".join(f"{NAMES[m]}: {UNITS[m]}" for m in METRICS) + "."
RULE = "A head is detected when its effect is more than 2 standard deviations from the mean effect."


@dataclass(frozen=True)
class Heads:
    """The effects [layer, head] of one corruption on one metric.

    far [layer, head]: which are beyond 2 standard deviations of the mean, where other cells count
    in these too; None: over `effect` alone.
    """

    corruption: str
    metric: str
    effect: Array
    far: NDArray[np.bool_] | None = None

    @property
    def detected(self) -> NDArray[np.bool_]:
        """Which heads are detected, [layer, head]."""
        return beyond_sd(self.effect) if self.far is None else self.far

    @property
    def positive(self) -> tuple[str, ...]:
        """The detected heads with a positive effect, as layer.head, by layer."""
        return self._detected(1)

    @property
    def negative(self) -> tuple[str, ...]:
        """The detected heads with a negative effect."""
        return self._detected(-1)

    @property
    def heads(self) -> frozenset[str]:
        """All detected heads, with their sign."""
        return signed(self.positive, self.negative)

    def of(self, head: str) -> float:
        """The effect of one head, as layer.head."""
        layer, number = map(int, head.split("."))
        return float(self.effect[layer, number])

    def _detected(self, sign: int) -> tuple[str, ...]:
        found = np.argwhere(self.detected & (np.sign(self.effect) == sign))
        return tuple(f"{layer}.{head}" for layer, head in found)


def effects(
    results: Results, corruption: str, metric: str, position: int = 0, source: str | None = None
) -> Heads:
    """The effects of all heads at one entry of the results' positions, over all pairs; detected are
    those far from the mean over all entries."""
    if metric in NORMALISED:
        effect = results.effect("head_z", metric, "denoise", source).values
    else:
        moved = results.changes("head_z", metric, "denoise", source)[0]
        effect = np.nanmean(moved, axis=0) * (-1 if metric == "kl" else 1)
    return Heads(corruption, metric, effect[..., position], beyond_sd(effect)[..., position])


def all_effects(
    by_corruption: Mapping[str, Results], position: int = 0, metrics: Sequence[str] = METRICS
) -> list[Heads]:
    """The effects by every corruption on every metric."""
    return [
        effects(results, corruption, metric, position)
        for corruption, results in by_corruption.items()
        for metric in metrics
    ]


def detections(title: str, found: Sequence[Heads]) -> Table:
    """The detected heads of every corruption and metric."""
    rows = tuple((h.corruption, NAMES[h.metric], text(h.negative), text(h.positive)) for h in found)
    return Table(title, ("corruption", "metric", "negative", "positive"), rows)


def against(published: Sequence[List], found: Sequence[Heads], title: str) -> Table:
    """Published lists against what was found for their corruption and metric."""
    rows = []
    for said in published:
        for here in found:
            if (said.corruption, said.metric) != (here.corruption, here.metric):
                continue
            c = compare(said, here.positive, here.negative)
            name = f"{said.where}{' (position: our reading)' if said.reading else ''}"
            what = (name, said.corruption, NAMES[said.metric])
            rows.append((*what, text(c.found), text(c.missing), text(c.extra)))
    columns = ("list", "corruption", "metric", "found here", "missing here", "only here")
    return Table(title, columns, tuple(rows))


def overlap(found: Sequence[Heads | List], corruption: str) -> float:
    """How far the metrics of a corruption detect the same heads: heads in both lists / heads in
    either, mean over the pairs of metrics; NaN where none detects any."""
    sets = [h.heads for h in found if h.corruption == corruption]
    shares = [len(a & b) / len(a | b) for a, b in combinations(sets, 2) if a | b]
    return float(np.mean(shares)) if shares else float("nan")


def figure(title: Sequence[str], found: Sequence[Heads]) -> Figure:
    """Layer × head, a row of pictures per corruption, a column per metric; each metric has one
    scale, centred at 0; detected heads are framed."""
    drawing.needed()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    corruptions = list(dict.fromkeys(h.corruption for h in found))
    metrics = list(dict.fromkeys(h.metric for h in found))
    layers, heads = found[0].effect.shape
    width = float(np.clip(0.2 * heads + 1.2, 2.8, 7)) * len(metrics)
    height = float(np.clip(0.11 * layers + 0.8, 2.4, 7)) * len(corruptions) + 0.8
    drawn = Figure(figsize=(width, height), layout="constrained")
    grid = drawn.subplots(len(corruptions), len(metrics), squeeze=False, sharex=True, sharey=True)
    for column, metric in enumerate(metrics):
        own = [h for h in found if h.metric == metric]
        limit = max(float(np.nanmax(np.abs(h.effect))) for h in own) or 1.0
        for here in own:
            axes = grid[corruptions.index(here.corruption)][column]
            _draw(axes, here, limit)
        grid[0][column].set_title(NAMES[metric], fontsize=9)
        bar = drawn.colorbar(
            axes.images[0],
            ax=list(grid[:, column]),
            location="bottom",
            ticks=MaxNLocator(5),
            aspect=30,
            fraction=0.05,
            pad=0.02,
        )
        bar.set_label(f"effect ({UNITS[metric]})", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    for row, corruption in enumerate(corruptions):
        grid[row][0].set_ylabel(f"{corruption}\nlayer", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("head", fontsize=8)
    drawn.suptitle("\n".join([*title, "framed: beyond 2 SD of the mean effect"]), fontsize=9)
    return drawn


def _draw(axes: object, here: Heads, limit: float) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    draw(axes, here.effect, limit, here.detected)
    layers, heads = here.effect.shape
    axes.set_xticks(range(0, heads, max(1, heads // 12)))
    axes.set_yticks(range(0, layers, max(1, layers // 10)))
    axes.tick_params(labelsize=7)


def text(heads: Sequence[str]) -> str:
    """Heads by layer, parted by spaces."""
    return " ".join(ordered(heads)) or "none"


def number(value: float) -> str:
    """An effect in three significant digits, with its sign."""
    return f"{value:+#.3g}"
