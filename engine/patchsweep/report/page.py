"""One self-contained HTML page of results: no network, no library; open it in any browser."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from rich.table import Table

from patchsweep.errors import BadInput
from patchsweep.report import terminal
from patchsweep.report.page_data import page_data
from patchsweep.results import Results, csv_text, drawing, heatmaps
from patchsweep.sites import SETS
from patchsweep.store import check_made, check_outside

# The largest tidy table that is put into a page; the rest of it takes 4 MB at most.
TABLE_NUMBERS = 250_000
TABLE_BYTES = 950_000


def page(results: Results) -> str:
    """The HTML: warnings, summary, provenance; effects to look at; what else was found."""
    grid = results.grid(results.components[0])
    title, weights = heatmaps.heading(results), str(results.attrs.get("weights", ""))
    return _filled(
        "page.html",
        title=escape(f"{title}, {heatmaps.counted(grid.pairs)}"),
        weights=f'<p class="lead">{escape(weights)}</p>' if weights else "",
        before=_before(results),
        effects=_effects(results) if set(results.components) - {SETS} else "",
        table=_download(results),
        after=_after(results),
    )


def write_page(results: Results, path: Path) -> Path:
    """Write the page; BadInput without matplotlib, where the disk refuses, inside results, and
    where a file is there that is no such page."""
    drawing.needed()
    check_outside(path)
    check_made(path)
    text = page(results)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as exc:
        reason = (exc.strerror or str(exc)).lower()
        raise BadInput(f"cannot write {path}: {reason}; choose another --out") from exc
    return path


def _file(name: str) -> str:
    return (files("patchsweep.report") / name).read_text(encoding="utf-8")


def _filled(name: str, **parts: str) -> str:
    """A file of this folder with its {{parts}}."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _file(name))


def _effects(results: Results) -> str:
    """Heatmaps of what was patched one at a time, with the numbers and the script behind them."""
    data = json.dumps(page_data(results), separators=(",", ":"), allow_nan=False)
    return _filled("effects.html", data=data.replace("<", "\\u003c"), script=_file("page.js"))


def _before(results: Results) -> str:
    """Warnings, summary, baselines, provenance."""
    warnings = results.warnings()
    said = "".join(f"<li>{escape(line)}</li>" for line in warnings)
    return "\n".join(
        [
            f'<ul class="warnings">{said}</ul>'
            if warnings
            else '<p class="warnings none">No warnings</p>',
            _pairs(terminal.header(results)),
            _titled("Baselines, mean over pairs", terminal.baselines(results)),
            "<details><summary>Provenance</summary>",
            _pairs(terminal.provenance(results)),
            "</details>",
        ]
    )


def _after(results: Results) -> str:
    """What is no heatmap: sets, edges, a circuit, how good estimates and a prefilter were."""
    parts = []
    metric = results.metrics[0]
    for direction in results.grid(results.components[0]).directions:
        parts += _sets(results, direction)
        if results.has_edges:
            parts.append(_titled(*terminal.edges(results, metric, direction)))
        said = [
            line
            for c in results.components
            for line in terminal.audits(results, c, direction, results.metrics)
        ]
        parts += [f"<p>{escape(line)}</p>" for line in said]
    parts += [f"<p>{escape(line)}</p>" for line in terminal.edge_audits(results, results.metrics)]
    if set(results.store.estimators) - set(results.only_estimated):
        title = "Estimated against exact changes, over the cells that were run"
        parts.append(_titled(title, terminal.agreement(results)))
    if results.has_circuit:
        parts += [
            _titled(f"Circuit, by {m}", terminal.circuit(results, m)) for m in results.metrics
        ]
    return "\n".join(parts)


def _sets(results: Results, direction: str) -> list[str]:
    """The sets of largest effect, by source and metric."""
    if SETS not in results.components:
        return []
    sources, parts = results.grid(SETS).sources, []
    for source, metric in itertools.product(sources, results.metrics):
        way = direction if len(sources) == 1 else f"{direction}, from {source}"
        table = terminal.top_table(results, SETS, metric, direction, source)
        parts.append(_titled(f"Sets, {way}: largest effects on {metric}", table))
    return parts


def _download(results: Results) -> str:
    """A link that holds the tidy table, gzipped CSV, or where it is too large how to get it."""
    rows = sum(sum(results.counts(c, results.metrics[0]).values()) for c in results.components)
    if rows * len(results.metrics) <= TABLE_NUMBERS:
        text = csv_text(results.to_frame())
        packed = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode("ascii")
        if len(packed) <= TABLE_BYTES:
            name = escape(f"{Path(results.store.name).stem}.csv.gz")
            href = f"data:application/gzip;base64,{packed}"
            return f'<a download="{name}" href="{href}">The tidy table</a>: a row per experiment'
    return f"The tidy table ({rows:,} rows): {_code('patchsweep export RESULTS TABLE.parquet')}"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _pairs(rows: dict[str, str]) -> str:
    inner = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in rows.items())
    return f"<dl>{inner}</dl>"


def _titled(title: str, table: Table) -> str:
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    kinds = ["n" if column.justify == "right" else "" for column in table.columns]
    head = _row("th", [str(column.header) for column in table.columns], kinds)
    body = "".join(_row("td", row, kinds) for row in zip(*columns, strict=True))
    caption = f'<p class="note">{escape(str(table.caption))}</p>' if table.caption else ""
    return f"<h2>{escape(title)}</h2><table>{head}{body}</table>{caption}"


def _row(tag: str, cells: Sequence[str], kinds: Sequence[str]) -> str:
    inner = "".join(
        f'<{tag} class="{kind}">{escape(cell)}</{tag}>'
        for cell, kind in zip(cells, kinds, strict=True)
    )
    return f"<tr>{inner}</tr>"
