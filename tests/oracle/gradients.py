"""Gradients and relevance of single runs: plain hooks and autograd on a model's own modules.

As in `heads.py` nothing is shared with the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oracle import heads, hooks
from oracle.families import Family

Touch = Callable[[str, int, Tensor], None]
Metric = Callable[[Tensor, dict[tuple[str, int], Tensor]], Tensor]


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """RMS norms that keep float64, which their families' own leave for float32."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _rms_norm(module, fixed=False)  # type: ignore[method-assign]
    return model


def _rms_norm(module: Any, fixed: bool) -> Callable[[Tensor], Tensor]:
    weight = module.weight + ("Gemma" in type(module).__name__)
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon

    def forward(x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return weight * x * (scale.detach() if fixed else scale)

    return forward


def forward(
    model: PreTrainedModel, family: Family, ids: Sequence[int], touch: Touch
) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
    """Logits [position, vocab] and activations [position, unit, width] of a run that autograd can
    follow; `touch` is shown every activation in the order of the forward, and may overwrite it."""
    seen: dict[tuple[str, int], Tensor] = {}

    def visit(component: str, layer: int, x: Tensor) -> None:
        touch(component, layer, x)
        seen[component, layer] = x

    with ExitStack() as stack:
        stack.enter_context(heads._own_attention(model, visit))
        embed = partial(heads._embed, heads.Prompt(tuple(ids)), visit)
        stack.enter_context(hooks.changed(model.get_input_embeddings(), "output", embed))
        for layer in range(model.config.num_hidden_layers):
            for component, module, at, view in heads._places(model, family, layer):
                if component not in heads.PROJECTED:
                    see = partial(heads._seen, view, partial(visit, component, layer))
                    stack.enter_context(hooks.changed(module, at, see))
            if not family.parallel:
                stack.enter_context(_mid(model, family, layer, visit))
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits, seen


@contextmanager
def _mid(model: PreTrainedModel, family: Family, layer: int, visit: Touch) -> Iterator[None]:
    """The residual stream after attention."""
    modules = hooks.modules(model, family, layer)
    before: list[Tensor] = []

    def see(hidden: Tensor) -> Tensor:
        before.append(hidden)
        return hidden

    def swap(out: Tensor) -> Tensor:
        mid = before[-1] + out * family.residual_multiplier
        visit("resid_mid", layer, mid[0].unsqueeze(1))
        return (mid - before[-1]) / family.residual_multiplier

    with hooks.changed(*modules["resid_pre"], see), hooks.changed(*modules["attn_out"], swap):
        yield


def gradients(
    model: PreTrainedModel,
    family: Family,
    ids: Sequence[int],
    metric: Metric,
    touch: Touch = lambda *_: None,
    after: Touch = lambda *_: None,
) -> dict[tuple[str, int], Tensor]:
    """∂m/∂a of every activation of a run; `touch` changes activations before and `after` behind
    the place where the gradient is taken."""
    leaves: dict[tuple[str, int], Tensor] = {}

    def add(component: str, layer: int, x: Tensor) -> None:
        touch(component, layer, x)
        leaf = leaves[component, layer] = torch.zeros_like(x, requires_grad=True)
        x += leaf
        after(component, layer, x)

    value = metric(*forward(model, family, ids, add))
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    each = zip(leaves.items(), found, strict=True)
    return {k: torch.zeros_like(leaf) if g is None else g for (k, leaf), g in each}


def fix_patterns(component: str, _: int, x: Tensor) -> None:
    """For `touch`: attention patterns pass no gradient on."""
    if component == "head_pattern":
        x.copy_(x.detach().clone())


@contextmanager
def relevance(model: PreTrainedModel) -> Iterator[None]:
    """RelP's rules for norms, activations and gates, module by module."""
    before = {}
    for module in model.modules():
        name = type(module).__name__
        rule: Callable[[Tensor], Tensor] | None = None
        if name.endswith("RMSNorm"):
            rule = _rms_norm(module, fixed=True)
        elif isinstance(module, nn.LayerNorm):
            rule = _layer_norm(module)
        elif name.endswith("MLP"):
            rule = _mlp(module)
        if rule is not None:
            before[module] = module.__dict__.get("forward")
            module.forward = rule  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.forward
            else:
                module.forward = own


def _layer_norm(module: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + module.eps).detach()
        return module.weight * centred / deviation + module.bias

    return forward


def _mlp(module: Any) -> Callable[[Tensor], Tensor]:
    def secant(act: Any, x: Tensor) -> Tensor:
        fixed = x.detach()
        return x * (act(fixed) / fixed)

    def gated(x: Tensor) -> Tensor:
        gate, up = secant(module.act_fn, module.gate_proj(x)), module.up_proj(x)
        return module.down_proj((gate * up.detach() + gate.detach() * up) / 2)

    def gpt2(x: Tensor) -> Tensor:
        return module.c_proj(secant(module.act, module.c_fc(x)))

    def neox(x: Tensor) -> Tensor:
        return module.dense_4h_to_h(secant(module.act, module.dense_h_to_4h(x)))

    if hasattr(module, "gate_proj"):
        return gated
    return gpt2 if hasattr(module, "c_fc") else neox
