"""The head x position grid on a CUDA device: model shapes, prompt lengths, float32 and bfloat16.

`python -m benchmarks.gpu_sweep --help`
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks import _report as report
from benchmarks._machine import Clocks
from benchmarks._measure import (
    Effort,
    Errors,
    Measurement,
    errors,
    measure,
    measure_neurons,
    measure_pairs,
)
from benchmarks._memory import measure_memory
from benchmarks._models import REAL, load, middle_pairs, rounded
from patchsweep.model.model import Model

OUT = Path("benchmarks/results/gpu_sweep.json")
Name = Literal["smollm2-135m", "gpt2-small", "llama-1b", "llama-7b"]
MODELS: tuple[Name, ...] = (REAL, "gpt2-small", "llama-1b", "llama-7b")
TINY_MODELS = ("tiny-llama", "tiny-gpt2")
Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")  # bfloat16 is compared with float32
LENGTHS = (15, 100)
PAIRS = 8
TINY = Effort(rounds=1, singles=12, batches=2, batch_sizes=(8, 32), side=128)


def gpu_sweep(
    *,
    out: Path = OUT,
    models: tuple[Name, ...] = MODELS,
    dtypes: tuple[Dtype, ...] = DTYPES,
    lengths: tuple[int, ...] = LENGTHS,
    rounds: int = 3,
    limit: float = 60,
    tiny: bool = False,
) -> None:
    """Measure the wavefront against full forwards on a GPU, and print and write the result.

    Example: python -m benchmarks.gpu_sweep --models gpt2-small --dtypes bfloat16 --lengths 15

    Parameters
    ----------
    out
        The JSON file to write; it grows case by case.
    models
        smollm2-135m (real), or shapes with random weights: gpt2-small, llama-1b, llama-7b.
    dtypes
        float32, bfloat16, or both, to learn what bfloat16 loses.
    lengths
        Tokens per prompt; the prompts differ in the middle token.
    rounds
        How often the ways take turns; medians are reported.
    limit
        Seconds of a case after which no further round begins.
    tiny
        Tiny random models on the CPU: shows that the benchmark runs, measures nothing.
    """
    if not tiny and not torch.cuda.is_available():
        print("gpu_sweep: torch sees no CUDA device: run it where there is one", file=sys.stderr)
        sys.exit(2)
    names: tuple[str, ...] = models
    effort = Effort(rounds, batch_sizes=(32, 256), side=8192, limit=limit)
    if tiny:
        effort, names, lengths = TINY, TINY_MODELS, (6, 9)
    device = torch.device("cpu" if tiny else "cuda")
    console, began = report.console_of_width(), Clocks.read()
    record: dict[str, Any] = {**report.start(console, device), "tiny": tiny, "cases": []}
    for name in names:
        exact: dict[int, Measurement] = {}
        for model in _in_dtypes(name, [x for x in DTYPES if x in dtypes], device):
            for length in lengths:
                case = _case(model, length, length == min(lengths), effort, exact.get(length))
                exact.setdefault(length, case.grid)
                report.show(console, case)
                record["cases"].append(report.as_data(case))
                report.write(out, record)
    report.finish(console, out, record, began)


def _in_dtypes(name: str, dtypes: Sequence[str], device: torch.device) -> Iterator[Model]:
    """The model in each dtype, with the weights of the first one rounded."""
    model = load(name, dtypes[0], device.type)
    yield model
    for dtype in dtypes[1:]:
        model = rounded(model, getattr(torch, dtype))
        yield model


def _case(
    model: Model, length: int, with_pairs: bool, effort: Effort, exact: Measurement | None
) -> report.Case:
    """Measure one model, dtype and length. `exact` is the same in the first dtype, if there was
    one before this."""
    # A plan counts the memory that is free; what the last case left in the cache is not.
    gc.collect()
    torch.cuda.empty_cache()
    pairs = middle_pairs(model, length, PAIRS)
    memory = measure_memory(model, pairs[0])
    found = measure(model, pairs[0], effort)
    return report.Case(
        grid=found,
        memory=memory,
        pairs=measure_pairs(model, pairs, effort.rounds) if with_pairs else None,
        neurons=measure_neurons(model, pairs[0]) if with_pairs else None,
        low=None if exact is None else _lost(exact, found),
    )


def _lost(exact: Measurement, low: Measurement) -> Errors:
    """Errors in low precision over the sampled runs that both measured."""
    known = dict(zip(map(tuple, exact.sampled), exact.by_full_forward, strict=True))
    runs = [i for i, cell in enumerate(low.sampled) if low.is_run[i] and tuple(cell) in known]
    reference = np.array([known[tuple(low.sampled[i])] for i in runs])
    return errors(reference, np.array(low.by_wave)[runs], np.array(low.by_full_forward)[runs])


if __name__ == "__main__":
    report.run(gpu_sweep)
