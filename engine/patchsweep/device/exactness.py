"""What a computation needs to give the same numbers twice, and what is as it was after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from patchsweep.device.offload import device_of

# Buffers of up to so many values are put back if something has written to them. Larger ones are
# masks or packed weights, which no forward writes to.
SMALL = 1 << 20


@contextmanager
def exactly(hf_model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what it is made for, whatever the caller has switched on:
    deterministic, in eval mode, not compiled, in its own dtype (no autocast), with gradients where
    they are asked for. After it the model and the caller's switches are as they were, whatever
    has happened."""
    device = device_of(hf_model)
    with ExitStack() as stack:
        stack.enter_context(left_as_it_was(hf_model))
        stack.enter_context(deterministic(device))
        if device.type != "meta":  # which knows no autocast
            stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        _ready(hf_model)
        yield


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """The same plan gives the same bits twice. CUDA needs to be told; a CPU does it anyway."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, by the first use
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)


@contextmanager
def left_as_it_was(hf_model: nn.Module) -> Iterator[None]:
    """Modules (their attributes, hooks, training flags, buffers), parameters and configs are after
    it what they were before: nnsight puts a forward of its own on every module, some models change
    their rotary buffers with the length of a prompt."""
    configs = {id(c): c for module in hf_model.modules() for c in _configs(vars(module))}
    held = [_Held(vars(owner)) for owner in (*hf_model.modules(), *configs.values())]
    trained = [(p, p.requires_grad) for p in hf_model.parameters()]
    small = [b for b in hf_model.buffers() if b.numel() <= SMALL and not b.is_meta]
    buffers = [(b, b.detach().clone()) for b in small]
    try:
        yield
    finally:
        for each in held:
            each.put_back()
        for parameter, wanted in trained:
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)
        with torch.inference_mode():  # in which every buffer may be written to
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


class _Held:
    """What an object holds in its attributes, and in dictionaries, lists and sets there."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        self._attributes, self._before = attributes, dict(attributes)
        inside = [v for v in attributes.values() if isinstance(v, (dict, list, set))]
        self._inside: list[tuple[Any, Any]] = [(value, value.copy()) for value in inside]

    def put_back(self) -> None:
        self._attributes.clear()
        self._attributes.update(self._before)
        for value, before in self._inside:
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)


def _configs(attributes: dict[str, Any]) -> Iterator[PretrainedConfig]:
    """The configs among some attributes, and those inside them."""
    for value in attributes.values():
        if isinstance(value, PretrainedConfig):
            yield value
            yield from _configs(vars(value))


def _ready(hf_model: nn.Module) -> None:
    """Eval mode, and nothing compiled: what a compiler has taken apart cannot be watched."""
    for module in list(hf_model.modules()):
        held = vars(module)
        held["training"] = False
        held["_compiled_call_impl"] = None
        own = getattr(held.get("forward"), "_torchdynamo_orig_callable", None)
        if own is not None:
            held["forward"] = own
        for name, part in module._modules.items():
            inner = getattr(part, "_orig_mod", None)
            if isinstance(inner, nn.Module):
                module._modules[name] = inner
