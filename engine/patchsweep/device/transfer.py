"""Arrays to a device and values back to the host, without the host waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, from_numpy


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array as a tensor on a device. To a GPU it goes by page-locked memory, which is kept until
    it has been read: what is queued there already is not waited for."""
    tensor = from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Arriving:
    """Values on their way to the host: `tensors` there, complete once all of `copied` are."""

    tensors: Mapping[str, Tensor]
    copied: Sequence[torch.cuda.Event]

    def result(self) -> dict[str, NDArray[np.floating]]:
        """The values, waited for."""
        for event in self.copied:
            event.synchronize()
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}


def to_host(values: Mapping[str, Tensor]) -> Arriving:
    """Begin to bring values to the host. On a CPU they are there."""
    # A copy from a GPU that is not waited for goes to page-locked memory by itself.
    tensors = {name: value.to("cpu", non_blocking=True) for name, value in values.items()}
    devices = {value.device for value in values.values() if value.device.type == "cuda"}
    copied = [torch.cuda.current_stream(device).record_event() for device in devices]
    return Arriving(tensors, copied)


@contextmanager
def aside(gpus: Sequence[torch.device], reads: Iterable[Tensor]) -> Iterator[None]:
    """What is queued inside on these GPUs runs after what they have to do by now, but beside what
    is queued on them after. `reads` are the tensors from outside that it reads and that do not
    stay.

    So the end of a wave, which needs the last GPU's layers, does not hold up the first GPU, where
    the layers of the next wave follow.
    """
    with ExitStack() as stack:
        for gpu in gpus:
            side = side_stream(gpu)
            side.wait_stream(torch.cuda.current_stream(gpu))
            stack.enter_context(torch.cuda.stream(side))
        for tensor in reads if gpus else ():
            tensor.record_stream(side_stream(tensor.device))
        yield


@cache
def side_stream(gpu: torch.device) -> torch.cuda.Stream:
    """A second stream of a GPU, the same one for everybody."""
    return torch.cuda.Stream(gpu)
