"""Peak memory of a sweep's waves beside the model and a plain forward.

`python -m benchmarks._memory MODEL` measures on the CPU in a fresh process and prints JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks._full import last_logits
from benchmarks._measure import all_waves, settings
from benchmarks._models import REAL, load, middle_pairs, sentence_pairs
from patchsweep.device.exactness import deterministic
from patchsweep.engine.planning import plan_sweep
from patchsweep.errors import BadInput
from patchsweep.model.model import Model
from patchsweep.pairs import Pair
from patchsweep.passes.attention import attention_is
from patchsweep.passes.forward import take_apart

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Memory:
    """Bytes: in use with the model loaded and run once, what the waves took beside that at most,
    and what the plan said that they would."""

    before: int
    waves: int
    planned: int


def in_fresh_process(model: str) -> Memory:
    """Measure a model's CPU memory in a process that has done nothing else."""
    command = [sys.executable, "-m", "benchmarks._memory", model]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return Memory(**json.loads(done.stdout))


@torch.no_grad()
def measure_memory(model: Model, pair: Pair) -> Memory:
    """Peak of the waves of a pair's head_z grid, after one plain forward of both prompts."""
    last_logits(model, torch.tensor([pair.clean, pair.corrupt], device=model.device))
    plan = plan_sweep(model.dimensions, [pair], settings(), model.device)

    def waves() -> None:
        with attention_is(model.hf_model), deterministic(model.device):
            all_waves(take_apart(model.hf_model, len(pair)), plan)

    before, peak = _cuda_peak(waves) if model.device.type == "cuda" else _resident_peak(waves)
    return Memory(before, peak - before, plan.peak_bytes)


def _cuda_peak(call: Callable[[], None]) -> tuple[int, int]:
    """Bytes allocated before, and at most during a call."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return before, torch.cuda.max_memory_allocated()


def _resident_peak(call: Callable[[], None]) -> tuple[int, int]:
    """Resident bytes before, and at most during a call. Linux only: the kernel keeps the peak."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        raise BadInput("peak memory is read from /proc: run this benchmark on Linux")
    gc.collect()
    # What was freed but kept by malloc would hide as much of the peak.
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")  # the peak counts from now on
    before = _status("VmRSS")
    call()
    return before, _status("VmHWM")


def _status(key: str) -> int:
    """A size in /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def main(name: str) -> None:
    """Print the memory of a model's sweep on the CPU."""
    model = load(name, "float32", "cpu")
    pair = sentence_pairs(model)[0] if name == REAL else middle_pairs(model, 14, 1)[0]
    print(json.dumps(asdict(measure_memory(model, pair))))


if __name__ == "__main__":
    main(sys.argv[1])
