"""The head x position grid of one IOI prompt on the CPU: full forwards, batches, the wavefront.

`python -m benchmarks.cpu_sweep --help`
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import _report as report
from benchmarks._machine import Clocks
from benchmarks._measure import (
    Effort,
    Errors,
    Measurement,
    errors,
    full_values,
    measure,
    measure_neurons,
    measure_pairs,
    wave_values,
)
from benchmarks._memory import in_fresh_process
from benchmarks._models import REAL, load, middle_pairs, rounded, sentence_pairs
from patchsweep.model.model import Model
from patchsweep.pairs import Pair

OUT = Path("benchmarks/results/cpu_sweep.json")
TINY = Effort(rounds=1, singles=12, batches=2, side=128)


def cpu_sweep(
    *,
    out: Path = OUT,
    rounds: int = 3,
    singles: int = Effort.singles or 0,
    batches: int = Effort.batches or 0,
    full: bool = False,
    tiny: bool = False,
) -> None:
    """Measure the wavefront against full forwards on SmolLM2-135M-Instruct; print and write the
    result.

    Example: python -m benchmarks.cpu_sweep --rounds 5

    Parameters
    ----------
    out
        The JSON file to write.
    rounds
        How often the three ways take turns; medians are reported.
    singles
        Cells to run one by one, in all rounds together; their time is scaled to the grid.
    batches
        Batches of 32 cells to run, in all rounds together; scaled likewise.
    full
        Run every cell one by one and in batches: nothing is scaled. Takes minutes.
    tiny
        A small random model and a few cells: shows that the benchmark runs, measures nothing.
    """
    effort = TINY if tiny else Effort(rounds, singles, batches)
    if full:
        effort = replace(effort, singles=None, batches=None)
    console, began = report.console_of_width(), Clocks.read()
    name = "tiny-llama" if tiny else REAL
    model = load(name, "float32", "cpu")
    pairs = middle_pairs(model, 14, 8) if tiny else sentence_pairs(model)
    facts = report.start(console, model.device)

    found = measure(model, pairs[0], effort)
    case = report.Case(
        grid=found,
        memory=in_fresh_process(name),
        pairs=measure_pairs(model, pairs, effort.rounds),
        neurons=measure_neurons(model, pairs[0]),
        low=_bfloat16(model, pairs[0], found),
    )
    report.show(console, case)
    report.finish(console, out, {**facts, "tiny": tiny, **report.as_data(case)}, began)


def _bfloat16(model: Model, pair: Pair, found: Measurement) -> Errors:
    """Errors in bfloat16 over the sampled cells that are runs."""
    runs = np.array(found.is_run)
    cells, reference = np.array(found.sampled)[runs], np.array(found.by_full_forward)[runs]
    low = rounded(model, torch.bfloat16)
    return errors(reference, wave_values(low, pair, cells), full_values(low, pair, cells))


if __name__ == "__main__":
    report.run(cpu_sweep)
