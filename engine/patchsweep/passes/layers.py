"""The decoder layers of a model and how large they are: seen in one forward of a few tokens.

Neither weights nor a config say it for sure: quantised weights lie in other shapes, layers of one
model may differ, a picture's tower may be as deep as the text model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patchsweep.device import device_of, out_of_memory, replaced
from patchsweep.errors import BadInput, NotOnWavefront, as_line
from patchsweep.passes.attention import Shown, attention_call, attention_is
from patchsweep.passes.stream import ResidualStream
from patchsweep.processes import log

TOKENS = 3


@dataclass(eq=False)
class Shape:
    """What one layer showed. Of its call of attention: the module that calls it, z [1, token, head,
    d_head], the key-value heads and how many of them differ, the width of queries and keys, and the
    first module that takes z as it is. `widths`: of what its modules take and return."""

    stream: ResidualStream
    attention: nn.Module | None = None
    z: Tensor | None = None
    kv_heads: int = 0
    different: int = 0
    d_qk: int = 0
    takes_z: nn.Module | None = None
    widths: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)

    def neurons(self, d_model: int) -> int | None:
        """The width of what the MLP's last linear map takes; None if none was found."""
        down = self.stream.linear.get("mlp_out")
        takes, returns = self.widths.get(down, (0, 0)) if isinstance(down, nn.Module) else (0, 0)
        return takes if returns == d_model else None


def layers_of(hf_model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers: the ModuleList whose length is the config's number of layers; of several
    the one whose members a forward of text calls one after another."""
    count = hf_model.config.get_text_config().num_hidden_layers
    lists = {n: m for n, m in hf_model.named_modules() if isinstance(m, nn.ModuleList)}
    found = [m for name, m in lists.items() if len(m) == count and "expert" not in name]
    if len(found) > 1:
        found = _called(hf_model, found) or found
    if found:
        return found[0]
    mend = "this family cannot run on the wavefront"
    name = max(lists, key=lambda n: len(lists[n]), default="")
    if name and 0 < len(lists[name]) < count:  # some layers were taken out
        mend = f"{name} has {len(lists[name])}: set config.num_hidden_layers to {len(lists[name])}"
    raise BadInput(f"{type(hf_model).__name__} has no list of {count} decoder layers: {mend}")


def _called(hf_model: PreTrainedModel, lists: Sequence[nn.ModuleList]) -> list[nn.ModuleList]:
    """Of lists those whose members are called one after another with the residual stream."""
    width = hf_model.config.get_text_config().hidden_size
    called: list[nn.Module] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = next(iter([*args, *kwargs.values()]), None)
        if isinstance(hidden, Tensor) and hidden.shape[-1] == width:
            called.append(module)

    with ExitStack() as stack:
        for module in {m for each in lists for m in each}:
            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        _forward(hf_model, lambda *_: None)
    return [each for each in lists if [m for m in called if m in {*each}] == [*each]]


def shapes_of(hf_model: PreTrainedModel, layers: Sequence[nn.Module]) -> list[Shape] | None:
    """What the layers show in one forward of a few tokens; their weights may be on the meta device.
    None if the model does not let its attention be seen, or cannot run."""
    shapes = [Shape(ResidualStream({})) for _ in layers]
    now: list[Shape] = []

    def see(module: nn.Module, query: Tensor, key: Tensor, z: Tensor) -> None:
        if not now or now[-1].attention is not None:
            return
        now[-1].attention, now[-1].z = module, z
        now[-1].kv_heads, now[-1].d_qk = key.shape[1], query.shape[3]
        now[-1].different = _different(key)
        now[-1].stream.from_attention(z)

    with ExitStack() as stack:
        for layer, shape in zip(layers, shapes, strict=True):
            stack.enter_context(_shown(layer, shape, now))
        ran = _forward(hf_model, see)
    return shapes if ran and any(shape.attention for shape in shapes) else None


@contextmanager
def _shown(layer: nn.Module, shape: Shape, now: list[Shape]) -> Iterator[None]:
    """Inside, a layer's call is watched."""
    own = layer.forward

    def call(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        now.append(shape)
        try:
            return shape.stream.follow(own, hidden, *args, **kwargs)
        finally:
            now.pop()

    def takes(module: nn.Module, args: tuple[Any, ...]) -> None:
        taken = args[0] if args else None
        if isinstance(taken, Tensor) and shape.takes_z is None and _same(taken, shape.z):
            shape.takes_z = module

    def returns(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
            shape.widths.setdefault(module, (args[0].shape[-1], out.shape[-1]))

    with ExitStack() as stack:
        stack.enter_context(replaced(layer, call))
        stack.enter_context(shape.stream.told_by(layer))
        for module in layer.modules():
            stack.callback(module.register_forward_pre_hook(takes).remove)
            stack.callback(module.register_forward_hook(returns).remove)
        yield


def _same(x: Tensor, z: Tensor | None) -> bool:
    """Whether these are the same values, in the same order."""
    if z is None or x.is_meta or x.numel() != z.numel():
        return False
    return torch.equal(x.flatten(), z.flatten().to(x))


def _different(key: Tensor) -> int:
    """How many heads of keys [1, head, token, d] differ from those before them."""
    heads = [*key[0]]
    if key.is_meta:
        return len(heads)
    return sum(not any(torch.equal(h, g) for g in heads[:i]) for i, h in enumerate(heads))


@torch.no_grad()
def _forward(hf_model: PreTrainedModel, see: Callable[..., None]) -> bool:
    """Run a few tokens through a model; whether that went well. `see` is shown attention, where the
    model lets its own be replaced."""
    tokens = torch.arange(TOKENS, device=device_of(hf_model.get_input_embeddings()))[None]
    with ExitStack() as stack:
        try:
            with suppress(NotOnWavefront):
                stack.enter_context(attention_is(hf_model))
            stack.enter_context(attention_call(Shown(see)))
            hf_model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        except Exception as error:
            if out_of_memory(error):
                raise
            said = "%s does not show its sizes, they are taken from its config: %s"
            log.warning(said, type(hf_model).__name__, as_line(error))
            return False
    return True


def matrices(module: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of a module's own matrices: of a linear map what it takes and returns, since
    quantised weights lie in other shapes."""
    if _is_linear(module) and not any(_is_linear(m) for m in module.modules() if m is not module):
        return [(module.in_features, module.out_features)]  # type: ignore[list-item]
    return [tuple(p.shape) for p in module.parameters(recurse=False) if p.dim() >= 2]


def _is_linear(module: nn.Module) -> bool:
    named = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(size, int) for size in named)
