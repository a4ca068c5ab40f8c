"""What the machine is and how fast it multiplies: the yardstick of every other number."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

T = TypeVar("T")
PACKAGES = ("patchsweep", "torch", "transformers", "numpy", "zarr")


def timed(device: torch.device, call: Callable[[], T]) -> tuple[float, T]:
    """Seconds that a call took, all of its work on the device done, and what it returned."""
    synchronize(device)
    began = time.perf_counter()
    out = call()
    synchronize(device)
    return time.perf_counter() - began, out


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, repeats: int = 5
) -> float:
    """FLOP/s of [m, k] x [k, n] for shape (m, k, n): the median of some repeats."""
    m, k, n = shape
    # Weights lie as nn.Linear keeps them.
    a = torch.randn(m, k, device=device, dtype=dtype)
    weight = torch.randn(n, k, device=device, dtype=dtype)
    torch.nn.functional.linear(a, weight)
    times = [
        timed(device, lambda: torch.nn.functional.linear(a, weight))[0] for _ in range(repeats)
    ]
    return 2 * m * k * n / statistics.median(times)


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware, threads, versions and date (UTC): the head of a results file."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "tf32": torch.backends.cuda.matmul.allow_tf32 if cuda else None,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
    }


def cpu_name() -> str:
    """The processor's name as Linux gives it; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Clocks:
    """CPU seconds since the machine started, of all cores: used by others than this program and
    its children, and altogether, idle ones counted."""

    others: float
    total: float

    @classmethod
    def read(cls) -> Clocks:
        times, own = psutil.cpu_times(), os.times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        mine = own.user + own.system + own.children_user + own.children_system
        return cls(sum(times) - idle - mine, sum(times))

    def others_since(self) -> float:
        """Share of all cores that other programs used since, in percent."""
        now = Clocks.read()
        return max(0.0, 100 * (now.others - self.others) / (now.total - self.total))
