"""One wave up the layers: the baselines and every patched run of its blocks, in packed calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchsweep.device import Arriving, aside, to_device, to_host
from patchsweep.passes.attention import LayerCall, attention_call
from patchsweep.passes.climb import climbing
from patchsweep.passes.forward import Forward
from patchsweep.passes.metrics import Rows, measure
from patchsweep.passes.stream import ResidualStream, Tap
from patchsweep.passes.taps import BORDER, Editor, Seen
from patchsweep.passes.values import Values
from patchsweep.plan import Plan, Wave
from patchsweep.plan.schedule import NULL, Embedding, Schedule, Step, make_schedule
from patchsweep.sites import Block, Status
from patchsweep.spec import Metric

# Takes the rows of a schedule up the layers, as `wavefront` does.
Carry = Callable[
    [Forward, Schedule, Callable[[int, Step], Seen], Callable[[Embedding], Tap | None]], Tensor
]
Found = dict[str, NDArray[np.floating]]
Statuses = dict[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class WaveResult:
    """What a wave found. values and status per block: arrays [1, 1, 1, pair, layer, unit, position]
    per metric; baseline and noise_floor per metric: [run = clean, corrupt; pair] of the wave's
    source and sample, NaN where it has no run."""

    blocks: Sequence[tuple[Block, Found, Statuses]]
    baseline: Found
    noise_floor: Found


@dataclass(frozen=True)
class Launched:
    """A wave whose work is queued on the devices, and the values of its rows, to be read."""

    plan: Plan
    wave: Wave
    schedule: Schedule
    values: Arriving

    def result(self) -> WaveResult:
        """What it found, waited for."""
        return _sorted_out(self.plan, self.wave, self.schedule, self.values.result())


def run_wave(
    forward: Forward,
    plan: Plan,
    wave: Wave,
    metrics: Sequence[Metric],
    values: Values,
    carry: Carry | None = None,
) -> WaveResult:
    """Compute every cell of a wave's blocks, on the wavefront if no other way to `carry` runs up
    the layers is given; for it the model must be using patchsweep's attention."""
    return launch_wave(forward, plan, wave, metrics, values, carry or wavefront).result()


def launch_wave(
    forward: Forward,
    plan: Plan,
    wave: Wave,
    metrics: Sequence[Metric],
    values: Values,
    carry: Carry,
) -> Launched:
    """Begin to do what `run_wave` does. A GPU is not waited for, so that the next wave can be
    launched behind this one; on a CPU it is done when this returns."""
    schedule = make_schedule(plan, wave)
    found = values_of_rows(forward, plan, wave, schedule, metrics, values, carry)
    return Launched(plan, wave, schedule, found)


@torch.no_grad()
def values_of_rows(
    forward: Forward,
    plan: Plan,
    wave: Wave,
    schedule: Schedule,
    metrics: Sequence[Metric],
    values: Values,
    carry: Carry,
) -> Arriving:
    """Each metric's values [row], by column, of a wave's rows."""
    editor = Editor(
        layouts=plan.layouts,
        values=values,
        source=wave.source,
        positions=schedule.inner,
        keys=schedule.keys,
        inner={},
        device=forward.device,
    )
    embedding = partial(embedding_tap, editor=editor, sample=wave.sample)
    rows = Rows(
        pairs=[plan.pairs[i] for i in wave.pairs],
        pair=schedule.row_pair,
        base=len(schedule.base_offset),
        reads=schedule.reads,
        other=1 + wave.runs.index(wave.source) if wave.source in wave.runs else 0,
        of={
            name: slots[wave.pairs.start : wave.pairs.stop]
            for name, slots in plan.layouts.reads.of.items()
        },
    )
    # Full forwards pass everywhere once.
    with forward.once() if carry is wavefront else nullcontext():
        hidden = carry(forward, schedule, across(forward, editor), embedding)
        with aside(forward.shared_by, reads=[hidden, *editor.inner.values()]):
            return to_host(measure(forward, hidden, rows, metrics, editor.inner))


def across(forward: Forward, editor: Editor) -> Callable[[int, Step], Seen]:
    """What an editor does in a layer call, on the device of that layer."""
    return lambda layer, step: editor.on(forward.devices[layer]).seen(layer, step)


def embedding_tap(embedding: Embedding, editor: Editor, sample: int) -> Tap | None:
    """Puts noise on embeddings, and constants in their place."""
    constants = editor.embedding(embedding.edits)
    if not constants and not len(embedding.noised):
        return None

    def tap(x: Tensor) -> None:
        if len(embedding.noised):
            token = to_device(embedding.noised, x.device)
            noise = editor.values.noise(
                embedding.pair.tolist(),
                embedding.slot.tolist(),
                embedding.source.tolist(),
                sample,
                x.shape[-1],
            )
            x[token, 0] += to_device(noise, x.device).to(x)
        for each in constants:
            each(x)

    return tap


def wavefront(
    forward: Forward,
    schedule: Schedule,
    seen: Callable[[int, Step], Seen],
    embedding: Callable[[Embedding], Tap | None],
) -> Tensor:
    """Take a schedule up the layers: the last layer's output where logits are read, [row, read,
    d_model]. Rows are the base rows, then the runs. `seen` says what happens in a layer call,
    `embedding` what happens to embeddings."""
    first, begin = schedule.embedding, forward.device
    tokens, positions = to_device(first.tokens, begin), to_device(first.positions, begin)
    hidden = forward.embed(tokens, positions, embedding(first))
    climbers = climbing(len(schedule.climbers), hidden)
    for layer, step in enumerate(schedule.steps()):
        device = forward.devices[layer]
        hidden = hidden.to(device)[to_device(step.gather, device)]
        what = seen(layer, step)
        if step.climb:
            climbers.enter(step.climb, hidden)
        for place in BORDER:
            if place in what.taps:
                what.taps[place](hidden[:, None])
        if layer == schedule.layers:
            row = np.arange(len(schedule.reads))[:, None]
            return hidden[
                to_device(step.row_tokens.token(row, np.maximum(schedule.reads, 0)), device)
            ]
        inside = {k: tap for k, tap in what.taps.items() if k in ResidualStream.PLACES}
        if step.climb:
            inside = climbers.watched(step.climb, inside)
        stream = ResidualStream(inside) if inside else None
        call = LayerCall(
            rows=step.rows,
            borrowers=to_device(step.borrowers, device),
            lenders=to_device(step.lenders, device),
            taps=what.taps,
            patterns=what.patterns,
            pattern_reads=what.pattern_reads,
            stream=stream,
            attend=what.attend,
        )
        with attention_call(call), forward.weights(layer):
            positions = to_device(step.positions, device)
            hidden = forward.layer(layer, hidden, positions, stream, what.taps.get("neuron"))
    raise AssertionError("a schedule ends with the tail's step")


def _sorted_out(plan: Plan, wave: Wave, schedule: Schedule, found: Found) -> WaveResult:
    """Put the rows' values where they belong."""
    runs, bases, pairs = schedule.runs, len(schedule.base_offset), len(wave.pairs)
    per_pair = bases // pairs
    own = 1 + wave.runs.index(wave.source) if wave.source in wave.runs else None
    baseline, of_runs = {}, {}
    for k, v in found.items():
        by_row = v[:bases].reshape(pairs, per_pair)
        corrupt = np.full(pairs, np.nan, v.dtype) if own is None else by_row[:, own]
        baseline[k] = np.stack([by_row[:, 0], corrupt])
        of_runs[k] = v[bases:]
        if wave.sample >= plan.sources[wave.source].samples:
            baseline[k] = np.full_like(baseline[k], np.nan)
    destination = np.array([d == "denoise" for d in plan.directions]).astype(int)

    null = runs.block == NULL
    floor = {k: np.full_like(v, np.nan) for k, v in baseline.items()}
    at = (destination[runs.direction[null]], runs.pair[null])
    for k, v in of_runs.items():
        floor[k][at] = np.abs(v[null] - baseline[k][at])

    blocks = []
    for number, block in enumerate(wave.blocks):
        mine = runs.block == number
        first = block.pairs.start - wave.pairs.start
        part = slice(first, first + len(block.pairs))
        ends = {k: v[destination[block.direction], part] for k, v in baseline.items()}
        values = {k: v[mine] for k, v in of_runs.items()}
        blocks.append((block, *_block(plan, block, runs.cell[mine], values, ends)))
    return WaveResult(blocks, baseline, floor)


def _block(
    plan: Plan,
    block: Block,
    cell: NDArray[np.int64],
    found: Mapping[str, NDArray[np.floating]],
    baseline: Mapping[str, NDArray[np.floating]],
) -> tuple[Found, Statuses]:
    """A block's arrays: runs where there are any, the baseline where nothing can differ, nothing
    where a run is left out."""
    shape = (
        len(block.pairs),
        plan.grids[block.component].layers,
        len(block.units),
        len(block.positions),
    )
    inside, chosen, possible = plan.inside(block), plan.chosen(block), plan.possible(block)
    ran = np.full(len(cell), Status.EXACT, np.uint8)
    if chosen is not None:
        ran = np.broadcast_to(chosen, shape).ravel()[cell]
    values, statuses = {}, {}
    for k, v in found.items():
        full = np.where(inside, baseline[k][:, None, None, None], np.nan).astype(v.dtype)
        status = np.where(inside, Status.STRUCTURAL, Status.OUTSIDE).astype(np.uint8)
        status[inside & ~np.isfinite(full)] = Status.NOT_FINITE
        if chosen is not None:
            status = np.where(possible, chosen, status)
            full[np.broadcast_to(possible, shape)] = np.nan
        full.ravel()[cell] = v
        status.ravel()[cell] = np.where(np.isfinite(v), ran, Status.NOT_FINITE)
        values[k] = full[None, None, None]
        statuses[k] = status[None, None, None]
    return values, statuses
