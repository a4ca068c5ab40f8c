"""Weights that are kept off a GPU come in one layer ahead, while the layer before computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn

from patchsweep.device.offload import device_of, hook_of, replaced, unhooked, weights_under
from patchsweep.device.transfer import side_stream

# Of every module with a hook that brings its weights in: those weights by name, on its device.
Weights = dict[nn.Module, Mapping[str, Tensor]]


def worthwhile(device: torch.device) -> bool:
    """Whether weights can come to a device while it computes. A CPU would have to fetch them
    itself."""
    return device.type == "cuda"


@dataclass(frozen=True)
class _Used:
    """The weights of a layer whose work is queued up to the event `computed`, if on a GPU."""

    weights: Weights
    computed: torch.cuda.Event | None

    def let_go(self) -> None:
        """Wait until the layer is computed, then free them."""
        if self.computed is not None:
            self.computed.synchronize()
        self.weights.clear()


class Prefetch:
    """Brings the weights of layers to their devices, in a thread and on a stream of its own.

    A layer's weights are held here until the device has computed it, and only then those of the
    next but one are fetched: at most two layers have weights at one time.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        self._thread = ThreadPoolExecutor(1, "patchsweep-weights")
        self._coming: tuple[int, Future[Weights]] | None = None
        self._used = _Used({}, None)

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Inside, layer `index` has its weights, and those of the next one are being fetched."""
        if self._coming is None or self._coming[0] != index:
            self._begin(index)
        assert self._coming is not None
        weights = self._coming[1].result()
        self._coming = None
        if index + 1 < len(self._layers):
            self._begin(index + 1)
        try:
            with _given(weights):
                yield
        finally:
            self._used = _Used(weights, _now(device_of(self._layers[index])))

    def _begin(self, index: int) -> None:
        self._coming = (index, self._thread.submit(self._fetch, index, self._used))

    def _fetch(self, index: int, before: _Used) -> Weights:
        before.let_go()
        device = device_of(self._layers[index])
        aside = torch.cuda.stream(side_stream(device)) if device.type == "cuda" else nullcontext()
        with aside:
            # Each copy is waited for, by this thread alone.
            return {
                module: {
                    name: hook.weights_map[name].to(device, p.dtype)
                    for name, p in weights_under(module, hook)
                }
                for module, hook in _absent(self._layers[index])
            }


def _absent(layer: nn.Module) -> Iterator[tuple[nn.Module, AlignDevicesHook]]:
    """A layer's modules without weights, and the hooks that would bring them in when called."""
    for module in layer.modules():
        hook = hook_of(module)
        # Buffers that are kept off the device as well are left to the hook.
        if hook is None or hook.offload_buffers:
            continue
        if any(p.is_meta for _, p in weights_under(module, hook)):
            yield module, hook


@contextmanager
def _given(weights: Weights) -> Iterator[None]:
    """Inside, the modules compute with these weights, and their hooks bring nothing in."""
    with ExitStack() as stack:
        for module, tensors in weights.items():
            for name, tensor in tensors.items():
                path, _, leaf = name.rpartition(".")
                stack.enter_context(_parameter_is(module.get_submodule(path), leaf, tensor))
            hook = hook_of(module)
            assert hook is not None
            stack.enter_context(replaced(module, unhooked(module, hook)))
        yield


@contextmanager
def _parameter_is(module: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    own = module.get_parameter(name)
    setattr(module, name, nn.Parameter(value, requires_grad=own.requires_grad))
    try:
        yield
    finally:
        setattr(module, name, own)


def _now(device: torch.device) -> torch.cuda.Event | None:
    """What is queued on a device until now."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
