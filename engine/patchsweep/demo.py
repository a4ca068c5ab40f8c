"""`patchsweep demo`: the main job on a real model, and an honest clock beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from patchsweep.engine import build_pairs, carry_out
from patchsweep.model import Model, load_model, weights
from patchsweep.pairs import Pair
from patchsweep.report import plot, print_pairs, print_warnings, top_table, write_page
from patchsweep.results import Results
from patchsweep.sites import Status
from patchsweep.spec import parse_spec

MODEL = "smollm2-135m"
PAIRS = 8
COMPONENTS = ("head_z", "mlp_out", "resid_pre")
METRICS = ("logit_diff", "logprob", "prob", "rank", "kl")
BATCH, REPEATS = 32, 3  # of the full forwards that are timed for comparison


def demo(out: Path, console: Console) -> None:
    """Sweep both tasks into `out`, draw them, and print what was found and how fast."""
    console.print(
        f"Loading {MODEL}: {weights(MODEL)} (the first time it is unpacked into the cache: some "
        "20 s)",
        highlight=False,
    )
    model = load_model(MODEL)
    for task, title in (("ioi", "indirect object identification"), ("facts", "facts")):
        spec = parse_spec(
            {
                "model": MODEL,
                "prompts": {"task": task, "n": PAIRS},
                "components": COMPONENTS,
                "metrics": METRICS,
                "direction": "denoise",
            }
        )
        pairs = build_pairs(spec.prompts, model.tokenizer)
        console.rule(f"{PAIRS} pairs: {title}")
        console.print(
            f"clean    {model.tokenizer.decode(pairs[0].clean)}\n"
            f"corrupt  {model.tokenizer.decode(pairs[0].corrupt)}\n"
            f"answer  {model.tokenizer.decode(pairs[0].answer)}, "
            f"wrong  {model.tokenizer.decode(pairs[0].wrong)}\n"
            f"{', '.join(COMPONENTS)} x every position, denoise; {', '.join(METRICS)}",
            highlight=False,
        )
        store = out / f"{task}.zarr"
        results = carry_out(model, pairs, spec, store, resume=False, overwrite=True)
        figures = plot(results, out / f"{task}-figures", formats=("png",))
        console.print(top_table(results, COMPONENTS[0], "logit_diff", "denoise"))
        console.print()
        print_warnings(console, results)
        _report(results, full_forwards(model, sorted(pairs, key=len)[PAIRS // 2]), console)
        page = write_page(results, out / f"{task}-figures" / "report.html")
        console.print(
            f"{len(figures)} figures in {page.parent}, and to look closer {page}\n",
            highlight=False,
        )
    console.print(f"Look closer: patchsweep show {out / 'ioi.zarr'}", highlight=False)


@dataclass(frozen=True)
class FullForwards:
    """Seconds per cell of unpatched full forwards, one by one and in batches of BATCH."""

    single: float
    batched: float


@torch.no_grad()
def full_forwards(model: Model, pair: Pair) -> FullForwards:
    """Time the model's own forwards of a prompt, logits at the last token only: the best of a few.

    Nothing is patched in them, so this is the least that any sweep by full forwards takes.
    """
    tokens = torch.tensor([pair.corrupt], device=model.device)

    def seconds(batch: int) -> float:
        times = []
        for _ in range(REPEATS + 1):
            began = time.perf_counter()
            model.hf_model(
                input_ids=tokens.expand(batch, -1), use_cache=False, logits_to_keep=1
            ).logits[0, 0, 0].item()
            times.append(time.perf_counter() - began)
        return min(times[1:]) / batch

    return FullForwards(seconds(1), seconds(BATCH))


def _report(results: Results, full: FullForwards, console: Console) -> None:
    counts = [results.counts(c, "logit_diff") for c in results.components]
    exact = sum(c[Status.EXACT] for c in counts)
    structural = sum(c[Status.STRUCTURAL] for c in counts)
    seconds = results.attrs["measured"]["seconds"]
    test = results.attrs["self_test"]
    floor = float(np.nanmax(results.noise_floor("logit_diff")))
    cells = exact + structural
    words = {
        "exact": f"{exact:,} cells were run; {test['cells']} of them, run again as full forwards, "
        f"differ by at most {test['cell_difference']:.1e} logits",
        "structural": f"{structural:,} cells cannot differ from the baseline: nothing was run",
        "noise floor": f"{floor:.1e} logits: a null patch against the baseline",
        "measured": f"{seconds:.1f} s for {cells:,} cells: {cells / seconds:,.0f} cells/s, "
        f"{exact / seconds:,.0f} of them run",
        "full forwards": "measured now on a pair of median length, unpatched: "
        f"{1e3 * full.single:.0f} ms a cell one by one, {1e3 * full.batched:.1f} ms in batches of "
        f"{BATCH}",
        "so this was": f"{cells * full.single / seconds:.0f} and "
        f"{cells * full.batched / seconds:.0f} times faster over the grid, "
        f"{exact * full.single / seconds:.0f} and {exact * full.batched / seconds:.0f} times over "
        "the cells that were run",
    }
    print_pairs(console, words)
