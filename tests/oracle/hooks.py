"""Where activations are in a model's own modules, and how a module's input or output is swapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from oracle.families import Family

Change = Callable[[Tensor], Tensor]


@contextmanager
def changed(module: Module, at: str, change: Change) -> Iterator[None]:
    """`change` gets the module's "input" or "output" and returns what stands in its place."""

    def before(_module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    def after(_module: Module, _args: object, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    if at == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """That attention function for the time of a forward, whatever the model is set to."""
    before = model.config._attn_implementation
    if not model._can_set_attn_implementation():  # these families have one, their own
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def modules(model: PreTrainedModel, family: Family, layer: int) -> dict[str, tuple[Module, str]]:
    """For every component of a layer: a module, and whether it is its input or its output."""
    block = model.get_submodule(family.layer.format(layer))
    found = {
        "resid_pre": (block, "input"),
        "head_z": (block.get_submodule(family.o_proj), "input"),
        "attn_out": (block.get_submodule(family.attn_norm or family.attn), "output"),
        "mlp_out": (block.get_submodule(family.mlp_norm or family.mlp), "output"),
        "resid_post": (block, "output"),
    }
    if not family.parallel:
        found["resid_mid"] = (block.get_submodule(family.mid), "input")
    return found
