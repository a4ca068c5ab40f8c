"""What a model is: everything that changes what its forward computes, as one digest.

Weights and config are not all of it. Hooks, training flags, adapters that are switched off, another
`forward` on one module, a buffer that a long prompt has changed: whatever is said here of a module
makes another model. The digest is the same in every process, and for a model that accelerate has
spread or that is compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as globally
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)

from patchsweep.device import state
from patchsweep.model.digests import HOOKS, KNOWN, Digests, digest, installed

INTERNAL = frozenset(vars(nn.Module()))
# What loading, training and placing write on modules, and what is said on its own.
NO_MATTER = {
    "forward",
    "name_or_path",
    "generation_config",
    "peft_config",
    "hf_quantizer",
    "hf_device_map",
    "kwargs",  # of an adapter: how it was put there
    "loss_type",
    "all_tied_weights_keys",
    "warnings_issued",
    "gradient_checkpointing",
    "is_training",
}
PEFTS = {"_active_adapter", "_disable_adapters"}
# Hooks that transformers puts on once hidden states were asked for, or for checkpoints in training;
# none changes a value.
LOOKING = {"output_capturing_hook", "make_inputs_require_grads"}
# Hooks that accelerate wraps a forward in to move weights and inputs.
MOVING = {"AlignDevicesHook", "CpuOffload", "SequentialHook", "ModelHook"}


def identity(hf_model: PreTrainedModel) -> str:
    """Equal for models that compute the same; 16 hexadecimal digits.

    Of every tensor a sample and the sum. What a hook or a replaced forward refers to is followed;
    where that cannot be read the identity is one of this process alone."""
    places = {}
    for name, module in hf_model.named_modules():
        if not hasattr(module, "_orig_mod"):  # what torch.compile puts around a module
            places[module] = _plainly(name)
    found = Digests(places)
    said = [type(hf_model).__name__, found.of(hf_model.config)]
    for name, value in state(hf_model):  # none is kept: it may have been read from disk
        what = digest(found.tensor(value)) if isinstance(value, Tensor) else found.of(value)
        said.append(f"{_plainly(name)} {what}")
    for module, name in places.items():
        said += [f"{name} {what}" for what in _said(module, found)]
    said += [f"everywhere {what}" for what in _hooks(vars(globally), found, "_global{}")]
    said += _replaced(places, found)
    return digest(said)[:16]


def _plainly(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _said(module: nn.Module, found: Digests) -> Iterator[str]:
    """What one module computes with, beside its weights and the modules in it."""
    kind = type(module)
    own = not installed(kind.__module__)
    yield f"is {found.of(kind)}"
    if module.training:
        yield "trains"
    for name, value in sorted(vars(module).items()):
        if name in INTERNAL | NO_MATTER or name.startswith(("_hf_", "__nnsight")):
            continue
        over = callable(getattr(kind, name, None))  # instead of a method
        if over and _home(value) == "accelerate":  # it only warns
            continue
        if not name.startswith("_") or name in PEFTS or own or over:
            yield f"has {name} {found.of(value) if own or over else _plain(value, found)}"
    forward = _forward(module)
    if forward is not None:
        yield f"computes {found.of(forward)}"
    yield from _hooks(vars(module), found)


def _plain(value: Any, found: Digests, depth: int = 0) -> str:
    """An attribute of a package's own module: objects of packages by their type and plain parts."""
    if isinstance(value, Mapping):
        return " ".join(f"{k}: {_plain(v, found, depth)}" for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        parts = [_plain(v, found, depth) for v in value]
        return " ".join(sorted(parts) if isinstance(value, set | frozenset) else parts)
    data = isinstance(value, Tensor | nn.Module | PretrainedConfig | str | int | float | None)
    if data or callable(value) or not installed(type(value).__module__):
        return found.of(value)
    held = vars(value) if hasattr(value, "__dict__") and not depth else {}
    plain = {k: v for k, v in held.items() if isinstance(v, str | int | float)}
    return f"{type(value).__qualname__} {found.of(_without(plain))}"


def _without(held: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in held.items() if k not in NO_MATTER}


def _forward(module: nn.Module) -> Any:
    """What stands in the place of the forward of a module's class; None for nothing."""
    held = vars(module)
    forward: Any = held.get("forward")
    moving = "_old_forward" in held and type(held.get("_hf_hook")).__name__ in MOVING
    if moving and _home(getattr(forward, "func", None)) == "accelerate":
        forward = held["_old_forward"]
    if type(forward).__module__.startswith("nnsight."):
        forward = forward.__wrapped__
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    same = getattr(forward, "__func__", forward) is type(module).forward
    return None if same and getattr(forward, "__self__", module) is module else forward


def _hooks(held: Mapping[str, Any], found: Digests, named: str = "{}") -> Iterator[str]:
    """The hooks of one module, or those of all, in order, and how they are called."""
    for kind in HOOKS:
        name = named.format(kind)
        flags = [f"{name}_with_kwargs", f"{name}_always_called"]
        for key, hook in held[name].items():
            if getattr(hook, "__name__", "") not in LOOKING or _home(hook) != "transformers":
                how = [key in held.get(flag, ()) for flag in flags]
                yield f"{name} {how} {found.of(hook)}"


def _replaced(places: Mapping[nn.Module, str], found: Digests) -> Iterator[str]:
    """What was put in the place of functions that packages define: methods of the model's classes,
    functions beside them and of torch; and attention functions that were registered."""
    kinds = {cls for module in places for cls in type(module).__mro__ if installed(cls.__module__)}
    for cls in sorted(kinds - {object}, key=lambda c: f"{c.__module__} {c.__qualname__}"):
        for name, method in sorted(vars(cls).items()):
            if not _own(cls, name, method):
                yield f"{cls.__qualname__} {name} {found.of(method)}"
    modules = {kind.__module__ for kind in map(type, places) if kind in kinds} | {F.__name__}
    for module in sorted(modules):
        for name, function in sorted(vars(sys.modules[module]).items()):
            if isinstance(function, FunctionType) and not _known(function):
                yield f"{module} {name} {found.of(function)}"
    configs = [c for m in places if isinstance(c := getattr(m, "config", None), PretrainedConfig)]
    names = {str(getattr(config, "_attn_implementation", None)) for config in configs}
    for name in sorted(names):
        for functions in (AttentionInterface(), AttentionMaskInterface()):
            function = functions.get(name)
            if isinstance(function, FunctionType) and not _known(function):
                yield f"attention {name} {found.of(function)}"


def _own(cls: type, name: str, method: Any) -> bool:
    """Whether a class has this method from its own definition, if it is one."""
    method = getattr(method, "__func__", method)
    if not isinstance(method, FunctionType):
        return True
    inner = _links(method)[-1]
    return all(map(_known, _links(method))) and (
        inner.__code__.co_qualname == f"{cls.__qualname__}.{name}"
    )


def _links(function: Any) -> Sequence[FunctionType]:
    """A function and those that it was put around."""
    links = []
    while isinstance(function, FunctionType):
        links.append(function)
        function = vars(function).get("__wrapped__")
    return links


def _known(function: FunctionType) -> bool:
    """Whether a function's code comes from Python or the packages that models are made of."""
    return _home(function) in KNOWN | sys.stdlib_module_names - {"__main__"}


def _home(function: Any) -> str:
    """The package whose code a function is, whatever name it has been given."""
    return str(getattr(function, "__globals__", {}).get("__name__")).partition(".")[0]
