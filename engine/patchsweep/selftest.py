"""Trust, but check: a few cells of the sweep at hand, once on the wave and once as full forwards.

Before a sweep starts, its longest pair is run three ways on the loaded model: as plain forwards
with transformers' own attention, as one stacked batch of full forwards with a few cells patched
under the masks that the model makes, and as a wave. All must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patchsweep.attention import Stacked, attention_call, attention_is
from patchsweep.dimensions import Dimensions
from patchsweep.errors import BadInput
from patchsweep.forward import Forward, replaced
from patchsweep.plan import Ints, Plan, arranged
from patchsweep.schedule import NULL, Edit, Schedule, make_schedule
from patchsweep.wave import carry, overwrites

CELLS, UNITS = 4, 4  # per component: cells, each for the first units

# Largest difference allowed, as a share of the largest logit. float64: the families' own eager
# attention computes its softmax in float32.
TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}


@dataclass(frozen=True)
class SelfTest:
    """What the check found: patched cells compared, and the largest differences, in logits."""

    cells: int
    baseline_difference: float
    cell_difference: float
    tolerance: float


@torch.no_grad()
def check(forward: Forward, plan: Plan) -> SelfTest:
    """Compare the three ways; BadInput if they differ by more than the dtype's tolerance.

    The model must be using patchsweep's attention.
    """
    schedule = _few_cells(plan)
    chosen = np.flatnonzero(schedule.runs.block != NULL)
    device = forward.unembedding()[0].device
    prompts = torch.from_numpy(schedule.tokens).view(2, -1).to(device)
    with attention_is(forward.hf_model, "eager"):
        own = _last_logits(forward, prompts)
    hidden = carry(forward, schedule)
    patched = _stacked(forward, plan.dimensions, schedule, chosen, prompts)
    wave = forward.logits(hidden)

    tolerance = TOLERANCE[own.dtype] * max(1.0, _largest(own))
    found = SelfTest(
        cells=len(chosen),
        baseline_difference=_largest(_difference(wave[:2], own)),
        cell_difference=_largest(_difference(wave[2:][chosen], patched)),
        tolerance=tolerance,
    )
    for what in ("baseline", "cell"):
        difference = getattr(found, f"{what}_difference")
        if difference > tolerance:
            raise BadInput(
                f"{type(forward.hf_model).__name__} failed its self-test: a {what} is "
                f"{difference:.2g} logits from a full forward (tolerance {tolerance:.2g}): "
                "this family cannot run on the wavefront"
            )
    return found


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """|a − b|; not finite in both is equal, in one of them is as far as can be."""
    far = torch.finfo(a.dtype).max
    both = a.isfinite() == b.isfinite()
    difference = torch.where(a.isfinite() & b.isfinite(), (a - b).abs(), 0.0)
    return torch.where(both, difference, far)


def _largest(x: Tensor) -> float:
    """The largest finite magnitude; 0 if there is none."""
    return float(x[x.isfinite()].abs().max()) if bool(x.isfinite().any()) else 0.0


def _few_cells(plan: Plan) -> Schedule:
    """A wave of a few cells per component, on the longest pair, in the first direction."""
    longest = max(range(len(plan.pairs)), key=lambda i: len(plan.pairs[i]))
    one = slice(longest, longest + 1)
    rng = np.random.default_rng(0)
    cells = {}
    for name, c in plan.cells.items():
        kept = np.zeros_like(c.exists[one])
        for layer, entry in rng.permutation(np.argwhere(c.exists[longest]))[:CELLS]:
            kept[0, layer, entry] = True
        grid = replace(
            c.grid,
            directions=plan.directions[:1],
            pairs=1,
            units=min(UNITS, c.grid.units),
            pair_tile=1,
            unit_tile=min(UNITS, c.grid.units),
            position_tile=len(c.grid.positions),
        )
        cells[name] = replace(
            c,
            grid=grid,
            exists=kept,
            start=c.start[one],
            patched=c.patched[one],
            inside=c.inside[one],
            places=None if c.places is None else c.places[one],
        )
    alone = replace(
        plan, pairs=[plan.pairs[longest]], directions=plan.directions[:1], token_budget=1 << 62
    )
    small = arranged(alone, cells)
    return make_schedule(small, small.waves[0])


def _last_logits(forward: Forward, tokens: Tensor) -> Tensor:
    """Logits [row, vocab] at the last token of full forwards of `tokens` [row, position].

    Called as a user would: no positions are given, the model finds its own.
    """
    output = forward.hf_model.get_output_embeddings()
    own = output.forward
    with replaced(output, lambda hidden: own(hidden[:, -1:])):
        logits: Tensor = forward.hf_model(input_ids=tokens, use_cache=False).logits
    return logits[:, 0]


def _stacked(
    forward: Forward, dimensions: Dimensions, schedule: Schedule, chosen: Ints, prompts: Tensor
) -> Tensor:
    """Logits [run, vocab] of the chosen runs as one batch of full forwards: the two prompts, then
    a copy of the destination for every run, patched from the source's row."""
    length = prompts.shape[1]
    runs = schedule.runs
    source, destination = (int(x[0]) // length for x in (runs.src, runs.dst))
    batch = torch.cat([prompts, prompts[destination].expand(len(chosen), -1)])
    row_of = np.full(len(runs.pair), -1)
    row_of[chosen] = 2 + np.arange(len(chosen))

    run, position = schedule.token_run, schedule.token_position
    target, donor = row_of[run] * length + position, source * length + position
    edits: list[dict[str, Edit]] = [{} for _ in forward.layers]
    calls: list[list[tuple[int, int | None, int]]] = [[] for _ in forward.layers]
    keys = np.stack([runs.component[run], runs.layer[run]], 1)
    for code, layer in np.unique(keys, axis=0):
        mine = (keys == (code, layer)).all(1)
        edit = Edit(target[mine], donor[mine], runs.unit[run][mine])
        edits[layer][schedule.components[code]] = edit

    with ExitStack() as stack:
        stack.enter_context(attention_call(Stacked()))
        for module, places, call in zip(forward.layers, edits, calls, strict=True):
            stack.enter_context(replaced(module, _patched(module, places, call, prompts.device)))
        logits = _last_logits(forward, batch)[2:]
    for layer, (call, window) in enumerate(zip(calls, dimensions.windows, strict=True)):
        if call != [(dimensions.heads, window, length)]:
            raise BadInput(
                f"layer {layer} of {type(forward.hf_model).__name__} does not attend once with "
                f"{dimensions.heads} heads and window {window}, as its config says: "
                "this model cannot run on the wavefront"
            )
    return logits


def _patched(
    module: nn.Module,
    edits: dict[str, Edit],
    seen: list[tuple[int, int | None, int]],
    device: torch.device,
) -> Callable[..., Any]:
    """The layer's forward for whole sequences, with some tokens' activations replaced."""
    own = module.forward
    stream, heads = overwrites(edits, device)

    def at_border(place: str, hidden: Tensor) -> Tensor:
        if place not in edits:
            return hidden
        tokens = hidden.flatten(0, 1).clone()
        tokens[edits[place].target] = tokens[edits[place].source]
        return tokens.view_as(hidden)

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = at_border("resid_pre", hidden)
        with attention_call(Stacked(heads, stream, seen)):
            call = own if stream is None else partial(stream.watch, own)
            out = call(hidden, *args, **kwargs)
        if isinstance(out, tuple):
            return (at_border("resid_post", out[0]), *out[1:])
        return at_border("resid_post", out)

    return forward
