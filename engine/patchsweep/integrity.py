"""Whether what the results call done is there: every chunk decoded, its checksum compared.

What is damaged is *withdrawn*: its records are deleted, then the chunk, and a resumed sweep does it
again, with the same bits. Blocks are those of the store, chunks. What goes with what:

- a block, or its record: this block;
- a baseline or an estimate: the estimates and all blocks of its source, sample and pairs (the first
  wave of these pairs writes the baseline, estimates come before it);
- scores of edges: those of their source, sample and pairs;
- the prefilter's choice: all estimates and all blocks;
- how often a wave was halved: it alone, as other parts differ in rounding only;
- anything else (prompts, coordinates, sites) is written once: `--overwrite`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import BadInput
from patchsweep.sites import MEASURED, Block, Grid, Status, blocks
from patchsweep.store import (
    CHOSEN,
    EDGES,
    ESTIMATED,
    ESTIMATED_SPLIT,
    SCORED,
    SCORED_SPLIT,
    WAVES_SPLIT,
    Damaged,
    Store,
)

Why = Literal["missing", "truncated", "checksum", "inconsistent"]
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
    record, "baseline", "estimates" or "edges" of some pairs, "choice", "split", or the name of
    an array that is written once."""

    what: str
    where: Block | Span | None
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
    """What was found in results; nobody may be writing to them meanwhile."""

    path: Path | str
    done: int
    blocks: int
    damages: tuple[Damage, ...]

    def __str__(self) -> str:
        """One line."""
        if self.damages:
            mend = "run again with --resume"
            if any(_is_fixed(d) for d in self.damages):
                mend = "what is written once is among them, run again with --overwrite"
            count = len(self.damages)
            what = "1 chunk is" if count == 1 else f"{count} chunks are"
            return f"{self.path}: {what} damaged: {mend}"
        return f"{self.path}: nothing is damaged, {self.done} of {self.blocks} blocks are done"


def check(path: str | Path) -> Check:
    """Decode every chunk that results hold; BadInput if `path` holds none."""
    store = Store.open(path)
    found = tuple(damages(store))
    marks = [_marks(store, f"completion/{name}")[0] for name in store.grids]
    return Check(store.path, sum(int(m.sum()) for m in marks), sum(m.size for m in marks), found)


def refuse_missing(store: Store) -> None:
    """BadInput if a chunk that is marked done is not there: it would read as nothing found."""
    for damage in _progress(store.listed(), decode=False):
        raise BadInput(
            f"{store.path} is damaged, {damage}; "
            f"'patchsweep check {store.path}' says what must be redone"
        )


def withdraw(store: Store) -> list[Damage]:
    """Take back what is damaged, so that it is done again. BadInput for what is written once."""
    found = list(damages(store))
    for damage in found:
        if _is_fixed(damage):
            raise BadInput(
                f"{store.path} is damaged, {damage}: it cannot be continued, use --overwrite"
            )
    records: dict[str, None] = {}
    for damage in found:
        records |= dict.fromkeys(_records(store, damage))
    store.remove([*records, *(d.key for d in found)])  # a record never outlives its data
    return found


def damages(store: Store) -> Iterator[Damage]:
    """All of them."""
    store = store.listed()
    written = {name for names in _written_later(store).values() for name in names}
    for name in store.arrays():
        if name not in written and not name.startswith("completion/"):
            for region in store.chunks(name):
                yield from _chunk(store, name, None, name, region, marked=True)[1]
    yield from _progress(store, decode=True)


def _is_fixed(damage: Damage) -> bool:
    return damage.where is None and damage.what not in ("choice", "split")


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
    found["edges"] = [f"{EDGES}/{m}" for m in store.metrics] if store.attrs.get(EDGES) else []
    return found


def _progress(store: Store, *, decode: bool) -> Iterator[Damage]:
    """What is damaged of that which a sweep fills; without `decode` only what is missing."""
    arrays = _written_later(store)
    left = np.zeros(store.shape(f"baseline/{store.metrics[0]}")[1:], bool)
    for name, grid in store.grids.items():
        done, bad = _marks(store, f"completion/{name}")
        for block in blocks(grid):
            if block.index in bad:
                why, key = bad[block.index]
                yield Damage(name, block, why, key)
            elif done[block.index] or decode:
                yield from _block(store, grid, block, bool(done[block.index]), decode)
            if not done[block.index]:
                left[block.source, block.sample, block.pairs.start : block.pairs.stop] = True
    needed = ~left  # the baseline may come after some blocks of its pairs, not after all
    for what, record in (("estimates", ESTIMATED), ("edges", SCORED)):
        if arrays[what]:
            done, bad = _marks(store, record)
            for index, (why, key) in bad.items():
                source, sample, pair = map(int, np.unravel_index(index, done.shape))
                yield Damage(what, Span(source, sample, range(pair, pair + 1)), why, key)
            yield from _by_pairs(store, what, arrays[what], done, decode)
            needed |= done if what == "estimates" else False
    yield from _by_pairs(store, "baseline", arrays["baseline"], needed, decode)
    for name in (WAVES_SPLIT, ESTIMATED_SPLIT, SCORED_SPLIT):
        for region in store.written(name):
            yield from _chunk(store, "split", None, name, region, marked=True, decode=decode)[1]
    if arrays["choice"]:
        done, bad = _marks(store, CHOSEN)
        for why, key in bad.values():
            yield Damage("choice", None, why, key)
        for name in arrays["choice"]:
            for region in store.chunks(name):
                yield from _chunk(store, "choice", None, name, region, bool(done[0]), decode)[1]


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
    for name in names:
        for region in store.chunks(name):
            source, sample, pairs = region[1:4]
            span = Span(source.start, sample.start, range(marks.shape[2])[pairs])
            marked = bool(marks[region[1:4]].any())
            yield from _chunk(store, what, span, name, region, marked, decode)[1]


def _chunk(
    store: Store,
    what: str,
    where: Block | Span | None,
    name: str,
    region: tuple[slice, ...],
    marked: bool,
    decode: bool = True,
) -> tuple[NDArray[Any] | None, list[Damage]]:
    """A chunk's data, and what is wrong with it; neither if it is not there and need not be."""
    [key] = store.keys(name, region)
    if not store.has(key):
        return None, [Damage(what, where, "missing", key)] if marked else []
    if not decode:
        return None, []
    try:
        return store.read(name, region), []
    except Damaged as error:
        return None, [Damage(what, where, _why(error), key)]


def _why(error: Damaged) -> Why:
    """Zstd tells a cut or overwritten frame from one whose content has changed."""
    return "truncated" if "invalid input" in str(error) else "checksum"


def _marks(store: Store, name: str) -> tuple[Marks, dict[int, tuple[Why, str]]]:
    """A record, in the shape of its array, and the flat indices whose own chunks are damaged."""
    try:
        return store.read(name).astype(np.bool_), {}
    except Damaged:
        pass
    marks, bad = np.zeros(store.shape(name), bool), {}
    for index, region in enumerate(store.chunks(name)):
        try:
            marks[region] = store.read(name, region)
        except Damaged as error:
            bad[index] = (_why(error), store.keys(name, region)[0])
    return marks, bad


def _records(store: Store, damage: Damage) -> Iterator[str]:
    """The records that do not hold any more."""
    where = damage.where
    if damage.what == "split":
        return
    if isinstance(where, Block):
        yield from _key_of(store, f"completion/{damage.what}", (where.index,))
        return
    if damage.what != EDGES:
        for name, grid in store.grids.items():
            for block in blocks(grid):
                if where is None or where.meets(block):
                    yield from _key_of(store, f"completion/{name}", (block.index,))
    if where is None:
        yield from _key_of(store, CHOSEN, (0,))
    record = SCORED if damage.what == EDGES else ESTIMATED
    if damage.what == EDGES or store.estimators:
        for source, sample, pair in np.ndindex(store.shape(record)):
            at = Span(source, sample, range(pair, pair + 1))
            same = where is not None and (where.source, where.sample) == (source, sample)
            if where is None or (same and at.pairs[0] in where.pairs):
                yield from _key_of(store, record, (source, sample, pair))


def _key_of(store: Store, record: str, index: tuple[int, ...]) -> list[str]:
    return store.keys(record, tuple(slice(i, i + 1) for i in index))
