"""Calls that may run out of memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache

from patchsweep.errors import BadInput

T = TypeVar("T")
MEND = "free memory, choose a smaller dtype, shorter prompts or device balanced"
_WANTED = re.compile(r"(?:tried to|unable to) allocate ([\d.]+ \w+)", re.IGNORECASE)


@dataclass(frozen=True)
class OutOfMemory:
    """How a call ended that ran out of memory; `wanted` as it was said, e.g. "2.00 GiB"."""

    where: str  # GPU or host
    wanted: str | None

    def __str__(self) -> str:
        more = f" ({self.wanted} more wanted)" if self.wanted else ""
        return f"out of memory on the {self.where}{more}"


def within_memory(call: Callable[[], T]) -> T | OutOfMemory:
    """What a call returns, or that it ran out of memory; then all that it held is free again."""
    try:
        return call()
    except (MemoryError, RuntimeError) as error:
        said = out_of_memory(error)
        if said is None:
            raise
    clear_device_cache(garbage_collection=True)  # no sooner: the error's frames hold the tensors
    return said


@contextmanager
def enough_memory() -> Iterator[None]:
    """Running out of memory inside is BadInput."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (said := out_of_memory(error)) is None:
            raise
        raise BadInput(f"{said}: {MEND}") from error


def out_of_memory(error: Exception) -> OutOfMemory | None:
    """Torch has no error of its own for the host's memory, and numpy's is a MemoryError."""
    on_gpu, text = isinstance(error, torch.OutOfMemoryError), str(error)
    if not (on_gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator" in text):
        return None
    wanted = _WANTED.search(text)
    return OutOfMemory("GPU" if on_gpu else "host", wanted and wanted[1])
