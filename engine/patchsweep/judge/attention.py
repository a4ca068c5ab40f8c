"""What attention takes and returns: the attention function that a model uses, wrapped.

Models look that function up at every call, in transformers' registry or (eager) among the names of
their own module. Families that attend in code of their own are seen one level lower: in the product
of queries and keys whose softmax weighs values, or torch's fused attention.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedModel

EAGER = "eager_attention_forward"
PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm"}
FUSED = "scaled_dot_product_attention"
SOFTMAX = "softmax"


class Visitor(Protocol):
    """Sees the attention of one layer."""

    def see(self, name: str, x: Tensor) -> Tensor:
        """An activation [row, position, unit, width] by its component; what stands in its place."""

    def wants(self, name: str) -> bool:
        """Whether `see` does anything with this component."""


@dataclass(frozen=True)
class Call:
    """One call of attention: its heads, and which keys a query may see, [query, key]; None where
    that is not known."""

    heads: int
    kv_heads: int
    allowed: Tensor | None


class NotShown(Exception):
    """Something of attention that cannot be told from what it takes."""


# Asked at every call: who sees it, None for nobody. Told of those that are seen.
Asked = Callable[[], Visitor | None]
Told = Callable[[Call], None]


@contextmanager
def watched(hf_model: PreTrainedModel, asked: Asked, told: Told) -> Iterator[None]:
    """Inside, every call of the attention function that the model uses is shown."""

    def wrap(own: Callable[..., Any]) -> Callable[..., Any]:
        def attention(
            module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            visitor = asked()
            if visitor is None:
                return own(module, q, k, v, *args, **kwargs)
            mask = args[0] if args else kwargs.get("attention_mask")
            with torch._C.DisableTorchFunction():
                told(Call(q.shape[1], k.shape[1], _allowed(module, q, k, mask, kwargs)))
                return _attend(visitor, own, module, (q, k, v), mask, args, kwargs)

        return attention

    names = {
        c._attn_implementation for m in hf_model.modules() if (c := getattr(m, "config", None))
    }
    with ExitStack() as stack:
        for registry in _registries(hf_model):
            for name in names & {*registry}:
                stack.enter_context(_replaced_in(registry, name, wrap(registry[name])))
        for module in _modules(hf_model):
            own = vars(module).get(EAGER)
            if own is not None:
                stack.callback(setattr, module, EAGER, own)
                setattr(module, EAGER, wrap(own))
        yield


def _modules(hf_model: PreTrainedModel) -> list[Any]:
    """The Python modules that a model's classes come from."""
    names = sorted({type(m).__module__ for m in hf_model.modules()})
    return [sys.modules[name] for name in names if name in sys.modules]


def _registries(hf_model: PreTrainedModel) -> list[AttentionInterface]:
    found = [x for m in _modules(hf_model) for x in vars(m).values()]
    return list({id(x): x for x in found if isinstance(x, AttentionInterface)}.values())


@contextmanager
def _replaced_in(registry: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """That function under a name, in this registry alone."""
    local = registry._local_mapping
    before = local.get(name)
    registry[name] = function
    try:
        yield
    finally:
        if before is None:
            del registry[name]
        else:
            registry[name] = before


def _attend(
    visitor: Visitor,
    own: Callable[..., Any],
    module: nn.Module,
    qkv: tuple[Tensor, Tensor, Tensor],
    mask: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    names = ("head_q", "head_k", "head_v")
    q, k, v = (_turned(visitor, n, x) for n, x in zip(names, qkv, strict=True))
    out = own(module, q, k, v, *args, **kwargs)
    z = out[0]
    if visitor.wants("head_pattern"):
        pattern = weights(module, q, k, mask, kwargs)
        z = _weighed(visitor, pattern, v, z)
    return (visitor.see("head_z", z), *out[1:])


def _turned(visitor: Visitor, name: str, x: Tensor) -> Tensor:
    """[row, head, position, width], seen with positions before heads."""
    return visitor.see(name, x.transpose(1, 2)).transpose(1, 2)


def _weighed(visitor: Visitor, pattern: Tensor, v: Tensor, z: Tensor) -> Tensor:
    """z [row, position, head, width] with those rows of attention [row, head, query, key] replaced
    that the visitor changes."""
    v = v.repeat_interleave(pattern.shape[1] // v.shape[1], 1)
    again = (pattern @ v.to(pattern)).transpose(1, 2)
    size = float(z.double().abs().max())
    share = 1e-3 if z.element_size() >= 4 else 5e-2
    if float((again.double() - z.double()).abs().max()) > share * size:
        raise NotShown("its probabilities times the values are not what attention returns")
    before = pattern.transpose(1, 2)
    after = visitor.see("head_pattern", before)
    if after is before:
        return z
    changed = (after != before).any(-1, keepdim=True)
    new = (after.transpose(1, 2) @ v.to(pattern)).transpose(1, 2).to(z)
    return torch.where(changed, new, z)


def weights(module: nn.Module, q: Tensor, k: Tensor, mask: Any, how: dict[str, Any]) -> Tensor:
    """Attention probabilities [row, head, query, key] in plain terms, in float32 at least."""
    exact = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(exact), k.to(exact).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scaling = how.get("scaling")
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if how.get("softcap") is not None:
        scores = how["softcap"] * torch.tanh(scores / how["softcap"])
    if isinstance(mask, Tensor) and mask.dtype != torch.bool and mask.dim() == 4:
        scores = scores + mask[..., : k.shape[2]].to(exact)
    allowed = _allowed(module, q, k, mask, how)
    if allowed is None:
        raise NotShown("its attention mask is of a kind that is not known")
    scores = scores.masked_fill(~allowed, float("-inf"))
    sinks = how.get("s_aux")
    if sinks is not None:
        sink = sinks.to(exact).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    pattern: Tensor = scores.softmax(-1)[..., : k.shape[2]]
    return pattern


def _allowed(
    module: nn.Module, q: Tensor, k: Tensor, mask: Any, how: dict[str, Any]
) -> Tensor | None:
    """[row or 1, 1, query, key]: which keys a query sees, from the mask that attention is given;
    None for a mask of another kind than [row, 1, query, key]."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4):
        return None
    if mask is not None:
        seen: Tensor = mask[..., : k.shape[2]]
        return seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
    query = torch.arange(q.shape[2], device=q.device)[:, None]
    key = torch.arange(k.shape[2], device=q.device)
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    # Without a mask some functions know what is meant; plain ones see everything.
    name = str(getattr(getattr(module, "config", None), "_attn_implementation", ""))
    said = None
    if any(kind in name for kind in ("sdpa", "flash", "flex")):
        said = how.get("is_causal")
        said = getattr(module, "is_causal", True) if said is None else said
    if said:
        seen = key <= query
    if "flash" in name and how.get("sliding_window") is not None:
        seen = seen & (query - key < how["sliding_window"])
    return seen[None, None]


@dataclass(eq=False)
class Products(TorchFunctionMode):
    """While active around a layer's call: shows the attention of a family that has no attention
    function. `rows` and `length` are those of the batch.

    `place` says which of the layer's products is that of queries and keys, and which that with
    values; with None they are looked for: `found` has them after, and `calls` what they showed.
    """

    rows: int
    length: int
    place: tuple[int, int] | None = None
    visitor: Visitor | None = None
    count: int = 0
    found: list[tuple[int, int]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    _scores: tuple[int, Call] | None = None
    _softmax: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == FUSED:
            return self._fused(func, args, kwargs)
        if name in PRODUCTS:
            return self._product(name, func, args, kwargs)
        out = func(*args, **kwargs)
        if name == SOFTMAX and self._square(out) and self._scores is not None:
            self._softmax = True
        return out

    def _square(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.shape[-2:] == (self.length, self.length)

    def _fused(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        number, self.count = self.count, self.count + 1
        if self.place is None:
            self.found.append((number, number))
            self.calls.append(self._call(args[0], args[1]))
        if self.place != (number, number) or len(args) < 3:
            return func(*args, **kwargs)
        names = ("head_q", "head_k", "head_v")
        seen = [self._see(n, x) for n, x in zip(names, args, strict=False)]
        return self._see("head_z", func(*seen, *args[3:], **kwargs))

    def _product(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        number, self.count = self.count, self.count + 1
        given = list(args)
        first = 1 if name == "baddbmm" else 0
        keys: list[Any] = [first, first + 1]
        held: list[Any] = [given, given]
        for i, said in enumerate(("batch1", "batch2") if first else ("input", "other")):
            if said in kwargs:
                keys[i], held[i] = said, kwargs
        a, b = (h[key] for h, key in zip(held, keys, strict=True))
        if self.place is not None and number == self.place[0]:
            held[0][keys[0]] = self._see("head_q", a)
            held[1][keys[1]] = self._see("head_k", b.transpose(-1, -2)).transpose(-1, -2)
        elif self.place is not None and number == self.place[1]:
            held[0][keys[0]] = self._see("head_pattern", a)
            held[1][keys[1]] = self._see("head_v", b)
            return self._see("head_z", func(*given, **kwargs))
        out = func(*given, **kwargs)
        if self.place is None:
            self._look(number, a, b, out)
        return out

    def _look(self, number: int, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Scores are the last square product before a softmax, which the next one multiplies."""
        if self._softmax and self._scores is not None and self._square(a):
            self.found.append((self._scores[0], number))
            self.calls.append(self._scores[1])
            self._scores, self._softmax = None, False
        elif self._square(out):
            self._scores, self._softmax = (number, self._call(a, b.transpose(-1, -2))), False

    def _call(self, q: Tensor, k: Tensor) -> Call:
        """Keys may be given once for each query head: those that are alike are one."""
        q, k = (x.reshape(self.rows, -1, *x.shape[-2:]) for x in (q, k))
        alike = (k[:, 1:] == k[:, :-1]).flatten(2).all(-1).all(0)
        return Call(q.shape[1], int((~alike).sum()) + 1, None)

    def _see(self, name: str, x: Tensor) -> Tensor:
        """An activation as it lies there, [row, unit, position, width] or [row · unit, ...]."""
        assert self.visitor is not None
        by_row = x.reshape(self.rows, -1, *x.shape[-2:]).transpose(1, 2)
        with torch._C.DisableTorchFunction():
            seen = self.visitor.see(name, by_row)
        return x if seen is by_row else seen.transpose(1, 2).reshape(x.shape)
