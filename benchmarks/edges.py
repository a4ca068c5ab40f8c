"""All edges of SmolLM2-135M-Instruct exactly, against two full forwards for each; and how faithful
their scores are.

`python -m benchmarks.edges --help`
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from benchmarks import _report as report
from benchmarks._edges import TwoForwards, Way
from benchmarks._faithful import RECALLS, Score, score
from benchmarks._full import last_logits
from benchmarks._machine import Clocks, matmul_rate, timed
from benchmarks._models import REAL, load, middle_pairs, sentence_pairs
from patchsweep.device.exactness import deterministic
from patchsweep.engine.loop import sweep
from patchsweep.engine.planning import plan_sweep
from patchsweep.model.model import Model
from patchsweep.pairs import Pair
from patchsweep.passes.attention import attention_is
from patchsweep.passes.forward import take_apart
from patchsweep.passes.values import Values
from patchsweep.passes.wave import run_wave
from patchsweep.plan import Plan, receivers, senders
from patchsweep.sites import EDGES, Node, Status, parse_node
from patchsweep.sites import RECEIVERS as KINDS
from patchsweep.spec import parse_settings
from patchsweep.tasks import find

OUT = Path("benchmarks/results/edges.json")
METRIC = "logit_diff"
BATCH = 32
SCORES: dict[str, Any] = {"eap": "eap", "eap_ig": "eap_ig"}
FASTER, PATHS_FASTER, FORWARDS = 25, 50, 3
Floats = NDArray[np.float64]


def edges(
    *,
    out: Path = OUT,
    batches: int = 3,
    rounds: int = 3,
    pairs: int = 8,
    tasks: tuple[str, ...] = ("ioi", "facts"),
    folder: Path | None = None,
    tiny: bool = False,
) -> None:
    """Time every edge of the IOI prompt, and all heads to one receiver set; compare EAP and EAP-IG
    with all exact edges; print and write the result.

    Example: python -m benchmarks.edges --pairs 1 --tasks ioi

    Parameters
    ----------
    out
        The JSON file to write.
    batches
        Batches of 32 edges by two full forwards each; their time is scaled to all edges.
    rounds
        How often the ways of path patching take turns; medians are reported.
    pairs
        Prompt pairs of each task over which scores are compared; 0: none.
    tasks
        The built-in tasks.
    folder
        Where exact results are kept and, if they are there already, taken from.
    tiny
        A small random model: shows that the benchmark runs, measures nothing.
    """
    console, began = report.console_of_width(), Clocks.read()
    model = load("tiny-llama" if tiny else REAL, "float32", "cpu")
    facts = report.start(console, model.device)
    pair = (middle_pairs(model, 8, 1) if tiny else sentence_pairs(model))[0]
    speed = all_edges(model, pair, batches, 128 if tiny else 2048)
    paths = one_set(model, pair, rounds)
    prompts = {name: find(name)(model.tokenizer, pairs) for name in tasks if pairs and not tiny}
    prompts |= {"tiny": middle_pairs(model, 8, pairs)} if tiny and pairs else {}
    cases: dict[str, list[Score]] = {}
    with ExitStack() as stack:
        kept = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for task, some in prompts.items():
            cases[task] = faithful(model, some, kept / task)
    console.print(speed_table(speed))
    console.print(paths_table(paths))
    for task, found in cases.items():
        console.print(scores_table(task, found))
    targets = targets_of(speed, paths)
    report.say(console, targets)
    record = {
        "tiny": tiny,
        "edges": asdict(speed),
        "paths": asdict(paths),
        "recalls": RECALLS,
        "scores": {task: [asdict(s) for s in found] for task, found in cases.items()},
        "targets": [{**asdict(t), "met": t.met} for t in targets],
    }
    report.finish(console, out, {**facts, **record}, began)


@dataclass(frozen=True)
class Speed:
    """Every edge of one pair, all positions together. `two_forwards`: seconds of an edge by two
    full forwards in batches, over the `sampled` ones; `difference`: the largest between the ways
    over these, in logits; matmul: FLOP/s of a large matrix product."""

    tokens: int
    edges: int
    runs: int
    waves: int
    flops: int
    seconds: float
    two_forwards: float
    sampled: int
    difference: float
    matmul: float

    @property
    def faster(self) -> float:
        """Times that the waves fit into two forwards for every edge that is run."""
        return self.runs * self.two_forwards / self.seconds

    @property
    def share(self) -> float:
        """The waves' FLOP/s as a part of the large matrix product's."""
        return self.flops / self.seconds / self.matmul


def all_edges(model: Model, pair: Pair, batches: int, side: int) -> Speed:
    """Time all waves, and batches of random edges by two full forwards."""
    given = {"components": ["mlp_out"], "positions": "all", "edges": "exact"}
    plan, seconds, found = waves(model, pair, given, EDGES)
    values, status = (x[0, 0, 0, 0, 0] for x in found)  # [receiver, sender]
    ran = np.random.default_rng(0).permutation(np.argwhere(status == Status.EXACT))
    some = ran[: batches * BATCH]
    d, two = model.dimensions, TwoForwards(model, pair)
    sending, receiving = senders(d), receivers(d)
    ways = [Way(sending[s], [receiving[r]]) for r, s in some]
    parts = [ways[i : i + BATCH] for i in range(0, len(ways), BATCH)]
    two.logit_diff(parts[0])
    spent, again = timed(model.device, lambda: torch.cat([two.logit_diff(p) for p in parts]))
    counts = plan.counts()
    return Speed(
        tokens=len(pair),
        edges=int(np.isfinite(values).sum()),
        runs=int((status == Status.EXACT).sum()),
        waves=counts["waves"],
        flops=counts["flops"],
        seconds=seconds,
        two_forwards=spent / len(some),
        sampled=len(some),
        difference=float(np.abs(again.cpu().numpy() - values[some[:, 0], some[:, 1]]).max()),
        matmul=matmul_rate((side,) * 3, torch.float32, model.device),
    )


@dataclass(frozen=True)
class Paths:
    """All heads to the queries of three heads at the last token, through MLPs. Median seconds over
    rounds: of the waves, of two full forwards for every head in batches, of one forward."""

    heads: int
    receivers: list[str]
    seconds: float
    two_forwards: float
    forward: float
    difference: float


def one_set(model: Model, pair: Pair, rounds: int) -> Paths:
    """Time an IOI figure: every head to one receiver set."""
    d, last = model.dimensions, len(pair) - 1
    layer = d.layers - 1
    texts = [f"head_q.{layer}.{h}" for h in range(3)]
    given = {
        "paths": {
            "set": {
                "senders": "head_z",
                "receivers": texts,
                "through": "mlps",
                "positions": [last],
            }
        }
    }
    read = [parse_node(text, KINDS) for text in texts]
    heads = [Node("head_z", at, head) for at in range(layer) for head in range(d.heads)]
    ways = [Way(head, read, [last]) for head in heads]
    two, tokens = TwoForwards(model, pair), torch.tensor([pair.corrupt], device=model.device)
    times: list[tuple[float, float, float]] = []
    for _ in range(rounds + 1):  # the first one is not counted
        _, seconds, found = waves(model, pair, given, "head_z.set")
        parts = [ways[i : i + BATCH] for i in range(0, len(ways), BATCH)]
        by_two = partial(lambda some: torch.cat([two.logit_diff(p, True) for p in some]), parts)
        spent, again = timed(model.device, by_two)
        with torch.no_grad():
            forward, _ = timed(model.device, partial(last_logits, model, tokens))
        times.append((seconds, spent, forward))
    values = found[0][0, 0, 0, 0, :layer, :, 0].ravel()
    middle = np.median(times[1:], 0).tolist()
    difference = float(np.abs(again.cpu().numpy() - values).max())
    return Paths(len(heads), texts, *middle, difference)


def waves(
    model: Model, pair: Pair, given: dict[str, Any], grid: str
) -> tuple[Plan, float, tuple[Floats, NDArray[np.uint8]]]:
    """The plan of a sweep, the seconds of all of its waves, and what they found for a grid: values
    and statuses."""
    settings = parse_settings({"metrics": [METRIC], "direction": "denoise", **given})
    plan = plan_sweep(model.dimensions, [pair], settings, model.device)
    shape = plan.grids[grid].shape
    found = np.full(shape, np.nan), np.zeros(shape, np.uint8)
    with attention_is(model.hf_model), deterministic(model.device):
        forward = take_apart(model.hf_model, len(pair))
        run = partial(run_wave, forward, plan, metrics=settings.metrics)
        run(plan.waves[-1], values=Values(plan.sources))
        call = lambda: [run(wave, values=Values(plan.sources)) for wave in plan.waves]  # noqa: E731
        seconds, results = timed(model.device, call)
    for block, values, status in (b for result in results for b in result.blocks):
        if block.component == grid:
            for whole, part in zip(found, (values, status), strict=True):
                whole[block.region(plan.grids[grid])] = part[METRIC]
    return plan, seconds, found


def faithful(model: Model, pairs: Sequence[Pair], folder: Path) -> list[Score]:
    """EAP and EAP-IG against all exact edges that are run, pair by pair."""
    sweeps = {
        name: sweep(
            model,
            pairs,
            out=folder / name,
            resume=True,
            components=["mlp_out"],
            positions="all",
            metrics=[METRIC],
            direction="denoise",
            edges=how,
        )
        for name, how in {"exact": "exact", **SCORES}.items()
    }
    exact = sweeps["exact"].store
    values, status = (exact.read(f"edges/{METRIC}{kind}")[0, 0, 0] for kind in ("", "_status"))
    _, corrupt = sweeps["exact"].baseline(METRIC)
    changes = values[:, 0].swapaxes(1, 2) - corrupt[0, 0][:, None, None]
    ran = status[:, 0].swapaxes(1, 2) == Status.EXACT  # [pair, sender, receiver]
    true = [x[at].astype(np.float64) for x, at in zip(changes, ran, strict=True)]
    found = []
    for name in SCORES:
        scores = sweeps[name].store.read(f"edges/{METRIC}")[0, 0, 0]
        said = [x[at].astype(np.float64) for x, at in zip(scores, ran, strict=True)]
        found.append(score("edges", name, said, true))
    return found


def targets_of(speed: Speed, paths: Paths) -> list[report.Target]:
    """What the specification asks for."""
    share, forwards = 100 * speed.share, paths.seconds / paths.forward
    by_two = paths.two_forwards / paths.seconds
    return [
        report.Target("times faster than two forwards an edge", speed.faster, FASTER),
        report.Target("% of the large matmul's FLOP/s, all edges", share, 60),
        report.Target("forwards' time, all heads to one set", forwards, FORWARDS, at_most=True),
        report.Target("times faster than two forwards a head", by_two, PATHS_FASTER),
        report.Target("largest difference of edges, logits", speed.difference, 2e-4, at_most=True),
        report.Target("largest difference of paths, logits", paths.difference, 2e-4, at_most=True),
    ]


def speed_table(s: Speed) -> Table:
    title = f"all edges of a pair of {s.tokens} tokens: {s.edges:,}, {s.runs:,} of them runs"
    table = Table("way", "seconds", "edges/s", "of matmul", title=title, box=None)
    by_two = s.runs * s.two_forwards
    table.add_row("waves", f"{s.seconds:,.1f}", f"{s.runs / s.seconds:,.0f}", f"{s.share:.0%}")
    scaled = f"two forwards, batches of {BATCH}, {s.sampled} of them"
    table.add_row(scaled, f"{by_two:,.0f}", f"{1 / s.two_forwards:,.1f}", "")
    return table


def paths_table(p: Paths) -> Table:
    title = f"{p.heads} heads to {', '.join(p.receivers)}, last token, through MLPs"
    table = Table("way", "seconds", "forwards", title=title, box=None)
    for name, seconds in (("waves", p.seconds), ("two forwards a head", p.two_forwards)):
        table.add_row(name, f"{seconds:,.3f}", f"{seconds / p.forward:,.1f}")
    return table


def scores_table(task: str, found: Sequence[Score]) -> Table:
    recalls = [f"{true} % in {kept} %" for true, kept in RECALLS]
    columns = ["scores", "pairs", "edges", "Pearson", "Spearman", *recalls]
    table = Table(*columns, title=f"{task}: scores against exact edges", box=None)
    for s in found:
        said = [f"{s.pearson:.3f}", f"{s.spearman:.3f}", *(f"{100 * r:.0f} %" for r in s.recall)]
        table.add_row(s.estimator, str(s.pairs), f"{s.cells:,}", *said)
    return table


if __name__ == "__main__":
    report.run(edges)
