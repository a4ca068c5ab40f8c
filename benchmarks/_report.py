"""Measurements as tables, against the targets, and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cyclopts
import torch
from rich.console import Console
from rich.table import Table

from benchmarks._machine import Clocks, machine
from benchmarks._measure import Errors, ManyPairs, Measurement, Neurons
from benchmarks._memory import Memory
from patchsweep.errors import BadInput

QUIET = 5  # percent of all cores that other programs may use
DISTORTED = "measure again on a quiet machine, full forwards suffer more than the wave"


@dataclass(frozen=True)
class Target:
    """A measured number and what it should be at least, or at most."""

    what: str
    measured: float
    target: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.measured <= self.target if self.at_most else self.measured >= self.target

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        verdict = "PASS" if self.met else "MISS"
        return f"{verdict}  {self.what}: {self.measured:.3g} (target {sign} {self.target:g})"


@dataclass(frozen=True)
class Case:
    """All that was measured of one model, dtype and prompt shape. `low`: what bfloat16 loses."""

    grid: Measurement
    memory: Memory
    pairs: ManyPairs | None
    neurons: Neurons | None
    low: Errors | None


@dataclass(frozen=True)
class Speedup:
    """How often the wave fits into full forwards of the whole grid, and of its runs alone."""

    grid: float
    runs: float


def speedup(m: Measurement, what: str) -> Speedup:
    """Of the wave over `single` or `batch_N` full forwards."""
    per_cell, wave = m.seconds(what), m.seconds("wave")
    return Speedup(m.cells * per_cell / wave, m.runs * per_cell / wave)


def share(m: Measurement) -> float:
    """The wave's FLOP/s as a part of the large matrix product's."""
    return m.rate / m.seconds("matmul_square")


def largest_difference(m: Measurement) -> float:
    """Between the wave and full forwards over the sampled cells, in logits."""
    pairs = zip(m.by_wave, m.by_full_forward, strict=True)
    return max(abs(a - b) for a, b in pairs)


def targets(case: Case) -> list[Target]:
    """What the specification asks for."""
    m = case.grid
    found = [
        Target("times faster than batches of 32, whole grid", speedup(m, "batch_32").grid, 15),
        Target("times faster than single forwards, whole grid", speedup(m, "single").grid, 80),
        Target("% of the large matmul's FLOP/s in the wave", 100 * share(m), 60),
    ]
    if case.pairs is not None:
        p = case.pairs
        ratio = cells_per_second(p, "many", "_sweep") / cells_per_second(p, "one", "_sweep")
        name = f"times the cells/s of 1 pair with {p.pairs} pairs, whole sweeps"
        found.append(Target(name, ratio, 1))
    if case.low is not None:
        e, name = case.low, "bf16 error of the wave / of full forwards"
        found += [
            Target(f"{name}, root mean square", e.wave_rms / e.full_rms, 1.5, at_most=True),
            Target(f"{name}, largest", e.wave_max / e.full_max, 1.5, at_most=True),
        ]
    ratio = case.memory.waves / case.memory.planned
    found.append(Target("peak memory of the waves / plan", ratio, 1, at_most=True))
    return found


def cells_per_second(p: ManyPairs, what: str, of: str = "") -> float:
    """Cells of the grids, structural ones counted, per second of the waves, or `of` the sweep."""
    return p.cells[what] / p.seconds(what + of)


def heading(m: Measurement) -> str:
    """One line that says what was measured."""
    return (
        f"{m.model}, {m.dtype}: head_z x position, {m.tokens} tokens, first difference at "
        f"{m.first_difference}: {m.cells:,} cells, {m.runs:,} of them runs"
    )


def speed_table(m: Measurement) -> Table:
    """The three ways side by side."""
    table = Table(box=None, pad_edge=False)
    for name in ("way", "grid, s", "per cell, ms", "wave faster, x", "over runs alone, x"):
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    for what, cells in m.timed_cells.items():
        per_cell, times = m.seconds(what), speedup(m, what)
        kind = what.replace("_", " of ").replace("single", "one by one")
        note = f"{cells:,} cells" if m.whole else f"{cells:,} cells, scaled"
        table.add_row(
            f"full forwards, {kind} ({note})",
            f"{m.cells * per_cell:.2f}",
            f"{1e3 * per_cell:.3f}",
            f"{times.grid:.1f}",
            f"{times.runs:.1f}",
        )
    table.add_row(
        f"wavefront ({m.waves} waves)",
        f"{m.seconds('wave'):.3f}",
        f"{1e3 * m.seconds('wave') / m.cells:.4f}",
    )
    for what in ("plan", "take_apart", "self_test"):
        table.add_row(f"  beside it: {what.replace('_', ' ')}", f"{m.seconds(what):.3f}")
    table.add_row("whole sweep into a Zarr store", f"{m.seconds('sweep'):.3f}")
    return table


def details(m: Measurement) -> list[str]:
    """What the table leaves out, a line each."""
    square, shaped = m.seconds("matmul_square"), m.seconds("matmul_model")
    return [
        f"medians of {len(m.rounds)} rounds; the ways take turns in each",
        f"arithmetic: {m.flops / 1e9:,.0f} GFLOP by the plan at {m.rate / 1e9:,.1f} GFLOP/s; "
        f"large matmul {square / 1e9:,.1f}, model-shaped {shaped / 1e9:,.1f}: "
        f"{100 * m.rate / square:.0f} % and {100 * m.rate / shaped:.0f} %",
        f"numbers: wave and full forwards differ by at most {largest_difference(m):.2g} logits "
        f"over {len(m.sampled)} sampled cells, {sum(m.is_run)} of them runs",
    ]


def pairs_lines(p: ManyPairs) -> list[str]:
    """One pair and several, a line each."""
    return [
        f"{n} pair{'s' * (n > 1)}: waves {p.seconds(k):.3f} s, {cells_per_second(p, k):,.0f} "
        f"cells/s, {1e6 * p.seconds(k) / p.runs[k]:.1f} us per run, {p.waves[k]} waves; "
        f"whole sweep "
        f"{p.seconds(f'{k}_sweep'):.3f} s, {cells_per_second(p, k, '_sweep'):,.0f} cells/s"
        for k, n in (("one", 1), ("many", p.pairs))
    ]


def neurons_line(n: Neurons, matmul: float) -> str:
    """The neuron sweep in one line."""
    rate = n.flops / n.seconds
    return (
        f"neurons: {n.cells:,} at one position in {n.seconds:.1f} s, {n.cells / n.seconds:,.0f} "
        f"cells/s in {n.waves} waves, {100 * rate / matmul:.0f} % of the large matmul's FLOP/s"
    )


def error_line(e: Errors) -> str:
    """Both errors in one line."""
    return (
        f"bf16 against float32 full forwards over {e.cells} sampled runs, in logits: wave "
        f"{e.wave_rms:.3g} rms, {e.wave_max:.3g} at most; full forwards in bf16 {e.full_rms:.3g} "
        f"rms, {e.full_max:.3g} at most"
    )


def memory_line(m: Memory) -> str:
    """Measured beside planned, in one line."""
    return (
        f"memory: {m.before / 1e6:,.0f} MB with the model run once; the waves take "
        f"{m.waves / 1e6:,.0f} MB more at the peak, the plan's bound is {m.planned / 1e6:,.0f} MB"
    )


def show(console: Console, case: Case) -> None:
    """Print a case: the table, what it leaves out, and the targets."""
    say(console, [heading(case.grid)])
    console.print(speed_table(case.grid))
    lines: list[object] = [*details(case.grid)]
    if case.pairs is not None:
        lines += pairs_lines(case.pairs)
    if case.neurons is not None:
        lines.append(neurons_line(case.neurons, case.grid.seconds("matmul_square")))
    if case.low is not None:
        lines.append(error_line(case.low))
    say(console, [*lines, memory_line(case.memory), *targets(case)])


def as_data(case: Case) -> dict[str, Any]:
    """A case with what follows from it."""
    m = case.grid
    return {
        **asdict(case),
        "median": {k: m.seconds(k) for k in m.rounds[0]},
        "speedup": {k: asdict(speedup(m, k)) for k in m.timed_cells},
        "flops_per_second": m.rate,
        "share_of_matmul": share(m),
        "largest_difference": largest_difference(m),
        "targets": [{**asdict(t), "met": t.met} for t in targets(case)],
    }


def console_of_width() -> Console:
    """As wide as the terminal, and wide enough for the tables in a file."""
    return Console(width=None if sys.stdout.isatty() else 120)


def start(console: Console, device: torch.device) -> dict[str, Any]:
    """Print the machine, and return what the JSON begins with."""
    facts = machine(device)
    console.print(
        f"{facts['gpu'] or facts['cpu']}, {facts['threads']} CPU threads of {facts['cores']}, "
        f"torch {facts['versions']['torch']}",
        highlight=False,
    )
    return {"machine": facts}


def say(console: Console, lines: Sequence[object]) -> None:
    """Print lines as they are."""
    for line in lines:
        console.print(str(line), highlight=False, soft_wrap=True)


def write(path: Path, record: dict[str, Any]) -> None:
    """Write results as JSON, the folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def finish(console: Console, path: Path, record: dict[str, Any], began: Clocks) -> None:
    """Write the results and say where, and whether the machine was quiet since it `began`."""
    others = began.others_since()
    record["machine"]["others_percent"] = others
    if others > QUIET:
        say(console, [f"WARNING: other programs used {others:.0f} % of the cores: {DISTORTED}"])
    write(path, record)
    say(console, [f"written to {path}"])


def run(command: Callable[..., None]) -> None:
    """Run a benchmark with the arguments of the command line; bad input is one line, status 2."""
    try:
        cyclopts.run(command)
    except BadInput as error:
        print(f"{command.__name__}: {error}", file=sys.stderr)
        sys.exit(2)
