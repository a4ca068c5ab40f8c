"""Estimates of small models, and what they are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from io import StringIO
from typing import Any

import numpy as np
import torch
from rich.console import Console

import patchsweep as ps
from inputs import Letters
from oracle import gradients, heads
from oracle.families import FAMILIES, Family
from patchsweep import attribution
from patchsweep.attribution import Estimates
from patchsweep.engine.planning import load_autoencoder, plan_sweep
from patchsweep.engine.prepare import prepare
from patchsweep.pairs import Pair
from patchsweep.passes.attention import attention_is
from patchsweep.passes.forward import take_apart
from patchsweep.report import show
from patchsweep.spec import parse_settings

EXACT = 1e-9
NAMES = ("llama", "gpt2", "gemma2", "qwen3", "mistral", "gpt_neox")
VIA = {"head_q", "head_k", "head_pattern"}  # components that act through patterns


def estimated(
    hf_model: Any,
    pairs: Sequence[Pair],
    estimators: Mapping[str, str],
    *,
    steps: int = 8,
    part: range | None = None,
    number: int = 0,
    counted: Any = None,
    **settings: Any,
) -> Estimates:
    given = parse_settings({"components": list(estimators), "direction": "both", **settings})
    model, sae = ps.wrap(hf_model, Letters()), load_autoencoder(given)
    plan = plan_sweep(model.dimensions, pairs, given, model.device, 4000, sae)
    with attention_is(hf_model):
        lengths = [len(tokens) for p in pairs for tokens in (p.clean, p.corrupt or p.clean)]
        forward = take_apart(hf_model, max(lengths), min(lengths))
        values = prepare(forward, plan, given, model.tokenizer, sae)
        part = part or range(len(pairs))
        with counted or nullcontext():
            return attribution.estimate_pairs(
                forward, plan, part, estimators, given.metrics, values, source=number, steps=steps
            )


@cache
def built(name: str) -> tuple[Any, Family]:
    """A model of three layers in float64 all the way."""
    family = FAMILIES[name]
    return gradients.in_float64(family.build(3, 1)), family


def logit_diff(pair: Pair) -> gradients.Metric:
    def metric(logits: torch.Tensor, _: Any) -> torch.Tensor:
        at = logits[pair.read]
        return at[list(pair.answer)].mean() - at[list(pair.wrong)].mean()

    return metric


def runs(pair: Pair, direction: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The destination's and the source's tokens."""
    both = (pair.corrupt, pair.clean)
    return both if direction == "denoise" else both[::-1]


def changes(found: Estimates, name: str, column: str = "logit_diff") -> Any:
    """Estimated changes, [direction, pair, layer, unit, position]."""
    values = found.values[name][column][:, 0, 0]
    destination = found.baseline[column][::-1]  # denoise: the other run
    return values - destination[:, :, None, None, None]


# Of a pair by its number, a direction and a component: [layer, unit, position].
Expect = Callable[[int, str, str], torch.Tensor]


def compare(found: Estimates, pairs: Sequence[Pair], names: Sequence[str], expect: Expect) -> None:
    """Every cell of every pair, in both directions."""
    for name in names:
        got = changes(found, name)
        for d, direction in enumerate(("denoise", "noise")):
            for i in range(len(pairs)):
                want = expect(i, direction, name).detach().numpy()
                np.testing.assert_allclose(
                    got[d, i, ..., : want.shape[-1]], want, atol=EXACT, err_msg=f"{name} {i}"
                )


def first_order(
    hf_model: Any, family: Family, pair: Pair, direction: str, touch: Any = None, after: Any = None
) -> dict[str, torch.Tensor]:
    """δ·g of every component, [layer, unit, position]."""
    dst, src = runs(pair, direction)
    nothing = lambda *_: None  # noqa: E731
    before = heads.activations(hf_model, family, heads.Prompt(dst))
    other = heads.activations(hf_model, family, heads.Prompt(src))
    g = gradients.gradients(
        hf_model, family, dst, logit_diff(pair), touch or nothing, after or nothing
    )
    cells: dict[str, list[torch.Tensor]] = {}
    for (component, layer), slope in sorted(g.items(), key=lambda x: x[0][1]):
        delta = other[component, layer] - before[component, layer]
        cells.setdefault(component, []).append((delta * slope).sum(-1).T)
    return {component: torch.stack(by_layer) for component, by_layer in cells.items()}


def linear_model() -> Any:
    """No norms, no activation function, and attention that is the same for all queries and keys."""
    hf_model = FAMILIES["gpt2"].build(3, 1, activation_function="linear")
    for module in hf_model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]
    for layer in hf_model.transformer.h:
        layer.attn.c_attn.weight[:, :48] = 0
        layer.attn.c_attn.bias[:48] = 0
    return hf_model


def text(results: Any) -> str:
    """What `show` prints, at 80 columns."""
    console = Console(file=StringIO(), width=80)
    show(results, console)
    return console.file.getvalue()  # type: ignore[attr-defined]
