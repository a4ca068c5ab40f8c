"""One case measured: full forwards, batches of them and the wavefront, taking turns."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._full import Cells, FullForwards
from benchmarks._machine import matmul_rate, synchronize, timed
from benchmarks._models import first_difference
from patchsweep.backends import selftest
from patchsweep.backends.probe import make_probe
from patchsweep.device.exactness import deterministic
from patchsweep.engine.loop import sweep
from patchsweep.engine.planning import plan_sweep
from patchsweep.errors import BadInput
from patchsweep.model.model import Model
from patchsweep.pairs import Pair
from patchsweep.passes.attention import attention_is
from patchsweep.passes.forward import Forward, take_apart
from patchsweep.passes.values import Values
from patchsweep.passes.wave import WaveResult, run_wave, wavefront
from patchsweep.plan import Plan, Wave
from patchsweep.spec import Sweep, parse_settings

SETTINGS: dict[str, Any] = {
    "components": ["head_z"],
    "metrics": ["logit_diff"],
    "direction": "denoise",
}
METRIC = "logit_diff"
SHARE_OF_RUNS = 0.75  # of the sampled cells; the others are structural


@dataclass(frozen=True)
class Effort:
    """How much is measured: rounds, single forwards and batches in all rounds together (None: the
    whole grid), the batch sizes, the side of the large matrix product, and the seconds after which
    no further round begins."""

    rounds: int = 3
    singles: int | None = 96
    batches: int | None = 12
    batch_sizes: tuple[int, ...] = (32,)
    side: int = 2048
    limit: float = float("inf")


@dataclass(frozen=True)
class Measurement:
    """What was measured of the head_z x position grid of one pair. All times in seconds.

    `rounds`: per round, `single` and `batch_N` per cell, the rest for the whole grid, `matmul_*` in
    FLOP/s. The sampled cells' logit differences: by full forwards and by the wave.
    """

    model: str
    dtype: str
    attention: str  # of the full forwards
    tokens: int
    first_difference: int
    cells: int
    runs: int
    waves: int
    flops: int
    token_budget: int
    peak_tokens: int
    whole: bool  # whether the full forwards were measured over the whole grid, not a sample
    timed_cells: dict[str, int]
    rounds: list[dict[str, float]]
    sampled: list[list[int]]  # (layer, head, position)
    is_run: list[bool]
    by_full_forward: list[float]
    by_wave: list[float]

    def seconds(self, what: str) -> float:
        """The median over the rounds; the mean where the rounds together are the whole grid."""
        values = [r[what] for r in self.rounds]
        if self.whole and what in self.timed_cells:
            return statistics.fmean(values)
        return statistics.median(values)

    @property
    def rate(self) -> float:
        """FLOP/s of the wave."""
        return self.flops / self.seconds("wave")


def settings() -> Sweep:
    """The sweep that every benchmark times."""
    return parse_settings(SETTINGS)


def measure(model: Model, pair: Pair, effort: Effort) -> Measurement:
    """Time the three ways in turns, after a call of each that is not counted.

    BadInput if there are fewer cells or batches to time than rounds.
    """
    device, d = model.device, model.dimensions
    full = FullForwards(model, pair)
    plan = plan_sweep(d, [pair], settings(), device)
    grid = np.indices((d.layers, d.heads, len(pair))).reshape(3, -1).T
    exists = plan.layout(plan.waves[0].blocks[0]).exists[0][grid[:, 0], grid[:, 2]]
    chosen = _sampled(grid, exists, effort.singles)
    singles = grid[chosen]
    batches = {n: _batches(grid, n, effort.batches) for n in effort.batch_sizes}
    peak = plan.counts()["peak_tokens"]
    least = min(len(singles), *map(len, batches.values()))
    if not 1 <= effort.rounds <= least:
        raise BadInput(f"{effort.rounds} rounds of {least} cells or batches: use 1 to {least}")

    full.logit_diff(singles[:1])
    for parts in batches.values():
        full.logit_diff(parts[0])
    with attention_is(model.hf_model), deterministic(device):
        one_wave(take_apart(model.hf_model, len(pair)), plan, plan.waves[-1])

    rounds: list[dict[str, float]] = []
    values = np.full(len(singles), np.nan)
    by_wave = values
    began = time.perf_counter()
    for r in range(effort.rounds):
        if rounds and effort.limit < time.perf_counter() - began:
            break
        turn = slice(r, None, effort.rounds)
        found: dict[str, float] = {}
        values[turn] = _forwards(
            full, singles[turn], {n: p[turn] for n, p in batches.items()}, found
        )
        results = _wavefront(model, pair, plan.token_budget, found)
        by_wave = at(grid_values(plan, results), singles)
        found["sweep"] = _whole_sweep(model, pair, plan.token_budget)
        dtype = model.hf_model.dtype
        found["matmul_square"] = matmul_rate((effort.side,) * 3, dtype, device)
        found["matmul_model"] = matmul_rate((peak, d.d_model, d.widest), dtype, device)
        rounds.append(found)
    done = np.arange(len(singles)) % effort.rounds < len(rounds)
    timed_cells = {"single": int(done.sum())}
    for n, parts in batches.items():
        timed_cells[f"batch_{n}"] = sum(
            len(c) for i, c in enumerate(parts) if i % effort.rounds < len(rounds)
        )
    return Measurement(
        model=model.name,
        dtype=str(model.hf_model.dtype).removeprefix("torch."),
        attention=model.hf_model.config._attn_implementation,
        tokens=len(pair),
        first_difference=first_difference(pair),
        cells=len(grid),
        runs=int(exists.sum()),
        waves=len(plan.waves),
        flops=sum(w.flops for w in plan.waves),
        token_budget=plan.token_budget,
        peak_tokens=peak,
        whole=effort.singles is None and effort.batches is None and len(rounds) == effort.rounds,
        timed_cells=timed_cells,
        rounds=rounds,
        sampled=singles[done].tolist(),
        is_run=exists[chosen][done].tolist(),
        by_full_forward=values[done].tolist(),
        by_wave=by_wave[done].tolist(),
    )


def _sampled(grid: Cells, exists: NDArray[np.bool_], count: int | None) -> Cells:
    """Indices of cells to run singly. A forward costs the same wherever it is patched, so the
    sample leans to the cells whose numbers can differ."""
    rng = np.random.default_rng(0)
    if count is None or count >= len(grid):
        return rng.permutation(len(grid))
    runs, structural = np.flatnonzero(exists), np.flatnonzero(~exists)
    least = max(0, count - len(structural))
    wanted = min(max(round(SHARE_OF_RUNS * count), least), len(runs))
    some = rng.choice(runs, wanted, replace=False)
    rest = rng.choice(structural, count - wanted, replace=False)
    return rng.permutation(np.concatenate([some, rest]))


def _batches(grid: Cells, size: int, count: int | None) -> list[Cells]:
    """Batches of cells that follow one another in the grid, as a plain loop over it has them.

    A sample leaves out the last one, which may be smaller."""
    rng = np.random.default_rng(0)
    parts = [grid[i : i + size] for i in range(0, len(grid), size)]
    if count is None or len(parts) <= count:
        return parts
    return [parts[i] for i in rng.permutation(len(parts) - 1)[:count]]


def _forwards(
    full: FullForwards,
    singles: Cells,
    batches: Mapping[int, Sequence[Cells]],
    found: dict[str, float],
) -> list[float]:
    """Run cells singly and batches of cells, the seconds per cell into `found`; the former's
    values."""
    device = full.model.device
    seconds, values = timed(device, partial(_single, full, singles))
    found["single"] = seconds / len(singles)
    for n, parts in batches.items():
        seconds, _ = timed(device, partial(_batched, full, parts))
        found[f"batch_{n}"] = seconds / sum(map(len, parts))
    return values


def _single(full: FullForwards, cells: Cells) -> list[float]:
    return [float(full.logit_diff(c[None])) for c in cells]


def _batched(full: FullForwards, batches: Sequence[Cells]) -> None:
    for cells in batches:
        full.logit_diff(cells)


def _wavefront(model: Model, pair: Pair, budget: int, found: dict[str, float]) -> list[WaveResult]:
    """Plan, take apart, self-test and every wave, each timed into `found`.

    The budget is given: what is free on a GPU changes as the allocator keeps memory.
    """
    device = model.device
    found["plan"], plan = timed(
        device, lambda: plan_sweep(model.dimensions, [pair], settings(), device, budget)
    )
    probe = make_probe(plan)
    asked, truth = timed(device, lambda: selftest.ask(model.hf_model, probe, None))
    with attention_is(model.hf_model), deterministic(device):
        found["take_apart"], forward = timed(device, lambda: take_apart(model.hf_model, len(pair)))
        compared, _ = timed(device, lambda: selftest.compare(forward, wavefront, truth, None))
        found["self_test"] = asked + compared
        found["wave"], results = timed(device, lambda: all_waves(forward, plan))
    return results


def one_wave(forward: Forward, plan: Plan, wave: Wave) -> WaveResult:
    """A wave of a plan."""
    return run_wave(forward, plan, wave, settings().metrics, Values(plan.sources))


def all_waves(forward: Forward, plan: Plan) -> list[WaveResult]:
    """Every wave of a plan."""
    return [one_wave(forward, plan, wave) for wave in plan.waves]


def grid_values(plan: Plan, results: Sequence[WaveResult]) -> NDArray[np.float64]:
    """The logit differences [pair, layer, head, position] that the waves found."""
    grid = plan.grids["head_z"]
    values: NDArray[np.float64] = np.full(grid.shape[3:], np.nan)
    for result in results:
        for block, found, _ in result.blocks:
            values[block.region(grid)[3:]] = found[METRIC][0, 0, 0]
    return values


def at(values: NDArray[np.float64], cells: Cells) -> NDArray[np.float64]:
    """Values [pair, layer, head, position] of the first pair at some cells, [cell]."""
    layer, head, position = cells.T
    picked: NDArray[np.float64] = values[0, layer, head, position]
    return picked


def _whole_sweep(model: Model, pair: Pair, budget: int) -> float:
    """Seconds of the whole sweep into a new Zarr store: plan, self-test, waves, writing."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "results.zarr")
        call = partial(sweep, model, [pair], out=out, token_budget=budget, **SETTINGS)
        return timed(model.device, call)[0]


@dataclass(frozen=True)
class ManyPairs:
    """One pair and several pairs of the same shape, measured in turns: seconds of the waves alone
    ("one", "many") and of whole sweeps into results ("one_sweep", "many_sweep")."""

    pairs: int
    cells: dict[str, int]
    runs: dict[str, int]
    waves: dict[str, int]
    rounds: list[dict[str, float]]

    def seconds(self, what: str) -> float:
        """Median seconds."""
        return statistics.median(r[what] for r in self.rounds)


def measure_pairs(model: Model, pairs: Sequence[Pair], rounds: int) -> ManyPairs:
    """Time the waves of the first pair alone, as often as there are pairs, and of all of them; and
    a whole sweep of each."""
    device = model.device
    budget = plan_sweep(model.dimensions, pairs, settings(), device).token_budget
    plans = {
        what: plan_sweep(model.dimensions, some, settings(), device, budget)
        for what, some in (("one", pairs[:1]), ("many", pairs))
    }
    times: list[dict[str, float]] = []
    with attention_is(model.hf_model), deterministic(device):
        forward = take_apart(model.hf_model, max(map(len, pairs)))
        one_wave(forward, plans["one"], plans["one"].waves[-1])
        for _ in range(rounds):
            one = [timed(device, partial(all_waves, forward, plans["one"]))[0] for _ in pairs]
            many, _ = timed(device, partial(all_waves, forward, plans["many"]))
            times.append({"one": statistics.mean(one), "many": many})
    for found in times:
        for what, some in (("one", pairs[:1]), ("many", pairs)):
            with tempfile.TemporaryDirectory() as folder:
                write = partial(
                    sweep, model, some, out=Path(folder, "r"), token_budget=budget, **SETTINGS
                )
                found[f"{what}_sweep"], _ = timed(device, write)
    counts = {k: p.counts() for k, p in plans.items()}
    return ManyPairs(
        pairs=len(pairs),
        cells={k: c["cells"] for k, c in counts.items()},
        runs={k: c["runs"] for k, c in counts.items()},
        waves={k: c["waves"] for k, c in counts.items()},
        rounds=times,
    )


@dataclass(frozen=True)
class Neurons:
    """Every neuron of a model at the last position of one pair, under the default budget: seconds
    of all waves, once."""

    cells: int
    waves: int
    flops: int
    seconds: float


def measure_neurons(model: Model, pair: Pair) -> Neurons:
    """Time the waves of a whole-model neuron sweep at one position."""
    neurons = parse_settings({**SETTINGS, "components": ["neuron"], "positions": [-1]})
    plan = plan_sweep(model.dimensions, [pair], neurons, model.device)
    counts = plan.counts()
    with attention_is(model.hf_model), deterministic(model.device):
        forward = take_apart(model.hf_model, len(pair))
        one_wave(forward, plan, plan.waves[-1])
        seconds, _ = timed(model.device, lambda: all_waves(forward, plan))
    return Neurons(counts["cells"], counts["waves"], counts["flops"], seconds)


def wave_values(model: Model, pair: Pair, cells: Cells) -> NDArray[np.float64]:
    """Logit differences of these cells [cell] by one pass of the wavefront."""
    plan = plan_sweep(model.dimensions, [pair], settings(), model.device)
    with attention_is(model.hf_model), deterministic(model.device):
        results = all_waves(take_apart(model.hf_model, len(pair)), plan)
        synchronize(model.device)
    return at(grid_values(plan, results), cells)


def full_values(model: Model, pair: Pair, cells: Cells) -> NDArray[np.float64]:
    """Logit differences of these cells [cell] by one full forward each."""
    return np.array(_single(FullForwards(model, pair), cells))


@dataclass(frozen=True)
class Errors:
    """Distance of low-precision logit differences from the float32 full forwards', over cells."""

    cells: int
    wave_rms: float
    full_rms: float
    wave_max: float
    full_max: float


def errors(
    reference: NDArray[np.float64], wave: NDArray[np.float64], full: NDArray[np.float64]
) -> Errors:
    """Root mean square and largest error of the wave and of full forwards; arrays [cell]."""

    def rms(x: NDArray[np.float64]) -> float:
        return float(np.sqrt(np.mean((x - reference) ** 2)))

    def largest(x: NDArray[np.float64]) -> float:
        return float(np.abs(x - reference).max())

    return Errors(len(reference), rms(wave), rms(full), largest(wave), largest(full))
