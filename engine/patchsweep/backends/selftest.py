"""Trust, but check: what a backend computes, against the judge, before any number is believed.

The judge (`patchsweep.judge`) runs the model as its user calls it and shares no code with either
backend. It says what the baselines of the longest and the shortest prompt are, what some cells of
every component that is patched are, and whether the cells that the plan calls structural are: all
of a component's at once, every layer, unit and position, must leave the logits alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from patchsweep.backends.probe import VARIANT, Probe
from patchsweep.device import out_of_memory
from patchsweep.errors import BadInput, as_line
from patchsweep.judge import Edit, Judge, Prompt
from patchsweep.passes import Carry, Editor, Forward, Seen, Values, across, embedding_tap
from patchsweep.plan.schedule import make_schedule, rows_only
from patchsweep.sae import SAE
from patchsweep.sites import Site, unit_name

RECORDED = 1 << 26  # values of one component that are kept at a time

# Largest difference allowed, as a share of the largest logit. float64: some families compute norms
# or their softmax in float32.
TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}
# Of that, what patches that change nothing may differ by: the same products, rounded alike but for
# experts, which see other tokens beside them.
NOTHING = 0.1


@dataclass(frozen=True)
class SelfTest:
    """What was compared, with the largest differences in logits: baselines of prompts of these
    lengths over the whole vocabulary, cells of these components that were run, and structural ones.
    """

    components: list[str]
    prompts: list[int]
    cells: int
    structural: int
    baseline_difference: float
    cell_difference: float
    structural_difference: float
    tolerance: float


@dataclass(frozen=True, eq=False)
class Truth:
    """What the judge says of a probe, on the CPU: logits of its prompts, of its pair (clean,
    corrupt) and of its cells, [row, vocab]; which keys queries see by layer, [query, key]."""

    probe: Probe
    prompts: Tensor
    pair: Tensor
    cells: Tensor
    masks: Sequence[Tensor | None]
    structural: int
    structural_difference: float
    tolerance: float


@torch.no_grad()
def ask(hf_model: PreTrainedModel, probe: Probe, sae: SAE | None) -> Truth:
    """What the judge says. BadInput if the model cannot run as it is called, is not causal, has
    other units than the plan, or if a structural cell changes logits."""
    name = type(hf_model).__name__
    try:
        return _asked(hf_model, probe, sae)
    except BadInput:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise BadInput(
            f"{name} cannot be run as {name}(input_ids=...), with hooks on its layers: "
            f"{as_line(error)}: this model cannot be swept"
        ) from error


def _asked(hf_model: PreTrainedModel, probe: Probe, sae: SAE | None) -> Truth:
    plan = probe.plan
    [pair] = plan.pairs
    judge = Judge(hf_model, probe.prompts[0], plan.dimensions.layers, sae)
    plain = {t: judge.plain(t) for t in {*probe.prompts, pair.clean}}
    clean = plain[pair.clean]
    tolerance = TOLERANCE[clean.dtype] * max(1.0, _largest(clean[-1]))
    _check_units(judge, probe)
    last = pair.clean[-1]
    other = (*pair.clean[:-1], next(t for t in (*pair.corrupt, (last + 1) % 2) if t != last))
    together, masks = judge.watch([pair.clean, pair.corrupt, other])
    _check_causal(judge, together[0, :-1], together[2, :-1], tolerance)
    judge.stackable = _largest(difference(together[0], clean)) <= NOTHING * tolerance
    corrupt = together[1] if judge.stackable else judge.plain(pair.corrupt)
    alone = torch.stack([clean[-1], corrupt[-1]])
    asked = [_asked_of(judge, probe, c, alone[0], tolerance) for c in probe.components]
    return Truth(
        probe=probe,
        prompts=torch.stack([plain[t][-1].cpu() for t in probe.prompts]),
        pair=alone.cpu(),
        cells=torch.cat([cells.cpu() for _, _, cells in asked]),
        masks=masks,
        structural=sum(count for count, _, _ in asked),
        structural_difference=max(worst for _, worst, _ in asked),
        tolerance=tolerance,
    )


def _check_causal(judge: Judge, one: Tensor, other: Tensor, tolerance: float) -> None:
    """BadInput if the last token changes what earlier ones compute, [position, vocab]."""
    apart = _largest(difference(one, other))
    if apart > NOTHING * tolerance:
        raise BadInput(
            f"{judge.name} is not causal (a token changes the logits of earlier ones by "
            f"{apart:.2g}): neither backend can run it"
        )


def _check_units(judge: Judge, probe: Probe) -> None:
    """BadInput if attention has other heads than the plan says."""
    layouts = probe.plan.layouts
    for name in probe.components:
        for layer in layouts.layers(name):
            has = judge.heads(layer).get(name)
            if has is not None and has != layouts.units(name):
                raise BadInput(
                    f"{name} of layer {layer} of {judge.name}: attention is given {has} heads, the "
                    f"model's config and weights say {layouts.units(name)}: this model cannot be "
                    "swept by heads"
                )


def _recorded(
    judge: Judge, probe: Probe, tokens: tuple[int, ...], component: str, layers: Sequence[int]
) -> dict[int, Tensor]:
    """Activations [position, unit, width] by layer. BadInput if there are not the plan's units."""
    keys = [(component, layer) for layer in layers]
    _, seen = judge.run([Prompt(tokens)], record=keys, reads=[-1])
    for layer in layers:
        has, said = seen[component, layer].shape[2], probe.plan.layouts.units(component)
        if has != said:
            raise BadInput(
                f"{component} of layer {layer} of {judge.name}: the model has {has} of them, its "
                f"config and weights say {said}: this model cannot be swept by them"
            )
    return {layer: seen[component, layer][0] for layer in layers}


def _asked_of(
    judge: Judge, probe: Probe, component: str, baseline: Tensor, tolerance: float
) -> tuple[int, float, Tensor]:
    """Of one component: how many cells the plan calls structural, by how much patching all of them
    changes the last token's logits, and the logits [cell, vocab] of the probe's cells. BadInput,
    with the layer, if structural cells change more than nothing."""
    layouts, [pair] = probe.plan.layouts, probe.plan.pairs
    structural = ~layouts.layout(component, VARIANT).exists[0]  # [layer, position]
    layers, units = list(layouts.layers(component)), layouts.units(component)
    values = len(pair) * units
    values *= len(pair) if component == "head_pattern" else probe.plan.dimensions.d_head
    step, worst = max(1, RECORDED // values), 0.0
    sites = [s for s in probe.sites if s.component == component]
    patches: dict[Site, Edit] = {}
    for i in range(0, len(layers), step):
        some = layers[i : i + step]
        source = _recorded(judge, probe, pair.corrupt, component, some)
        patches |= {s: _edit(s, source[s.layer or 0]) for s in sites if (s.layer or 0) in some}
        edits = []
        for layer in some:
            at = torch.from_numpy(np.flatnonzero(structural[layer - layers[0]]))
            every = torch.arange(units).repeat(len(at)), at.repeat_interleave(units)
            if len(at):
                edits.append(_put(component, layer, *every, source[layer]))
        if edits:
            apart = _changed(judge, pair.clean, baseline, edits)
            if apart > NOTHING * tolerance:
                raise _matters(judge, pair.clean, baseline, edits, tolerance)
            worst = max(worst, apart)
    if not sites:  # there is no cell that could change anything
        return int(structural.sum()) * units, worst, baseline[None][:0]
    rows = [[patches[s]] for s in sites]
    cells, _ = judge.run([Prompt(pair.clean)] * len(sites), rows, reads=[-1])
    return int(structural.sum()) * units, worst, cells[:, 0]


def _edit(site: Site, source: Tensor) -> Edit:
    assert isinstance(site.position, int)
    unit, at = torch.tensor([site.unit or 0]), torch.tensor([site.position])
    return _put(site.component, site.layer or 0, unit, at, source)


def _put(component: str, layer: int, unit: Tensor, at: Tensor, source: Tensor) -> Edit:
    """What a source run has there, [position, unit, width], in the same places."""
    value = source[at.to(source.device), unit.to(source.device)]
    return Edit(component, layer, unit, at, value)


def _matters(
    judge: Judge, tokens: tuple[int, ...], baseline: Tensor, edits: list[Edit], tolerance: float
) -> BadInput:
    """What to say of structural cells that change logits: the layer that changes them most."""
    by_layer = {e.layer: _changed(judge, tokens, baseline, [e]) for e in edits}
    layer = max(by_layer, key=by_layer.__getitem__)
    return BadInput(
        f"{judge.name} failed its self-test: {edits[0].component} patched in layer {layer} where "
        f"its attention windows and the prompts say that nothing can change moves a logit by "
        f"{by_layer[layer]:.2g} (tolerance {NOTHING * tolerance:.2g}): neither backend can run "
        "this model"
    )


def _changed(judge: Judge, tokens: tuple[int, ...], baseline: Tensor, edits: list[Edit]) -> float:
    logits, _ = judge.run([Prompt(tokens)], [edits], reads=[-1])
    return _largest(difference(logits[0, 0], baseline))


@torch.no_grad()
def compare(
    forward: Forward, carry: Carry, truth: Truth, sae: SAE | None, how: str = ""
) -> SelfTest:
    """Hold what a backend computes against the truth. BadInput, saying what differs by how much, if
    it is more than the dtype's tolerance; `how` says which backend that is."""
    probe = truth.probe
    small = probe.plan
    lines = [
        (f"the baseline of a prompt of {len(t)} tokens", row)
        for t, row in zip(probe.prompts, truth.prompts, strict=True)
    ]
    plain = rows_only(probe.prompts, small.dimensions.layers)
    found = [_logits(forward, carry(forward, plain, lambda *_: Seen({}), lambda _: None))]

    schedule = make_schedule(small, small.waves[0])
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
    rows = _logits(forward, carry(forward, schedule, across(forward, editor), embedding))
    base = len(schedule.base_offset)
    lines += [("the baseline of a pair's " + k, truth.pair[i]) for i, k in enumerate(RUNS)]
    found.append(rows[:base])
    # Cells of a run that is itself not finite are not finite on the wavefront, and marked so.
    sound = truth.pair.isfinite().any(1).numpy()[schedule.runs.base]
    runs = base + np.flatnonzero(schedule.runs.set & sound)
    cells = schedule.runs.cell[runs - base]
    lines += [(_said(probe.sites[c]), truth.cells[c]) for c in cells]
    found.append(rows[torch.from_numpy(runs)])

    apart = difference(torch.cat(found), torch.stack([row for _, row in lines]))
    by_row = [_largest(row) for row in apart]
    first = len(lines) - len(cells)
    for some in (range(first), range(first, len(lines))):  # baselines say more than cells
        worst = max(some, key=by_row.__getitem__, default=0)
        if by_row[worst] > truth.tolerance:
            raise BadInput(
                f"{type(forward.hf_model).__name__} failed its self-test{how}: {lines[worst][0]} "
                f"has a logit {by_row[worst]:.2g} from the model's own forward (tolerance "
                f"{truth.tolerance:.2g})"
            )
    return SelfTest(
        components=list(probe.components),
        prompts=sorted({len(t) for t in probe.prompts}),
        cells=len(cells),
        structural=truth.structural,
        baseline_difference=max(by_row[:first]),
        cell_difference=max(by_row[first:], default=0.0),
        structural_difference=truth.structural_difference,
        tolerance=truth.tolerance,
    )


RUNS = ("clean prompt", "corrupt prompt")


def _said(site: Site) -> str:
    unit = f", {unit_name(site.component)} {site.unit}" if unit_name(site.component) else ""
    return f"{site.component} patched in layer {site.layer}{unit}, at position {site.position},"


def check_masks(truth: Truth) -> None:
    """BadInput if attention sees other keys than a causal mask, within the layer's window, allows:
    those the wavefront gives it."""
    windows = truth.probe.plan.dimensions.windows
    for layer, (mask, window) in enumerate(zip(truth.masks, windows, strict=True)):
        if mask is None:
            continue
        query, key = (torch.arange(n, device=mask.device) for n in mask.shape)
        assumed = key <= query[:, None]
        if window is not None:
            assumed &= query[:, None] - key < window
        if not torch.equal(mask, assumed):
            within = f" within a window of {window}" if window else ""
            raise BadInput(f"the attention mask of layer {layer} is not causal{within}")


def _logits(forward: Forward, hidden: Tensor) -> Tensor:
    """Logits [row, vocab] on the CPU, from hidden [row, 1, d_model]."""
    return forward.logits(hidden[:, 0]).cpu()


def difference(a: Tensor, b: Tensor) -> Tensor:
    """|a − b|; not finite in both is equal, in one of them is as far as can be."""
    far = torch.finfo(a.dtype).max
    both = a.isfinite() == b.isfinite()
    apart = torch.where(a.isfinite() & b.isfinite(), (a - b).abs(), 0.0)
    return torch.where(both, apart, far)


def _largest(x: Tensor) -> float:
    """The largest finite magnitude; 0 if there is none."""
    return float(x[x.isfinite()].abs().max()) if bool(x.isfinite().any()) else 0.0
