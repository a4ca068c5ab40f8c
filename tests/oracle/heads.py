"""Patched forwards of every component and source: one full forward each, plain hooks.

One idea: a forward shows each activation, where it arises, as a view [position, unit, width] that
may be written to. Patches write; what stands there afterwards is recorded and goes on. A patch from
another run takes what an unpatched forward of that run recorded.

Beside `oracle.py`, which runs a family's own attention, this one runs a plain attention function of
its own, in which queries, keys, values and patterns are seen. Nothing is shared with the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from oracle import hooks
from oracle.families import Family

NAME = "oracle_heads"
# What a module gives to norms and rotary embedding, which act at the destination's position.
# A query or key that changes its position is patched here; any q, k or v may be.
PROJECTED = ("q_proj", "k_proj", "v_proj")
MOVED = {"head_q": "q_proj", "head_k": "k_proj"}
PROJECTION = {**MOVED, "head_v": "v_proj"}
HAS_UNITS = (
    *PROJECTED,
    "head_q",
    "head_k",
    "head_v",
    "head_pattern",
    "head_z",
    "neuron",
    "sae_feature",
)

# Called with a component, its layer and its activation [position, unit, width], which may be
# written to; of head_pattern [query, head, key].
Visit = Callable[[str, int, Tensor], None]
View = Callable[[Tensor], Tensor]
Activations = Mapping[tuple[str, int], Tensor]


class Autoencoder(Protocol):
    """A sparse autoencoder of the component `at` (head_z: all heads, flattened) in `layer`."""

    @property
    def at(self) -> str: ...

    @property
    def layer(self) -> int: ...

    @property
    def decoder(self) -> Tensor:
        """[feature, width]"""

    def encode(self, x: Tensor) -> Tensor:
        """Features [token, feature] of activations [token, width]."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """One run's input; `noise` [position, d_embed] is added to the output of the embedding."""

    ids: tuple[int, ...]
    noise: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Add:
    """Steering: what the destination has there, plus a vector [width]."""

    vector: Tensor


@dataclass(frozen=True, eq=False)
class Patch:
    """One activation that is replaced; `positions` maps those of the destination to the source's.

    The unit is a query head of head_q, head_pattern and head_z, a physical key-value head of head_k
    and head_v, a neuron, a feature; elsewhere None (or 0). The position of a pattern is the query.
    A constant source is what stands there then, [width] or a scalar; of a feature, its value.
    """

    component: str
    layer: int
    unit: int | None
    positions: Mapping[int, int]
    source: Prompt | Tensor | Add


def logits(
    model: PreTrainedModel,
    family: Family,
    destination: Prompt,
    patches: Sequence[Patch] = (),
    sae: Autoencoder | None = None,
) -> Tensor:
    """Logits [position, vocab] (float64) of the destination run with patches.

    Each patch takes effect at its place in the forward; of two of the same unit, position, layer
    and component the later in the list counts. (An `Add` adds to what it finds.) Features patched
    at one position each add their own change, measured before any of them.

    ValueError: a place that the model does not have; a position outside a prompt; queries and keys
    of another position where no one module makes them; patterns of other positions or lengths.
    """
    return forward(model, family, destination, patches, sae)[0]


def activations(
    model: PreTrainedModel,
    family: Family,
    prompt: Prompt,
    patches: Sequence[Patch] = (),
    sae: Autoencoder | None = None,
) -> Activations:
    """Activations [position, unit, width] of a run by (component, layer), after what is patched at
    the very place; head_pattern [query, head, key]; sae_feature [position, feature, 1]."""
    return forward(model, family, prompt, patches, sae)[1]


def activation(
    model: PreTrainedModel,
    family: Family,
    prompt: Prompt,
    patches: Sequence[Patch],
    component: str,
    layer: int,
    sae: Autoencoder | None = None,
) -> Tensor:
    """One activation of a run, after what is patched at the very place.

    [position, head, width] of heads, head_pattern [head, query, key], else [position, width], where
    neurons and features are the width.
    """
    x = activations(model, family, prompt, patches, sae)[component, layer]
    if component == "head_pattern":
        return x.transpose(0, 1)
    return x if component.startswith("head_") else x.flatten(1)


def forward(
    model: PreTrainedModel,
    family: Family,
    prompt: Prompt,
    patches: Sequence[Patch],
    sae: Autoencoder | None,
    known: dict[Any, Activations] | None = None,
) -> tuple[Tensor, Activations]:
    """What `logits` and `activations` return, of one run. `known` keeps the source runs of one
    model for further calls."""
    sources = {} if known is None else known
    for patch in patches:
        _check(patch, prompt, sae)
        if isinstance(patch.source, Prompt) and _key(patch.source) not in sources:
            sources[_key(patch.source)] = forward(model, family, patch.source, (), sae)[1]

    run = _Run(sae)
    before = MOVED if model._can_set_attn_implementation() else PROJECTION
    for patch in _before_attention(_last_ones(patches), before):
        from_run = isinstance(patch.source, Prompt)
        edit = _Edit(patch, sources[_key(patch.source)] if from_run else {})
        at = sae.at if sae is not None and patch.component == "sae_feature" else patch.component
        run.edits.setdefault((at, patch.layer), []).append(edit)

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(_own_attention(model, run.visit))
        embedding = model.get_input_embeddings()
        stack.enter_context(hooks.changed(embedding, "output", partial(_embed, prompt, run.visit)))
        for layer in range(model.config.num_hidden_layers):
            for component, module, at, view in _places(model, family, layer):
                see = partial(_seen, view, partial(run.visit, component, layer))
                stack.enter_context(hooks.changed(module, at, see))
            if not family.parallel:
                visit = partial(run.visit, "resid_mid", layer)
                stack.enter_context(_mid(model, family, layer, visit))
        out = model(torch.tensor([prompt.ids]), use_cache=False).logits[0].double()
    for component, layer in run.edits.keys() - run.seen.keys():
        raise ValueError(f"{family.model_type} has no {component} in layer {layer} to be patched")
    return out, run.seen


@dataclass(frozen=True, eq=False)
class _Edit:
    """A patch and what its source run has recorded."""

    patch: Patch
    source: Activations

    def value(self, own: Tensor, position: int) -> Tensor:
        """What stands in place of `own` [width], with the source at `position`."""
        patch = self.patch
        if isinstance(patch.source, Add):
            return own + patch.source.vector
        if isinstance(patch.source, Tensor):
            return patch.source
        return self.source[patch.component, patch.layer][position, patch.unit or 0]


@dataclass(eq=False)
class _Run:
    """One forward: what is written where, and what was seen after it."""

    sae: Autoencoder | None
    edits: dict[tuple[str, int], list[_Edit]] = field(default_factory=dict)
    seen: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def visit(self, component: str, layer: int, x: Tensor) -> None:
        features: Tensor | None = None
        for edit in self.edits.get((component, layer), ()):
            patch = edit.patch
            if patch.component != "sae_feature":
                features = None
                for dst, src in patch.positions.items():
                    x[dst, patch.unit or 0] = edit.value(x[dst, patch.unit or 0].clone(), src)
                continue
            assert self.sae is not None and patch.unit is not None
            if features is None:
                features = self.sae.encode(x.flatten(1).clone())
            for dst, src in patch.positions.items():
                own = features[dst, patch.unit]
                change = (edit.value(own, src) - own) * self.sae.decoder[patch.unit]
                x[dst] += change.view_as(x[dst])
        self.seen[component, layer] = x.clone()
        if self.sae is not None and (component, layer) == (self.sae.at, self.sae.layer):
            self.seen["sae_feature", layer] = self.sae.encode(x.flatten(1).clone())[..., None]


def _check(patch: Patch, prompt: Prompt, sae: Autoencoder | None) -> None:
    if patch.unit is None if patch.component in HAS_UNITS else patch.unit:
        raise ValueError(f"{patch.component}: unit {patch.unit}")
    if any(not 0 <= dst < len(prompt.ids) for dst in patch.positions):
        raise ValueError(f"{patch.component}: {dict(patch.positions)} of {len(prompt.ids)} tokens")
    if patch.component == "sae_feature" and (sae is None or sae.layer != patch.layer):
        raise ValueError(f"sae_feature: no autoencoder in layer {patch.layer}")
    if not isinstance(patch.source, Prompt):
        return
    length = len(patch.source.ids)
    if any(not 0 <= src < length for src in patch.positions.values()):
        raise ValueError(f"{patch.component}: {dict(patch.positions)} from {length} tokens")
    moved = any(dst != src for dst, src in patch.positions.items())
    if patch.component == "head_pattern" and (moved or length != len(prompt.ids)):
        raise ValueError("a row of attention has no meaning over other keys")


def _key(prompt: Any) -> tuple[Any, ...]:
    """The same of two prompts that say the same."""
    return prompt.ids, None if prompt.noise is None else prompt.noise.numpy().tobytes()


def _last_ones(patches: Sequence[Patch]) -> list[Patch]:
    """The patches without the positions at which a later one stands in the very same place."""
    taken: set[tuple[str, int, int, int]] = set()
    out = []
    for patch in reversed(patches):
        place = (patch.component, patch.layer, patch.unit or 0)
        left = {dst: src for dst, src in patch.positions.items() if (*place, dst) not in taken}
        if not isinstance(patch.source, Add):
            taken.update((*place, dst) for dst in left)
        out.append(replace(patch, positions=left))
    return out[::-1]


def _before_attention(patches: Sequence[Patch], before: Mapping[str, str]) -> Iterator[Patch]:
    """Queries and keys of another position are patched before the model rotates them; where
    attention is not seen, all of `before` are patched in their projections."""
    for patch in patches:
        if patch.component not in before or not isinstance(patch.source, Prompt):
            yield patch
            continue
        anywhere = patch.component not in MOVED or before is not MOVED
        moved = {dst: src for dst, src in patch.positions.items() if anywhere or dst != src}
        kept = {dst: src for dst, src in patch.positions.items() if dst not in moved}
        if moved:
            yield replace(patch, component=before[patch.component], positions=moved)
        if kept:
            yield replace(patch, positions=kept)


# Where activations are seen.


def _places(
    model: PreTrainedModel, family: Family, layer: int
) -> Iterator[tuple[str, Module, str, View]]:
    """Component, module, input or output, and how [position, width] is seen by units."""
    block = model.get_submodule(family.layer.format(layer))
    for component, (module, at) in hooks.modules(model, family, layer).items():
        if component != "resid_mid":
            heads = model.config.num_attention_heads if component == "head_z" else 1
            yield component, module, at, partial(_units, heads)
    for part, component in enumerate(PROJECTED if family.qkv else ()):
        module = block.get_submodule(family.qkv[0 if family.fused else part])
        yield component, module, "output", partial(_projected, family, model.config, part)
    if family.down is not None:
        yield "neuron", block.get_submodule(family.down), "input", lambda x: x.unsqueeze(-1)


def _units(count: int, x: Tensor) -> Tensor:
    return x.view(len(x), count, x.shape[-1] // count)


def _projected(family: Family, config: PretrainedConfig, part: int, x: Tensor) -> Tensor:
    """Queries, keys or values (part 0, 1, 2) in the output [position, width] of their module."""
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads if family.grouped else heads
    counts = (heads, kv_heads, kv_heads)
    if family.fused == "heads":
        return _units(3 * heads, x)[:, part::3]
    if family.fused == "blocks":
        first = sum(counts[:part])
        return _units(sum(counts), x)[:, first : first + counts[part]]
    return _units(counts[part], x)


def _seen(view: View, visit: Callable[[Tensor], None], hidden: Tensor) -> Tensor:
    new = hidden.reshape(-1, hidden.shape[-1]).clone()
    visit(view(new))
    return new.view_as(hidden)


def _embed(prompt: Prompt, visit: Visit, hidden: Tensor) -> Tensor:
    new = hidden.clone()
    if prompt.noise is not None:
        if prompt.noise.shape != new[0].shape:
            raise ValueError(f"noise {list(prompt.noise.shape)} on {list(new[0].shape)}")
        new[0] += prompt.noise.to(new)
    visit("embed", 0, new[0].unsqueeze(1))
    return new


@contextmanager
def _mid(
    model: PreTrainedModel, family: Family, layer: int, visit: Callable[[Tensor], None]
) -> Iterator[None]:
    """The residual stream after attention: attention is made to add just what is missing."""
    modules = hooks.modules(model, family, layer)
    before: list[Tensor] = []

    def see(hidden: Tensor) -> Tensor:
        before.append(hidden)
        return hidden

    def swap(out: Tensor) -> Tensor:
        mid = before[-1] + out * family.residual_multiplier
        new = mid.clone()
        visit(new[0].unsqueeze(1))
        return torch.where(new == mid, out, (new - before[-1]) / family.residual_multiplier)

    with hooks.changed(*modules["resid_pre"], see), hooks.changed(*modules["attn_out"], swap):
        yield


# Attention, with the visit of the forward that is under way.

_visits: list[Visit] = []


@contextmanager
def _own_attention(model: PreTrainedModel, visit: Visit) -> Iterator[None]:
    _visits.append(visit)
    try:
        with hooks.attention(model, NAME):
            yield
    finally:
        _visits.pop()


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention written out, in the dtype of its inputs.

    query [batch, head, query, d_head], key and value [batch, kv_head, position, d_head],
    attention_mask [batch, 1, query, position] added to the scores; a sink per head, `s_aux` [head],
    takes part of the softmax and gives nothing. z [batch, query, head, d_head].
    """
    visit = _visits[-1]
    q, k, v = (
        x[0].transpose(0, 1).clone() for x in (query, key, value)
    )  # [position, head, d_head]
    for component, x in (("head_q", q), ("head_k", k), ("head_v", v)):
        visit(component, module.layer_idx, x)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->qhk", q, k)
    scores = scores * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + attention_mask[0, 0][:, None]
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if s_aux is not None:
        total = total + torch.exp(s_aux.to(scores)[:, None] - top)
    pattern = weights / total
    visit("head_pattern", module.layer_idx, pattern)
    return torch.einsum("qhk,khd->qhd", pattern, v)[None], None


AttentionInterface.register(NAME, _attention)
# Without a mask function of the same name transformers passes no mask at all.
AttentionMaskInterface.register(NAME, eager_mask)
