"""Still figures: heatmaps of the effect, one per component, metric, direction and view."""

from __future__ import annotations

import itertools
import re
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
LONGEST = 40  # characters of a set's name
NAME = 200  # bytes of a file's, of the 255 that file systems take


def plot(results: Results, out: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Draw every component × metric × direction × source into the folder `out`; returns the files.

    Layer × position, and for components with heads also layer × head; sliding windows of layers
    with the sum of their single layers; named sets; a circuit's curve. A dimension left out is
    reduced to its effect of largest absolute value, sign kept. BadInput if `out` cannot be written
    or matplotlib is missing.
    """
    heatmaps.needed()
    files = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        taken = set[str]()
        for said, figure in _figures(results):
            name = file_name(said, taken)
            for suffix in formats:
                files.append(out / f"{name}.{suffix}")
                figure.savefig(files[-1], dpi=DPI)
    except OSError as exc:
        reason = (exc.strerror or str(exc)).lower()
        raise BadInput(f"cannot write figures to {out}: {reason}; choose another --out") from exc
    return files


def file_name(said: str, taken: set[str]) -> str:
    """A name for a file, of letters, digits and a few signs, that none of those `taken` has; it is
    taken then. Names of sources and metrics are a user's, and may be anything."""
    plain = re.sub(r"[^\w.=-]", "_", said).encode()[:NAME].decode(errors="ignore")
    others = (f"{plain}-{i}" for i in itertools.count(2))
    name = next(n for n in itertools.chain([plain], others) if n not in taken)
    taken.add(name)
    return name


def _figures(results: Results) -> Iterator[tuple[str, Figure]]:
    """Every figure and its name."""
    singles = [c for c in results.components if c != SETS]
    for component, metric in itertools.product(singles, results.metrics):
        grid = results.grid(component)
        for direction, (number, source) in itertools.product(
            grid.directions, enumerate(grid.sources)
        ):
            effect = results.shown_effect(component, metric, direction, source)
            pictures = heatmaps.views(results, component, effect)
            pictures += _windows(results, component, metric, direction, source)
            said = [component, metric, direction, *([source] if len(grid.sources) > 1 else [])]
            for picture in pictures:
                name = "-".join([*said, picture.view])
                yield name, heatmaps.draw(results, component, metric, direction, picture, number)
    if SETS not in results.components:
        return
    named = list(results.attrs["spec"].get("sets", {}))
    sources = results.grid(SETS).sources
    for metric, source in itertools.product(results.metrics, sources):
        which = "-".join([metric, *([source] if len(sources) > 1 else [])])
        if results.has_circuit:
            yield f"circuit-{which}", _curve(results, metric, source)
        elif named:
            yield f"sets-{which}", _bars(results, metric, source, named)


def _windows(
    results: Results, component: str, metric: str, direction: str, source: str
) -> list[heatmaps.Heatmap]:
    """Of every size of window what its layers do together, and the sum of what each does alone."""
    pictures = []
    for size in results.window_sizes(component):
        joint, total = results.windows(component, size, metric, direction, source)
        note = f"windows of {size} layers"
        for view, values, how in (
            ("joint", joint, "patched together"),
            ("sum", total, "sum of single layers"),
        ):
            name = f"window_{size}_{view}"
            more = heatmaps.window(results, component, name, values, f"{note}, {how}")
            pictures.append(more)
    return pictures


def _bars(results: Results, metric: str, source: str, names: Sequence[str]) -> Figure:
    """The effect of every named set, with its interval over pairs, one bar a direction."""
    from matplotlib.figure import Figure

    grid = results.grid(SETS)
    where = [grid.positions.index(name) for name in names]
    height = 0.25 * len(names) * (len(grid.directions) + 1)
    figure = Figure(figsize=(7, height + 1.8), layout="constrained")
    axes = figure.add_subplot()
    thick = 0.8 / len(grid.directions)
    for i, direction in enumerate(grid.directions):
        asked = SETS, metric, direction, source
        effect = results.effect(*asked)[0, 0, where]
        low, high = (end[0, 0, where] for end in results.interval(*asked))
        reach = np.clip([effect - low, high - effect], 0, None)  # NaN, not drawn, of one template
        at = np.arange(len(names)) + (i - (len(grid.directions) - 1) / 2) * thick
        axes.barh(at, effect, thick, xerr=reach, capsize=2, label=direction)
    axes.axvline(0, color="0.3", linewidth=0.8)
    labels = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in names]
    axes.set_yticks(range(len(names)), labels, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    scale = heatmaps.scale(results.normalised(grid.sources.index(source)), metric)
    axes.set_xlabel(f"effect on {metric} ({scale})")
    what = "sets" if len(grid.sources) == 1 else f"sets, {source}"
    counted = f"n = {heatmaps.counted(grid.pairs)}"
    lines = (heatmaps.heading(results), f"{what}, {counted}, 95 % intervals")
    axes.set_title("\n".join(lines), fontsize=9, parse_math=False)
    axes.legend(fontsize=8)
    return figure


def _curve(results: Results, metric: str, source: str) -> Figure:
    """Performance against circuit size."""
    from matplotlib.figure import Figure

    found = results.circuit(metric, source)
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
