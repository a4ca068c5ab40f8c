"""What a sweep estimates, cells and edges, written to its results; and what is run after that."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from patchsweep.attribution.eap import Scores, score_edges
from patchsweep.attribution.estimate import Estimates, estimate_pairs
from patchsweep.attribution.estimators import chosen, chosen_with_edges, prefilter_of
from patchsweep.attribution.runs import pair_ranges
from patchsweep.device import MEND, OutOfMemory, within_memory
from patchsweep.errors import BadInput
from patchsweep.passes import Forward, Values
from patchsweep.plan import Chosen, Plan, narrowed
from patchsweep.plan.layout import Variant
from patchsweep.prefilter import Bytes, Map, choose
from patchsweep.processes import Processes
from patchsweep.results import Columns, Results, columns_of
from patchsweep.sites import EDGES, Block
from patchsweep.spec import Sweep
from patchsweep.store import ESTIMATED_SPLIT, SCORED_SPLIT, Store

T = TypeVar("T")
log = logging.getLogger("patchsweep")


def tried(forward: Forward, plan: Plan, settings: Sweep, values: Values) -> None:
    """Estimate one pair where only trying says whether it can be done: BadInput for a user's
    function without a gradient, and for a metric that depends on more than edges."""
    estimators, metrics = chosen(settings), settings.metrics
    if estimators and any(m.name == "callable" for m in metrics):
        estimate_pairs(forward, plan, range(1), estimators, metrics, values, steps=1)
    if settings.edges and settings.edges.estimator:
        score_edges(forward, plan, range(1), metrics, values, min(2, settings.edges.steps))


def write_estimates(
    forward: Forward,
    plan: Plan,
    settings: Sweep,
    values: Values,
    store: Store,
    processes: Processes,
) -> None:
    """Write the estimates that are not there yet and that fall to this process, with the baselines
    that they were made from."""
    estimators, metrics = chosen(settings), settings.metrics

    def estimated(source: int, sample: int, pairs: range) -> Estimates:
        at: dict[str, int] = {"source": source, "sample": sample}
        found = estimate_pairs(forward, plan, pairs, estimators, metrics, values, **at)
        if settings.edges is None or settings.edges.prefilter is None:
            return found
        steps = settings.edges.steps
        scores = score_edges(forward, plan, pairs, metrics, values, steps, **at)
        of_edges = {c: _as_runs(plan, found.baseline[c], x) for c, x in scores.items()}
        return replace(found, values={**found.values, EDGES: of_edges})

    for at in _claimed("estimates", plan, store.estimated(), processes):
        for pairs, found in _in_parts(estimated, *at, store, ESTIMATED_SPLIT):
            if not store.has_baseline(*at[:2], pairs):  # else with the noise floor of its wave
                unknown = {name: np.full_like(x, np.nan) for name, x in found.baseline.items()}
                store.write_baseline(*at[:2], pairs, found.baseline, unknown)
            store.write_estimates(*at[:2], pairs, found.values)


def _as_runs(
    plan: Plan, baseline: NDArray[np.floating], scores: NDArray[np.floating]
) -> NDArray[np.floating]:
    """Scores [direction, pair, sender, receiver] as values of patched runs, [direction, 1, 1, pair,
    1, receiver, sender]; infinite where they are not finite though there is an edge."""
    ends = baseline[[0 if d == "noise" else 1 for d in plan.directions]]  # [direction, pair]
    found = scores.swapaxes(2, 3) + ends[..., None, None]
    table = plan.layouts.edges
    assert table is not None
    edges = table.exist(range(len(table.receivers)), range(len(table.senders)))
    found = np.where(edges & ~np.isfinite(found), np.inf, found).astype(scores.dtype)
    return found[:, None, None, :, None]


def write_edges(
    forward: Forward,
    plan: Plan,
    settings: Sweep,
    values: Values,
    store: Store,
    processes: Processes,
) -> None:
    """Write the scores of edges that are not there yet and that fall to this process."""
    assert settings.edges is not None
    steps, metrics = settings.edges.steps, settings.metrics

    def scored(source: int, sample: int, pairs: range) -> Scores:
        return score_edges(
            forward, plan, pairs, metrics, values, steps, source=source, sample=sample
        )

    done = store.scored()
    for at in _claimed("edges", plan, done, processes):
        for pairs, found in _in_parts(scored, *at, store, SCORED_SPLIT):
            for i, pair in enumerate(pairs):
                if not done[at[0], at[1], pair]:  # what is there keeps its bits
                    one = {metric: scores[:, i : i + 1] for metric, scores in found.items()}
                    store.write_edges(*at[:2], range(pair, pair + 1), one)


def _claimed(
    what: str, plan: Plan, done: NDArray[np.bool_], processes: Processes
) -> Iterator[tuple[int, int, range]]:
    """Source, sample and range of pairs of what is not done yet, [source, sample, pair], and falls
    to this process: those of whole chunks, so that no other writes to the same."""
    tiles = next(iter(plan.chunks.grids.values())).pair_tiles()  # those of all grids
    units = [
        (number, sample, tile)
        for number, source in enumerate(plan.sources)
        for sample in range(source.samples)
        for tile in tiles
    ]
    for number, sample, tile in processes.claim(what, units):
        for pairs in pair_ranges(plan, tile):
            if not done[number, sample, pairs.start : pairs.stop].all():
                yield number, sample, pairs
                log.info("%s of pairs %d-%d: done", what, pairs.start, pairs.stop - 1)


def _in_parts(
    compute: Callable[[int, int, range], T],
    source: int,
    sample: int,
    pairs: range,
    store: Store,
    record: str,
) -> list[tuple[range, T]]:
    """What is computed of some pairs: of all together, or if that runs out of memory of halves, and
    so on. `record` keeps how often they are halved, so that they are again. All of them are
    computed before any is written. BadInput if one pair does not fit."""
    at = (source, sample, pairs.start)
    depth = store.split(record, at)
    while True:
        size = -(-len(pairs) >> depth)
        parts = [pairs[i : i + size] for i in range(0, len(pairs), size)]
        found = within_memory(partial(_each, compute, source, sample, parts))
        if not isinstance(found, OutOfMemory):
            return found
        if size == 1:
            raise BadInput(f"{found}, with the gradients of one pair at a time: {MEND}")
        depth += 1
        store.write_split(record, at, depth)
        log.warning("pairs %d-%d: out of memory, again in parts", pairs.start, pairs.stop - 1)


def _each(
    compute: Callable[[int, int, range], T], source: int, sample: int, parts: Sequence[range]
) -> list[tuple[range, T]]:
    return [(pairs, compute(source, sample, pairs)) for pairs in parts]


def chosen_cells(plan: Plan, settings: Sweep, store: Store) -> Plan:
    """The plan with only those cells of estimated components that the prefilter chooses. Chosen
    once, by what was estimated; then as the results say."""
    ways = [(d, s) for d in range(len(plan.directions)) for s in range(len(plan.sources))]
    results = Results(store)
    columns = {
        name: results.columns(name, None if settings.prefilter else "start")
        for name in store.estimators
    }
    if not store.chosen():
        choices = dict[str, dict[str, Bytes]]()
        for name, of in columns.items():
            status, stratum = np.zeros((2, *store.shape(f"choice/{name}_status")), np.uint8)
            for d, s in ways:
                at = plan.directions[d], plan.sources[s].name
                scores = [
                    results.estimated_effect(name, m, *at, align=of.align, min_pairs=1).values
                    for m in store.metrics
                ]
                there = possible(plan, name, d, s, of)
                found = choose(np.stack(scores), there, prefilter_of(settings, name))
                status[d, s], stratum[d, s] = found.status, found.stratum
            choices[name] = {"status": status, "stratum": stratum}
        store.write_choice(choices)
    stored = {name: store.read(f"choice/{name}_status") for name in columns}
    return narrowed(
        plan,
        {
            (name, d, s): Chosen(stored[name][d, s], of.members)
            for name, of in columns.items()
            for d, s in ways
        },
    )


def expected(plan: Plan, settings: Sweep) -> Plan:
    """The plan with as many cells as the prefilter will choose, drawn at random: before anything
    is estimated. All cells where a threshold says how many."""
    rng = np.random.default_rng(0)
    choice: dict[tuple[str, int, int], Chosen] = {}
    for name in chosen_with_edges(settings):
        given, of = prefilter_of(settings, name), columns(plan, settings, name)
        for d in range(len(plan.directions)):
            for s in range(len(plan.sources)):
                there = possible(plan, name, d, s, of)
                some = rng.random((1, *there.shape))
                scores = some if given and not isinstance(given.keep, dict) else some + np.inf
                choice[name, d, s] = Chosen(choose(scores, there, given).status, of.members)
    return narrowed(plan, choice) if choice else plan


def columns(plan: Plan, settings: Sweep, name: str) -> Columns:
    """What a component's positions are over pairs where a prefilter chooses: as effects are shown;
    by index where all are only estimated."""
    pairs = plan.pairs
    return columns_of(
        plan.grids[name].positions,
        [len(pair) for pair in pairs],
        [len(pair) - max(1, len(pair.continuation)) for pair in pairs],
        [pair.labels for pair in pairs],
        None if settings.prefilter else "start",
    )


def chosen_columns(plan: Plan, settings: Sweep) -> dict[str, int]:
    """How many columns the prefilter chooses among, by component."""
    names = chosen(settings) if settings.prefilter else ()
    return {name: len(columns(plan, settings, name).names) for name in names}


def possible(plan: Plan, name: str, direction: int, source: int, of: Columns) -> Map:
    """[layer, unit, column]: where a patch can change what is read, in any pair and sample."""
    if name == EDGES:
        return _possible_edges(plan, direction, source)
    samples = [Variant(direction, source, n) for n in range(plan.layouts.samples)]
    exists = np.any([plan.layouts.layout(name, v).exists for v in samples], axis=0)
    if of.members is not None:
        exists = np.any(exists[:, :, None] & of.members[:, None], axis=3)
    shape = (exists.shape[1], plan.grids[name].units, exists.shape[2])
    return np.broadcast_to(exists.any(0)[:, None], shape)


def _possible_edges(plan: Plan, direction: int, source: int) -> Map:
    """[1, receiver, sender]: the same of edges."""
    grid = plan.grids[EDGES]
    found = np.zeros(grid.shape[4:], bool)
    ends = range(grid.units), range(len(grid.positions))
    for sample in range(plan.layouts.samples):
        for i in range(len(plan.pairs)):
            one = Block(EDGES, 0, direction, source, sample, range(i, i + 1), *ends)
            found |= plan.possible(one)[0]
    return found
