"""The residual stream inside one layer: what is added to it, found by following the additions.

Families differ in what stands between a sub-layer and the residual stream (post-norms, multipliers,
parallel blocks), not in the fact that something is added. So the additions are watched while the
model's own layer runs, and shown to whoever overwrites or reads them; no table of families is
needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from patchsweep.errors import BadInput

ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
MISSING = {
    "resid_mid": "its attention and MLP read the same residual stream (parallel blocks)",
    "attn_out": "what attention adds to the residual stream was not found",
    "mlp_out": "what the MLP adds to the residual stream was not found",
}
# Functions whose result is the same activation in another shape or dtype.
SAME = {"view", "reshape", "contiguous", "flatten", "unsqueeze", "squeeze", "dropout", "clone"}
SAME |= {"detach", "to", "float", "double", "half", "bfloat16", "type", "type_as"}

# Functions that multiply by a weight, and which of their arguments it is.
LINEAR = {"linear": 1, "addmm": 2}

# What a tensor is, seen from the residual stream: the stream itself before and after attention's
# addition, or something computed from it: by attention, from the stream before, from the stream
# after; SUM is attention + MLP on their way to the stream together (parallel blocks).
STREAM, MID, ATTENTION, BEFORE, AFTER, SUM = "stream", "mid", "attention", "before", "after", "sum"


# Sees an activation [token, unit, width] while a layer runs; may overwrite it in place.
Tap = Callable[[Tensor], None]


@dataclass(eq=False)
class ResidualStream(TorchFunctionMode):
    """While active around a layer call: show what is written to the residual stream to taps.

    `taps` are by place (attn_out, resid_mid, mlp_out); `found` tells which of them this layer has:
    resid_mid only where the MLP reads the stream after attention was added. `linear` tells which
    linear map what is written (attn_out, mlp_out) comes from: its module, or a bare weight.
    """

    taps: Mapping[str, Tap]
    found: set[str] = field(default_factory=set)
    linear: dict[str, nn.Module | Tensor | None] = field(default_factory=dict)
    PLACES: ClassVar[tuple[str, ...]] = ("attn_out", "resid_mid", "mlp_out")

    def __post_init__(self) -> None:
        super().__init__()
        self._roles = WeakTensorKeyDictionary()
        self._linear = WeakTensorKeyDictionary()  # of what comes from one linear map: that map

    def watch(self, layer: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call a layer with the residual stream `hidden`; BadInput if it lacks a place."""
        out = self.follow(layer, hidden, *args, **kwargs)
        for place in self.taps:
            if place not in self.found:
                raise BadInput(f"{place} cannot be patched in this model: {MISSING[place]}")
        return out

    def follow(self, layer: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call a layer with the residual stream `hidden`."""
        self._roles[hidden] = STREAM
        with self:
            return layer(hidden, *args, **kwargs)

    def from_attention(self, z: Tensor) -> None:
        """`z` is what the attention function returns."""
        self._roles[z] = ATTENTION

    @contextmanager
    def inside_attention(self, inputs: Sequence[Any]) -> Iterator[None]:
        """What is computed inside from the first of `inputs` that is known is attention's."""
        known = next((t for t in inputs if self._role(t) is not None), None)
        role = self._role(known)
        if known is None or role is None:
            yield
            return
        self._roles[known] = ATTENTION
        yield
        self._roles[known] = role

    def computed(self, module: nn.Module, inputs: Sequence[Any], out: Tensor) -> None:
        """A module computed `out` from `inputs`, perhaps by means that cannot be watched."""
        if out not in self._roles:
            role = self._derived("module", tuple(inputs))
            if role is not None:
                self._roles[out] = role
        if getattr(getattr(module, "weight", None), "dim", int)() == 2:
            self._linear[out] = module

    @contextmanager
    def told_by(self, layer: nn.Module) -> Iterator[None]:
        """Inside, the modules of a layer tell what they computed."""

        def tell(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            if isinstance(out, Tensor):
                self.computed(module, [*args, *kwargs.values()], out)

        with ExitStack() as stack:
            for module in layer.modules():
                hook = module.register_forward_hook(tell, with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def is_mid(self, value: Any) -> bool:
        """Whether this is the stream after attention was added to it."""
        return self._role(value) == MID

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.__name__
        if name in ADDITIONS and len(args) == 2 and all(isinstance(a, Tensor) for a in args):
            role = self._addition(*args)
            out = func(*args, **(kwargs or {}))
            if role == MID and "resid_mid" in self.taps:
                self._show("resid_mid", out)
        else:
            out = func(*args, **(kwargs or {}))
            role = self._derived(name, args)
            if name == "__setitem__" and role is not None:
                self._roles[args[0]] = role
        if role is not None:
            for t in out if isinstance(out, (tuple, list)) else (out,):
                # A conversion that has nothing to do returns its input, which keeps its role.
                if isinstance(t, Tensor) and (name in ADDITIONS or t not in self._roles):
                    self._roles[t] = role
        if isinstance(out, Tensor) and out not in self._linear:
            linear = self._map(name, args)
            if linear is not None:
                self._linear[out] = linear
        return out

    def _map(self, name: str, args: tuple[Any, ...]) -> nn.Module | Tensor | None:
        """The one linear map that a result comes from."""
        if name in LINEAR:
            weight: Tensor = args[LINEAR[name]]
            return weight
        known = {self._linear[a] for a in args if isinstance(a, Tensor) and a in self._linear}
        return known.pop() if len(known) == 1 else None

    def _role(self, value: Any) -> str | None:
        return self._roles.get(value) if isinstance(value, Tensor) else None

    def _derived(self, name: str, args: tuple[Any, ...]) -> str | None:
        """The role of what a function computes from tensors of known roles."""
        if name in SAME and args:
            role = self._role(args[0])
            if role is not None:
                return role
        flat = (b for a in args for b in (a if isinstance(a, (tuple, list)) else (a,)))
        roles = {self._role(a) for a in flat}
        if ATTENTION in roles:
            return ATTENTION
        if MID in roles or AFTER in roles:
            return AFTER
        return BEFORE if roles & {STREAM, BEFORE} else None

    def _addition(self, a: Tensor, b: Tensor) -> str | None:
        """The role of a + b, after what the addition writes to the stream was overwritten."""
        by_role = {self._role(a): a, self._role(b): b}
        if len(by_role) < 2 or a.shape != b.shape:
            return self._derived("add", (a, b))
        if STREAM in by_role or MID in by_role:
            onto = STREAM if STREAM in by_role else MID
            (kind,) = by_role.keys() - {onto}
            if kind is None:  # of unknown origin: better not found than taken for the MLP
                return None
            if kind == SUM:
                return MID
            if kind == ATTENTION:
                self._write("attn_out", by_role[kind])
                return MID
            if kind == AFTER:
                self.found.add("resid_mid")
            self._write("mlp_out", by_role[kind])
            # With both written the layer is done: its output is no place of its own.
            return STREAM if onto == STREAM else None
        if by_role.keys() == {ATTENTION, BEFORE} and a.shape[-1] == b.shape[-1]:
            self._write("attn_out", by_role[ATTENTION])
            self._write("mlp_out", by_role[BEFORE])
            return SUM
        return self._derived("add", (a, b))

    def _write(self, place: str, written: Tensor | None) -> None:
        self.found.add(place)
        if written is not None:
            self.linear[place] = self._linear.get(written)
        if place in self.taps and written is not None:
            self._show(place, written)

    def _show(self, place: str, activation: Tensor) -> None:
        self.taps[place](activation.view(-1, 1, activation.shape[-1]))
