"""Which record vouches for which chunks of the arrays that a sweep fills.

A record is one chunk of an array of records, written after what it speaks of:

    [state, a digest of every chunk, for every chunk a second digest or 0]

The state is 0 (nothing is there), PARTLY or DONE. A chunk that is written again, with more in it,
is there as it was or as it will be while it is: both digests are recorded before, one after.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchsweep.sites import EDGES
from patchsweep.store.digests import Digests

PARTLY, DONE = 1, 2


class Record(NamedTuple):
    """What a record says; digests [slot]."""

    state: int
    now: Digests
    soon: Digests

    def vouches(self, slot: int) -> bool:
        """Whether a chunk should be there."""
        return bool(self.now[slot])

    def allows(self, slot: int, digest: int) -> bool:
        """Whether a chunk with this digest is what was written."""
        return digest in (int(self.now[slot]), int(self.soon[slot]))


@dataclass(frozen=True)
class Ledger:
    """The records of some arrays, numbered in C order.

    name: of the array that holds them. arrays: how many chunks each of those that they vouch for
    has along its dimensions. axes: the dimensions that number the records; all chunks along the
    others are of one record.
    """

    name: str
    arrays: Mapping[str, tuple[int, ...]]
    axes: tuple[int, ...]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many records there are, along `axes`."""
        first = next(iter(self.arrays.values()))
        return tuple(first[axis] for axis in self.axes)

    @cached_property
    def slots(self) -> int:
        """Chunks that a record vouches for."""
        return sum(self._inner(array) for array in self.arrays)

    @property
    def length(self) -> int:
        """Numbers of a record."""
        return 1 + 2 * self.slots

    @property
    def size(self) -> int:
        """Numbers of all records."""
        return math.prod(self.counts) * self.length

    def place(self, array: str, chunk: Sequence[int]) -> tuple[int, int]:
        """The number of a chunk's record, and its slot there."""
        record, slot = 0, 0
        for axis, count in enumerate(self.arrays[array]):
            if axis in self.axes:
                record = record * count + chunk[axis]
            else:
                slot = slot * count + chunk[axis]
        return record, self._first[array] + slot

    def chunks(self, record: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The chunks that a record vouches for, in the order of its slots."""
        at = dict(zip(self.axes, np.unravel_index(record, self.counts), strict=True))
        for array, counts in self.arrays.items():
            inner = [1 if axis in at else n for axis, n in enumerate(counts)]
            for chunk in np.ndindex(*inner):
                yield array, tuple(int(at.get(axis, i)) for axis, i in enumerate(chunk))

    def record(self, numbers: Digests) -> Record:
        """What `length` numbers say."""
        return Record(int(numbers[0]), numbers[1 : 1 + self.slots], numbers[1 + self.slots :])

    def states(self, numbers: Digests) -> NDArray[np.uint64]:
        """The states of all records, in the shape of `counts`."""
        return numbers.reshape(*self.counts, self.length)[..., 0]

    def key(self, record: int) -> str:
        """The file of a record."""
        return f"{self.name}/c/{record}"

    @cached_property
    def _first(self) -> dict[str, int]:
        """The first slot of every array."""
        sizes = [self._inner(array) for array in self.arrays]
        return {array: sum(sizes[:i]) for i, array in enumerate(self.arrays)}

    def _inner(self, array: str) -> int:
        counts = self.arrays[array]
        return math.prod(n for axis, n in enumerate(counts) if axis not in self.axes)


def ledgers_of(
    counts: Mapping[str, tuple[int, ...]],
    components: Sequence[str],
    metrics: Sequence[str],
    estimators: Sequence[str],
    edges: bool,
) -> dict[str, Ledger]:
    """The ledgers of results, by name. counts: of the chunks of all arrays, along each dimension.

    - completion/<component>, [block]: the values and statuses of a block, by every metric.
    - records/baseline, [source, sample, tile of pairs].
    - records/estimates, [source, sample, tile of pairs]: of all estimated components; which pairs
      of a tile are estimated is marked beside.
    - completion/edges, [source, sample, pair]: scores of edges, in all directions.
    - completion/choice: of all estimated components, one record.
    """

    def made(name: str, arrays: Sequence[str], axes: tuple[int, ...]) -> Ledger:
        return Ledger(name, {array: counts[array] for array in arrays}, axes)

    by_pairs = (1, 2, 3)
    kinds = ("", "_status")
    found = [
        made(f"completion/{c}", [f"{c}/{m}{k}" for m in metrics for k in kinds], (0, 1, 2, 3, 5, 6))
        for c in components
    ]
    both = [f"baseline/{m}{k}" for m in metrics for k in ("", "_noise_floor")]
    found.append(made(BASELINES, both, by_pairs))
    if estimators:
        cells = [f"{c}/{m}_estimate" for c in estimators for m in metrics]
        chosen = [f"choice/{c}_{kind}" for c in estimators for kind in ("status", "stratum")]
        found += [made(ESTIMATES, cells, by_pairs), made(CHOSEN, chosen, ())]
    if edges:
        found.append(made(SCORED, [f"{EDGES}/{m}" for m in metrics], by_pairs))
    return {ledger.name: ledger for ledger in found}


BASELINES, ESTIMATES = "records/baseline", "records/estimates"
SCORED, CHOSEN = f"completion/{EDGES}", "completion/choice"


def scored(attrs: Mapping[str, Any]) -> bool:
    """Whether results with these root attributes have edges that were scored, and not run: where
    they were, edges are a component."""
    return bool(attrs.get(EDGES)) and EDGES not in attrs["components"]
