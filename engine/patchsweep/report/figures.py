"""Still figures: heatmaps of the effect, one per component, metric, direction and view."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from patchsweep.errors import BadInput
from patchsweep.results import Results, drawing, heatmaps, one_of_each
from patchsweep.sites import COMPONENTS, SETS
from patchsweep.store import MADE, check_made, check_outside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
LONGEST = 40  # characters of a set's name
FORMATS = ("png", "svg", "pdf")
NAME = 200  # bytes of a file's, of the 255 that file systems take


@dataclass(frozen=True)
class Wanted:
    """Which figures: those of these components, metrics, directions and views (None: all there
    are), with positions as `align` says."""

    components: Sequence[str] | None = None
    metrics: Sequence[str] | None = None
    directions: Sequence[str] | None = None
    views: Sequence[str] | None = None
    align: str | None = None


def plot(
    results: Results,
    out: Path,
    formats: Sequence[str] = ("png",),
    wanted: Wanted | None = None,
) -> list[Path]:
    """Draw figures into the folder `out`; returns the files. By default every component, direction
    and source by the first metric.

    Layer × position, and for components with heads also layer × head; sliding windows of layers
    with the sum of their single layers; named sets; a circuit's curve. A dimension left out is
    reduced to its effect of largest absolute value, sign kept. BadInput for what the results do not
    have, if `out` cannot be written or is inside results, if a file there is not a figure made
    here, or matplotlib is missing.
    """
    drawing.needed()
    check_outside(out / "figure.png")
    wanted = wanted or Wanted(metrics=results.metrics[:1])
    _check(results, wanted, formats)
    files = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        taken = set[str]()
        for said, figure in _figures(results, wanted):
            name = file_name(said, taken)
            for suffix in formats:
                files.append(out / f"{name}.{suffix}")
                save(figure, files[-1])
    except OSError as exc:
        reason = (exc.strerror or str(exc)).lower()
        raise BadInput(f"cannot write figures to {out}: {reason}; choose another --out") from exc
    return files


def save(figure: Figure, path: Path) -> None:
    """Write a figure that says who made it. BadInput if what is there was made by others."""
    check_made(path)
    key = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}.get(path.suffix)
    figure.savefig(path, dpi=DPI, metadata=key and {key: MADE.decode()})


def _check(results: Results, wanted: Wanted, formats: Sequence[str]) -> None:
    """BadInput for a name that the results do not have, or an unknown format."""
    one_of_each("component", wanted.components, results.components)
    one_of_each("metric", wanted.metrics, results.metrics)
    one_of_each("direction", wanted.directions, results.grid(results.components[0]).directions)
    if unknown := set(formats) - set(FORMATS):
        raise BadInput(f"no format '{min(unknown)}': use one of {', '.join(FORMATS)}")


def file_name(said: str, taken: set[str]) -> str:
    """A name for a file, of letters, digits and a few signs, that none of those `taken` has; it is
    taken then. Names of sources and metrics are a user's, and may be anything."""
    plain = re.sub(r"[^\w.=-]", "_", said).encode()[:NAME].decode(errors="ignore")
    others = (f"{plain}-{i}" for i in itertools.count(2))
    name = next(n for n in itertools.chain([plain], others) if n not in taken)
    taken.add(name)
    return name


def _figures(results: Results, wanted: Wanted) -> Iterator[tuple[str, Figure]]:
    """Every figure and its name."""
    singles = [c for c in wanted.components or results.components if c != SETS]
    metrics = wanted.metrics or results.metrics
    for component, metric in itertools.product(singles, metrics):
        grid = results.grid(component)
        ways = itertools.product(wanted.directions or grid.directions, enumerate(grid.sources))
        for direction, (number, source) in ways:
            said = [component, metric, direction, *([source] if len(grid.sources) > 1 else [])]
            asked = component, metric, direction, source
            for picture in _pictures(results, asked, wanted):
                sure = results.sure(*asked, picture.cells, wanted.align)
                figure = drawing.draw(results, *asked[:3], picture, number, sure=sure)
                yield "-".join([*said, picture.view]), figure
    if SETS not in (wanted.components or results.components) or wanted.views:
        return
    named = list(results.attrs["spec"].get("sets", {}))
    sources = results.grid(SETS).sources
    for metric, source in itertools.product(metrics, sources):
        which = "-".join([metric, *([source] if len(sources) > 1 else [])])
        if results.has_circuit:
            yield f"circuit-{which}", _curve(results, metric, source)
        elif named:
            yield f"sets-{which}", _bars(results, metric, source, named)


def _pictures(
    results: Results, asked: tuple[str, str, str, str], wanted: Wanted
) -> list[heatmaps.Heatmap]:
    """The pictures of a component, metric, direction and source, lowest idle layers folded."""
    component, align = asked[0], wanted.align
    columns = results.columns(component, align)
    pictures = heatmaps.views(results, component, results.shown(*asked, align=align), columns)
    # Adjacent layers of the residual stream hold the same thing: windows say nothing more.
    if component in COMPONENTS and COMPONENTS[component].enters != "stream":
        pictures += _windows(results, *asked, align)
    chosen = [p for p in pictures if not wanted.views or p.view in wanted.views]
    return [drawing.folded(picture) for picture in chosen]


def _windows(
    results: Results, component: str, metric: str, direction: str, source: str, align: str | None
) -> list[heatmaps.Heatmap]:
    """Of every size of window what its layers do together, and the sum of what each does alone."""
    pictures, columns = [], results.columns(component, align)
    for size in results.window_sizes(component):
        joint, total = results.windows(component, size, metric, direction, source, align=align)
        note = f"windows of {size} layers"
        for view, values, how in (
            ("joint", joint, "patched together"),
            ("sum", total, "sum of single layers"),
        ):
            name = f"window_{size}_{view}"
            more = heatmaps.window(results, component, name, values, columns, f"{note}, {how}")
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
        effect = results.effect(*asked).values[0, 0, where]
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
    grid = results.grid(SETS)
    normalised = results.normalised(grid.sources.index(source))
    least = "corrupt run" if normalised else "everything patched"
    axes.set_ylabel(f"{metric} recovered\n(0 = {least}, 1 = clean run)")
    pairs = heatmaps.counted(grid.pairs)
    lines = (heatmaps.heading(results), f"n = {pairs}, {found.areas}")
    axes.set_title("\n".join(lines), fontsize=9, parse_math=False)
    axes.legend(fontsize=8)
    return figure
