"""Strong scaling over processes: measured here with one and two, simulated for many GPUs from the
plan; and whether the store keeps up.

`python -m benchmarks.scaling --help`
"""

from __future__ import annotations

import heapq
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from rich.table import Table
from transformers import PretrainedConfig

from benchmarks import _report as report
from benchmarks._machine import Clocks
from benchmarks._models import REAL, SHAPES
from patchsweep import results as results_of
from patchsweep.engine.planning import MOST_TOKENS
from patchsweep.model.model import dimensions_of, empty_model
from patchsweep.pairs import Pair
from patchsweep.plan import Cut, Plan, make_plan
from patchsweep.plan.chunks import chunked
from patchsweep.sites import blocks
from patchsweep.spec import parse_settings
from patchsweep.store import Store

OUT = Path("benchmarks/results/scaling.json")
PROCESSES = (1, 2)
GPUS = (8, 64, 512)
LENGTHS, PLANNED = (24, 40), 25  # tokens of prompts, and pairs that are planned, again and again
RATE = 4e14  # FLOP/s of a GPU: 40 % of an H200's in bfloat16
IDLE = 5  # percent, at most
FASTER = 1.7  # times, at least
LARGE = ("llama-7b", "llama-70b")


@dataclass(frozen=True)
class Measured:
    """A sweep by some processes: seconds as a whole, and from the first wave to the last."""

    processes: int
    whole: float
    waves: float


@dataclass(frozen=True)
class Simulated:
    """A sweep on some GPUs, a process each; `idle` is the share of their time in which they wait
    for the last one."""

    model: str
    gpus: int
    units: int
    hours: float
    idle: float
    written: float  # bytes a second and process


def scaling(*, out: Path = OUT, rounds: int = 3, prompts: int = 8, pairs: int = 2000) -> None:
    """Measure a sweep of SmolLM2-135M-Instruct with one and two processes of one thread each, and
    simulate sweeps of large models on many GPUs.

    Example: python -m benchmarks.scaling --rounds 5

    Parameters
    ----------
    out
        The JSON file to write.
    rounds
        How often one and two processes take turns; the quickest counts.
    prompts
        IOI pairs of the sweep that is measured.
    pairs
        Pairs of the sweeps that are simulated: a multiple of 25.
    """
    console, began = report.console_of_width(), Clocks.read()
    facts = report.start(console, torch.device("cpu"))
    found = [measured(n, prompts) for _ in range(rounds) for n in PROCESSES]
    best = [
        Measured(
            n,
            min(m.whole for m in found if m.processes == n),
            min(m.waves for m in found if m.processes == n),
        )
        for n in PROCESSES
    ]
    console.print(_measured_table(best))
    simulated, stores = [], {}
    for name in LARGE:
        plan = planned(SHAPES[name], LENGTHS, MOST_TOKENS["cuda"], pairs)
        stores[name] = store_rate(plan)
        simulated += [simulate(name, plan, gpus, pairs) for gpus in GPUS]
    console.print(_simulated_table(simulated, stores))
    one, two = best
    targets = [
        report.Target("times faster with 2 processes, waves alone", one.waves / two.waves, FASTER)
    ]
    targets += [
        report.Target(f"% idle, {s.model} on {s.gpus} GPUs", 100 * s.idle, IDLE, at_most=True)
        for s in simulated
    ]
    assumptions = [
        f"simulated: head_z x position in direction denoise, {pairs:,} pairs of {LENGTHS[0]} "
        f"to {LENGTHS[1]} tokens; waves of {MOST_TOKENS['cuda']:,} tokens",
        f"a GPU holds the model and does {RATE:.0e} FLOP/s in every wave; claiming, starting and "
        "writing take no time; units are claimed in the plan's order, costliest first",
        "store: one process writing chunks of that plan here, fsync off",
    ]
    report.say(console, [*assumptions, *targets])
    record = {
        "measured": list(map(asdict, found)),
        "simulated": list(map(asdict, simulated)),
        "store_bytes_per_second": stores,
        "assumptions": assumptions,
    }
    report.finish(console, out, {**facts, **record}, began)


def measured(processes: int, prompts: int) -> Measured:
    """A sweep from the command to its end, by processes of one thread."""
    spec = {
        "model": REAL,
        "device": "cpu",
        "prompts": {"task": "ioi", "n": prompts},
        "components": ["head_z", "mlp_out"],
        "metrics": ["logit_diff"],
        # Small enough for more than a few waves.
        "token_budget": 1024,
    }
    with tempfile.TemporaryDirectory() as folder:
        file, results = Path(folder, "spec.yaml"), Path(folder, "r.zarr")
        file.write_text(yaml.safe_dump(spec))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, *launcher, "-m", "patchsweep", "run", file, "--out", results],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        whole = time.perf_counter() - began
        waves = results_of.open(results).attrs["measured"]["seconds"]
    return Measured(processes, whole, waves)


def planned(config: PretrainedConfig, lengths: tuple[int, int], budget: int, count: int) -> Plan:
    """The plan of a few pairs of random lengths, both ends counted, and first differences; in
    chunks as if there were `count` pairs."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(PLANNED):
        length = rng.integers(lengths[0], lengths[1] + 1)
        clean, corrupt = rng.choice(config.vocab_size, (2, length), replace=False)
        same = rng.integers(length)
        corrupt[:same] = clean[:same]
        pairs.append(Pair(tuple(clean.tolist()), tuple(corrupt.tolist()), (1,), (2,)))
    settings = parse_settings({"components": ["head_z"], "metrics": ["logit_diff"]})
    dimensions = dimensions_of(empty_model(config, "bfloat16"))
    few = make_plan(pairs, settings, dimensions, budget)
    whole = {name: replace(grid, pairs=count) for name, grid in few.grids.items()}
    blocks = chunked(whole, arrays=2, baselines=2, value=4, blocks=None).blocks
    return make_plan(
        pairs, settings, dimensions, budget, cut=Cut(few.pairs_per_block, blocks=blocks)
    )


def simulate(name: str, plan: Plan, gpus: int, pairs: int) -> Simulated:
    """The plan as often as makes so many pairs, each GPU claiming the next unit when it is free."""
    times = pairs // PLANNED
    flops = sorted([sum(w.flops for w in unit) for unit in plan.units] * times, reverse=True)
    seconds = schedule([f / RATE for f in flops], gpus)
    written = plan.counts()["disk_bytes"] * times / seconds / gpus
    idle = max(0.0, 1 - sum(flops) / RATE / (gpus * seconds))
    return Simulated(name, gpus, len(flops), seconds / 3600, idle, written)


def schedule(costs: Sequence[float], workers: int) -> float:
    """When the last of them ends, if each takes the next item as soon as it is free."""
    free = [0.0] * workers
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


def store_rate(plan: Plan) -> float:
    """Bytes a second that one process writes of chunks of a plan."""
    grid = plan.chunks.grids["head_z"]
    some = blocks(grid)[:64]
    size = tuple(part.stop - part.start for part in some[0].region(grid))
    values = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    some = [b for b in some if _shape(b.region(grid)) == size]
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(
            Path(folder, "r"), [grid], ["logit_diff"], plan.pairs, str, {}, "float32"
        )
        began = time.perf_counter()
        for block in some:
            status = {"logit_diff": np.ones(size, np.uint8)}
            store.write_block(block, {"logit_diff": values}, status)
        seconds = time.perf_counter() - began
    return len(some) * values.size * 5 / seconds


def _shape(region: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in region)


def _measured_table(found: Sequence[Measured]) -> Table:
    table = Table(
        "processes", "whole, s", "times faster", "waves alone, s", "times faster", box=None
    )
    one = found[0]
    for m in found:
        table.add_row(
            str(m.processes),
            f"{m.whole:.1f}",
            f"{one.whole / m.whole:.2f}",
            f"{m.waves:.1f}",
            f"{one.waves / m.waves:.2f}",
        )
    return table


def _simulated_table(found: Sequence[Simulated], stores: dict[str, float]) -> Table:
    columns = (
        "model",
        "GPUs",
        "units",
        "hours",
        "idle, %",
        "MB/s to write, each",
        "MB/s written here",
    )
    table = Table(*columns, box=None)
    for s in found:
        table.add_row(
            s.model,
            str(s.gpus),
            f"{s.units:,}",
            f"{s.hours:.3g}",
            f"{100 * s.idle:.2f}",
            f"{s.written / 1e6:.3g}",
            f"{stores[s.model] / 1e6:.3g}",
        )
    return table


if __name__ == "__main__":
    report.run(scaling)
