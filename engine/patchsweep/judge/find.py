"""Where a model's activations are: seen in one plain forward of a few tokens.

What a layer adds to the residual stream is found by its value: the stream after the layer less that
before it is α·(output of one module) + β·(output of another), for some two of the layer's modules.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patchsweep.judge.attention import Call, Products, watched

ROUNDINGS = 8  # by so many units of rounding a sum may be off


@dataclass(frozen=True)
class Written:
    """A module whose output, times `scale`, is added to the residual stream; and those before it
    whose outputs are added with it (shared experts), each with its scale."""

    module: nn.Module
    scale: float
    beside: tuple[tuple[nn.Module, float], ...] = ()


@dataclass(frozen=True)
class Layer:
    """A decoder layer: what attention and the MLP add, the MLP's last linear map, the calls of
    attention, and for families without an attention function which products it is made of."""

    module: nn.Module
    attn: Written | None
    mlp: Written | None
    down: nn.Module | None
    calls: tuple[Call, ...]
    products: tuple[int, int] | None


@dataclass(eq=False)
class _Seen:
    """What one member of a list of modules showed: order is the number of the event."""

    module: nn.Module
    before: Tensor | None = None
    after: Tensor | None = None
    called: int = 0
    attended: int | None = None
    calls: list[Call] = field(default_factory=list)
    products: list[tuple[int, int]] = field(default_factory=list)
    shown: list[Call] = field(default_factory=list)  # by the products
    returned: list[tuple[int, nn.Module, Tensor]] = field(default_factory=list)
    taken: list[tuple[int, nn.Module, Tensor]] = field(default_factory=list)
    linear: list[tuple[int, nn.Module]] = field(default_factory=list)


def first(value: Any) -> Any:
    """The main output of a module: the first of a tuple or list."""
    return value[0] if isinstance(value, (tuple, list)) and len(value) else value


@torch.no_grad()
def find(hf_model: PreTrainedModel, tokens: Tensor, count: int) -> list[Layer]:
    """The `count` decoder layers, watched in a forward of tokens [1, position]. LookupError if no
    list of that many modules is called one after another, and where activations are not finite."""
    lists = [m for m in hf_model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    members = {member: _Seen(member) for each in lists for member in each}
    now: list[_Seen] = []
    events = itertools.count()

    def told(call: Call) -> None:
        now[-1].calls.append(call)
        now[-1].attended = next(events)

    with ExitStack() as stack:
        stack.enter_context(watched(hf_model, lambda: Blind() if now else None, told))
        for seen in members.values():
            stack.enter_context(_followed(seen, now, events, tokens.shape[1]))
        hf_model(input_ids=tokens)
    shown = [x for s in members.values() for x in (s.before, s.after) if x is not None]
    if not all(bool(x.isfinite().all()) for x in shown):
        raise LookupError("its activations are not finite")
    for each in lists:
        found = [members[m] for m in each]
        if all(s.called == 1 and s.after is not None for s in found) and _chained(found):
            layers: list[Layer] = []
            for one in found:
                layers.append(_layer(one, layers[-1] if layers else None))
            return layers
    raise LookupError(f"no list of {count} layers is called one after another")


class Blind:
    """Looks at attention and changes nothing."""

    def see(self, _: str, x: Tensor) -> Tensor:
        return x

    def wants(self, _: str) -> bool:
        return False


def _chained(found: Sequence[_Seen]) -> bool:
    """Whether each takes what the one before returns."""
    pairs = itertools.pairwise(found)
    return all(
        a.after is not None and b.before is not None and torch.equal(a.after, b.before)
        for a, b in pairs
    )


@contextmanager
def _followed(seen: _Seen, now: list[_Seen], events: Iterator[int], length: int) -> Iterator[None]:
    """Inside, what a member of a list and the modules in it take and return is written down."""
    products: list[tuple[Products, ExitStack]] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor):
            seen.before = hidden.detach().clone()
        now.append(seen)
        mode, inside = Products(1, length), ExitStack()
        inside.enter_context(mode)
        products.append((mode, inside))

    def leave(_: nn.Module, __: Any, out: Any) -> None:
        mode, inside = products.pop()
        inside.close()
        if not seen.calls:
            seen.products, seen.shown = mode.found, mode.calls
        now.pop()
        seen.called += 1
        if isinstance(first(out), Tensor):
            seen.after = first(out).detach().clone()

    def took(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = first(args)
        if isinstance(x, Tensor) and seen.before is not None and x.shape == seen.before.shape:
            seen.taken.append((next(events), module, x.detach().clone()))

    def returned(module: nn.Module, _: Any, out: Any) -> None:
        order, x = next(events), first(out)
        if products and products[-1][0].found and seen.attended is None:
            seen.attended = order
        if isinstance(x, Tensor) and seen.before is not None and x.numel() == seen.before.numel():
            seen.returned.append((order, module, x.detach().clone()))
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            seen.linear.append((order, module))

    hooks: list[Any] = [
        seen.module.register_forward_pre_hook(enter, with_kwargs=True),
        seen.module.register_forward_hook(leave),
    ]
    for module in seen.module.modules():
        if module is not seen.module:
            hooks += [module.register_forward_pre_hook(took)]
            hooks += [module.register_forward_hook(returned)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _layer(seen: _Seen, below: Layer | None) -> Layer:
    attn, mlp = _as_below(seen, below) or _added(seen)
    down = None
    if mlp is not None:
        until = max(order for order, module, _ in seen.returned if module is mlp.module)
        linear = [module for order, module in seen.linear if order <= until]
        down = linear[-1] if linear else None
    calls = tuple(seen.calls or seen.shown)
    products = seen.products[0] if len(seen.products) == 1 else None
    return Layer(seen.module, attn, mlp, down, calls, products)


def _as_below(seen: _Seen, below: Layer | None) -> tuple[Written, Written] | None:
    """What attention and the MLP add, if the modules of the same names as in the layer below add up
    to the difference, as most often."""
    if below is None or below.attn is None or below.mlp is None or below.mlp.beside:
        return None
    names = {module: name for name, module in below.module.named_modules()}
    here = dict(seen.module.named_modules())
    wanted = [here.get(names.get(w.module, "-")) for w in (below.attn, below.mlp)]
    assert seen.before is not None and seen.after is not None
    some = [(o, m, _flat(x)) for o, m, x in seen.returned if m in wanted]
    if len(some) != 2 or seen.before.shape != seen.after.shape:
        return None
    unit = torch.finfo(seen.before.dtype).eps
    found = _made_of(_flat(seen.after), _flat(seen.before), some, (1, 2), unit)
    both = {w.module: w for _, w in found or ()}
    attn, mlp = (both.get(m) for m in wanted if m is not None)
    return (attn, mlp) if attn is not None and mlp is not None else None


# An output of a module, when it was returned, flat in float64.
_Output = tuple[int, nn.Module, Tensor]


def _added(seen: _Seen) -> tuple[Written | None, Written | None]:
    """What attention and what the MLP add: the modules, up to three, whose outputs, to scale, make
    up the difference that the layer makes. Attention's is the first after attention was called."""
    assert seen.before is not None and seen.after is not None
    if seen.before.shape != seen.after.shape:
        return None, None
    unit = torch.finfo(seen.before.dtype).eps
    before, after = _flat(seen.before), _flat(seen.after)
    outputs = _distinct(seen)
    found = _made_of(after, before, outputs, (1, 2), unit)
    found = found or _made_of(after, before, outputs, (3,), unit)
    if torch.equal(after, before):
        found = []
    if found is not None and len(found) < 2:
        found = _with_idle(seen, found)
    if found is None:
        return _before_norms(seen, before, outputs, unit)
    if len(found) == 3:
        (order, own), (_, other), (_, last) = found
        both = Written(last.module, last.scale, ((other.module, other.scale),))
        return (own, both) if _attended(seen, order) else (None, None)
    attended = [w for order, w in found if _attended(seen, order)]
    others = [w for _, w in found if w not in attended[:1]]
    # Where no attention was called (a recurrent layer), what comes last is the MLP's.
    return (attended[0] if attended else None), (others[-1] if others else None)


def _with_idle(seen: _Seen, found: list[tuple[int, Written]]) -> list[tuple[int, Written]]:
    """With the modules that add nothing here: outputs of zeros one after another, after attention
    was called, are of modules within one another, the last is the outermost."""
    idle: list[tuple[int, nn.Module]] = []
    going_on = False
    for order, module, x in seen.returned:
        zero = _attended(seen, order) and not x.any()
        if zero and going_on:
            idle.pop()
        if zero:
            idle.append((order, module))
        going_on = zero
    ends = idle[:1] + idle[1:][-1:]
    if found:
        before = [one for one in idle if one[0] < found[0][0]]
        ends = before[:1] or idle[-1:]
    return sorted([*found, *((o, Written(m, 1.0)) for o, m in ends)], key=lambda one: one[0])


def _before_norms(
    seen: _Seen, before: Tensor, outputs: list[_Output], unit: float
) -> tuple[Written | None, Written | None]:
    """Where a norm follows each addition: attention's output with the stream makes up what some
    norm takes, and the MLP's with what that returns what a later one takes."""
    attn = mlp = None
    stream = before
    for order, norm, taken in seen.taken:
        earlier = [o for o in outputs if o[0] < order and _attended(seen, o[0])]
        found = _made_of(_flat(taken), stream, earlier, (1,), unit)
        if found is None:
            continue
        after = (x for at, m, x in seen.returned if m is norm and at > order)
        stream = _flat(next(after))
        if attn is None:
            attn = found[0][1]
        else:
            mlp = found[0][1]
    return attn, mlp


def _attended(seen: _Seen, order: int) -> bool:
    return seen.attended is not None and order >= seen.attended


def _flat(x: Tensor) -> Tensor:
    return x.double().cpu().flatten()


def _distinct(seen: _Seen) -> list[_Output]:
    """Outputs of modules that were called once (a hook could not tell more apart), of equal ones
    the last."""
    times = Counter(module for _, module, _ in seen.returned)
    found: list[_Output] = []
    for order, module, x in seen.returned:
        if times[module] == 1:
            flat = _flat(x)
            found = [f for f in found if not torch.equal(f[2], flat)]
            found.append((order, module, flat))
    return found


def _made_of(
    after: Tensor, before: Tensor, outputs: list[_Output], counts: tuple[int, ...], unit: float
) -> list[tuple[int, Written]] | None:
    """So many of the outputs that, to scale, are after − before up to rounding, in order; None if
    there are none, or nothing was added."""
    best = None
    if torch.equal(after, before):
        return None
    for count in counts:
        for some in itertools.combinations(outputs, count):
            scales, worst = _fit([x for _, _, x in some], before, after, unit)
            if worst <= ROUNDINGS and (best is None or worst < best[0] / 2):
                best = worst, some, scales
    if best is None:
        return None
    _, some, scales = best
    return [(order, Written(m, s)) for (order, m, _), s in zip(some, scales, strict=True)]


def _fit(
    parts: Sequence[Tensor], before: Tensor, after: Tensor, unit: float
) -> tuple[list[float], float]:
    """Factors of the parts that add up to after − before, and by how many units of rounding of the
    numbers involved it is missed at most."""
    wanted = after - before
    rounding = before.abs() + after.abs() + sum(p.abs() for p in parts)
    weight = 1 / (rounding + 1e-30)
    columns = torch.stack([p * weight for p in parts], 1)
    found = torch.linalg.lstsq(columns, (wanted * weight)[:, None]).solution[:, 0]
    near = min(64 * unit**0.75, 0.05)
    scales = [1.0 if abs(float(s) - 1) < near else float(s) for s in found]
    made = sum(s * p for s, p in zip(scales, parts, strict=True))
    return scales, float(((wanted - made).abs() * weight).max()) / unit
