"""The yardstick of edges and paths: two full forwards with plain PyTorch hooks, in batches.

In the first all heads and MLPs put out what they do in the destination but for the sender, in the
second the receivers' projections do what they did in the first. As in `_full` the model runs as it
was loaded, and computes the logits of the last token only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._full import last_logits
from patchsweep.model.model import Model
from patchsweep.pairs import Pair
from patchsweep.passes.layers import layers_of
from patchsweep.sites import Node

PROJECTIONS = {"head_q": "self_attn.q_proj", "head_k": "self_attn.k_proj"}
PROJECTIONS |= {"head_v": "self_attn.v_proj", "mlp_in": "mlp"}
Hook = Callable[[nn.Module, Any, Tensor], None]
# Outputs by (component, layer), [position, width].
Outputs = dict[tuple[str, int], Tensor]


@dataclass(frozen=True)
class Way:
    """One row of a batch: what sends, which nodes receive, at which positions (None: all)."""

    sender: Node
    receivers: Sequence[Node]
    positions: Sequence[int] | None = None


class TwoForwards:
    """Denoising of a Llama: the corrupt prompt with what senders put out in the clean one."""

    def __init__(self, model: Model, pair: Pair) -> None:
        self.model, self.pair, self.dimensions = model, pair, model.dimensions
        self.layers = [*layers_of(model.hf_model)]
        self.tokens = torch.tensor([pair.corrupt], device=model.device)
        self.own, self.other = (self._outputs(tokens) for tokens in (pair.corrupt, pair.clean))

    @torch.no_grad()
    def logit_diff(self, ways: Sequence[Way], mlps: bool = False) -> Tensor:
        """Logit of the answer minus that of the wrong token [way], float32: one batch. `mlps`:
        through MLPs, which then are live in the first forward."""
        kept: Outputs = {}
        logits = self._first(ways, mlps, kept)
        behind = [way.receivers[0].component != "logits" for way in ways]
        if any(behind):
            second = self._second(ways, kept)
            logits = torch.where(
                torch.tensor(behind, device=logits.device)[:, None], second, logits
            )
        logits = logits.float()
        return logits[:, self.pair.answer[0]] - logits[:, self.pair.wrong[0]]

    def _first(self, ways: Sequence[Way], mlps: bool, kept: Outputs) -> Tensor:
        """Logits; what the projections of receivers put out into `kept`."""
        read = {(r.component, r.layer) for way in ways for r in way.receivers}
        with ExitStack() as stack:
            for layer, module in enumerate(self.layers):
                for name, path in PROJECTIONS.items():
                    if (name, layer) in read:
                        keep = self._keeps(kept, name, layer)
                        stack.enter_context(_after(module.get_submodule(path), keep))
                out = module.get_submodule("self_attn.o_proj")
                stack.enter_context(_before(out, self._sends("head_z", layer, ways, True)))
                sends = self._sends("mlp_out", layer, ways, not mlps)
                stack.enter_context(_after(module.get_submodule("mlp"), sends))
            stack.enter_context(_before(self.layers[0], self._sends("embed", 0, ways, False)))
            return last_logits(self.model, self.tokens.expand(len(ways), -1))

    def _second(self, ways: Sequence[Way], kept: Outputs) -> Tensor:
        with ExitStack() as stack:
            for (name, layer), values in kept.items():
                if name == "logits":
                    continue
                module = self.layers[layer].get_submodule(PROJECTIONS[name])
                receive = self._receives(name, layer, ways, values)
                stack.enter_context(_after(module, receive))
            return last_logits(self.model, self.tokens.expand(len(ways), -1))

    def _keeps(self, kept: Outputs, name: str, layer: int) -> Hook:
        def keep(_: nn.Module, __: Any, out: Tensor) -> None:
            kept[name, layer] = out.clone()

        return keep

    def _sends(self, name: str, layer: int, ways: Sequence[Way], frozen: bool) -> Hook:
        """What is sent in these rows; all else as in the destination, if it is `frozen`."""
        mine = [(i, w) for i, w in enumerate(ways) if _at(w.sender) == (name, layer)]

        def send(_: nn.Module, __: Any, x: Tensor) -> None:
            if frozen:
                x.copy_(self.own[name, layer])
            for row, way in mine:
                part = self._part(name, way.sender.unit, x.shape[-1])
                at = slice(None) if way.positions is None else list(way.positions)
                x[row, at, part] = self.other[name, layer][at, part]

        return send

    def _receives(self, name: str, layer: int, ways: Sequence[Way], values: Tensor) -> Hook:
        def receive(_: nn.Module, __: Any, x: Tensor) -> None:
            for row, way in enumerate(ways):
                for node in way.receivers:
                    if (node.component, node.layer) == (name, layer):
                        part = self._part(name, node.unit, x.shape[-1])
                        at = slice(None) if way.positions is None else list(way.positions)
                        x[row, at, part] = values[row, at, part]

        return receive

    def _part(self, name: str, unit: int | None, width: int) -> slice:
        d = self.dimensions
        if unit is None:
            return slice(None)
        size = width // (d.kv_heads if name in ("head_k", "head_v") else d.heads)
        return slice(unit * size, unit * size + size)

    @torch.no_grad()
    def _outputs(self, tokens: Sequence[int]) -> Outputs:
        found: Outputs = {}

        def see(name: str, layer: int) -> Hook:
            def keep(_: nn.Module, __: Any, x: Tensor) -> None:
                found[name, layer] = x[0].clone()

            return keep

        with ExitStack() as stack:
            for layer, module in enumerate(self.layers):
                out, mlp = (module.get_submodule(x) for x in ("self_attn.o_proj", "mlp"))
                stack.enter_context(_before(out, see("head_z", layer)))
                stack.enter_context(_after(mlp, see("mlp_out", layer)))
            stack.enter_context(_before(self.layers[0], see("embed", 0)))
            last_logits(self.model, torch.tensor([tokens], device=self.model.device))
        return found


def _at(node: Node) -> tuple[str, int]:
    return node.component, node.layer or 0


@contextmanager
def _before(module: nn.Module, hook: Hook) -> Iterator[None]:
    """`hook` may change what the module takes."""
    handle = module.register_forward_pre_hook(lambda m, args: hook(m, args, args[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _after(module: nn.Module, hook: Hook) -> Iterator[None]:
    """`hook` may change what the module returns."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
