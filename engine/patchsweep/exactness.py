"""What a computation needs to give the same bits twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Deterministic, and in the dtype of the model whatever the user has switched on."""
    with deterministic(device), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """The same plan gives the same bits twice. CUDA needs to be told; a CPU does it anyway."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
