"""A wave as index arrays: which token goes where in every layer call. Pure, no tensors.

The packed tokens of a layer call are [base rows | patched rows | injected tokens | donors]. The
base rows are the clean run of every pair and the runs it is set against. Patched rows are grouped
by (pair, direction, first position); the rows of a group share the destination's prefix. Injected
tokens stand for tokens of rows that are born from what comes out of the layer. Donors are tokens of
base rows at another position, for queries and keys that are to be rotated there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchsweep.layout import CODES, NAMES, OWN, Places, Variant, injected_tokens
from patchsweep.plan import Ints, Plan, Wave, null_start
from patchsweep.sites import SETS, Block
from patchsweep_kernels import Rows

NULL = -1  # the block of null patches, which belong to none
NOWHERE = 1 << 40  # the first position of a row that is not carried yet
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Edit:
    """Replacements of one component by values of one source, in columns [edit].

    target: the token of the layer call that is overwritten, in `unit`; donor: the token that has
    the source's value (−1 where the source takes no run). own: a token with the activation that the
    target has before. position: the target's. row: the runs, as numbers in RowTokens.
    """

    component: str
    source: int
    target: Ints
    donor: Ints
    own: Ints
    unit: Ints
    position: Ints
    row: Ints


@dataclass(frozen=True)
class RowTokens:
    """Where the tokens of every row are in a call: of base rows and then of runs, in columns [row].

    From position `start` on a row's tokens lie one after another from `first`; those before are the
    destination's, from `prefix`.
    """

    start: Ints
    first: Ints
    prefix: Ints

    def token(self, row: Ints, position: Ints) -> Ints:
        """The token of a row at a position; the arguments broadcast."""
        own = self.first[row] + position - self.start[row]
        return np.where(position >= self.start[row], own, self.prefix[row] + position)


@dataclass(frozen=True)
class Step:
    """One layer call, or at the end what the tail reads.

    gather [token]: for every packed token, which token of the layer below's output (of the
    embedding, at the first layer) it is. positions [token]. rows: who attends to whom. The z of the
    tokens `borrowers` is that of the tokens `lenders`. `edits` are in the order of the forward. The
    first `base` tokens are those of unpatched runs. Inside, metrics read the rows `reading`.
    """

    gather: Ints
    positions: Ints
    rows: list[Rows]
    borrowers: Ints
    lenders: Ints
    edits: list[Edit]
    row_tokens: RowTokens
    base: int
    reading: Ints


@dataclass(frozen=True)
class Embedding:
    """The tokens that are embedded: those of the base rows, then embeddings that are patched in.

    tokens, positions [token]. Noise: token `noised` takes value `slot` (of the noised positions of
    its pair) times the standard deviations of its source. `edits` replace embeddings by constants.
    """

    tokens: Ints
    positions: Ints
    noised: Ints
    pair: Ints
    source: Ints
    slot: Ints
    edits: list[Edit]


@dataclass(frozen=True)
class Runs:
    """The patched rows of a wave in packed order, [run].

    `block` counts within the wave, `cell` is the flat index in the block's values, `pair` counts
    within the wave. dst is the first base token of the destination, `base` its number among the
    base rows; a row holds `length` tokens from position `start` on and is first carried into layer
    call `joins`. `set`: whether it patches a set of sites.
    """

    block: Ints
    cell: Ints
    pair: Ints
    direction: Ints
    start: Ints
    joins: Ints
    dst: Ints
    base: Ints
    length: Ints
    set: Ints


@dataclass(frozen=True)
class Patched:
    """Every replacement of every run, in columns [place]; `donor` is a base token, −1 for none;
    `slot` numbers the injected tokens, −1 for none; `moved`: the donor is to be rotated."""

    run: Ints
    component: Ints
    layer: Ints
    unit: Ints
    position: Ints
    source: Ints
    donor: Ints
    call: Ints
    slot: Ints
    moved: Bools


@dataclass(frozen=True)
class Schedule:
    """The base rows, runs and layer calls of one wave."""

    embedding: Embedding
    base_offset: Ints  # [base row] its first token
    base_length: Ints  # [base row]
    # Of every row, base rows first: its pair within the wave; where logits are read and activations
    # inside (for attention, with the key), −1 for none: [row], [row, read], [row, inner metric].
    row_pair: Ints
    reads: Ints
    inner: Ints
    keys: Ints
    runs: Runs
    patched: Patched
    injected_run: Ints  # [injected]
    injected_position: Ints
    injected_call: Ints
    injected_attends: Bools
    layers: int

    @property
    def base(self) -> int:
        """How many tokens the base rows have."""
        return int(self.base_length.sum())

    def steps(self) -> Iterator[Step]:
        """Every layer's call from the bottom up, then what the tail reads."""
        runs, base = self.runs, self.base
        group = _group(runs)
        at = np.zeros(len(runs.start), np.int64)  # first token of each row below
        slot = np.zeros(len(self.injected_run), np.int64)  # token of each injected one below
        for layer in range(self.layers + 1):
            alive = np.flatnonzero(runs.joins <= layer)
            born = runs.joins == layer
            row, offset = ragged(runs.length[alive])
            run = alive[row]
            source = np.where(born, runs.dst + runs.start, at)[run] + offset
            here = np.zeros_like(at)
            here[alive] = np.cumsum(runs.length[alive]) - runs.length[alive]

            new = np.flatnonzero(born[self.injected_run])
            r = self.injected_run[new]
            source[here[r] + self.injected_position[new] - runs.start[r]] = slot[new]
            if layer == 0:
                self._embed(source, here)
            at = base + here
            tokens = RowTokens(
                start=np.concatenate(
                    [
                        np.zeros_like(self.base_offset),
                        np.where(runs.joins <= layer, runs.start, NOWHERE),
                    ]
                ),
                first=np.concatenate([self.base_offset, at]),
                prefix=np.concatenate([self.base_offset, runs.dst]),
            )
            inject = np.flatnonzero(self.injected_call == layer)
            slot[inject] = base + len(source) + np.arange(len(inject))
            copied = runs.dst[self.injected_run[inject]] + self.injected_position[inject]

            here_patched = np.flatnonzero(self.patched.call == layer)
            moved = here_patched[self.patched.moved[here_patched]]
            donors = self.patched.donor[moved]
            donor_slot = np.full(len(self.patched.run), -1)
            donor_slot[moved] = base + len(source) + len(inject) + np.arange(len(moved))
            silent = inject[~self.injected_attends[inject]]
            yield Step(
                gather=np.concatenate([np.arange(base), source, copied, donors]),
                positions=np.concatenate(
                    [
                        self.embedding.positions[:base],
                        runs.start[run] + offset,
                        self.injected_position[inject],
                        self.patched.position[moved],
                    ]
                ),
                rows=[*self._rows(alive, at, group), *self._queries(inject, slot)],
                borrowers=np.concatenate([slot[silent], donor_slot[moved]]),
                lenders=np.concatenate(
                    [runs.dst[self.injected_run[silent]] + self.injected_position[silent], donors]
                ),
                edits=self._edits(here_patched, tokens, slot, donor_slot),
                row_tokens=tokens,
                base=base,
                reading=np.arange(len(self.row_pair)),
            )

    def _embed(self, source: Ints, here: Ints) -> None:
        """Rows whose embeddings are patched take them from behind those of the base rows."""
        mine = np.flatnonzero(self.patched.component == CODES["embed"])
        run = self.patched.run[mine]
        place = here[run] + self.patched.position[mine] - self.runs.start[run]
        source[place] = self.base + np.arange(len(mine))

    def _edits(self, mine: Ints, tokens: RowTokens, slot: Ints, donor_slot: Ints) -> list[Edit]:
        """The replacements of one layer call, by component in the order of the forward."""
        p, bases = self.patched, len(self.base_offset)
        edits = []
        mine = mine[p.component[mine] != CODES["embed"]]
        keys = np.stack([p.component[mine], p.source[mine]])
        for code, source in np.unique(keys, axis=1).T:
            chosen = mine[(keys == [[code], [source]]).all(0)]
            run, position = p.run[chosen], p.position[chosen]
            injected = p.slot[chosen] >= 0
            target = tokens.token(bases + run, position)
            target[injected] = slot[p.slot[chosen][injected]]
            donor = np.where(donor_slot[chosen] >= 0, donor_slot[chosen], p.donor[chosen])
            fresh = self.runs.set[run] == 0
            own = np.where(fresh, self.runs.dst[run] + position, target)
            edits.append(
                Edit(
                    NAMES[code],
                    int(source),
                    target,
                    donor,
                    own,
                    p.unit[chosen],
                    position,
                    bases + run,
                )
            )
        return edits

    def _rows(self, alive: Ints, at: Ints, group: Ints) -> list[Rows]:
        runs = self.runs
        length = self.base_length
        new = np.flatnonzero(np.diff(length, prepend=-1))  # neighbours of one length go together
        count = np.diff(np.append(new, len(length)))
        rows = [
            Rows(int(self.base_offset[i]), int(n), int(length[i]))
            for i, n in zip(new, count, strict=True)
        ]
        _, first, count = np.unique(group[alive], return_index=True, return_counts=True)
        for r, n in zip(alive[first], count, strict=True):
            rows.append(
                Rows(int(at[r]), int(n), int(runs.length[r]), int(runs.dst[r]), int(runs.start[r]))
            )
        return rows

    def _queries(self, inject: Ints, slot: Ints) -> list[Rows]:
        """Injected tokens that attend: rows of one token behind the destination's prefix."""
        mine = inject[self.injected_attends[inject]]
        if not len(mine):
            return []
        dst, position = self.runs.dst[self.injected_run[mine]], self.injected_position[mine]
        change = np.ones(len(mine), bool)
        change[1:] = (dst[1:] != dst[:-1]) | (position[1:] != position[:-1])
        first = np.flatnonzero(change)
        count = np.diff(np.append(first, len(mine)))
        return [
            Rows(int(slot[mine[i]]), int(n), 1, int(dst[i]), int(position[i]))
            for i, n in zip(first, count, strict=True)
        ]


def make_schedule(plan: Plan, wave: Wave) -> Schedule:
    """Lay a wave out."""
    bases = _base_rows(plan, wave)
    parts, pieces = [_null(plan, wave)], []
    offset = len(parts[0]["pair"])
    for number, block in enumerate(wave.blocks):
        for pair in block.pairs:
            found, places = _of_block(plan, wave, block, number, pair)
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
    )


_PLACE = ("run", "component", "layer", "unit", "position", "source")


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


_RUN = ("block", "cell", "pair", "direction", "layer", "start", "joins", "set")


def _of_block(
    plan: Plan, wave: Wave, block: Block, number: int, pair: int
) -> tuple[dict[str, Ints], dict[str, Ints]]:
    """The runs of one pair in a block, and what they replace (`run` counting these runs)."""
    layout, units = plan.layout(block), np.arange(len(block.units))
    entries = slice(block.positions.start, block.positions.stop)
    exists = layout.exists[pair][:, entries]
    layer, entry = np.nonzero(exists)
    shape = (len(block.pairs), exists.shape[0], len(units), exists.shape[1])
    inside = pair - block.pairs.start
    cell = np.ravel_multi_index((inside, layer[:, None], units, entry[:, None]), shape).ravel()
    each = {
        "layer": layer,
        "start": layout.start[pair][:, entries][layer, entry],
        "joins": layout.joins[pair][:, entries][layer, entry],
    }
    runs = {k: np.repeat(v, len(units)) for k, v in each.items()}
    said = {
        "block": number,
        "pair": pair - wave.pairs.start,
        "direction": block.direction,
        "set": int(block.component == SETS),
    }
    runs |= {k: np.full_like(cell, v) for k, v in said.items()}
    runs["cell"] = cell

    places = plan.layouts.places(block.component, plan.variant(block), pair)
    total = layout.exists.shape[2]
    place = np.full(layout.exists[pair].size, -1)
    place[layer * total + entry + entries.start] = np.arange(len(layer))
    mine = np.flatnonzero(place[places.cell] >= 0)
    run = place[places.cell[mine]][:, None] * len(units) + units
    columns = {
        k: np.repeat(getattr(places, k)[mine], len(units))
        for k in ("component", "layer", "position", "source")
    }
    columns["unit"] = (places.unit[mine][:, None] + block.units.start + units).ravel()
    return runs, {"run": run.ravel(), **columns}


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

    columns = (found["component"], found["layer"], found["unit"], position, found["source"])
    call, _ = layouts.calls(Places(run, *columns))
    injected = injected_tokens(Places(run, *columns), position, call, runs.joins)
    attends = found["component"][injected] == CODES["head_q"]
    dst = runs.dst[run[injected]]
    injected = injected[np.lexsort((position[injected], dst, ~attends, call[injected]))]
    slot = _slots(run, position, injected, call == runs.joins[run] - 1)
    return Patched(run, *columns, donor, call, slot, moved), injected


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


def _group(runs: Runs) -> Ints:
    """[run]: numbers the rows that share a destination and a first position."""
    change = np.zeros(len(runs.pair), bool)
    for column in (runs.pair, runs.direction, runs.start):
        change[1:] |= column[1:] != column[:-1]
    return np.cumsum(change)


def ragged(lengths: Ints) -> tuple[Ints, Ints]:
    """(row, offset) of every token of rows that lie one after another."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    offset = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return row, offset


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


_NONE, _NO_PLACES = np.zeros(0, np.int64), np.zeros(0, bool)
_NO_RUNS = Runs(*(_NONE,) * 10)
_NO_PATCHES = Patched(*(_NONE,) * 9, _NO_PLACES)


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
    )
