"""Which module of a layer holds which activation: found once, by watching plain forwards.

The wavefront sees activations in its own attention function and in the additions to the residual
stream. Full forwards of a model as it is (the nnsight backend) can only see what goes into a module
or comes out of it. Here the two are matched: a place is the first module whose output equals, up to
a factor, what the layer adds to the residual stream. Only the names of the query, key and value
projections are a table.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from patchsweep.device import replaced
from patchsweep.passes import Forward, ResidualStream, Shape, shapes_of
from patchsweep.plan import Dimensions

# Projections by name: one for each, or all in one. Queries and keys are whole after these norms,
# where they follow.
SEPARATE = {"head_q": "q_proj", "head_k": "k_proj", "head_v": "v_proj"}
NORMS = {"head_q": ("q_norm", "q_layernorm"), "head_k": ("k_norm", "k_layernorm")}
SIDE_BY_SIDE = ("c_attn", "qkv_proj", "Wqkv", "query_key_value")  # all queries, keys, values
BY_HEAD = ("query_key_value",)  # query, key, value of the first head, of the second, ...
BY_HEAD_IN = ("GPTBigCodeAttention",)  # its c_attn too, but for one key-value head
SHUFFLED = ("CodeGenAttention",)  # in an order of its own
ORDER = ("head_q", "head_k", "head_v")


@dataclass(frozen=True)
class Spot:
    """Where a layer holds an activation: in what a module (by its path in the layer) takes or
    returns, or a call of attention in its forward returns, [batch, position, ...].

    `order`: spots of a layer are passed in rising order. The tensor there is `scale` times smaller
    than the activation. `units`: heads or neurons that its last axis holds; with `part` only
    columns start:stop of it; with `column` it is [unit, 3, width] by head and this the second
    index; `transposed`: it is [batch, unit, position, width].
    """

    module: str
    side: Literal["input", "output", "attention"]
    order: float
    units: int = 1
    scale: float = 1.0
    part: tuple[int, int] | None = None
    column: int | None = None
    transposed: bool = False

    def view(self, x: Tensor) -> Tensor:
        """The activation [batch, position, unit, width] as a view of the tensor there."""
        if x.dim() == 2:
            x = x[None]
        if self.transposed:
            return x.transpose(1, 2)
        if x.dim() == 4:
            return x
        if self.column is not None:
            return x.view(*x.shape[:2], self.units, 3, -1)[:, :, :, self.column]
        if self.part is not None:
            x = x[..., slice(*self.part)]
        return x.view(*x.shape[:2], self.units, -1)


@dataclass
class _Watched:
    """What one layer showed: what its modules took and returned, in order."""

    stream: ResidualStream
    events: int = 0
    returned: list[tuple[str, int, Tensor]] = field(default_factory=list)
    taken: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)  # of what a module takes
    written: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    mid: str | None = None
    pattern: tuple[str, int] | None = None  # attention probabilities beside the first output


@torch.no_grad()
def find_spots(forward: Forward, dimensions: Dimensions) -> list[dict[str, Spot]]:
    """Of every layer the spots that it has, by place: attn_out, resid_mid, mlp_out, head_q, head_k,
    head_v, head_z, neuron, pattern. The model runs twice on a few tokens: with its own attention,
    which alone shows patterns, and with one that shows z, where the model lets it be replaced."""
    sizes = {dimensions.heads, dimensions.kv_heads}
    length = next(n for n in range(5, 9) if n not in sizes)
    watched = []
    with ExitStack() as stack:
        for layer in forward.layers:
            one = _Watched(ResidualStream({}))
            watched.append(one)
            stack.enter_context(_watching(layer, one))
        tokens = torch.arange(length, device=forward.device) % dimensions.vocab
        forward.hf_model(**plainly(tokens[None]))
    shapes = shapes_of(forward.hf_model, forward.layers)
    return [
        _spots(layer, one, dimensions, length)
        | _heads(layer, one, dimensions, shapes[number] if shapes else None)
        for number, (layer, one) in enumerate(zip(forward.layers, watched, strict=True))
    ]


def plainly(tokens: Tensor) -> dict[str, Any]:
    """The arguments of a plain forward of prompts without padding, [row, position]."""
    mask = torch.ones_like(tokens)  # without one, models look for padding
    return {"input_ids": tokens, "attention_mask": mask, "use_cache": False}


@contextmanager
def _watching(layer: nn.Module, one: _Watched) -> Iterator[None]:
    """Inside, a layer's call is written down."""

    def wrote(place: str, x: Tensor) -> None:
        one.written[place] = (x.clone(), one.events)

    one.stream.taps = {p: partial(wrote, p) for p in ("attn_out", "mlp_out")}
    own = layer.forward

    def call(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return one.stream.follow(own, hidden, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(replaced(layer, call))
        for name, module in layer.named_modules():
            if name:
                stack.enter_context(_noting(module, name, one))
        yield


@contextmanager
def _noting(module: nn.Module, name: str, one: _Watched) -> Iterator[None]:
    """Inside, what a module takes and returns is written down, and the stream is told."""
    attention = "Attention" in type(module).__name__
    open_calls = ExitStack()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        one.events += 1
        one.taken.setdefault(name, one.events)
        inputs = [*args, *kwargs.values()]
        if inputs and isinstance(inputs[0], Tensor):
            one.widths.setdefault(name, inputs[0].shape[-1])
        if one.mid is None and any(map(one.stream.is_mid, inputs[:1])):
            one.mid = name
        if attention:
            open_calls.enter_context(one.stream.inside_attention(inputs))

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        one.events += 1
        first = first_of(out)
        open_calls.close()
        if isinstance(first, Tensor):
            one.stream.computed(module, [*args, *kwargs.values()], first)
            one.returned.append((name, one.events, first.clone()))
        second = out[1] if isinstance(out, tuple) and len(out) > 1 else None
        if attention and isinstance(second, Tensor) and second.dim() == 4:
            one.pattern = (name, one.events)

    hooks = (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def first_of(out: Any) -> Any:
    """A module's main output: the first of a tuple."""
    return out[0] if isinstance(out, (tuple, list)) and out else out


def _spots(layer: nn.Module, one: _Watched, d: Dimensions, length: int) -> dict[str, Spot]:
    names = {module: name for name, module in layer.named_modules()}
    spots = {}
    for place, (written, until) in one.written.items():
        found = _returning(one, written, until)
        if found is not None:
            spots[place] = found
    down = names.get(one.stream.linear.get("mlp_out"))
    if down is not None and d.neurons is not None and one.widths.get(down) == d.neurons:
        spots["neuron"] = Spot(down, "input", one.taken[down], d.neurons)
    if one.mid is not None and "resid_mid" in one.stream.found:
        spots["resid_mid"] = Spot(one.mid, "input", one.taken[one.mid])
    if one.pattern is not None:
        spots["pattern"] = Spot(one.pattern[0], "output", one.pattern[1], d.heads)
    return spots | _projections(layer, one, d, length)


def _returning(one: _Watched, written: Tensor, until: int) -> Spot | None:
    """The first module whose output is what was written, up to a factor."""
    wanted = written.reshape(-1)
    for name, order, returned in one.returned:
        if order > until or returned.numel() != written.numel():
            continue
        flat = returned.reshape(-1)
        scale = float((wanted.double() @ flat.double()) / (flat.double() @ flat.double()))
        if torch.allclose(flat * scale, wanted, rtol=1e-2, atol=1e-6 + 1e-2 * float(wanted.std())):
            return Spot(name, "output", order, scale=1.0 if abs(scale - 1) < 1e-3 else scale)
    return None


def _heads(layer: nn.Module, one: _Watched, d: Dimensions, shape: Shape | None) -> dict[str, Spot]:
    """Where z is: in what the first module takes that is given it as it is, most often the output
    projection; where none is (a gate stands before that), in what the call of attention returns.
    Where that is not seen, in what the output projection takes."""
    names = {module: name for name, module in layer.named_modules()}
    out = names.get(one.stream.linear.get("attn_out"))
    if shape is None:
        if out is None or one.widths.get(out) != d.heads * d.d_head:
            return {}
        return {"head_z": Spot(out, "input", one.taken[out], d.heads)}
    taking = names.get(shape.takes_z)
    if taking is not None and taking in one.taken:
        return {"head_z": Spot(taking, "input", one.taken[taking], d.heads)}
    calling = names.get(shape.attention)
    if calling is None or out is None:
        return {}
    # Just before the output projection: all of the call's own modules have been called.
    return {"head_z": Spot(calling, "attention", one.taken[out] - 0.5, d.heads)}


def _projections(layer: nn.Module, one: _Watched, d: Dimensions, length: int) -> dict[str, Spot]:
    """Queries, keys and values of `length` tokens, where the names of the projections are known."""
    if any(type(m).__name__ in SHUFFLED for m in layer.modules()):
        return {}
    last = {name.rsplit(".", 1)[-1]: (name, at, out) for name, at, out in one.returned}
    heads = {"head_q": d.heads, "head_k": d.kv_heads, "head_v": d.kv_heads}
    spots = {}
    for place, units in heads.items():
        known = [last[n] for n in (*NORMS.get(place, ()), SEPARATE[place]) if n in last]
        if not known:
            continue
        name, order, out = max(known, key=lambda module: module[1])  # norms may stand before it
        lies = tuple(out.shape[:-1])
        flat = lies in ((1, length), (length,)) and out.shape[-1] % units == 0
        turned = lies == (1, units, length)
        if flat or turned or lies == (1, length, units):
            spots[place] = Spot(name, "output", order, units, transposed=turned)
    fused = [last[n] for n in SIDE_BY_SIDE if n in last]
    if not fused:
        return spots
    name, order, out = fused[0]
    by_head = name.rsplit(".", 1)[-1] in BY_HEAD or any(
        type(m).__name__ in BY_HEAD_IN for m in layer.modules()
    )
    width, d_head = out.shape[-1], out.shape[-1] // (d.heads + 2 * d.kv_heads)
    if width != (d.heads + 2 * d.kv_heads) * d_head:
        return spots
    if by_head and d.kv_heads == d.heads:
        whole = {p: Spot(name, "output", order, d.heads, column=i) for i, p in enumerate(ORDER)}
        return whole | spots
    if by_head and d.kv_heads != 1:
        return spots  # grouped in an order of its own
    stops = torch.tensor([0, *(heads[p] * d_head for p in ORDER)]).cumsum(0).tolist()
    parts = list(itertools.pairwise(stops))
    return {
        place: Spot(name, "output", order, heads[place], part=part)
        for place, part in zip(ORDER, parts, strict=True)
    } | spots
