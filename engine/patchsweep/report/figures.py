"""Still figures: heatmaps of the effect, one per component, metric, direction and view."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from patchsweep import heatmaps
from patchsweep.errors import BadInput
from patchsweep.results import Results
from patchsweep.sites import SETS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150


def plot(results: Results, out: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Draw every component × metric × direction into the folder `out`; returns the files.

    Layer × position, and for components with heads also layer × head; sliding windows of layers
    with the sum of their single layers; a circuit's curve. A dimension left out is reduced to its
    effect of largest absolute value, sign kept. BadInput if `out` cannot be written or matplotlib
    is missing.
    """
    heatmaps.needed()
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
            effect = results.shown_effect(component, metric, direction)
            pictures = heatmaps.views(results, component, effect)
            for size in results.window_sizes(component):
                joint, total = results.windows(component, size, metric, direction)
                note = f"windows of {size} layers"
                for view, values, how in (
                    ("joint", joint, "patched together"),
                    ("sum", total, "sum of single layers"),
                ):
                    name = f"window_{size}_{view}"
                    more = heatmaps.window(results, component, name, values, f"{note}, {how}")
                    pictures.append(more)
            for picture in pictures:
                name = f"{component}-{metric}-{direction}-{picture.view}"
                yield name, heatmaps.draw(results, component, metric, direction, picture)
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
    pairs = heatmaps.counted(results.grid(SETS).pairs)
    lines = (heatmaps.heading(results), f"n = {pairs}, CPR {found.cpr:.3f}, CMD {found.cmd:.3f}")
    axes.set_title("\n".join(lines), fontsize=9, parse_math=False)
    axes.legend(fontsize=8)
    return figure
