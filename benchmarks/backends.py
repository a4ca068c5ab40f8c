"""The same grid through every backend: nnsight as its documentation has it, nnsight batched, the
wavefront in memory, the wavefront over weights on disk.

`python -m benchmarks.backends --help`
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnsight import TransformersModel  # type: ignore[import-untyped]
from rich.table import Table

from benchmarks import _report as report
from benchmarks._full import Cells, output_projections, record_z
from benchmarks._machine import Clocks, timed
from benchmarks._measure import METRIC, SETTINGS
from benchmarks._models import REAL, sentence_pairs
from patchsweep.engine.loop import sweep
from patchsweep.model.model import Model, load_model
from patchsweep.pairs import Pair

OUT = Path("benchmarks/results/backends.json")
WAYS = {
    "invokes": "nnsight, an invoke per cell",
    "nnsight": "nnsight, batched (backend: nnsight)",
    "wavefront": "wavefront, in memory",
    "offloaded": "wavefront, layers on disk",
}


def backends(
    *, out: Path = OUT, rounds: int = 2, cells: int = 64, limit: str = "200MB", tiny: bool = False
) -> None:
    """Measure one head x position grid of SmolLM2-135M-Instruct through every backend.

    Example: python -m benchmarks.backends --rounds 3

    Parameters
    ----------
    out
        The JSON file to write.
    rounds
        How often the ways take turns; medians are reported.
    cells
        Cells to run as invokes, 32 a trace; their time is scaled to the grid.
    limit
        Memory for weights of the offloaded model; the rest lies on disk.
    tiny
        A prompt of five tokens: shows that the benchmark runs, measures little.
    """
    console, began = report.console_of_width(), Clocks.read()
    model = load_model(REAL)
    away = load_model(REAL, device="balanced", max_memory={"cpu": limit})
    pair = sentence_pairs(model)[0]
    if tiny:
        pair = Pair(pair.clean[-5:], pair.corrupt[-5:], pair.answer, pair.wrong)
    facts = report.start(console, model.device)

    d = model.dimensions
    grid = np.indices((d.layers, d.heads, len(pair))).reshape(3, -1).T
    some = grid[np.random.default_rng(0).permutation(len(grid))[:cells]]
    times: list[dict[str, float]] = []
    values: dict[str, np.ndarray[Any, Any]] = {}
    for _ in range(rounds):
        found: dict[str, float] = {}
        seconds, values["invokes"] = timed(model.device, partial(_invokes, model, pair, some))
        found["invokes"] = seconds / len(some) * len(grid)
        for way in ("nnsight", "wavefront", "offloaded"):
            of, backend = (away, "wavefront") if way == "offloaded" else (model, way)
            found[way], values[way] = timed(of.device, partial(_swept, of, pair, backend))
        times.append(found)

    picked = tuple(some.T)
    differences = {
        way: float(np.abs(values[way][picked] - values["wavefront"][picked]).max())
        if way != "invokes"
        else float(np.abs(values[way] - values["wavefront"][picked]).max())
        for way in WAYS
    }
    medians = {way: statistics.median(t[way] for t in times) for way in WAYS}
    table = Table("way", "seconds a grid", "cells/s", "times faster", "differs by", box=None)
    for way, name in WAYS.items():
        table.add_row(
            name,
            f"{medians[way]:.2f}",
            f"{len(grid) / medians[way]:,.0f}",
            f"{medians['invokes'] / medians[way]:.1f}",
            f"{differences[way]:.1e}",
        )
    console.print(f"{len(grid):,} cells of {len(pair)} tokens, whole sweeps", table, sep="\n")
    record = {"cells": len(grid), "sampled": len(some), "limit": limit, "rounds": times}
    report.finish(console, out, {**facts, **record, "differences": differences}, began)


def _swept(model: Model, pair: Pair, backend: str) -> np.ndarray[Any, Any]:
    """Logit differences [layer, head, position] of a whole sweep into a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        results = sweep(model, [pair], out=Path(folder, "r"), backend=backend, **SETTINGS)
        found: np.ndarray[Any, Any] = results.store.read(f"head_z/{METRIC}")[0, 0, 0, 0]
    return found


@torch.no_grad()
def _invokes(model: Model, pair: Pair, cells: Cells) -> np.ndarray[Any, Any]:
    """Logit differences [cell], one invoke each."""
    traced = TransformersModel(model.hf_model, tokenizer=model.tokenizer, task="text-generation")
    donors = record_z(model, pair.clean)
    paths = {module: name for name, module in model.hf_model.named_modules()}
    projections = [traced.get(paths[p]) for p in output_projections(model)]
    unembedding = traced.get(paths[model.hf_model.get_output_embeddings()])
    corrupt, width = torch.tensor([pair.corrupt]), model.dimensions.d_head
    found = []
    for start in range(0, len(cells), 32):
        with traced.trace() as tracer:
            logits = list().save()  # noqa: C408
            for layer, head, position in cells[start : start + 32].tolist():
                part = slice(head * width, (head + 1) * width)
                with tracer.invoke(corrupt):
                    projections[layer].input[:, position, part] = donors[layer][position, head]
                    logits.append(unembedding.output[:, -1])
        found += [float(x[0, pair.answer[0]] - x[0, pair.wrong[0]]) for x in logits]
    return np.array(found)


if __name__ == "__main__":
    report.run(backends)
