"""A model's own forward, taken apart: the embedding, one layer at a time, the tail.

Nothing of an architecture is written again: the pieces are reached by calling the model's forward
with its layers made to pass their input on, and the layers with the arguments that forward gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from patchsweep.device import (
    Prefetch,
    device_of,
    hook_of,
    offloaded,
    replaced,
    weights_of,
    worthwhile,
)
from patchsweep.errors import BadInput, NotOnWavefront
from patchsweep.passes.attention import LayerCall, Stacked, attention_call
from patchsweep.passes.layers import layers_of
from patchsweep.passes.stream import ResidualStream, Tap
from patchsweep_kernels import Rows


@dataclass(frozen=True)
class Forward:
    """The pieces of a loaded model's forward, for prompts of up to `length` tokens."""

    hf_model: PreTrainedModel
    layers: Sequence[nn.Module]
    length: int
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]  # a layer's arguments after the first
    returns_tuple: bool

    @property
    def device(self) -> torch.device:
        """Where the residual stream begins."""
        return device_of(self.hf_model.get_input_embeddings())

    @cached_property
    def devices(self) -> list[torch.device]:
        """Where the residual stream is in every layer call, and at last where the tail reads it."""
        return [device_of(layer) for layer in (*self.layers, self.layers[-1])]

    @cached_property
    def shared_by(self) -> list[torch.device]:
        """The GPUs that a model is spread over with all its weights; empty if it is not."""
        gpus = {device for device in self.devices if device.type == "cuda"}
        spread = len(gpus) > 1 and not offloaded(self.hf_model)
        return sorted(gpus, key=str) if spread else []

    @cached_property
    def prefetch(self) -> Prefetch | None:
        """Brings layers' weights in ahead, where that is worthwhile."""
        kept = any(hook_of(m) for layer in self.layers for m in layer.modules())
        return Prefetch(self.layers) if kept and worthwhile(self.device) else None

    def weights(self, layer: int) -> AbstractContextManager[None]:
        """Inside, a layer of a wave, which goes through all of them in order, has its weights."""
        return nullcontext() if self.prefetch is None else self.prefetch.layer(layer)

    @property
    def waves_in_flight(self) -> int:
        """Waves that are worth launching before the first of them is read: on GPUs the next one
        waits behind, on several each has one; a CPU has done what is launched."""
        return max(2, len(self.shared_by)) if self.device.type == "cuda" else 1

    def once(self) -> AbstractContextManager[None]:
        """Inside, what lies outside the layers and the embeddings (norms, positions) has its
        weights brought in once, however often the model's forward passes there."""
        inside = {m for layer in self.layers for m in layer.modules()}
        ends = (self.hf_model.get_input_embeddings(), self.hf_model.get_output_embeddings())
        return weights_of(*(m for m in self.hf_model.modules() if m not in {*inside, *ends}))

    def embed(self, tokens: Tensor, positions: Tensor, tap: Tap | None = None) -> Tensor:
        """The residual stream that the first layer receives, [token, d_model].

        `tap` sees what the embedding module returns, before positions are added.
        """
        seen: list[Tensor] = []

        def first(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return hidden

        embedding = self.hf_model.get_input_embeddings()
        own = embedding.forward

        def embedded(ids: Tensor) -> Tensor:
            out: Tensor = own(ids)
            if tap is not None:
                tap(out.view(-1, 1, out.shape[-1]))
            return out

        with (
            self._bypassed(first),
            replaced(embedding, embedded),
            replaced(self.hf_model.get_output_embeddings(), _nothing),
        ):
            self._forward(tokens[None], positions[None])
        return seen[0][0]

    def layer(
        self,
        index: int,
        hidden: Tensor,
        positions: Tensor,
        stream: ResidualStream | None = None,
        neurons: Tap | None = None,
    ) -> Tensor:
        """Output of layer `index` for packed tokens [token, d_model] at `positions` [token].

        `stream` watches the layer if it is given; `neurons` sees the MLP's neurons.
        """
        args, kwargs = self.calls[index]
        pick = _Positions(self.length, positions)
        layer = self.layers[index]
        call = layer if stream is None else partial(stream.watch, layer)
        with neurons_seen(self.down_projections[index] if neurons else None, neurons):
            out = call(hidden[None], *map(pick, args), **{k: pick(v) for k, v in kwargs.items()})
        first: Tensor = out[0] if self.returns_tuple else out
        return first.view(hidden.shape)

    @cached_property
    def down_projections(self) -> list[nn.Module]:
        """Of every layer the module that maps the MLP's neurons to what the MLP adds to the
        residual stream, found in a forward of one token. BadInput if there is none."""
        zero = torch.zeros(1, dtype=torch.long, device=self.device)
        hidden = self.embed(zero, zero)
        found = []
        for index, layer in enumerate(self.layers):
            stream = ResidualStream({})
            call = LayerCall([Rows(0, 1, 1)], zero[:0], zero[:0], {}, (), (), stream)
            at = self.devices[index]
            # Weights that a hook brought in are others once it has put them away.
            with attention_call(call), weights_of(*layer.modules()):
                # A module may be more than a product with its weight: one with an adapter is.
                with stream.told_by(layer):
                    hidden = self.layer(index, hidden.to(at), zero.to(at), stream)
                down = stream.linear.get("mlp_out")
            if not isinstance(down, nn.Module):
                raise NotOnWavefront(
                    f"neuron cannot be patched in this model: the MLP of layer {index} does not "
                    "end in one linear map"
                )
            found.append(down)
        return found

    def final_norm(self, hidden: Tensor) -> Tensor:
        """What the unembedding receives when the last layer returns `hidden`, [row, d_model]."""
        seen: list[Tensor] = []

        def unembedding(h: Tensor) -> Tensor:
            seen.append(h)
            return h

        self._tail(hidden, unembedding)
        return seen[0].reshape(hidden.shape[0], -1).to(hidden.device)

    def finish(self, raw: Tensor) -> Tensor:
        """What the model makes of the unembedding's output (scale, soft-cap), [row, token]."""
        width = self.hf_model.config.get_text_config().hidden_size
        idle = torch.zeros(raw.shape[0], width, dtype=raw.dtype, device=raw.device)
        return self._tail(idle, lambda _: raw[:, None])

    @cached_property
    def finishes(self) -> bool:
        """Whether logits are more than the unembedding's output: measured on probe values."""
        output = self.hf_model.get_output_embeddings()
        raw = torch.linspace(-50, 50, 101, device=device_of(output)).to(output.weight.dtype)[None]
        return not torch.equal(self.finish(raw), raw)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [row, vocab] when the last layer returns `hidden` [row, d_model]."""
        with self.unembedding() as (weight, bias):
            return self._tail(hidden, lambda h: F.linear(h.to(weight.device), weight, bias))

    @contextmanager
    def unembedding(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Weight [vocab, d_model] and bias [vocab] of the unembedding, brought in once inside."""
        output = self.hf_model.get_output_embeddings()
        with weights_of(output):
            yield output.weight, getattr(output, "bias", None)

    def _tail(self, hidden: Tensor, unembedding: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of the model's forward whose last layer returns `hidden` [row, d_model]."""
        zeros = torch.zeros(hidden.shape[0], 1, dtype=torch.long, device=hidden.device)
        embedding = self.hf_model.get_input_embeddings()
        nothing = hidden.new_zeros(hidden.shape[0], 1, embedding.weight.shape[1])
        with (
            self._bypassed(lambda _: hidden[:, None]),
            replaced(embedding, lambda _: nothing),
            replaced(self.hf_model.get_output_embeddings(), unembedding),
        ):
            return self._forward(zeros, zeros)[:, 0]

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        given = arguments(self.hf_model, tokens, positions)
        # No layer sees a mask here; without one the model asks the device whether it is needed.
        out: Tensor = self.hf_model(**given, attention_mask=torch.ones_like(tokens)).logits
        return out

    @contextmanager
    def _bypassed(self, instead: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Every layer returns `instead` of its input, without computing anything."""

        def passed(hidden: Tensor, *_: Any, **__: Any) -> Any:
            out = instead(hidden)
            return (out,) if self.returns_tuple else out

        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(replaced(layer, passed))
            yield


def take_apart(hf_model: PreTrainedModel, length: int, shortest: int | None = None) -> Forward:
    """Record once how the model calls its layers, for prompts of `shortest` to `length` tokens.

    The model must be using patchsweep's attention (`attention.attention_is`). BadInput if it has no
    plain unembedding, or if what it computes per position depends on the prompt's length.
    """
    whole = as_it_is(hf_model, length)
    layers, returns_tuple = whole.layers, whole.returns_tuple
    calls = _recorded(hf_model, layers, returns_tuple, length)
    if shortest is not None and shortest < length:
        short = _recorded(hf_model, layers, returns_tuple, shortest)
        positions = torch.arange(shortest, device=device_of(hf_model.get_input_embeddings()))
        first = _tensors([_Positions(length, positions)(v) for v in _values(calls)])
        for a, b in zip(first, _tensors(_values(short)), strict=True):
            if a.shape != b.shape or not torch.allclose(a.double(), b.double(), atol=1e-6):
                raise NotOnWavefront(
                    f"{type(hf_model).__name__} computes positions that depend on the prompt's "
                    f"length (here {shortest} to {length} tokens): sweep prompts of one length"
                )
    return replace(whole, calls=calls)


def arguments(hf_model: PreTrainedModel, tokens: Tensor, positions: Tensor) -> dict[str, Any]:
    """The arguments of a model's forward; some models count positions themselves."""
    given = {"input_ids": tokens, "use_cache": False}
    if "position_ids" in inspect.signature(hf_model.forward).parameters:
        given["position_ids"] = positions
    return given


def as_it_is(hf_model: PreTrainedModel, length: int) -> Forward:
    """A model's forward for which only the tail is taken apart. BadInput if it has no plain
    unembedding."""
    layers = layers_of(hf_model)
    if getattr(getattr(hf_model.get_output_embeddings(), "weight", None), "dim", int)() != 2:
        raise BadInput(
            f"{type(hf_model).__name__} has no unembedding with a plain weight matrix: "
            "this model cannot be swept"
        )
    returns_tuple = _returns_tuple(hf_model, layers[0], *_tokens(hf_model, length))
    return Forward(hf_model, list(layers), length, (), returns_tuple)


Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


def _tokens(hf_model: PreTrainedModel, length: int) -> tuple[Tensor, Tensor]:
    """Some tokens and their positions, [1, length]."""
    device = device_of(hf_model.get_input_embeddings())
    tokens = torch.zeros(1, length, dtype=torch.long, device=device)
    return tokens, torch.arange(length, device=device)[None]


def _recorded(
    hf_model: PreTrainedModel, layers: Iterable[nn.Module], returns_tuple: bool, length: int
) -> Calls:
    """The arguments, after the hidden states, of every layer's call."""
    calls: Calls = []

    def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return (hidden,) if returns_tuple else hidden

    tokens, positions = _tokens(hf_model, length)
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced(layer, record))
        stack.enter_context(replaced(hf_model.get_output_embeddings(), _nothing))
        hf_model(**arguments(hf_model, tokens, positions))
    return calls


def _values(calls: Calls) -> list[Any]:
    return [v for args, kwargs in calls for v in (*args, *kwargs.values())]


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


class _Seen(Exception):
    """Ends a forward once what was wanted of it is known."""


def _returns_tuple(
    hf_model: PreTrainedModel, layer: nn.Module, tokens: Tensor, positions: Tensor
) -> bool:
    """Whether a decoder layer returns a tuple: seen on one call of the first."""

    def stop(_: nn.Module, __: Any, out: Any) -> None:
        raise _Seen(isinstance(out, (tuple, list)))

    hook = layer.register_forward_hook(stop)
    try:
        with attention_call(Stacked()):
            hf_model(**arguments(hf_model, tokens, positions))
    except _Seen as seen:
        return bool(seen.args[0])
    finally:
        hook.remove()
    raise BadInput(f"{type(hf_model).__name__} did not call its first layer")


@contextmanager
def neurons_seen(down: nn.Module | None, tap: Tap | None) -> Iterator[None]:
    """Inside, the tap sees the input of a down projection, [token, neuron, 1]."""
    if down is None or tap is None:
        yield
        return

    def see(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        neurons = args[0].clone()
        tap(neurons.view(-1, neurons.shape[-1], 1))
        return (neurons, *args[1:])

    hook = down.register_forward_pre_hook(see)
    try:
        yield
    finally:
        hook.remove()


def _nothing(hidden: Tensor) -> Tensor:
    return hidden[..., :1]


class _Positions:
    """Picks the packed positions out of whatever a model computes per position."""

    def __init__(self, length: int, positions: Tensor) -> None:
        self.length = length
        self.positions = positions

    def __call__(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self, value))
        if isinstance(value, dict):
            return {k: self(v) for k, v in value.items()}
        if not isinstance(value, Tensor):
            return value
        value = value.to(self.positions.device)
        if value.dim() >= 2 and value.shape[:2] == (1, self.length):
            return value[:, self.positions]
        return value[self.positions] if value.shape == (self.length,) else value
