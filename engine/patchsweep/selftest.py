"""Trust, but check: a few cells of every component, once on the wave and once as full forwards.

Before a sweep starts, its longest prompt is run three ways on the loaded model: as plain forwards
with transformers' own attention, as one stacked batch of full forwards with a few cells patched
under the masks that the model makes, and as a wave. All must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchsweep.attention import Stacked, attention_call, attention_is
from patchsweep.dimensions import Dimensions
from patchsweep.errors import NotOnWavefront
from patchsweep.forward import Forward, neurons_seen
from patchsweep.offload import replaced
from patchsweep.pairs import Pair
from patchsweep.plan import Plan, make_plan
from patchsweep.sae import SAE
from patchsweep.schedule import Schedule, make_schedule
from patchsweep.sites import SETS, Site
from patchsweep.spec import Sweep
from patchsweep.stacked import batches
from patchsweep.stream import ResidualStream, Tap
from patchsweep.taps import Editor, Seen
from patchsweep.values import Values
from patchsweep.wave import across, embedding_tap, wavefront

CELLS = 16  # per component

# Largest difference allowed, as a share of the largest logit. float64: the families' own eager
# attention computes its softmax in float32.
TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}
Calls = list[tuple[int, int, int | None, int]]  # of attention: heads, kv heads, window, queries


@dataclass(frozen=True)
class SelfTest:
    """What the check found: patched cells compared, and the largest differences, in logits."""

    cells: int
    baseline_difference: float
    cell_difference: float
    tolerance: float


@torch.no_grad()
def check(forward: Forward, plan: Plan, sae: SAE | None) -> SelfTest:
    """Compare the three ways; NotOnWavefront if they differ by more than the dtype's tolerance.

    The model must be using patchsweep's attention.
    """
    small = _few_cells(plan)
    schedule = make_schedule(small, small.waves[0])
    chosen = len(schedule.base_offset) + np.flatnonzero(schedule.runs.set)
    prompts = torch.from_numpy(schedule.embedding.tokens[: schedule.base]).view(2, -1)
    with attention_is(forward.hf_model, "eager"):
        own = _last_logits(forward, prompts.to(forward.device))
    editor = Editor(
        layouts=small.layouts,
        values=Values(small.sources, sae=sae),
        source=0,
        positions=schedule.inner,
        keys=schedule.keys,
        inner={},
        device=forward.device,
    )
    embedding = partial(embedding_tap, editor=editor, sample=0)
    reached = wavefront(forward, schedule, across(forward, editor), embedding)
    wave = forward.logits(reached[:, 0]).to(own.device)
    patched = _stacked(forward, small.dimensions, schedule, editor)

    tolerance = TOLERANCE[own.dtype] * max(1.0, _largest(own))
    found = SelfTest(
        cells=len(chosen),
        baseline_difference=_largest(_difference(wave[:2], own)),
        cell_difference=_largest(_difference(wave[chosen], patched[chosen])),
        tolerance=tolerance,
    )
    for what in ("baseline", "cell"):
        difference = getattr(found, f"{what}_difference")
        if difference > tolerance:
            raise NotOnWavefront(
                f"{type(forward.hf_model).__name__} failed its self-test: a {what} is "
                f"{difference:.2g} logits from a full forward (tolerance {tolerance:.2g}): "
                "this family cannot run on the wavefront"
            )
    return found


def what(plan: Plan) -> str:
    """What a self-test of this plan would compare: the prompts and the sites."""
    small = _few_cells(plan)
    [pair] = small.pairs
    return f"{pair.clean} {pair.corrupt} {small.hash}"


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """|a − b|; not finite in both is equal, in one of them is as far as can be."""
    far = torch.finfo(a.dtype).max
    both = a.isfinite() == b.isfinite()
    difference = torch.where(a.isfinite() & b.isfinite(), (a - b).abs(), 0.0)
    return torch.where(both, difference, far)


def _largest(x: Tensor) -> float:
    """The largest finite magnitude; 0 if there is none."""
    return float(x[x.isfinite()].abs().max()) if bool(x.isfinite().any()) else 0.0


def _few_cells(plan: Plan) -> Plan:
    """One cell a run, some of every component, on the longest pair, as sets of one site."""
    pair = _probe(plan.pairs)
    layouts = plan.layouts
    rng = np.random.default_rng(0)
    cells = {}
    for name in layouts.patched([c for c in plan.grids if c != SETS]):
        layers, units = layouts.layers(name), layouts.units(name)
        # The tail reads the last token; cells there reach it from every layer.
        position = np.where(
            rng.random(CELLS) < 0.5, len(pair) - 1, rng.integers(len(pair), size=CELLS)
        )
        for layer, unit, at in zip(
            rng.integers(layers.start, layers.stop, CELLS),
            rng.integers(units, size=CELLS),
            position,
            strict=True,
        ):
            cells[name, int(layer), int(unit), int(at)] = Site(name, int(layer), int(unit), int(at))
    settings = Sweep(
        sets={str(i): (site,) for i, site in enumerate(cells.values())}, direction="noise"
    )
    return make_plan([pair], settings, plan.dimensions, 1 << 62, layouts.features)


def _probe(pairs: Sequence[Pair]) -> Pair:
    """The longest clean prompt against another one of its length, differing from the first token
    on where tokens allow."""
    longest = max(pairs, key=len)
    other = tuple(reversed(longest.clean))
    if other == longest.clean:
        other = ((longest.clean[0] + 1) % max(2, longest.clean[0] + 1), *longest.clean[1:])
    if len(longest.corrupt) == len(longest.clean):
        other = longest.corrupt
    return Pair(longest.clean, other, longest.answer, longest.wrong or longest.answer)


def _last_logits(forward: Forward, tokens: Tensor) -> Tensor:
    """Logits [row, vocab] at the last token of full forwards of `tokens` [row, position].

    Called as a user would: no positions are given, the model finds its own.
    """
    output = forward.hf_model.get_output_embeddings()
    own = output.forward
    with replaced(output, lambda hidden: own(hidden[:, -1:])):
        logits: Tensor = forward.hf_model(input_ids=tokens, use_cache=False).logits
    return logits[:, 0]


def _stacked(forward: Forward, d: Dimensions, schedule: Schedule, editor: Editor) -> Tensor:
    """Logits [row, vocab] of a schedule's rows as one batch of full forwards."""
    [batch] = batches(schedule, 1 << 62)
    tokens = torch.from_numpy(batch.tokens).to(forward.device)
    calls: list[Calls] = [[] for _ in forward.layers]
    tap = embedding_tap(batch.embedding, editor, 0)
    seen = across(forward, editor)
    steps = [seen(layer, batch.step(layer)) for layer in range(len(forward.layers) + 1)]
    with ExitStack() as stack:
        stack.enter_context(attention_call(Stacked()))
        if tap is not None:
            stack.enter_context(_embedded(forward, tap))
        for layer, module in enumerate(forward.layers):
            after = steps[layer + 1].taps.get("resid_post")
            patched = _patched(forward, layer, steps[layer], after, calls[layer])
            stack.enter_context(replaced(module, patched))
        logits = _last_logits(forward, tokens)
    _check_calls(forward, d, calls, batch.length)
    return logits


def _check_calls(forward: Forward, d: Dimensions, calls: Sequence[Calls], length: int) -> None:
    """Every layer attends once, as the config says."""
    for layer, (call, window) in enumerate(zip(calls, d.windows, strict=True)):
        if call != [(d.heads, d.kv_heads, window, length)]:
            raise NotOnWavefront(
                f"layer {layer} of {type(forward.hf_model).__name__} does not attend once with "
                f"{d.heads} heads, {d.kv_heads} key-value heads and window {window}, as its config "
                "says: this model cannot run on the wavefront"
            )


def _embedded(forward: Forward, tap: Tap) -> Any:
    embedding = forward.hf_model.get_input_embeddings()
    own = embedding.forward

    def embed(ids: Tensor) -> Tensor:
        out: Tensor = own(ids)
        tap(out.view(-1, 1, out.shape[-1]))
        return out

    return replaced(embedding, embed)


def _patched(
    forward: Forward, layer: int, what: Seen, after: Tap | None, calls: Calls
) -> Callable[..., Any]:
    """The layer's forward for whole sequences, with what happens in it and `after` it."""
    own, above = forward.layers[layer].forward, forward.devices[layer + 1]
    watched = {k: v for k, v in what.taps.items() if k in ResidualStream.PLACES}
    down = forward.down_projections[layer] if "neuron" in what.taps else None

    def at_border(tap: Tap | None, hidden: Tensor) -> Tensor:
        if tap is None:
            return hidden
        tokens = hidden.flatten(0, 1).clone()
        tap(tokens[:, None])
        return tokens.view_as(hidden)

    def call(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = at_border(what.taps.get("resid_pre"), hidden)
        stream = ResidualStream(watched) if watched else None
        run = own if stream is None else partial(stream.watch, own)
        with (
            attention_call(Stacked(what.taps, what.patterns, stream, calls)),
            neurons_seen(down, what.taps.get("neuron")),
        ):
            out = run(hidden, *args, **kwargs)
        if isinstance(out, tuple):
            return (at_border(after, out[0].to(above)), *out[1:])
        return at_border(after, out.to(above))

    return call
