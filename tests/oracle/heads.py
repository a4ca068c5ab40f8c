"""Patched forwards of every component, source and alignment: one full forward each, plain hooks.

Beside `oracle.py`, which runs a family's own attention, this one runs a plain attention function of
its own, in which queries, keys, values and patterns are seen. Nothing is shared with the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from oracle import oracle
from oracle.families import Family

NAME = "oracle_heads"
IN_ATTENTION = ("head_q", "head_k", "head_v", "head_pattern")
# In the order of the forward; a layer's stream comes before what is computed from it.
ORDER = (
    "embed",
    "resid_pre",
    "head_q",
    "head_k",
    "head_v",
    "head_pattern",
    "head_z",
    "attn_out",
    "resid_mid",
    "neuron",
    "mlp_out",
    "resid_post",
)
# Where the neurons are, if not in `mlp.down_proj`: the module whose input they are.
DOWN = {
    "gpt2": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "gpt_neox_sequential": "mlp.dense_4h_to_h",
    "opt": "fc2",
    "phi": "mlp.fc2",
    "starcoder2": "mlp.c_proj",
}
# The last linear map or norm before rotary: q and k are patched there when they change position.
BEFORE_ROTARY = {"olmo2": ("self_attn.q_norm", "self_attn.k_norm")}
SEPARATE = ("self_attn.q_proj", "self_attn.k_proj")


@dataclass(frozen=True, eq=False)
class Prompt:
    """One run's input; `noise` [position, d_embed] is added to its token embeddings."""

    ids: tuple[int, ...]
    noise: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Add:
    """Steering: what the destination has there, plus a vector."""

    vector: Tensor


@dataclass(frozen=True, eq=False)
class Patch:
    """One activation that is replaced; `positions`: those of the destination to the source's."""

    component: str
    layer: int
    unit: int
    positions: Mapping[int, int]
    source: Prompt | Tensor | Add


@dataclass(eq=False)
class _Layer:
    """What happens in a layer's attention: values [token, unit, width] are seen and replaced."""

    edits: dict[str, Callable[[Tensor], None]] = field(default_factory=dict)
    seen: dict[str, Tensor] = field(default_factory=dict)


_layers: list[_Layer] = []
_count = [0]


def _attention(
    _module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    layer = _layers[_count[0]]
    _count[0] += 1
    parts = {"head_q": query, "head_k": key, "head_v": value}
    for name, x in parts.items():
        x = x[0].transpose(0, 1).clone()
        if name in layer.edits:
            layer.edits[name](x)
        layer.seen[name] = x
        parts[name] = x.transpose(0, 1)
    q, k, v = parts.values()
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = torch.einsum("hqd,hkd->hqk", q, k) * (
        q.shape[-1] ** -0.5 if scaling is None else scaling
    )
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.exp(scores + attention_mask[0, 0])  # small models: no maximum is taken out
    total = weights.sum(-1, keepdim=True)
    if s_aux is not None:
        total = total + torch.exp(s_aux.to(scores.dtype))[:, None, None]
    rows = (weights / total).transpose(0, 1).clone()  # [query, head, key]
    if "head_pattern" in layer.edits:
        layer.edits["head_pattern"](rows)
    layer.seen["head_pattern"] = rows
    return torch.einsum("qhk,hkd->qhd", rows, v)[None], None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


def logits(
    model: PreTrainedModel,
    family: Family,
    destination: Prompt,
    patches: Sequence[Patch] = (),
    sae: Any = None,
) -> Tensor:
    """Logits [position, vocab] (float64) of a run with patches; `sae` as `activations` takes it."""
    return _forward(model, family, destination, patches, sae)[0]


def activations(
    model: PreTrainedModel,
    family: Family,
    prompt: Prompt,
    patches: Sequence[Patch] = (),
    sae: Any = None,
) -> dict[tuple[str, int], Tensor]:
    """Activations [position, unit, width] of a run, after what is patched at the very place; of a
    pattern [query, head, key]; of sae_feature [position, feature, 1], where `sae` has `at`,
    `layer`, `decoder` [feature, width] and `encode`."""
    return _forward(model, family, prompt, patches, sae)[1]


def _forward(
    model: PreTrainedModel, family: Family, prompt: Prompt, patches: Sequence[Patch], sae: Any
) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
    sources = {
        id(p.source): _forward(model, family, p.source, (), sae)[1]
        for p in patches
        if isinstance(p.source, Prompt)
    }
    layers = model.config.num_hidden_layers
    seen: dict[tuple[str, int], Tensor] = {}
    edits: dict[tuple[str, int], list[Callable[[Tensor], None]]] = {}
    before_rotary = []
    for patch in patches:
        moved = any(a != b for a, b in patch.positions.items())
        from_run = isinstance(patch.source, Prompt)
        if moved and from_run and patch.component in ("head_q", "head_k"):
            before_rotary.append(_rotated(model, family, patch))
            continue
        if moved and from_run and patch.component == "head_pattern":
            raise ValueError("a row of attention has no meaning over other keys")
        place = (patch.component, patch.layer)
        if patch.component == "sae_feature":
            place = (sae.at, sae.layer)
        edits.setdefault(place, []).append(_edit(patch, sources.get(id(patch.source), {}), sae))

    def visit(component: str, layer: int, x: Tensor) -> None:
        """x [position, unit, width] is what the forward goes on with."""
        for edit in edits.get((component, layer), ()):
            edit(x)
        seen[component, layer] = x.clone()
        if sae is not None and (component, layer) == (sae.at, sae.layer):
            seen["sae_feature", layer] = sae.encode(x.flatten(1))[..., None]

    _layers[:] = [
        _Layer({c: lambda x, c=c, i=i: visit(c, i, x) for c in IN_ATTENTION}) for i in range(layers)
    ]
    _count[0] = 0
    with ExitStack() as stack:
        stack.enter_context(_own_attention(model))
        embedding = model.get_input_embeddings()
        stack.enter_context(_hooked(embedding, "output", lambda x: _embed(x, prompt, visit)))
        for layer in range(layers):
            for component, module, at, units in _modules(model, family, layer):
                stack.enter_context(_hooked(module, at, _viewed(component, layer, units, visit)))
            if not family.parallel:
                multiplier = family.residual_multiplier
                stack.enter_context(_mid(model, family, layer, multiplier, visit))
        for module, swap in before_rotary:
            stack.enter_context(_hooked(module, "output", swap))
        with torch.no_grad():
            out = model(torch.tensor([prompt.ids]), use_cache=False).logits[0].double()
    return out, seen


def _edit(
    patch: Patch, source: Mapping[tuple[str, int], Tensor], sae: Any
) -> Callable[[Tensor], None]:
    def edit(x: Tensor) -> None:
        before = x.clone()
        for dst, src in patch.positions.items():
            if patch.component == "sae_feature":
                old = sae.encode(before.flatten(1))[dst, patch.unit]
                if isinstance(patch.source, Add):
                    new = old + patch.source.vector
                elif isinstance(patch.source, Prompt):
                    new = source["sae_feature", patch.layer][src, patch.unit, 0]
                else:
                    new = patch.source
                flat = x.view(x.shape[0], -1)
                flat[dst] += (new - old) * sae.decoder[patch.unit]
                continue
            if isinstance(patch.source, Add):
                new = before[dst, patch.unit] + patch.source.vector
            elif isinstance(patch.source, Prompt):
                new = source[patch.component, patch.layer][src, patch.unit]
            else:
                new = patch.source
            x[dst, patch.unit] = new

    return edit


def _embed(x: Tensor, prompt: Prompt, visit: Callable[[str, int, Tensor], None]) -> Tensor:
    x = x.clone()
    if prompt.noise is not None:
        x[0] += prompt.noise.to(x)
    visit("embed", 0, x.view(-1, 1, x.shape[-1]))
    return x


def _viewed(
    component: str, layer: int, units: int, visit: Callable[[str, int, Tensor], None]
) -> Callable[[Tensor], Tensor]:
    def see(hidden: Tensor) -> Tensor:
        x = hidden.clone().contiguous()
        count = units or x.shape[-1]
        visit(component, layer, x.view(-1, count, x.shape[-1] // count))
        return x

    return see


def _modules(
    model: PreTrainedModel, family: Family, layer: int
) -> Iterator[tuple[str, Any, str, int]]:
    """Component, module, input or output, and how many units (0: every number is one)."""
    heads = model.config.num_attention_heads
    block = model.get_submodule(family.layer.format(layer))
    for component, (module, at) in oracle._modules(model, family, layer).items():
        if component != "resid_mid":
            yield component, module, at, heads if component == "head_z" else 1
    path = next(
        (p for n, p in DOWN.items() if n.split("_seq")[0] == family.model_type), "mlp.down_proj"
    )
    parts = dict(block.named_modules())
    if path in parts:
        yield "neuron", parts[path], "input", 0


@contextmanager
def _hooked(module: Any, at: str, see: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """`see` takes a module's input or output and returns what stands in its place."""
    if at == "input":
        handle = module.register_forward_pre_hook(
            lambda _m, args, kwargs: oracle._with_input(
                args, kwargs, see(oracle._input(args, kwargs))
            ),
            with_kwargs=True,
        )
    else:
        handle = module.register_forward_hook(
            lambda _m, _a, out: oracle._with_output(out, see(oracle._output(out)))
        )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _mid(
    model: PreTrainedModel,
    family: Family,
    layer: int,
    multiplier: float,
    visit: Callable[[str, int, Tensor], None],
) -> Iterator[None]:
    """The residual stream after attention: attention is made to add just what is missing."""
    modules = oracle._modules(model, family, layer)
    before: list[Tensor] = []

    def see(hidden: Tensor) -> Tensor:
        before.append(hidden)
        return hidden

    def swap(out: Tensor) -> Tensor:
        mid = before[-1] + out * multiplier
        new = mid.clone().contiguous()
        visit("resid_mid", layer, new.view(-1, 1, new.shape[-1]))
        return torch.where(new == mid, out, (new - before[-1]) / multiplier)

    with (
        _hooked(modules["resid_pre"][0], "input", see),
        _hooked(modules["attn_out"][0], "output", swap),
    ):
        yield


def _rotated(
    model: PreTrainedModel, family: Family, patch: Patch
) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """A query or key of another position: what the projection (or the norm over all heads behind
    it) returned there, which the model then rotates where it is put: the module, and the change."""
    assert isinstance(patch.source, Prompt)
    prompt = patch.source
    paths = BEFORE_ROTARY.get(family.model_type, SEPARATE)
    block = model.get_submodule(family.layer.format(patch.layer))
    module = block.get_submodule(paths[patch.component == "head_k"])
    found: list[Tensor] = []

    def see(out: Tensor) -> Tensor:
        found.append(out.clone())
        return out

    _layers[:] = [_Layer() for _ in range(model.config.num_hidden_layers)]
    _count[0] = 0
    embedding = model.get_input_embeddings()
    with (
        _own_attention(model),
        _hooked(module, "output", see),
        _hooked(embedding, "output", lambda x: _embed(x, prompt, lambda *_: None)),
        torch.no_grad(),
    ):
        model(torch.tensor([prompt.ids]), use_cache=False)
    units = _layers[patch.layer].seen[patch.component].shape[1]

    def swap(out: Tensor) -> Tensor:
        new = out.clone().contiguous()
        x, y = (t.view(-1, units, t.shape[-1] // units) for t in (new, found[0]))
        for dst, src in patch.positions.items():
            x[dst, patch.unit] = y[src, patch.unit]
        return new

    return module, swap


@contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
