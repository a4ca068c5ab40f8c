"""The runs of edges in a wave, what they replace, and the climbers that they begin with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from patchsweep.plan import Ints, Node, Plan, Wave
from patchsweep.plan.edge_costs import climbing, number_of
from patchsweep.plan.layout import CODES, OWN
from patchsweep.plan.schedule.steps import Climbers
from patchsweep.sites import RUN, Block

# Columns of climbers until their tokens are known: rows (of the destination and of what is sent) as
# sources, and positions in them.
CLIMBER = ("pair", "component", "unit", "first", "last", "to", "dst", "of", "src")
NO_CLIMBERS = {name: np.zeros(0, np.int64) for name in CLIMBER}
Columns = dict[str, Ints]


def of_edges(
    plan: Plan, wave: Wave, block: Block, number: int, pair: int
) -> tuple[Columns, Columns, Columns]:
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


def _climbers(plan: Plan, wave: Wave, block: Block, pair: int) -> tuple[Columns, Ints]:
    """The climbers of one pair in a block, and their numbers [sender, clean position]."""
    table, variant = plan.layouts.edges, plan.variant(block)
    assert table is not None
    frame = plan.layouts.frames(variant)[pair]
    number = number_of(table, block.units, plan.edges_run(variant, block.units))
    reached, kinds = plan.layouts.reached(variant, pair), plan.edge_costs.kinds
    first, last = climbing(table, reached, number, kinds.call)
    senders = np.arange(block.positions.start, block.positions.stop)
    own = senders if number.shape[1] > 1 else table.of_sender[senders]
    at, position = np.nonzero(last[own] >= 0)
    known = np.full((len(senders), last.shape[1]), -1)
    known[at, position] = np.arange(len(at))
    nodes = [table.senders[n] for n in senders]
    component, unit = (np.array(x) for x in zip(*map(_sent, nodes), strict=True))
    noise = plan.directions[variant.direction] == "noise"
    to, of = (OWN, wave.source) if noise else (wave.source, OWN)
    said = {"pair": pair - wave.pairs.start, "to": to, "of": of}
    return {
        "component": component[at],
        "unit": unit[at],
        "first": first[own][at],
        "last": last[own][at, position],
        "dst": frame.to_dst[position],
        "src": frame.to_src[position],
        **{k: np.full_like(at, v) for k, v in said.items()},
    }, known


def _sent(node: Node) -> tuple[int, int]:
    return CODES[node.component], node.unit or 0


def climbers_of(found: Columns, offset: Ints, row_of: Callable[[Ints, Ints], Ints]) -> Climbers:
    """Climbers with their tokens; `row_of` gives the base row of pairs and sources, `offset` the
    first token of every base row."""
    dst, src = (offset[row_of(found["pair"], found[k])] for k in ("to", "of"))
    return Climbers(
        component=found["component"],
        unit=found["unit"],
        first=found["first"],
        last=found["last"],
        dst=dst + found["dst"],
        src=src + found["src"],
        position=found["dst"],
    )
