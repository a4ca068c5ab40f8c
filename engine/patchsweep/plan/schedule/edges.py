"""The runs of edges in a wave, what they replace, and the climbers that they begin with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from patchsweep.plan import Ints, Plan, Wave
from patchsweep.plan.edge_costs import climbing, number_of
from patchsweep.plan.layout import CODES, OWN, Variant
from patchsweep.plan.schedule.climb import Climbers
from patchsweep.sites import RUN, Block

Columns = dict[str, Ints]


@dataclass(frozen=True, eq=False)
class Beginnings:
    """Climbers until their tokens are known, and what they carry (steps.Climbers), in columns: dst
    and src are positions in the rows of `pair` that `to` and `by` (sources) say."""

    climbers: Columns  # pair, to, dst, first, last, mlps
    sends: Columns  # of, component, layer, unit, by, src


CLIMBERS = ("pair", "to", "dst", "first", "last", "mlps")
SENDS = ("of", "component", "layer", "unit", "by", "src")


def of_edges(
    plan: Plan, wave: Wave, block: Block, number: int, pair: int
) -> tuple[Columns, Columns, Beginnings]:
    """The edges of one pair in a block that are run; what they replace, `run` and `climber`
    counting these; and the climbers."""
    table, variant = plan.layouts.edges, plan.variant(block)
    assert table is not None
    reached, kinds = plan.layouts.reached(variant, pair), plan.edge_costs.kinds
    inside, one = pair - block.pairs.start, replace(block, pairs=range(pair, pair + 1))
    ran, chosen = plan.possible(one)[0], plan.chosen(one)
    if chosen is not None:
        ran = ran & np.isin(chosen[0], RUN)
    entry, unit, at = np.nonzero(ran)
    receiver, sender = unit + block.units.start, at + block.positions.start
    a, b = table.of_sender[sender], table.of_receiver[receiver]
    shape = (len(block.pairs), *ran.shape)
    said = {
        "block": number,
        "pair": pair - wave.pairs.start,
        "direction": block.direction,
        "set": 0,
    }
    runs = {
        "cell": np.ravel_multi_index((np.full_like(entry, inside), entry, unit, at), shape),
        "layer": table.layer[b],
        "start": reached.runs.start[entry, a, b],
        "joins": kinds.joins[b],
        **{k: np.full_like(entry, v) for k, v in said.items()},
    }
    by_entry = (reached.patched(e)[a[entry == e], b[entry == e]] for e in range(len(ran)))
    run, position = np.nonzero(np.concatenate([*by_entry]))
    climbers, known = _climbers(plan, wave, block, pair)
    places = {
        "run": run,
        "component": table.component[b][run],
        "layer": table.layer[b][run],
        "unit": table.unit[receiver[run]],
        "position": position,
        "source": np.full_like(run, OWN),
        "climber": known[at[run], position],
    }
    return runs, places, climbers


def _climbers(plan: Plan, wave: Wave, block: Block, pair: int) -> tuple[Beginnings, Ints]:
    """The climbers of one pair in a block, and their numbers [sender, clean position]."""
    table, variant = plan.layouts.edges, plan.variant(block)
    assert table is not None
    number = number_of(table, block.units, plan.edges_run(variant, block.units))
    reached, kinds = plan.layouts.reached(variant, pair), plan.edge_costs.kinds
    first, last = climbing(table, reached, number, kinds.call)
    senders = np.arange(block.positions.start, block.positions.stop)
    own = senders if number.shape[1] > 1 else table.of_sender[senders]
    at, position = np.nonzero(last[own] >= 0)
    known = np.full((len(senders), last.shape[1]), -1)
    known[at, position] = np.arange(len(at))
    nodes = [table.senders[n] for n in senders]
    sent = [(CODES[node.component], node.layer or 0, node.unit or 0) for node in nodes]
    component, layer, unit = np.array(sent).T
    found = begun(
        plan,
        wave,
        variant,
        pair,
        position,
        first[own][at],
        last[own][at, position],
        table.asked.through == "mlps",
        (np.arange(len(at)), component[at], layer[at], unit[at]),
    )
    return found, known


def begun(
    plan: Plan,
    wave: Wave,
    variant: Variant,
    pair: int,
    position: Ints,
    first: Ints,
    last: Ints,
    mlps: bool,
    sends: tuple[Ints, Ints, Ints, Ints],
) -> Beginnings:
    """Climbers at some clean positions of one pair; sends: whose, component, layer and unit."""
    frame = plan.layouts.frames(variant)[pair]
    noise = plan.directions[variant.direction] == "noise"
    to, by = (OWN, wave.source) if noise else (wave.source, OWN)
    of, component, layer, unit = sends
    said = {"pair": pair - wave.pairs.start, "to": to, "mlps": int(mlps)}
    climbers = {"dst": frame.to_dst[position], "first": first, "last": last}
    climbers |= {k: np.full_like(position, v) for k, v in said.items()}
    src = frame.to_src[position][of]
    names = {"of": of, "component": component, "layer": layer, "unit": unit, "src": src}
    return Beginnings(climbers, names | {"by": np.full_like(of, by)})


def climbers_of(
    found: Sequence[Beginnings], offset: Ints, row_of: Callable[[Ints, Ints], Ints]
) -> Climbers:
    """Climbers of several blocks with their tokens; `row_of` gives the base row of pairs and
    sources, `offset` the first token of every base row."""
    none = np.zeros(0, np.int64)
    climbers = {k: np.concatenate([none, *(f.climbers[k] for f in found)]) for k in CLIMBERS}
    sends = {k: np.concatenate([none, *(f.sends[k] for f in found)]) for k in SENDS}
    counts = [len(f.climbers["pair"]) for f in found]
    before = np.cumsum([0, *counts])[:-1]
    many = [len(f.sends["of"]) for f in found]
    of = sends["of"] + np.repeat(before, many)
    pair = climbers["pair"]
    return Climbers(
        dst=offset[row_of(pair, climbers["to"])] + climbers["dst"],
        position=climbers["dst"],
        first=climbers["first"],
        last=climbers["last"],
        mlps=climbers["mlps"] > 0,
        of=of,
        component=sends["component"],
        layer=sends["layer"],
        unit=sends["unit"],
        src=offset[row_of(pair[of], sends["by"])] + sends["src"],
    )
