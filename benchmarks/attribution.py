"""How faithful estimates of SmolLM2-135M-Instruct are to exact patching, and what they cost.

`python -m benchmarks.attribution --help`
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import _report as report
from benchmarks._estimates import Cost, Grid, costs, exact_grid, ready, swept, ways
from benchmarks._faithful import RECALLS, Kept, Score, kept_by, score
from benchmarks._machine import Clocks, timed
from benchmarks._models import REAL, first_difference, load, middle_pairs
from patchsweep.attribution import DEFAULT
from patchsweep.model.model import Model
from patchsweep.pairs import Pair
from patchsweep.tasks import find

OUT = Path("benchmarks/results/attribution.json")
COMPONENTS = (
    "head_z",
    "head_q",
    "head_k",
    "head_v",
    "head_pattern",
    "attn_out",
    "mlp_out",
    "resid_pre",
    "resid_mid",
    "embed",
    "neuron",
)
BY_PATH = ("resid_pre", "head_z", "mlp_out")  # estimated by ig too
KEEP, AUDIT = "5%", 300
MOST = 6  # forwards that atp and relp may take
RECALL = 0.95  # of the largest 1 % of head_z, at least
FASTER = 10  # times than all neurons at all positions, at least


def attribution(
    *,
    out: Path = OUT,
    pairs: int = 16,
    components: tuple[str, ...] = COMPONENTS,
    tasks: tuple[str, ...] = ("ioi", "facts"),
    directions: tuple[str, ...] = ("denoise",),
    ig: int = 2,
    rounds: int = 3,
    folder: Path | None = None,
    tiny: bool = False,
) -> None:
    """Hold every estimator against exact patching of every cell, and print and write the result.

    Example: python -m benchmarks.attribution --pairs 2 --components head_z --ig 0

    Parameters
    ----------
    out
        The JSON file to write.
    pairs
        Prompt pairs of each task; of neurons only one, the one with the fewest runs.
    components
        What is estimated.
    tasks
        The built-in tasks.
    directions
        denoise, noise or both.
    ig
        Pairs that are estimated by integrated gradients too, which take minutes.
    rounds
        How often the costs are measured; medians are reported.
    folder
        Where exact results are kept and, if they are there already, taken from.
    tiny
        A small random model: shows that the benchmark runs, measures nothing.
    """
    console, began = report.console_of_width(), Clocks.read()
    model = load("tiny-llama" if tiny else REAL, "float32", "cpu")
    facts = report.start(console, model.device)
    prompts = {name: find(name)(model.tokenizer, pairs) for name in (() if tiny else tasks)} or {
        "tiny": middle_pairs(model, 8, pairs)
    }
    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        kept = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for (task, part), (of, names, audit) in parts_of(prompts, components).items():
            for direction in directions:
                at = kept / f"{task}-{direction}-{part}"
                case = compare(model, of, names, direction, ig, audit, at)
                show(console, case, f"{task}, {direction}")
                found.append({"task": task, "direction": direction, **asdict(case)})
    pair = next(iter(prompts.values()))[0]
    how = together(components)
    if ig:
        how |= {"ig": {"mlp_out": "ig"}}
    spent = costs(model, pair, how, directions[0], rounds)
    console.print(cost_table(spent, len(pair)))
    targets = targets_of(found, spent)
    report.say(console, targets)
    record = {
        "tiny": tiny,
        "recalls": RECALLS,
        "default": DEFAULT,
        "cases": found,
        "tokens": len(pair),
        "cost": [asdict(c) for c in spent],
        "targets": [{**asdict(t), "met": t.met} for t in targets],
    }
    report.finish(console, out, {**facts, **record}, began)


Part = tuple[list[Pair], list[str], int]


def parts_of(
    prompts: Mapping[str, list[Pair]], components: Sequence[str]
) -> dict[tuple[str, str], Part]:
    """What is swept together, by task and name: pairs, components, and the size of the prefilter's
    audit. Neurons of one pair only, the one that needs the fewest runs."""
    most = [name for name in components if name != "neuron"]
    parts: dict[tuple[str, str], Part] = {}
    if most:
        parts = {(task, "all"): (pairs, most, 1) for task, pairs in prompts.items()}
    if "neuron" in components:
        each = [(task, pair) for task, pairs in prompts.items() for pair in pairs]
        task, pair = min(each, key=lambda of: len(of[1]) - first_difference(of[1]))
        parts[task, "neuron"] = ([pair], ["neuron"], AUDIT)
    return parts


@dataclass(frozen=True)
class Case:
    """Some components of some pairs: scores of all estimators, by_path those over the first `ig`
    pairs with integrated gradients too; what a prefilter keeps, and the seconds of its whole sweep
    and of the exact sweep's waves (None if these were interrupted)."""

    pairs: int
    scores: list[Score]
    by_path: list[Score]
    kept: list[Kept]
    audit: int
    exact_seconds: float | None
    prefilter_seconds: float


def compare(
    model: Model,
    pairs: Sequence[Pair],
    components: Sequence[str],
    direction: str,
    ig: int,
    audit: int,
    folder: Path,
) -> Case:
    """Every estimator of every component, and a prefilter by the default ones, against an exact
    sweep, which lies in the folder or will."""
    results = swept(model, pairs, components, direction, folder)
    exact = {name: exact_grid(results, name) for name in components}
    with ready(model, pairs, components, direction) as made:
        found = {way: made.estimate(how) for way, how in together(components).items()}
    by_path, few = [], [name for name in BY_PATH if name in components]
    if few and ig:
        with ready(model, pairs[:ig], few, direction) as made:
            path = {**found, "ig": made.estimate(dict.fromkeys(few, "ig"))}
        by_path = scores(path, exact, few, ig)
    with tempfile.TemporaryDirectory() as temporary:
        seconds, filtered = timed(
            model.device,
            partial(
                swept,
                model,
                pairs,
                components,
                direction,
                Path(temporary, "r"),
                prefilter={"keep": KEEP, "audit": audit},
            ),
        )
        kept = [kept_by(filtered, results, name) for name in components]
    measured = results.attrs.get("measured")
    return Case(
        pairs=len(pairs),
        scores=scores(found, exact, components, len(pairs)),
        by_path=by_path,
        kept=kept,
        audit=audit,
        exact_seconds=measured["seconds"] if measured else None,
        prefilter_seconds=seconds,
    )


def targets_of(cases: Sequence[Mapping[str, Any]], spent: Sequence[Cost]) -> list[report.Target]:
    """What the specification asks for."""
    found = [
        report.Target(f"forwards of both prompts, {c.estimator}", c.in_seconds, MOST, at_most=True)
        for c in spent
        if c.estimator in ("atp", "relp")
    ]
    for case in cases:
        of = f"{case['task']}, {case['direction']}"
        found += [
            report.Target(f"recall of head_z, {of}", kept["recall"], RECALL)
            for kept in case["kept"]
            if kept["component"] == "head_z"
        ]
        if case["audit"] == AUDIT and case["exact_seconds"]:
            ratio = case["exact_seconds"] / case["prefilter_seconds"]
            found.append(report.Target(f"times faster over neurons, {of}", ratio, FASTER))
    return found


def scores(
    found: Mapping[str, Mapping[str, Grid]],
    exact: Mapping[str, Grid],
    components: Sequence[str],
    pairs: int,
) -> list[Score]:
    """Of every component by every estimator that was asked, over the first pairs."""
    return [
        score(name, way, grids[name].by_pair[:pairs], exact[name].by_pair[:pairs])
        for name in components
        for way, grids in found.items()
        if name in grids
    ]


def together(components: Sequence[str]) -> dict[str, dict[str, str]]:
    """By estimator, the components that it is asked about."""
    names = list(dict.fromkeys(way for name in components for way in ways(name)))
    return {way: {c: way for c in components if way in ways(c)} for way in names}


def show(console: Console, case: Case, title: str) -> None:
    """The tables of a case."""
    for found in filter(None, (case.scores, case.by_path)):
        console.print(table_of(found, title))
    table = Table("component", "cells", "kept", "estimator", "1 % kept", box=None)
    table.title = f"{title}: prefilter, keep {KEEP}, over {case.pairs} pairs"
    for k in case.kept:
        recall = f"{100 * k.recall:.0f} % of {k.largest}"
        table.add_row(k.component, f"{k.cells:,}", f"{k.kept:,}", k.estimator, recall)
    console.print(table)
    if case.exact_seconds:
        line = f"exact {case.exact_seconds:.1f} s (waves alone), prefilter with an audit of"
        report.say(console, [f"{line} {case.audit} per stratum {case.prefilter_seconds:.1f} s"])


def table_of(found: Sequence[Score], title: str) -> Table:
    """A row per component and estimator, the default one marked."""
    recalls = [f"{true} % in {kept} %" for true, kept in RECALLS]
    columns = ["component", "estimator", "pairs", "cells", "Pearson", "Spearman", *recalls]
    table = Table(*columns, title=title, box=None)
    for s in found:
        mark = " *" if DEFAULT[s.component] == s.estimator else ""
        said = [f"{s.pearson:.3f}", f"{s.spearman:.3f}", *(f"{100 * r:.0f} %" for r in s.recall)]
        said = said if s.pairs else ["-"] * len(said)
        table.add_row(s.component, f"{s.estimator}{mark}", str(s.pairs), f"{s.cells:,}", *said)
    return table


def cost_table(spent: Sequence[Cost], tokens: int) -> Table:
    """What estimating all cells of a pair takes."""
    title = f"all cells of a pair of {tokens} tokens; forwards: of both prompts"
    table = Table("", "components", "seconds", "GFLOP", "forwards", "by FLOPs", title=title)
    table.box = None
    for c in spent:
        table.add_row(
            c.estimator,
            ", ".join(c.components) if len(c.components) < 4 else str(len(c.components)),
            f"{c.seconds:.3f}",
            f"{c.flops / 1e9:,.1f}",
            f"{c.in_seconds:.1f}",
            f"{c.in_flops:.1f}",
        )
    return table


if __name__ == "__main__":
    report.run(attribution)
