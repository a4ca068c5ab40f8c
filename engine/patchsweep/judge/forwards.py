"""Full forwards in which activations are replaced and recorded, by plain hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from patchsweep.errors import BadInput
from patchsweep.judge.attention import NotShown, Products, watched
from patchsweep.judge.find import Layer, Written, first
from patchsweep.sae import SAE

HEADS = ("head_q", "head_k", "head_v", "head_pattern", "head_z")
Key = tuple[str, int]  # component, layer


class Unseen(BadInput):
    """The judge cannot see an activation of this model."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A run's input; `noise` [position, width] is added to what the embedding returns."""

    tokens: tuple[int, ...]
    noise: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Edit:
    """What is put in place of, or with "add" added to, an activation of one component in a layer.

    In columns [n]: units and positions; value [n, width], of sae_feature [n, 1], of head_pattern
    [n, key]. Of one component and layer the later edits count.
    """

    component: str
    layer: int
    unit: Tensor
    position: Tensor
    value: Tensor
    how: Literal["put", "add"] = "put"


# Activations [row, position, unit, width] after what was replaced, by component and layer; of
# head_pattern [row, query, head, key].
Recorded = dict[Key, Tensor]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model whose activations were found; `logits` [row, position, vocab] are those of rows of
    tokens."""

    hf_model: PreTrainedModel
    layers: Sequence[Layer]
    sae: SAE | None
    logits: Callable[[Sequence[Sequence[int]]], Tensor]


class Forward:
    """One forward of some rows: what is replaced, and what was seen."""

    def __init__(
        self,
        subject: Subject,
        prompts: Sequence[Prompt],
        edits: Sequence[Sequence[Edit]],
        record: Sequence[Key],
    ) -> None:
        self.subject, self.prompts, self.record = subject, prompts, set(record)
        self.edits: dict[Key, list[tuple[int, Edit]]] = {}
        for row, some in enumerate(edits):
            for edit in some:
                self.edits.setdefault((edit.component, edit.layer), []).append((row, edit))
        self.seen: Recorded = {}
        self.beside: list[Tensor] = []  # what other modules add together with the next one
        self.now: int | None = None

    def run(self) -> Tensor:
        subject = self.subject
        wanted = {*self.record, *self.edits}
        noised = any(p.noise is not None for p in self.prompts)
        with ExitStack() as stack:
            if noised or any(component == "embed" for component, _ in wanted):
                embedding = subject.hf_model.get_input_embeddings()
                stack.enter_context(_output(embedding, self._embedded))
            for index, layer in enumerate(subject.layers):
                here = {self._place(c) for c, at in wanted if at == index} - {"embed"}
                self._watch(stack, index, layer, here)
            if any(component in HEADS for component, _ in map(self._at, wanted)):
                stack.enter_context(watched(subject.hf_model, self._asked, lambda _: None))
            try:
                logits = subject.logits([p.tokens for p in self.prompts])
            except NotShown as why:
                raise self._unseen("head_pattern", self.now or 0, str(why)) from why
        for component, at in wanted:
            if (component, at) not in self.seen:
                raise self._unseen(component, at, "its attention or MLP is of another kind")
        return logits

    def _place(self, component: str) -> str:
        sae = self.subject.sae
        return sae.at if component == "sae_feature" and sae is not None else component

    def _at(self, key: Key) -> Key:
        return self._place(key[0]), key[1]

    def _unseen(self, component: str, layer: int, why: str) -> Unseen:
        name = type(self.subject.hf_model).__name__
        return Unseen(
            f"{component} of layer {layer} of {name} cannot be held against the model's own "
            f"forward ({why}): sweep other components"
        )

    def _watch(self, stack: ExitStack, index: int, layer: Layer, here: set[str]) -> None:
        """Hooks for what is seen in one layer."""
        if "resid_pre" in here or "resid_mid" in here:
            stack.enter_context(_input(layer.module, partial(self._pre, index)))
        if "resid_post" in here:
            see = partial(self._stream, "resid_post", index)
            stack.enter_context(_output(layer.module, see))
        if {"attn_out", "resid_mid"} & here:
            if layer.attn is None:
                raise self._unseen("attn_out", index, "what is added was not found")
            see = partial(self._attention_wrote, index, layer.attn)
            stack.enter_context(_output(layer.attn.module, see))
        if "mlp_out" in here:
            if layer.mlp is None:
                raise self._unseen("mlp_out", index, "what is added was not found")
            for module, scale in layer.mlp.beside:
                note = partial(self._beside, index, scale)
                stack.enter_context(_output(module, note))
            see = partial(self._wrote, "mlp_out", index, layer.mlp)
            stack.enter_context(_output(layer.mlp.module, see))
        if "neuron" in here:
            if layer.down is None:
                raise self._unseen("neuron", index, "the MLP does not end in a linear map")
            stack.enter_context(_input(layer.down, partial(self._neurons, index)))
        if here & set(HEADS):
            stack.enter_context(self._attending(index, layer))

    @contextmanager
    def _attending(self, index: int, layer: Layer) -> Iterator[None]:
        """Inside, attention in a layer is seen."""
        if len(layer.calls) != 1:
            raise self._unseen("attention", index, f"it is called {len(layer.calls)} times")
        inside = ExitStack()

        def enter(*_: Any) -> None:
            self.now = index
            if layer.products:
                rows, length = len(self.prompts), len(self.prompts[0].tokens)
                inside.enter_context(Products(rows, length, layer.products, self))

        def leave(*_: Any) -> None:
            self.now = None
            inside.close()

        hooks = (
            layer.module.register_forward_pre_hook(enter),
            layer.module.register_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    # What is seen of attention, in the layer that is under way.

    def _asked(self) -> Forward | None:
        return None if self.now is None else self

    def wants(self, name: str) -> bool:
        return (name, self.now) in self.edits or (name, self.now) in self.record

    def see(self, name: str, x: Tensor) -> Tensor:
        assert self.now is not None
        return self._visit(name, self.now, x)

    # Activations as they pass.

    def _visit(self, place: str, layer: int, x: Tensor) -> Tensor:
        """An activation [row, position, unit, width], and what stands in its place."""
        sae = self.subject.sae
        features = ("sae_feature", layer)
        if sae is None or (sae.at, sae.layer) != (place, layer):
            features = ("", -1)
        named = {(place, layer), features}
        if not named & {*self.edits, *self.record}:
            return x
        x = x.clone()
        group = self._group(place, layer, x.shape[2])
        for row, edit in self.edits.get((place, layer), ()):
            at, value = edit.position.to(x.device), edit.value.to(x)
            if place == "head_pattern":
                value = nn.functional.pad(value, (0, x.shape[-1] - value.shape[-1]))
            for member in range(group):
                unit = edit.unit.to(x.device) * group + member
                new = x[row, at, unit] + value if edit.how == "add" else value
                x[row, at, unit] = new.expand(len(at), x.shape[-1])
        self.seen[place, layer] = x[:, :, ::group]
        if features in self.edits:
            self._features(x, self.edits[features])
        if features in {*self.edits, *self.record}:
            assert sae is not None
            self.seen[features] = sae.encode(x.flatten(2).flatten(0, 1)).view(*x.shape[:2], -1, 1)
        return x

    def _group(self, place: str, layer: int, shown: int) -> int:
        """By how many heads each head of keys or values is shown."""
        if place not in ("head_k", "head_v"):
            return 1
        return shown // self.subject.layers[layer].calls[0].kv_heads

    def _features(self, x: Tensor, edits: Sequence[tuple[int, Edit]]) -> None:
        """x + Σ (f′ − f)·decoder, all changes measured before any is made."""
        sae = self.subject.sae
        assert sae is not None
        flat = x.view(*x.shape[:2], -1)
        own = sae.encode(flat.flatten(0, 1)).view(*x.shape[:2], -1)
        change = torch.zeros_like(own)
        for row, edit in edits:
            at, unit, value = (
                t.to(x.device) for t in (edit.position, edit.unit, edit.value[:, 0].to(own))
            )
            added = value if edit.how == "add" else value - own[row, at, unit]
            change[row].index_put_((at, unit), added, accumulate=True)
        flat += change @ sae.to(x.device, x.dtype).decoder

    def _embedded(self, x: Tensor) -> Tensor:
        if ("embed", 0) in self.seen:
            return x
        for row, prompt in enumerate(self.prompts):
            if prompt.noise is not None:
                x = x.clone()
                x[row] += prompt.noise.to(x)
        out = self._visit("embed", 0, x[:, :, None])[:, :, 0]
        self.seen.setdefault(("embed", 0), out)
        return out

    def _stream(self, place: str, layer: int, x: Tensor) -> Tensor:
        return self._visit(place, layer, self._by_position(place, layer, x)).reshape(x.shape)

    def _by_position(self, place: str, layer: int, x: Tensor) -> Tensor:
        """[row, position, 1, width]"""
        rows, length = len(self.prompts), len(self.prompts[0].tokens)
        if x.numel() % (rows * length) or (x.dim() == 3 and x.shape[:2] != (rows, length)):
            raise self._unseen(place, layer, f"it is {list(x.shape)}")
        return x.reshape(rows, length, 1, -1)

    def _pre(self, layer: int, x: Tensor) -> Tensor:
        x = self._stream("resid_pre", layer, x)
        self.before = x
        return x

    def _beside(self, layer: int, scale: float, out: Tensor) -> Tensor:
        self.beside.append(self._by_position("mlp_out", layer, out) * scale)
        return out

    def _wrote(self, place: str, layer: int, what: Written, out: Tensor) -> Tensor:
        added = self._by_position(place, layer, out) * what.scale
        others = [self.beside.pop() for _ in what.beside]
        whole = sum(others, added)
        new = self._visit(place, layer, whole)
        if new is whole:
            return out
        own = torch.where(new == whole, added, new - sum(others)) if others else new
        return _put(out, own, added, what.scale)

    def _attention_wrote(self, layer: int, what: Written, out: Tensor) -> Tensor:
        """attn_out, and the stream that it is added to: attention adds what is missing there."""
        out = self._wrote("attn_out", layer, what, out)
        if {("resid_mid", layer), self._features_at("resid_mid", layer)} & {
            *self.edits,
            *self.record,
        }:
            added = self._by_position("attn_out", layer, out) * what.scale
            before = self._by_position("resid_mid", layer, self.before)
            mid = before + added
            new = self._visit("resid_mid", layer, mid)
            out = _put(out, torch.where(new == mid, added, new - before), added, what.scale)
        return out

    def _features_at(self, place: str, layer: int) -> Key:
        sae = self.subject.sae
        here = sae is not None and (sae.at, sae.layer) == (place, layer)
        return ("sae_feature", layer) if here else ("", -1)

    def _neurons(self, layer: int, x: Tensor) -> Tensor:
        by_row = self._by_position("neuron", layer, x).transpose(2, 3)
        return self._visit("neuron", layer, by_row).transpose(2, 3).reshape(x.shape)


def _put(out: Tensor, new: Tensor, added: Tensor, scale: float) -> Tensor:
    """A module's output for which `new` is added; where nothing changes it stays as it is."""
    changed = torch.where(new == added, out.reshape(added.shape), new / scale)
    return changed.reshape(out.shape)


@contextmanager
def _output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the module's main output is what `change` makes of it."""

    def after(_: nn.Module, __: Any, out: Any) -> Any:
        if isinstance(out, (tuple, list)):
            return type(out)((change(first(out)), *out[1:]))
        return change(out)

    hook = module.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the module's main input is what `change` makes of it."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs)) if "hidden_states" not in kwargs else "hidden_states"
        return args, {**kwargs, name: change(kwargs[name])}

    hook = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
