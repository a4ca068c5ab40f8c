"""Whole grids by plain hooks: one full forward of the model, as a user calls it, for every cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import patchsweep as ps
import tiny

PAIR = ps.make_pair(
    tiny.tokenizer(), clean="a b c d e", corrupt="a k c m e", answer=" g", wrong=" h"
)


@torch.no_grad()
def logit_diff(hf_model: nn.Module, tokens: Sequence[int]) -> float:
    logits = hf_model(input_ids=torch.tensor([tokens])).logits[0, -1].double()
    return float(logits[PAIR.answer[0]] - logits[PAIR.wrong[0]])


def grid(
    hf_model: nn.Module,
    modules: Sequence[nn.Module],
    side: Literal["input", "output"] = "output",
    units: int = 1,
) -> NDArray[np.float64]:
    """logit_diff [layer, unit, position] of the corrupt run in which what each module takes or
    returns is, at one position and unit, that of the clean run."""
    found = np.zeros((len(modules), units, len(PAIR)))
    for layer, module in enumerate(modules):
        kept: list[Tensor] = []

        def keep(x: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(x.clone())
            return x

        _run(hf_model, module, side, keep, PAIR.clean)
        for unit, position in np.ndindex(units, len(PAIR)):

            def patch(x: Tensor, u: int = unit, at: int = position, kept: Any = kept) -> Tensor:
                x = x.clone()
                width = x.shape[-1] // units
                part = slice(u * width, u * width + width)
                x[:, at, part] = kept[0][:, at, part]
                return x

            found[layer, unit, position] = _run(hf_model, module, side, patch, PAIR.corrupt)
    return found


def _run(hf_model: nn.Module, module: nn.Module, side: str, what: Any, tokens: Any) -> float:
    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (what(args[0]), *args[1:])

    def after(_: nn.Module, __: Any, out: Any) -> Any:
        return (what(out[0]), *out[1:]) if isinstance(out, tuple) else what(out)

    hook: Any
    if side == "input":
        hook = module.register_forward_pre_hook(before)
    else:
        hook = module.register_forward_hook(after)
    try:
        return logit_diff(hf_model, tokens)
    finally:
        hook.remove()


def swept(results: ps.Results, component: str = "resid_post") -> NDArray[np.floating[Any]]:
    """The same of a sweep, [layer, unit, position]."""
    values: NDArray[np.floating[Any]] = results.store.read(f"{component}/logit_diff")[0, 0, 0, 0]
    return values
