"""Results in the terminal, within 80 columns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from patchsweep.errors import BadInput
from patchsweep.results import CellEffect, Results, one_of_each
from patchsweep.sites import EDGES, SETS, Grid, Status, unit_name
from patchsweep.statistics import known_mean
from patchsweep.store import RUNS

if TYPE_CHECKING:
    from patchsweep.plan import Plan

TOP = 10
NAMED_DETECTIONS = 12
WINDOW = re.compile(r"[a-z_]+\.\d+-\d+@.*")  # the name of a sliding window of layers
TEXT_COLUMNS = ("metric", "token", "set", "component", "estimator", "edge")


@dataclass(frozen=True)
class Asked:
    """What is shown: components (all if None), metrics (the first if None), how many cells, what
    positions are over pairs (`Results.columns`), and whether the provenance is."""

    components: Sequence[str] | None = None
    metrics: Sequence[str] | None = None
    top: int = TOP
    align: str | None = None
    provenance: bool = False

    def check(self, results: Results) -> None:
        """BadInput for what the results do not have."""
        one_of_each("component", self.components, results.components)
        one_of_each("metric", self.metrics, results.metrics)
        if self.top < 1:
            raise BadInput(f"top is {self.top}: use a whole number, at least 1")

    def parts(self, results: Results) -> Iterator[tuple[str, str, str]]:
        """Every component, direction and metric."""
        for component in self.components or results.components:
            for direction in results.grid(component).directions:
                for metric in self.metrics or results.metrics[:1]:
                    yield component, direction, metric


def show(results: Results, console: Console, asked: Asked | None = None) -> None:
    """Print warnings, header, baselines, and by metric the top cells and detections."""
    asked = asked or Asked()
    asked.check(results)
    print_pairs(console, header(results))
    print_warnings(console, results)
    _print_titled(console, "Baselines, mean over pairs", baselines(results))
    console.print()
    for component, direction, metric in asked.parts(results):
        for title, table in tables(results, component, direction, metric, asked):
            _print_titled(console, title, table)
        if component != SETS and component not in results.only_estimated:
            console.print(_detections(results, component, metric, direction, asked.align))
        for line in audits(results, component, direction, (metric,)):
            console.print(Text(line))
        console.print()
    for title, table in others(results, asked):
        _print_titled(console, title, table)
        console.print()
    for line in edge_audits(results, asked.metrics or results.metrics[:1]):
        console.print(Text(line))
    if asked.provenance:
        console.print(Text("Provenance", style="bold"))
        print_pairs(console, provenance(results))


def as_json(results: Results, asked: Asked) -> dict[str, Any]:
    """The same as data: numbers are not rounded, NaN is null."""
    asked.check(results)
    found: dict[str, Any] = {
        **header(results),
        "warnings": results.warnings(),
        "baselines": {
            m: dict(zip(RUNS, _plain(results.baseline(m)[:, 0].mean((1, 2))), strict=True))
            for m in results.metrics
        },
        "top": [],
    }
    for component, direction, metric in asked.parts(results):
        top = results.top(component, metric, direction, asked.top, align=asked.align)
        rows = [dict(zip(top.columns, _plain(row), strict=True)) for row in top.to_numpy()]
        entry = {"component": component, "direction": direction, "metric": metric, "cells": rows}
        found["top"].append(entry)
    if asked.provenance:
        found["provenance"] = provenance(results)
    return found


def _plain(values: Any) -> list[Any]:
    return [None if x != x else x.item() if hasattr(x, "item") else x for x in values]


def others(results: Results, asked: Asked) -> Iterator[tuple[str, Table]]:
    """What is no table of cells: how good estimates were, edges, a circuit."""
    if set(results.store.estimators) - set(results.only_estimated):
        title = "Estimated against exact changes, over the cells that were run"
        yield title, agreement(results)
    for metric in asked.metrics or results.metrics[:1]:
        if results.has_edges:
            for direction in results.grid(results.components[0]).directions:
                yield edges(results, metric, direction)
        if results.has_circuit:
            yield f"Circuit, by {metric}", circuit(results, metric)


def tables(
    results: Results, component: str, direction: str, metric: str, asked: Asked
) -> Iterator[tuple[str, Table]]:
    """The cells of largest effect on a metric under a title; of sets, windows apart."""
    kind = "estimated effects" if component in results.only_estimated else "effects"
    scale = "0 = destination, 1 = source" if results.normalised(0) else "patched - destination"
    title = f"{component}, {direction}: largest {kind} on {metric} ({scale})"
    if component != SETS:
        yield title, top_table(results, component, metric, direction, None, asked)
        return
    for part, names in _kinds_of_sets(results):
        table = top_table(results, component, metric, direction, None, asked, names)
        yield title.replace(SETS, part, 1), table


def _kinds_of_sets(results: Results) -> list[tuple[str, set[str]]]:
    """Windows, and all other sets, by name; of these those that there are."""
    names = set(map(str, results.grid(SETS).positions))
    windows = {name for name in names if WINDOW.fullmatch(name)}
    kinds = [("windows", windows), (SETS, names - windows)]
    return [(kind, some) for kind, some in kinds if some]


def plan_table(plan: Plan) -> Table:
    """What a sweep will take."""
    table = Table.grid(padding=(0, 2))
    counts, per_chunk = plan.counts(), plan.chunks.blocks
    blocks = "a block" if per_chunk == 1 else f"at most {per_chunk} blocks"
    words = {
        "cells": f"{counts['cells']:,}",
        "structural": f"{counts['structural']:,} (equal to the baseline by construction: not run)",
        "runs": f"{counts['runs']:,}",
        "blocks": f"{counts['blocks']:,}",
        "waves": f"{counts['waves']:,}",
        "tokens": f"at most {counts['peak_tokens']:,} a layer call, budget {plan.token_budget:,}",
        "compute": f"{counts['flops'] / 1e12:,.2f} TFLOP",
        "memory": f"at most {counts['peak_bytes'] / 2**20:,.0f} MiB beside the model",
        "files": f"{counts['files']:,} ({blocks} in a chunk)",
        "disk": f"at most {counts['disk_bytes'] / 2**20:,.1f} MiB before compression",
    }
    if counts["estimated"]:
        words["estimated"] = f"{counts['estimated']:,} (not run; compute is without estimates)"
    if plan.offload.moved:
        once = f"{plan.offload.moved / 2**20:,.0f} MiB a pass"
        words["weights"] = f"{counts['moved_bytes'] / 2**20:,.0f} MiB brought in, {once}"
    for name, value in words.items():
        table.add_row(Text(name, style="bold"), value)
    return table


def comparison_table(differences: Mapping[str, float], tolerance: float) -> Table:
    """The largest difference of every metric from full forwards."""
    table = _table("metric", "largest difference", "tolerance", "")
    for metric, difference in differences.items():
        holds = "holds" if difference <= tolerance else "DOES NOT HOLD"
        table.add_row(metric, f"{difference:.1e}", f"{tolerance:.0e}", holds)
    return table


def cell_name(cell: CellEffect, unit: str) -> str:
    """The usual name of its place: layer.head, or the layer alone."""
    return f"{cell.layer}.{cell.unit}" if unit else str(cell.layer)


def quoted(token: str) -> str:
    """A token with its spaces visible and its line breaks escaped; empty stays empty."""
    return repr(token) if token else ""


def header(results: Results) -> dict[str, str]:
    """What was swept: model, prompts, direction, source, and how many cells have which status."""
    attrs = results.attrs
    origin = f" ({results.origin})" if results.origin else ""
    lengths = results.store.read("prompts/length")
    grid = results.grid(results.components[0])
    span = sorted({int(lengths.min()), int(lengths.max())})
    pairs = "1 pair" if grid.pairs == 1 else f"{grid.pairs} pairs"
    rows = {
        "model": results.model,
        "prompts": f"{pairs} of {'–'.join(map(str, span))} tokens{origin}",
        "direction": ", ".join(grid.directions),
        "source": _sources(grid),
        "dtype": str(attrs["dtype"]),
    }
    if "backend_reason" in attrs:
        rows["backend"] = f"{attrs['backend']} ({attrs['backend_reason']})"
    for component in results.components:
        counts = results.counts(component, results.metrics[0])
        text = f"{counts[Status.EXACT]:,} cells exact, {counts[Status.STRUCTURAL]:,} structural"
        others = (s for s in Status if s not in (Status.EXACT, Status.STRUCTURAL) and counts[s])
        rows[component] = ", ".join(
            [text, *(f"{counts[s]:,} {s.name.lower().replace('_', ' ')}" for s in others)]
        )
    return rows | _shared_heads(results)


def _shared_heads(results: Results) -> dict[str, str]:
    """That query heads share key and value heads, where they do."""
    names = [c for c in results.components if unit_name(c) == "kv_head"]
    each = results.attrs.get("heads", 0) // results.grid(names[0]).units if names else 0
    if each < 2:
        return {}
    what = " or ".join(names)
    reached = f"a patch of {what} reaches all {each}"
    return {"shared": f"{each} query heads share every key and value head: {reached}"}


def _sources(grid: Grid) -> str:
    """Where values come from; of several the first is shown."""
    text = ", ".join(grid.sources)
    return text if len(grid.sources) == 1 else f"{text} (below: {grid.sources[0]})"


def baselines(results: Results) -> Table:
    """Metrics of the unpatched runs, and how far a null patch comes out from them."""
    table = _table("metric", "clean", "corrupt", "noise floor (max)")
    for metric in results.metrics:
        means = known_mean(known_mean(results.baseline(metric)[:, 0], 1), 1)
        floor = float(np.fmax.reduce(results.noise_floor(metric), axis=None))
        table.add_row(Text(metric), _number(means[0]), _number(means[1]), f"{floor:.1e}")
    return table


def top_table(
    results: Results,
    component: str,
    metric: str,
    direction: str,
    source: str | None = None,
    asked: Asked | None = None,
    sets: set[str] | None = None,
) -> Table:
    """The cells of largest effect on a metric; `source`: the first if left out; `sets`: only
    these."""
    asked = asked or Asked()
    unit = unit_name(component)
    count = asked.top if sets is None else len(results.grid(component).positions)
    found = results.largest(component, metric, direction, count, source, align=asked.align)
    if component == SETS:
        table = _table("set", f"patched {metric}", "effect")
        for cell in [c for c in found if sets is None or c.position in sets][: asked.top]:
            table.add_row(Text(str(cell.position)), _number(cell.patched), _effect(cell.effect))
        return table
    total = results.grid(component).pairs
    fewer = any(cell.pairs < total for cell in found)
    place = f"layer.{unit}" if unit else "layer"
    pairs = ["pairs"] if fewer else []
    table = _table(place, "position", "token", *pairs, f"patched {metric}", "effect")
    for cell in found:
        table.add_row(
            cell_name(cell, unit),
            Text(str(cell.position)),  # a label may look like markup
            Text(quoted(cell.token)),
            *([f"{cell.pairs} of {total}"] if fewer else []),
            _number(cell.patched),
            _effect(cell.effect),
        )
    return table


def circuit(results: Results, metric: str) -> Table:
    """Performance against circuit size, with the areas under and beside the curve."""
    found = results.circuit(metric)
    table = _table("sites", "share", "all others noised", "these denoised")
    table.add_row("0", "0.00%", _number(found.empty), "")
    for row in zip(found.sizes, found.fraction, found.faithfulness, found.recovered, strict=True):
        size, fraction, faithful, recovered = row
        table.add_row(str(size), f"{fraction:.2%}", f"{faithful:.3f}", f"{recovered:.3f}")
    table.caption = found.areas
    return table


def agreement(results: Results) -> Table:
    """How well each metric was estimated at each component."""
    table = _table("component", "estimator", "metric", "Pearson", "Spearman", "cells")
    for component, how in results.store.estimators.items():
        for metric in results.metrics if component not in results.only_estimated else ():
            r = results.agreement(component, metric)
            numbers = f"{r.pearson:.3f}", f"{r.spearman:.3f}", f"{r.cells:,}"
            table.add_row(component, how, metric, *numbers)
    return table


def audits(results: Results, component: str, direction: str, metrics: Sequence[str]) -> list[str]:
    """What the prefilter's audit says of the cells that were not run, by metric."""
    lines = []
    for metric in metrics:
        found = results.audit(component, metric, direction)
        if found is None:
            continue
        strata = found.audit.strata
        drawn = ", ".join(f"{s.hits} of {s.drawn} drawn from {s.cells:,}" for s in strata)
        recall = "" if np.isnan(found.recall) else f", recall {found.recall:.0%}"
        lines.append(
            f"Prefilter, {metric}: {found.precision:.0%} of the kept cells exceed "
            f"{found.theta:.3g}{recall}; of the others {drawn} do; "
            f"{found.audit.statement}"
        )
    return lines


def edge_audits(results: Results, metrics: Sequence[str]) -> list[str]:
    """What `audits` says of edges, if a prefilter chose among them."""
    if EDGES not in results.store.estimators:
        return []
    return [
        f"Edges, {direction}: {line}"
        for direction in results.grid(EDGES).directions
        for line in audits(results, EDGES, direction, metrics)
    ]


def edges(results: Results, metric: str, direction: str) -> tuple[str, Table]:
    """The edges of largest score, under a title with what makes them an approximation."""
    how = results.edges(metric, direction).attrs.get("approximation")
    table = _table("edge", "score" if how else "change")
    count = TOP // len(results.grid(results.components[0]).directions)
    for edge, score in results.top_edges(metric, direction, count):
        table.add_row(edge, f"{score:+.4g}")
    changes = f"estimated changes of {metric}, by {how}" if how else f"changes of {metric}"
    return f"Edges, {direction}: largest {changes}", table


def _detections(
    results: Results, component: str, metric: str, direction: str, align: str | None
) -> Text:
    unit = unit_name(component)
    found = results.detected(component, metric, direction, align=align)
    names = [f"{cell_name(cell, unit)}@{cell.position}" for cell in found[:NAMED_DETECTIONS]]
    more = f" and {len(found) - len(names)} more" if len(found) > len(names) else ""
    of = " (of the cells that were run)" if component in results.store.estimators else ""
    cells = "1 cell" if len(found) == 1 else f"{len(found)} cells"
    text = f"Beyond 2 SD of the mean effect{of}: {cells}"
    return Text(f"{text}: {', '.join(names)}{more}" if len(found) else text)


def print_warnings(console: Console, results: Results) -> None:
    """Print what a reader must know, worst first."""
    warnings = results.warnings()
    said = ("Warnings", "bold yellow") if warnings else ("No warnings", "bold")
    console.print(Text(*said))
    lines = Table.grid(padding=(0, 1))
    for line in warnings:
        lines.add_row("-", Text(line))
    console.print(lines)
    console.print()


# Attributes that are shown above, or not as text.
ELSEWHERE = {"model", "spec", "dtype", "backend", "backend_reason", "estimators", "edges"}
ELSEWHERE |= {"weights", "prompts", "doubts", "joint", "metrics", "components"}
ELSEWHERE |= {"patchsweep_schema", "written_once", "chosen_columns"}


def provenance(results: Results) -> dict[str, str]:
    """How the results were made, by attribute."""
    attrs = {key: value for key, value in results.attrs.items() if key not in ELSEWHERE}
    rows = {key.replace("_", " "): _flat(value) for key, value in sorted(attrs.items())}
    if split := int((results.store.splits() > 0).sum()):
        rows["waves split"] = f"{split}, they ran out of memory"
    return {**rows, "schema": str(results.attrs["patchsweep_schema"]), "path": str(results.path)}


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(_flat(part) for part in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _effect(value: float) -> Text:
    """An effect in the colours of the figures: red towards the source, blue away from it."""
    text = f"{value:+.3f}"
    if not text.strip("+-0."):
        return Text("0.000", style="dim")
    return Text(text, style="red" if value > 0 else "bright_blue")


def _number(value: float) -> str:
    if np.isnan(value):
        return "–"
    if 1e4 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    whole = value == round(value) if np.isfinite(value) else True
    return f"{value:.4g}" if whole else f"{value:#.4g}".rstrip(".")


def _table(*columns: str) -> Table:
    table = Table(box=None)
    for name in columns:
        justify: Literal["left", "right"] = "left" if name in TEXT_COLUMNS else "right"
        table.add_column(name, justify=justify, overflow="fold")
    return table


def _print_titled(console: Console, title: str, table: Table) -> None:
    console.print(Text(title, style="bold"))
    console.print(table)


def print_pairs(console: Console, rows: dict[str, str]) -> None:
    """Print names, and beside each what is said of it."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(Text(key), Text(value))
    console.print(table)
    console.print()
