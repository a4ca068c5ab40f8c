"""The yardstick: one full forward per cell with plain PyTorch hooks, single or in batches.

The model runs as it was loaded, with its own attention, and computes the logits of the last token
only. Hooks are set on the layers that a batch patches and on no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from patchsweep.errors import BadInput
from patchsweep.model.model import Model
from patchsweep.pairs import Pair
from patchsweep.passes.layers import layers_of

Cells = NDArray[np.int64]  # [cell, (layer, head, position)]

# What z enters, in Llama's and in GPT-2's layers.
PROJECTIONS = ("self_attn.o_proj", "attn.c_proj")


def output_projections(model: Model) -> list[nn.Module]:
    """The attention output projection of every layer. BadInput if a layer has none that is
    known."""
    found = []
    for layer in layers_of(model.hf_model):
        own = [m for name, m in layer.named_modules() if name in PROJECTIONS]
        if len(own) != 1:
            raise BadInput(
                f"{type(model.hf_model).__name__} has no {' or '.join(PROJECTIONS)} in a layer: "
                "the benchmark cannot hook it"
            )
        found.append(own[0])
    return found


@torch.no_grad()
def record_z(model: Model, tokens: Sequence[int]) -> list[Tensor]:
    """z [position, head, d_head] of every layer in a plain forward of a prompt."""
    heads = model.dimensions.heads
    found: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0][0].unflatten(-1, (heads, -1)).clone())

    with ExitStack() as stack:
        for module in output_projections(model):
            stack.enter_context(hooked(module, record))
        last_logits(model, torch.tensor([tokens], device=model.device))
    return found


class FullForwards:
    """Denoising by full forwards: runs the corrupt prompt, patches one head's z from the clean."""

    def __init__(self, model: Model, pair: Pair) -> None:
        self.model = model
        self.pair = pair
        self.projections = output_projections(model)
        self.z = record_z(model, pair.clean)
        self.tokens = torch.tensor([pair.corrupt], device=model.device)

    @torch.no_grad()
    def logit_diff(self, cells: Cells) -> Tensor:
        """Logit of the answer minus that of the wrong token [cell], float32: one batch."""
        with ExitStack() as stack:
            for layer in np.unique(cells[:, 0]):
                rows = np.flatnonzero(cells[:, 0] == layer)
                patch = self._patch(layer, rows, cells[rows, 1], cells[rows, 2])
                stack.enter_context(hooked(self.projections[layer], patch))
            logits = last_logits(self.model, self.tokens.expand(len(cells), -1)).float()
        return logits[:, self.pair.answer[0]] - logits[:, self.pair.wrong[0]]

    def _patch(
        self, layer: int, rows: Cells, heads: Cells, positions: Cells
    ) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """A hook that replaces, in each of these rows of the batch, one head at one position."""
        device = self.tokens.device
        row, head, position = (torch.from_numpy(x).to(device) for x in (rows, heads, positions))
        z = self.z[layer]

        def patch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            args[0].view(*args[0].shape[:2], *z.shape[1:])[row, position, head] = z[position, head]

        return patch


def last_logits(model: Model, tokens: Tensor) -> Tensor:
    """Logits [row, vocab] at the last token of full forwards of `tokens` [row, position]."""
    out: Tensor = model.hf_model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
    return out[:, -1]


@contextmanager
def hooked(module: nn.Module, hook: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """`hook` sees the module's arguments before every call inside."""
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
