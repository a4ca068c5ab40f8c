"""Whether what results should hold is there: every chunk decoded, its digest compared.

What is damaged is *withdrawn*: its records are deleted, then the chunk, and a resumed sweep does it
again, with the same bits. Blocks are those of the store, chunks. What goes with what:

- a block, or its record: this block;
- a baseline or an estimate: the estimates and all blocks of its source, sample and pairs (the first
  wave of these pairs writes the baseline, estimates come before it);
- scores of edges: those of their source, sample and pairs;
- the prefilter's choice: all estimates and all blocks;
- how often a wave was halved: it alone, as other parts differ in rounding only;
- anything else (metadata, prompts, coordinates, sites) is written once, and kept in the manifest:
  it is written again from there. Older results have none: `--overwrite`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import BadInput
from patchsweep.sites import EDGES, MEASURED, Block, Grid, Status, blocks
from patchsweep.store.arrays import ESTIMATED, ESTIMATED_SPLIT, SCORED_SPLIT, WAVES_SPLIT
from patchsweep.store.damage import Damaged, Why
from patchsweep.store.ledger import BASELINES, CHOSEN, ESTIMATES, SCORED, scored
from patchsweep.store.store import Store

Marks = NDArray[np.bool_]


@dataclass(frozen=True)
class Span:
    """Pairs of one source and sample."""

    source: int
    sample: int
    pairs: range

    def meets(self, block: Block) -> bool:
        """Whether a block is of these."""
        same = (block.source, block.sample) == (self.source, self.sample)
        return same and block.pairs.start < self.pairs.stop and self.pairs.start < block.pairs.stop


@dataclass(frozen=True)
class Damage:
    """A chunk, the file `key`, that is not what its record says. `what`: a component's block or
    record, "baseline", "estimates" or "edges" of some pairs, "choice", "split"; or, `where` being
    "once", the group or array of a file that is written once."""

    what: str
    where: Block | Span | Literal["once"] | None
    why: Why
    key: str

    def __str__(self) -> str:
        at = ""
        if isinstance(self.where, Block):
            at = f" block {self.where.index}"
        elif isinstance(self.where, Span):
            first, last = self.where.pairs[0], self.where.pairs[-1]
            at = f" source {self.where.source}, sample {self.where.sample}, pairs {first}-{last}"
        return f"{self.what}{at}: {self.why} ({self.key})"


@dataclass(frozen=True)
class Check:
    """What was found in the results at `path`; nobody may be writing to them meanwhile. `done` of
    `blocks` (chunks) are there; `damages`, one for each file; `undone`: what else is not done, in
    words; `kept_twice`: whether what is written once can be written again."""

    path: Path | str
    done: int
    blocks: int
    damages: tuple[Damage, ...]
    undone: tuple[str, ...] = ()
    kept_twice: bool = True

    def __str__(self) -> str:
        """One line."""
        if self.damages:
            mend = "run again with --resume"
            if not self.kept_twice and any(d.where == "once" for d in self.damages):
                mend = "what is written once is among them, run again with --overwrite"
            count = len(self.damages)
            what = "1 file is" if count == 1 else f"{count} files are"
            return f"{self.path}: {what} damaged: {mend}"
        done = [f"{self.done} of {self.blocks} blocks are done", *self.undone]
        return f"{self.path}: nothing is damaged, {', '.join(done)}"


def check(path: str | Path) -> Check:
    """Decode every chunk of the results at `path`, a folder, a zip file or a URL; BadInput if there
    are none. What is damaged is reported, and nothing is changed."""
    store = Store.open(path, mending=True)
    found = tuple(damages(store))
    marks = [store.records(f"completion/{name}")[0] for name in store.grids]
    undone = []
    for what, record in _by_pair(store).items():
        done = store.records(record)[0]
        if not done.all():
            undone.append(f"{what} of {int(done.sum())} of {done.size} pairs are done")
    if store.estimators and not store.records(CHOSEN)[0].all():
        undone.append("which cells are run is not chosen")
    blocks = sum(m.size for m in marks)
    return Check(
        store.path, sum(int(m.sum()) for m in marks), blocks, found, (*undone,), store.vouched
    )


def refuse_missing(store: Store) -> None:
    """BadInput if a chunk that is marked done is not there: it would read as nothing found; and for
    nodes of Zarr v2, which others than patchsweep would read."""
    store = store.listed()
    if key := store.of_v2():
        raise BadInput(f"{store.path}/{key} is of Zarr v2, results are of v3: move it out of there")
    for damage in _progress(store, decode=False):
        raise BadInput(
            f"{store.path} is damaged, {damage}; "
            f"'patchsweep check {store.path}' says what must be redone"
        )


def withdraw(store: Store) -> list[Damage]:
    """Take back what is damaged, so that it is done again, and write again what is written once.
    BadInput for that in older results, which do not keep it twice."""
    found = list(damages(store))
    for damage in found:
        if damage.where == "once" and not store.vouched:
            raise BadInput(
                f"{store.path} is damaged, {damage}: it cannot be continued, use --overwrite"
            )
    store.restore()
    records: dict[str, None] = {}
    filled = [damage for damage in found if damage.where != "once"]
    for damage in filled:
        records |= dict.fromkeys(_records(store, damage))
    store.remove([*records, *(d.key for d in filled)])  # a record never outlives its data
    return found


def damages(store: Store) -> Iterator[Damage]:
    """All of them."""
    store = store.listed()
    seen = set[str]()
    for damage in itertools.chain(_once(store), _progress(store, decode=True)):
        if damage.key not in seen:  # a record, by each of its chunks
            yield damage
        seen.add(damage.key)


def _once(store: Store) -> Iterator[Damage]:
    for key, why in store.damaged_once().items():
        yield Damage(key.split("/c/")[0].removesuffix("/zarr.json"), "once", why, key)
    if store.vouched:
        return
    for name in store.arrays():
        if not store.is_filled(name):
            for region in store.chunks(name):
                yield from _chunk(store, name, "once", name, region, marked=True)[1]


def _by_pair(store: Store) -> dict[str, str]:
    """What is computed by pairs and not in blocks, and the array that says of which."""
    found = {"estimates": ESTIMATED} if store.estimators else {}
    return found | ({"edges": SCORED} if scored(store.attrs) else {})


def _written_later(store: Store) -> dict[str, list[str]]:
    """The arrays that a sweep fills, by what they hold."""
    found: dict[str, list[str]] = {
        name: [f"{name}/{metric}{kind}" for metric in store.metrics for kind in ("", "_status")]
        for name in store.grids
    }
    both = [f"{metric}{kind}" for metric in store.metrics for kind in ("", "_noise_floor")]
    found["baseline"] = [f"baseline/{name}" for name in both]
    found["estimates"] = [f"{n}/{m}_estimate" for n in store.estimators for m in store.metrics]
    kinds = ("status", "stratum")
    found["choice"] = [f"choice/{n}_{kind}" for n in store.estimators for kind in kinds]
    if scored(store.attrs):
        found["edges"] = [f"{EDGES}/{m}" for m in store.metrics]
    return found


def _progress(store: Store, *, decode: bool) -> Iterator[Damage]:
    """What is damaged of that which a sweep fills; without `decode` only what is missing."""
    arrays = _written_later(store)
    left = np.zeros(store.shape(f"baseline/{store.metrics[0]}")[1:], bool)
    for name, grid in store.grids.items():
        done, bad = store.records(f"completion/{name}")
        done = done.ravel()
        for block in blocks(grid):
            if block.index in bad:
                why, key = bad[block.index]
                yield Damage(name, block, why, key)
            else:
                yield from _block(store, grid, block, bool(done[block.index]), decode)
            if not done[block.index]:
                left[block.source, block.sample, block.pairs.start : block.pairs.stop] = True
    needed = ~left  # the baseline may come after some blocks of its pairs, not after all
    for what, record in _by_pair(store).items():
        done, bad = store.records(record)
        for index, (why, key) in bad.items():
            yield Damage(what, _span(done, index, 1, done.shape[2]), why, key)
        yield from _by_pairs(store, what, arrays[what], done, decode)
        needed |= done if what == "estimates" else False
    yield from _by_pairs(store, "baseline", arrays["baseline"], needed, decode)
    for name in (WAVES_SPLIT, ESTIMATED_SPLIT, SCORED_SPLIT) if decode else ():
        for region in store.written(name):
            try:
                store.numbers(name, region)
            except Damaged as error:
                yield Damage("split", None, error.why, store.keys(name, region)[0])
    if arrays["choice"]:
        done, bad = store.records(CHOSEN)
        for why, key in bad.values():
            yield Damage("choice", None, why, key)
        for name in arrays["choice"]:
            for region in store.chunks(name):
                yield from _chunk(store, "choice", None, name, region, bool(done.all()), decode)[1]


def _span(records: Marks, number: int, tile: int, pairs: int) -> Span:
    """The pairs of a record, [source, sample, tile of pairs]."""
    source, sample, at = map(int, np.unravel_index(number, records.shape))
    return Span(source, sample, range(at * tile, min(at * tile + tile, pairs)))


def _block(store: Store, grid: Grid, block: Block, done: bool, decode: bool) -> Iterator[Damage]:
    region = block.region(grid)
    for metric in store.metrics:
        data = []
        for name in (f"{grid.component}/{metric}", f"{grid.component}/{metric}_status"):
            array, found = _chunk(store, grid.component, block, name, region, done, decode)
            yield from found
            if array is not None:
                data.append(array)
        if done and len(data) == 2 and not _consistent(*data):
            name = f"{grid.component}/{metric}_status"
            yield Damage(grid.component, block, "inconsistent", store.keys(name, region)[0])


def _consistent(values: NDArray[Any], status: NDArray[Any]) -> bool:
    """Nothing is left to do, and values are finite just where their status says so."""
    known = np.isin(status, [s for s in Status if s != Status.NOT_DONE]).all()
    return bool(known and (np.isfinite(values) == np.isin(status, MEASURED)).all())


def _by_pairs(
    store: Store, what: str, names: Sequence[str], marks: Marks, decode: bool
) -> Iterator[Damage]:
    """Chunks of arrays [_, source, sample, pair, ...], needed where any `marks` [source, sample,
    pair] are set."""
    if store.vouched and what != "edges" and names:
        records, bad = store.records(ESTIMATES if what == "estimates" else BASELINES)
        tile = store.chunk_sizes(names[0])[3]
        for number, (why, key) in bad.items():
            yield Damage(what, _span(records, number, tile, marks.shape[2]), why, key)
    for name in names:
        for region in store.chunks(name):
            source, sample, pairs = region[1:4]
            span = Span(source.start, sample.start, range(marks.shape[2])[pairs])
            marked = bool(marks[region[1:4]].any())
            yield from _chunk(store, what, span, name, region, marked, decode)[1]


def _chunk(
    store: Store,
    what: str,
    where: Block | Span | Literal["once"] | None,
    name: str,
    region: tuple[slice, ...],
    marked: bool,
    decode: bool = True,
) -> tuple[NDArray[Any] | None, list[Damage]]:
    """A chunk's data, and what is wrong with it; neither if it is not there and need not be. What
    no record vouches for is not there."""
    [key] = store.keys(name, region)
    vouched = store.vouches(key)
    if vouched is False:
        return None, [Damage(what, where, "missing", store.record_of(key))] if marked else []
    if not store.has(key):
        return None, [Damage(what, where, "missing", key)] if marked or vouched else []
    if not decode:
        return None, []
    try:
        return store.read(name, region), []
    except Damaged as error:
        return None, [Damage(what, where, error.why, key)]


def _records(store: Store, damage: Damage) -> Iterator[str]:
    """The records that do not hold any more."""
    where = damage.where
    if damage.what == "split" or where == "once":
        return
    if isinstance(where, Block):
        yield store.record_key(f"completion/{damage.what}", (where.index,))
        return
    if damage.what != EDGES:
        for name, grid in store.grids.items():
            for block in blocks(grid):
                if where is None or where.meets(block):
                    yield store.record_key(f"completion/{name}", (block.index,))
    if where is None:
        yield store.record_key(CHOSEN, (0,))
    record = SCORED if damage.what == EDGES else ESTIMATED
    if damage.what == EDGES or store.estimators:
        for source, sample, pair in np.ndindex(store.records(record)[0].shape):
            same = where is not None and (where.source, where.sample) == (source, sample)
            if where is None or (same and pair in where.pairs):
                yield store.record_key(record, (source, sample, pair))
    if store.vouches(damage.key) is not None:  # a chunk
        yield store.record_of(damage.key)
