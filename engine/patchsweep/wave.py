"""One wave up the layers: the baselines and every patched run of its blocks, in packed calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchsweep.attention import HeadOverwrite, LayerCall, attention_call
from patchsweep.forward import Forward
from patchsweep.metrics import Wanted, evaluate, wanted, whole_vocabulary
from patchsweep.plan import TAIL_ELEMENTS, TAIL_TILE, Plan, Wave, entries_of
from patchsweep.schedule import NULL, Edit, Schedule, make_schedule
from patchsweep.sites import Block, Status
from patchsweep.spec import Metric
from patchsweep.stream import WRITES, Overwrite, ResidualStream
from patchsweep_kernels import MetricHead, Reference, metric_head

Values = dict[str, NDArray[np.floating]]
Statuses = dict[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class WaveResult:
    """What a wave found. values and status per block: arrays [1, 1, 1, pair, layer, unit, position]
    per metric; baseline and noise_floor per metric: [run = clean, corrupt; sample; pair]."""

    blocks: Sequence[tuple[Block, Values, Statuses]]
    baseline: Values
    noise_floor: Values


@torch.no_grad()
def run_wave(forward: Forward, plan: Plan, wave: Wave, metrics: Sequence[Metric]) -> WaveResult:
    """Compute every cell of a wave's blocks. The model must be using patchsweep's attention."""
    schedule = make_schedule(plan, wave)
    hidden = carry(forward, schedule)
    values = _metrics(forward, plan, wave, schedule, hidden, metrics)
    return _sorted_out(plan, wave, schedule, values)


def carry(forward: Forward, schedule: Schedule) -> Tensor:
    """Take a schedule up the layers: the last layer's output at the tokens read, [row, d_model].

    Rows are both prompts of every pair (clean, corrupt, clean, …), then the runs.
    """
    device = forward.unembedding()[0].device
    hidden = forward.embed(_to(schedule.tokens, device), _to(schedule.positions, device))
    for layer, step in enumerate(schedule.steps()):
        hidden = hidden[_to(step.gather, device)]
        if layer == schedule.layers:
            break
        positions = _to(step.positions, device)
        stream, heads = overwrites(step.edits, device)
        copied = _to(step.copied, device)
        with attention_call(LayerCall(step.rows, step.injected, copied, heads, stream)):
            hidden = forward.layer(layer, hidden, positions, stream)
    return hidden


def _to(index: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(index).to(device, non_blocking=True)


def overwrites(
    edits: Mapping[str, Edit], device: torch.device
) -> tuple[ResidualStream | None, HeadOverwrite | None]:
    """What has to be overwritten inside a layer: of the residual stream, and of heads' z."""
    places = {
        name: Overwrite(_to(e.target, device), _to(e.source, device))
        for name, e in edits.items()
        if name in WRITES
    }
    z = edits.get("head_z")
    heads = None
    if z is not None:
        heads = HeadOverwrite(*(_to(x, device) for x in (z.target, z.source, z.unit)))
    return ResidualStream(places) if places else None, heads


def _metrics(
    forward: Forward,
    plan: Plan,
    wave: Wave,
    schedule: Schedule,
    hidden: Tensor,
    metrics: Sequence[Metric],
) -> Values:
    """Each metric of every row [row]."""
    pairs = np.arange(len(wave.pairs))
    pair = _to(np.concatenate([np.repeat(pairs, 2), schedule.runs.pair]), hidden.device)
    sets = wanted([plan.pairs[i] for i in wave.pairs], metrics, hidden.device).rows(pair)
    clean = Reference(rows=2 * _to(pairs, hidden.device), of=pair)
    head = read(forward, hidden, sets, metrics, clean)
    return {k: v.cpu().numpy() for k, v in evaluate(metrics, head, sets).items()}


def read(
    forward: Forward,
    hidden: Tensor,
    sets: Wanted,
    metrics: Sequence[Metric],
    clean: Reference,
) -> MetricHead:
    """What the metrics need of the logits of `hidden` [row, d_model]; `clean`: the clean runs."""
    weight, bias = forward.unembedding()
    names = {m.name for m in metrics}
    whole = whole_vocabulary(metrics)
    return metric_head(
        forward.final_norm(hidden),
        weight,
        bias,
        sets.tokens.clamp(min=0),
        finish=forward.finish if forward.finishes else None,
        logsumexp=whole,
        ranked=sets.answers if names & {"rank", "accuracy"} else 0,
        reference=clean if "kl" in names else None,
        tile=max(TAIL_TILE, TAIL_ELEMENTS // hidden.shape[0]),
    )


def _sorted_out(plan: Plan, wave: Wave, schedule: Schedule, values: Values) -> WaveResult:
    """Put the rows' values where they belong."""
    runs, pairs = schedule.runs, len(wave.pairs)
    baseline = {k: v[: 2 * pairs].reshape(pairs, 2).T[:, None] for k, v in values.items()}
    of_runs = {k: v[2 * pairs :] for k, v in values.items()}
    destination = np.array([d == "denoise" for d in plan.directions]).astype(int)

    null = runs.block == NULL
    floor = {k: np.full_like(v, np.nan) for k, v in baseline.items()}
    dst = destination[runs.direction[null]]
    for k, v in of_runs.items():
        at = (dst, 0, runs.pair[null])
        floor[k][at] = np.abs(v[null] - baseline[k][at])

    blocks = []
    for number, block in enumerate(wave.blocks):
        mine = runs.block == number
        dst_run = destination[block.direction]
        own = {k: baseline[k][dst_run, 0] for k in values}
        found = {k: v[mine] for k, v in of_runs.items()}
        blocks.append((block, *_block(plan, block, runs.cell[mine], found, own)))
    return WaveResult(blocks, baseline, floor)


def _block(
    plan: Plan,
    block: Block,
    cell: NDArray[np.int64],
    found: Mapping[str, NDArray[np.floating]],
    baseline: Mapping[str, NDArray[np.floating]],
) -> tuple[Values, Statuses]:
    """A block's arrays: runs where there are any, the baseline where nothing can differ."""
    c = plan.cells[block.component]
    shape = (
        len(block.pairs),
        plan.dimensions.layers,
        len(block.units),
        len(block.positions),
    )
    inside = np.broadcast_to(c.inside[entries_of(block)][:, None, None, :], shape)
    values, statuses = {}, {}
    for k, v in found.items():
        full = np.where(inside, baseline[k][:, None, None, None], np.nan).astype(v.dtype)
        status = np.where(inside, Status.STRUCTURAL, Status.OUTSIDE).astype(np.uint8)
        status[inside & ~np.isfinite(full)] = Status.NOT_FINITE
        full.ravel()[cell] = v
        status.ravel()[cell] = np.where(np.isfinite(v), Status.EXACT, Status.NOT_FINITE)
        values[k] = full[None, None, None]
        statuses[k] = status[None, None, None]
    return values, statuses
