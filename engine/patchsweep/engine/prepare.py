"""Before the first wave: everything that sources and metrics need beside it is made and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchsweep.errors import BadInput
from patchsweep.pairs import Pair, read_pairs
from patchsweep.passes import (
    Carry,
    Constants,
    Forward,
    Values,
    embedding_std,
    load_function,
    mean_activations,
    read_tensor,
    read_vector,
    wavefront,
)
from patchsweep.plan import Plan
from patchsweep.plan.layout import Layouts
from patchsweep.sae import SAE
from patchsweep.spec import Gaussian, Mean, Metric, Prompts, Resample, Sweep, Vector

# What draws hang on: results that were drawn in another way are of another sweep.
DRAWS = "the prompts' own tokens"
# Mean activations by component, [layer, position or 1, unit, width], of components over prompts, by
# position or all.
Averages = Callable[[list[str], Sequence[tuple[int, ...]], str], dict[str, Tensor]]

# Components whose width is one of the sizes of a layer.
WIDTH_OF = {"head_q": "d_qk", "head_k": "d_qk", "head_v": "d_head", "head_z": "d_head"}


def prepare(
    forward: Forward,
    plan: Plan,
    settings: Sweep,
    tokenizer: Any,
    sae: SAE | None,
    carry: Carry = wavefront,
    averages: Averages | None = None,
) -> Values:
    """BadInput for what the model does not have: layers, heads, widths. `averages` takes the means
    of a source; by default runs that are carried as all others."""
    layouts = plan.layouts
    components = layouts.patched(plan.grids)
    if sae is not None:
        call = sae.layer + (sae.at == "resid_post")
        sae = sae.to(forward.devices[call], forward.hf_model.dtype)
    for metric in settings.metrics:
        _check_metric(metric, plan)
    constants: Constants = {}
    for number, source in enumerate(plan.sources):
        if isinstance(source.given, Mean | Vector) and "head_pattern" in components:
            raise BadInput(
                f"source {source.name}: a row of attention has no {source.name} over other keys: "
                "patch head_pattern from zero, resample or another run"
            )
        if isinstance(source.given, Mean):
            prompts = mean_prompts(source.given, plan.pairs, tokenizer)
            for name in components:
                _width(forward, layouts, name)  # every layer has that
            take = averages or partial(mean_activations, forward, layouts, sae=sae, carry=carry)
            found = take(components, prompts, source.given.by)
            constants |= {(number, name): table for name, table in found.items()}
        elif isinstance(source.given, Vector):
            for name in components:
                sizes = (len(layouts.layers(name)), *_width(forward, layouts, name))
                table = read_vector(source.given, name, *sizes)
                constants[number, name] = table.to(forward.device)
    gaussian = settings.corrupt if isinstance(settings.corrupt, Gaussian) else None
    return Values(
        sources=plan.sources,
        constants=constants,
        noise_scale=embedding_std(forward, gaussian, layouts) if gaussian else 0.0,
        sae=sae,
        directions={
            m.column: _direction(m, _width(forward, layouts, m.component)[1]).to(forward.device)
            for m in settings.metrics
            if m.name == "probe"
        },
    )


def mean_prompts(given: Mean, pairs: Sequence[Pair], tokenizer: Any) -> list[tuple[int, ...]]:
    """The prompts that a mean is taken over."""
    if given.prompts == "clean":
        return [p.clean for p in pairs]
    if given.prompts == "corrupt":
        if not all(p.corrupt for p in pairs):
            raise BadInput("source mean: prompts: corrupt, but a pair has none: use clean")
        return [p.corrupt for p in pairs]
    return [
        p.clean
        for p in read_pairs(Path(given.prompts), tokenizer, Prompts.model_fields["bos"].default)
    ]


def _width(forward: Forward, layouts: Layouts, name: str) -> tuple[int, int]:
    """Units of a component, and the width of one."""
    d, units = layouts.dimensions, layouts.units(name)
    if name in WIDTH_OF:
        d.check_even(f"{name} has no mean, vector or probe", WIDTH_OF[name])
    wide = {
        "embed": forward.hf_model.get_input_embeddings().weight.shape[1],
        "neuron": 1,
        "sae_feature": 1,
        **{head: getattr(d, size) for head, size in WIDTH_OF.items()},
    }
    return units, wide.get(name, d.d_model)


def _check_metric(m: Metric, plan: Plan) -> None:
    """BadInput for a corrupt run or a function that is not there."""
    if m.name == "relative_prob" and any(s.kind != "run" for s in plan.sources):
        raise BadInput("relative_prob compares with the corrupt run: every source must have one")
    if m.name == "callable":
        load_function(m.path)


def _direction(m: Metric, width: int) -> Tensor:
    """A probe's direction [width]."""
    direction = read_tensor(Path(m.file))
    if tuple(direction.shape) != (width,):
        raise BadInput(
            f"{m.file}: the probe is {list(direction.shape)}, {m.component} of this model needs "
            f"[{width}]"
        )
    return direction


def digest(values: Values, plan: Plan, tokenizer: Any) -> str:
    """Identifies what files and draws gave to a sweep, whatever computes it. Means are known
    by their prompts: they round differently from one backend or device to another."""
    found = hashlib.sha256()
    of_means = set()
    for number, source in enumerate(plan.sources):
        if isinstance(source.given, Gaussian | Resample):
            found.update(DRAWS.encode())
        if isinstance(source.given, Mean):
            of_means.add(number)
            found.update(f"{mean_prompts(source.given, plan.pairs, tokenizer)}".encode())
    given = {key: x for key, x in values.constants.items() if key[0] not in of_means}
    tensors: list[tuple[object, Tensor]] = [*given.items(), *values.directions.items()]
    if values.sae is not None:
        found.update(f"{values.sae.k}".encode())
        tensors += [(k, x) for k, x in vars(values.sae).items() if isinstance(x, Tensor)]
    for name, tensor in tensors:
        found.update(f"{name}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().to("cpu", torch.float64).contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def files_of(settings: Sweep) -> list[str]:
    """The files that `digest` speaks of."""
    found = [str(given.file) for _, given in settings.sources if isinstance(given, Vector)]
    for _, given in settings.sources:
        if isinstance(given, Mean) and given.prompts not in ("clean", "corrupt"):
            found.append(given.prompts)
    found += [m.file for m in settings.metrics if m.name == "probe"]
    return found + ([str(settings.sae.file)] if settings.sae else [])
