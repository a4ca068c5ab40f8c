"""The schedule of a wave, or of unpatched runs alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from patchsweep.plan import Ints, Plan, Wave, null_start
from patchsweep.plan.layout import CODES, OWN, Climbs, Places, Variant, injected_tokens
from patchsweep.plan.schedule.climb import Climbers
from patchsweep.plan.schedule.columns import Bools, Edit, Embedding, Patched, Runs
from patchsweep.plan.schedule.edges import Beginnings, begun, climbers_of, of_edges
from patchsweep.plan.schedule.steps import Schedule, ragged
from patchsweep.sites import EDGES, RUN, SETS, Block

NULL = -1  # the block of null patches, which belong to none

# Columns of runs and of what they replace, until the runs are put in order.
_RUN = ("block", "cell", "pair", "direction", "layer", "start", "joins", "set")
_PLACE = ("run", "component", "layer", "unit", "position", "source", "climber")


def make_schedule(plan: Plan, wave: Wave) -> Schedule:
    """Lay a wave out."""
    bases = _base_rows(plan, wave)
    parts, pieces, climbers = [_null(plan, wave)], list[dict[str, Ints]](), list[Beginnings]()
    offset, climbing = len(parts[0]["pair"]), 0
    for number, block in enumerate(wave.blocks):
        for pair in block.pairs:
            lay_out = of_edges if block.component == EDGES else _of_block
            found, places, begin = lay_out(plan, wave, block, number, pair)
            if begin:
                places["climber"] += climbing
                climbing += len(begin.climbers["pair"])
                climbers.append(begin)
            places["run"] += offset
            offset += len(found["pair"])
            parts.append(found)
            pieces.append(places)
    columns = {k: np.concatenate([p[k] for p in parts]) for k in _RUN}
    noise = np.array([d == "noise" for d in plan.directions])[columns["direction"]]
    base = _row_of(plan, wave, columns["pair"], np.where(noise, OWN, wave.source))
    columns |= {"base": base, "dst": bases["offset"][base]}
    columns["length"] = bases["length"][base] - columns["start"]
    order = np.lexsort(
        [columns[k] for k in ("set", "layer", "joins", "start", "direction", "pair")]
    )
    columns.pop("layer")
    runs = Runs(**{k: v[order] for k, v in columns.items()})
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    found = {k: np.concatenate([p[k] for p in pieces]) for k in _PLACE}
    found["run"] = rank[found["run"]]
    patched, injected = _patched(plan, wave, runs, found, bases)
    rows = np.concatenate([np.arange(len(bases["pair"])), runs.base])
    return Schedule(
        embedding=_embedding(plan, wave, bases, runs, patched),
        base_offset=bases["offset"],
        base_length=bases["length"],
        row_pair=bases["pair"][rows],
        reads=bases["reads"][rows],
        inner=bases["inner"][rows],
        keys=bases["keys"][rows],
        runs=runs,
        patched=patched,
        injected_run=patched.run[injected],
        injected_position=patched.position[injected],
        injected_call=patched.call[injected],
        injected_attends=patched.component[injected] == CODES["head_q"],
        layers=plan.dimensions.layers,
        climbers=climbers_of(climbers, bases["offset"], partial(_row_of, plan, wave)),
    )


def _base_rows(plan: Plan, wave: Wave) -> dict[str, Ints]:
    """The base rows: of every pair the clean run, then those of the wave's sources."""
    layouts = plan.layouts
    reads, inner = layouts.reads.positions, layouts.reads.inner
    rows = []
    for number, i in enumerate(wave.pairs):
        own = np.arange(
            len(layouts.pairs[i]) + 1
        )  # a further one, for positions that are not there
        own[-1] = -1
        rows.append((number, OWN, layouts.pairs[i].clean, own))
        for s in wave.runs:
            other = layouts.other(s, wave.sample, i)
            assert other is not None
            rows.append((number, s, other.tokens, np.append(other.align, -1)))
    length = np.array([len(tokens) for _, _, tokens, _ in rows])
    pairs = [wave.pairs[number] for number, _, _, _ in rows]
    positions = np.array([[r.position[i] for r in inner] for i in pairs], np.int64)
    keys = np.array([[r.key[i] for r in inner] for i in pairs], np.int64)

    def here(clean: Ints) -> Ints:
        """Clean positions [row, …] in each row's own count."""
        columns = [align[row] for row, (_, _, _, align) in zip(clean, rows, strict=True)]
        return np.array(columns, np.int64).reshape(len(rows), -1)

    return {
        "pair": np.array([number for number, _, _, _ in rows]),
        "source": np.array([source for _, source, _, _ in rows]),
        "offset": np.cumsum(length) - length,
        "length": length,
        "tokens": np.concatenate([np.array(tokens) for _, _, tokens, _ in rows]),
        "reads": here(reads[pairs]),
        "inner": here(positions),
        "keys": here(keys),
    }


def _row_of(plan: Plan, wave: Wave, pair: Ints, source: Ints) -> Ints:
    """The base row of pairs (counted in the wave) and sources (OWN: the clean run)."""
    number = np.zeros(len(plan.sources) + 1, np.int64)
    number[list(wave.runs)] = 1 + np.arange(len(wave.runs))
    return pair * (1 + len(wave.runs)) + number[source]  # OWN is the last, and 0


def _null(plan: Plan, wave: Wave) -> dict[str, Ints]:
    """A null patch per pair and direction: a row from the first differing token, not patched."""
    if wave.sample >= plan.sources[wave.source].samples:
        empty = np.zeros(0, np.int64)
        return dict.fromkeys(_RUN, empty)
    ways = len(plan.directions)
    pair, direction = np.divmod(np.arange(len(wave.pairs) * ways), ways)
    start = [
        null_start(plan.layouts, Variant(d, wave.source, wave.sample), i)
        for i in wave.pairs
        for d in range(ways)
    ]
    zero = np.zeros_like(pair)
    return {
        "block": zero + NULL,
        "cell": zero,
        "pair": pair,
        "direction": direction,
        "layer": zero - 1,
        "start": np.array(start),
        "joins": zero,
        "set": zero,
    }


def _of_block(
    plan: Plan, wave: Wave, block: Block, number: int, pair: int
) -> tuple[dict[str, Ints], dict[str, Ints], Beginnings | None]:
    """The runs of one pair in a block, what they replace (`run` counting these runs), and of paths
    the climbers (`climber` counting these)."""
    layout = plan.layout(block)
    entries = slice(block.positions.start, block.positions.stop)
    exists = layout.exists[pair][:, entries]
    shape = (len(block.pairs), exists.shape[0], len(block.units), exists.shape[1])
    run = np.broadcast_to(exists[:, None], shape[1:])
    if (chosen := plan.chosen(block, range(pair, pair + 1))) is not None:
        run = run & np.isin(chosen[0], RUN)
    layer, entry, unit = np.nonzero(run.swapaxes(1, 2))
    inside = pair - block.pairs.start
    said = {
        "block": number,
        "pair": pair - wave.pairs.start,
        "direction": block.direction,
        "set": int(block.component == SETS),
    }
    runs = {
        "cell": np.ravel_multi_index((np.full_like(layer, inside), layer, unit, entry), shape),
        "layer": layer,
        "start": layout.start[pair][:, entries][layer, entry],
        "joins": layout.joins[pair][:, entries][layer, entry],
        **{k: np.full_like(layer, v) for k, v in said.items()},
    }
    which = (block.component, plan.variant(block), pair)
    path = block.component in plan.layouts.paths
    places, climbs = plan.layouts.path(*which) if path else (plan.layouts.places(*which), None)
    assert (np.diff(places.cell) >= 0).all()
    cell = layer * layout.exists.shape[2] + entry + entries.start
    first = np.searchsorted(places.cell, cell)
    row, offset = ragged(np.searchsorted(places.cell, cell, side="right") - first)
    mine = first[row] + offset
    columns = {k: getattr(places, k)[mine] for k in ("component", "layer", "position", "source")}
    columns["run"], own = row, block.units.start + unit
    if climbs is None:
        columns |= {"unit": places.unit[mine] + own[row], "climber": np.full_like(row, -1)}
        return runs, columns, None
    whose, climber, begin = _begin(plan, wave, block, pair, climbs, cell, own)
    width = len(plan.pairs[pair])
    keys = whose * width + climbs.position[climber]  # ascending
    at = np.searchsorted(keys, row * width + columns["position"])
    return runs, {**columns, "unit": places.unit[mine], "climber": at}, begin


def _begin(
    plan: Plan, wave: Wave, block: Block, pair: int, climbs: Climbs, cell: Ints, unit: Ints
) -> tuple[Ints, Ints, Beginnings]:
    """The climbers of some runs of a path, by their `cell` and `unit`: whose each is, which of the
    pair's it is, and all of them."""
    first = np.searchsorted(climbs.cell, cell)
    whose, offset = ragged(np.searchsorted(climbs.cell, cell, side="right") - first)
    climber = first[whose] + offset
    sends = np.searchsorted(climbs.of, climber)
    of, offset = ragged(np.searchsorted(climbs.of, climber, side="right") - sends)
    send = sends[of] + offset
    begin = begun(
        plan,
        wave,
        plan.variant(block),
        pair,
        climbs.position[climber],
        climbs.first[climber],
        climbs.last[climber],
        plan.layouts.paths[block.component].through_mlps,
        (of, climbs.component[send], climbs.layer[send], climbs.unit[send] + unit[whose[of]]),
    )
    return whose, climber, begin


def _patched(
    plan: Plan, wave: Wave, runs: Runs, found: dict[str, Ints], bases: dict[str, Ints]
) -> tuple[Patched, Ints]:
    """The replacements in the destinations' own positions, with their donors; and which of them
    stand for the injected tokens."""
    layouts, longest = plan.layouts, max(len(plan.pairs[i]) for i in wave.pairs)
    run, clean = found["run"], found["position"]
    pair, direction = runs.pair[run], runs.direction[run]
    noise = np.array([d == "noise" for d in plan.directions])[direction]

    def table(column: Callable[[Variant, int], Ints]) -> Ints:
        """A value per [pair, direction, clean position], looked up for every place."""
        out = np.full((len(wave.pairs), len(plan.directions), longest), -1)
        for number, i in enumerate(wave.pairs):
            for d in range(len(plan.directions)):
                values = column(Variant(d, wave.source, wave.sample), i)
                out[number, d, : len(values)] = values
        return out[pair, direction, clean]

    position = table(lambda v, i: layouts.frames(v)[i].to_dst) if len(run) else clean
    donor, moved = np.full_like(run, -1), np.zeros(len(run), bool)
    for source in np.unique(found["source"]):
        mine = found["source"] == source
        own = wave.source if source == OWN else int(source)
        if plan.sources[own].kind != "run":
            continue
        at = table(lambda v, i, s=int(source): layouts.to_src(v, s, i))  # type: ignore[misc]
        restored = (source == OWN) & ~noise  # the clean run is the source
        row = _row_of(plan, wave, pair, np.where(restored, OWN, own))
        donor[mine] = (bases["offset"][row] + at)[mine]
        moved[mine] = (at != position)[mine]
    moved &= np.isin(found["component"], (CODES["head_q"], CODES["head_k"]))
    moved &= found["climber"] < 0  # it stands where its receiver does

    columns = (found["component"], found["layer"], found["unit"], position, found["source"])
    call, _ = layouts.calls(Places(run, *columns))
    injected = injected_tokens(Places(run, *columns), position, call, runs.joins)
    attends = found["component"][injected] == CODES["head_q"]
    dst = runs.dst[run[injected]]
    injected = injected[np.lexsort((position[injected], dst, ~attends, call[injected]))]
    slot = _slots(run, position, injected, call == runs.joins[run] - 1)
    return Patched(run, *columns, donor, call, slot, moved, found["climber"]), injected


def _slots(run: Ints, position: Ints, injected: Ints, late: Bools) -> Ints:
    """[place]: which of the injected tokens it is in, −1 if its row is carried already."""
    out = np.full_like(run, -1)
    if len(injected):
        width = int(position.max()) + 1
        key = run * width + position
        order = np.argsort(key[injected], kind="stable")
        found = np.searchsorted(key[injected][order], key[late])
        out[late] = order[found]
    return out


def _embedding(
    plan: Plan, wave: Wave, bases: dict[str, Ints], runs: Runs, patched: Patched
) -> Embedding:
    """Base tokens, then one token for every embedding that is patched into a run."""
    mine = np.flatnonzero(patched.component == CODES["embed"])
    run, donor = patched.run[mine], patched.donor[mine]
    length = bases["length"]
    base_position = np.arange(length.sum()) - np.repeat(bases["offset"], length)
    own = runs.dst[run] + patched.position[mine]
    added = bases["tokens"][np.where(donor >= 0, donor, own)]
    tokens = np.concatenate([bases["tokens"], added])
    noise = np.full((3, length.sum()), -1)  # pair, source and slot of the noise on a base token
    for row, source in enumerate(bases["source"]):
        i = wave.pairs[bases["pair"][row]]
        other = plan.layouts.other(int(source), wave.sample, i) if source != OWN else None
        if other is not None and other.noised:
            at = bases["offset"][row] + np.array(other.noised)
            noise[:, at] = np.array([[i], [source], [0]])
            noise[2, at] = np.arange(len(at))
    noise = np.concatenate([noise, np.where(donor >= 0, noise[:, donor], -1)], 1)
    noised = np.flatnonzero(noise[0] >= 0)
    edits = []
    for source in np.unique(patched.source[mine]):
        kind = plan.sources[wave.source if source == OWN else int(source)].kind
        chosen = np.flatnonzero(patched.source[mine] == source)
        if kind != "run":
            target = length.sum() + chosen
            none, position = np.full_like(target, -1), patched.position[mine][chosen]
            zero = np.zeros_like(target)
            edits.append(
                Edit("embed", int(source), target, none, target, zero, position, run[chosen])
            )
    return Embedding(
        tokens=tokens,
        positions=np.concatenate([base_position, patched.position[mine]]),
        noised=noised,
        pair=noise[0, noised],
        source=noise[1, noised],
        slot=noise[2, noised],
        edits=edits,
    )


_NONE, _NO_PLACES = np.zeros(0, np.int64), np.zeros(0, bool)
_NO_RUNS = Runs(*(_NONE,) * 10)
_NO_PATCHES = Patched(*(_NONE,) * 9, _NO_PLACES, _NONE)


def rows_only(prompts: Sequence[tuple[int, ...]], layers: int) -> Schedule:
    """Plain forwards of some prompts, with nothing patched and the last token read."""
    length = np.array([len(p) for p in prompts])
    last = (length - 1)[:, None]
    rows = {
        "pair": np.arange(len(length)),
        "offset": np.cumsum(length) - length,
        "length": length,
        "reads": last,
        "inner": last[:, :0],
        "keys": last[:, :0],
    }
    positions = np.concatenate([np.arange(n) for n in length])
    tokens = np.concatenate(prompts)
    return _unpatched(rows, Embedding(tokens, positions, *(_NONE,) * 4, []), layers)


def base_only(plan: Plan, wave: Wave, keep: Bools) -> Schedule:
    """The unpatched runs of a wave's pairs alone; of its base rows those that `keep` [base row]
    says."""
    bases = _base_rows(plan, wave)
    tokens = bases.pop("tokens")[np.repeat(keep, bases["length"])]
    rows = {k: v[keep] for k, v in bases.items()} | {"tokens": tokens}
    rows["offset"] = np.cumsum(rows["length"]) - rows["length"]
    embedding = _embedding(plan, wave, rows, _NO_RUNS, _NO_PATCHES)
    return _unpatched(rows, embedding, plan.dimensions.layers)


def _unpatched(rows: dict[str, Ints], embedding: Embedding, layers: int) -> Schedule:
    return Schedule(
        embedding=embedding,
        base_offset=rows["offset"],
        base_length=rows["length"],
        row_pair=rows["pair"],
        reads=rows["reads"],
        inner=rows["inner"],
        keys=rows["keys"],
        runs=_NO_RUNS,
        patched=_NO_PATCHES,
        injected_run=_NONE,
        injected_position=_NONE,
        injected_call=_NONE,
        injected_attends=_NO_PLACES,
        layers=layers,
        climbers=Climbers(*(_NONE,) * 4, _NO_PLACES, *(_NONE,) * 5),
    )
