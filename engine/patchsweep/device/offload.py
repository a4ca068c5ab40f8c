"""Weights that accelerate keeps off the device, in memory or on disk, and its hooks bring in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import send_to_device
from torch import Tensor, nn


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` computes `forward` inside. Offload hooks on it do not run: no weights are moved."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def weights_of(*modules: nn.Module) -> Iterator[None]:
    """The modules' own weights are there inside: brought in once, however often a module is called
    or asked for. What is there already stays as it is."""
    with ExitStack() as stack:
        for module in modules:
            hook = hook_of(module)
            if hook is not None and any(p.is_meta for _, p in weights_under(module, hook)):
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
                stack.enter_context(replaced(module, unhooked(module, hook)))
        yield


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)  # type: ignore[union-attr]
        for p in part.parameters(recurse=False):
            return p.device
    raise AssertionError("a module without weights")


def offloaded(hf_model: nn.Module) -> set[str]:
    """The parameters that hooks bring in, by name; tied ones by every name."""
    return {
        _joined(name, leaf)
        for name, module in hf_model.named_modules()
        if (hook := hook_of(module)) is not None
        for leaf, _ in weights_under(module, hook)
    }


def unreachable(hf_model: nn.Module) -> list[str]:
    """The parameters that have no values and that no hook brings in."""
    known = offloaded(hf_model)
    return [n for n, p in hf_model.named_parameters() if p.is_meta and n not in known]


def state(hf_model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Weights and buffers, those too that are not saved, and what else a state dict holds; sorted
    by name, one tensor at a time read from where it is kept."""
    found: dict[str, Any] = dict(hf_model.named_parameters(remove_duplicate=False))
    found |= hf_model.named_buffers(remove_duplicate=False)
    found |= hf_model.state_dict()
    for name, value in sorted(found.items()):
        away = isinstance(value, Tensor) and value.is_meta
        yield name, _kept(hf_model, name, value) if away else value


def _kept(hf_model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The values of a tensor that is not on a device."""
    parts = name.split(".")
    for i in reversed(range(len(parts))):
        hook = hook_of(hf_model.get_submodule(".".join(parts[:i])))
        if hook is not None:
            kept: Tensor = hook.weights_map[".".join(parts[i:])]
            return kept.to(tensor.dtype)
    raise AssertionError(f"{name} is nowhere")


def hook_of(module: nn.Module) -> AlignDevicesHook | None:
    """The hook that brings a module's weights in, if it has one."""
    hook = getattr(module, "_hf_hook", None)
    return hook if isinstance(hook, AlignDevicesHook) and hook.offload else None


def weights_under(module: nn.Module, hook: AlignDevicesHook) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a hook brings in."""
    return module.named_parameters(recurse=hook.place_submodules)


def unhooked(module: nn.Module, hook: AlignDevicesHook) -> Callable[..., Any]:
    """A module's forward, without its hook but on the hook's device."""
    own: Any = module._old_forward
    device = hook.execution_device

    def forward(*args: Any, **kwargs: Any) -> Any:
        sent = send_to_device(kwargs, device, skip_keys=hook.skip_keys)
        return own(*send_to_device(args, device), **sent)

    return forward


def _joined(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name else leaf
