"""What positions mean over pairs: the columns that effects are shown, ranked and averaged by.

Arrays are stored by index. Pairs of unequal length have another token, of another role, at the same
index; so what is said over pairs goes by label where all pairs share labels, else from the end of
the prompt, by index only where all prompts are equally long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import BadInput
from patchsweep.statistics import Array

ALIGN = ("labels", "end", "start")
BETWEEN = " … "  # stands in the names of segments
Name = int | str
Map = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns of a grid's positions.

    `align`: labels, end, start, or given (labels, indices or groups that the sweep was asked for).
    What methods take, `values`, or what is `found` or to `use`, is of the `pairs` of that slice.
    `names` [column]; `members` [pair, column, position]: the positions whose mean a column is, in
    every pair; None where every position is a column of its own. `single` [column]: one position at
    most in every pair, which the name says to a spec too.
    """

    align: str
    names: tuple[int, ...] | tuple[str, ...]
    members: Map | None
    single: Map

    def mean(self, values: Array, use: Map, pairs: slice = slice(None)) -> tuple[Array, Map]:
        """The mean of [sample, pair, layer, unit, position] over each column's positions, of those
        to `use`, and where there is one: [sample, pair, layer, unit, column] both. 0 where not."""
        kept = np.where(use, values, 0.0)
        if self.members is None:
            return kept, use
        total, count = self._sum(kept, pairs), self.count(use, pairs)
        return total / np.maximum(count, 1), count > 0

    def any(self, found: Map, pairs: slice = slice(None)) -> Map:
        """Whether any position of a column is true, [sample, pair, layer, unit, column]."""
        return found if self.members is None else self.count(found, pairs) > 0

    def count(self, found: Map, pairs: slice = slice(None)) -> Array:
        """How many positions of a column are true, [sample, pair, layer, unit, column]."""
        values = found.astype(np.float64)
        return values if self.members is None else self._sum(values, pairs)

    def _sum(self, values: Array, pairs: slice) -> Array:
        assert self.members is not None
        members = self.members[pairs].astype(np.float64)[:, None].swapaxes(-1, -2)
        return np.asarray(values @ members)

    def places(self, pair: int) -> list[NDArray[np.intp]]:
        """The positions of every column in one pair."""
        if self.members is None:
            return [np.array([p]) for p in range(len(self.names))]
        return [np.flatnonzero(column) for column in self.members[pair]]


def pairs_of(columns: Columns, lengths: Sequence[int]) -> NDArray[np.int64]:
    """How many pairs have each column of an axis of all positions."""
    there: Map = np.array(lengths)[:, None] > np.arange(len(columns.names))
    if columns.members is not None:
        there = np.asarray(columns.members.any(-1))
    return np.asarray(there.sum(0), np.int64)


def as_given(names: tuple[int, ...] | tuple[str, ...], align: str = "given") -> Columns:
    """Every entry of the axis is a column."""
    return Columns(align, names, None, np.ones(len(names), np.bool_))


def meaning(lengths: Sequence[int], labels: Sequence[Mapping[str, int]]) -> str:
    """How positions by index are shown over these pairs, if nothing else is asked for."""
    shared = _shared(labels)
    places = {tuple(pair[name] for name in shared) for pair in labels}
    if len(set(lengths)) == 1 and len(places) == 1:
        return "start"
    if set(shared) - {"END"}:
        return "labels"
    return "start" if len(set(lengths)) == 1 else "end"


def columns_of(
    positions: Sequence[int | str],
    lengths: Sequence[int],
    reads: Sequence[int],
    labels: Sequence[Mapping[str, int]],
    align: str | None = None,
) -> Columns:
    """The columns of a grid's positions over pairs: as they were asked for, or if these are all
    positions by what they mean, or as `align` says. BadInput as for `aligned`."""
    if tuple(positions) != tuple(range(max(lengths))):
        return as_given(tuple(positions))  # type: ignore[arg-type]
    return aligned(align or meaning(lengths, labels), lengths, reads, labels)


def aligned(
    align: str, lengths: Sequence[int], reads: Sequence[int], labels: Sequence[Mapping[str, int]]
) -> Columns:
    """The columns of all positions of pairs, where answers are read at `reads` [pair]. BadInput for
    an unknown way, and by labels that not all pairs have."""
    if align not in ALIGN:
        raise BadInput(f"align is '{align}': use one of {', '.join(ALIGN)}")
    if align == "start":
        return as_given(tuple(range(max(lengths))), "start")
    if align == "end":
        return _from_end(np.array(lengths), np.array(reads))
    if not _shared(labels):
        raise BadInput("align labels: the pairs have no label in common: use end or start")
    return _by_labels(np.array(lengths), labels)


def _from_end(lengths: NDArray[np.int64], reads: NDArray[np.int64]) -> Columns:
    """-1 is where the answer is read; what follows it (a continuation) is +1, +2 ..."""
    first, last = -int(reads.max()) - 1, int((lengths - reads).max()) - 2
    offsets = np.arange(first, last + 1)
    position = reads[:, None] + 1 + offsets
    inside = (position >= 0) & (position < lengths[:, None])
    members = inside[..., None] & (position[..., None] == np.arange(lengths.max()))
    before = [int(n) for n in offsets if n < 0]
    after = [f"+{n + 1}" for n in range(last + 1)]
    names: Any = (*map(str, before), *after) if after else tuple(before)
    return Columns("end", names, members, offsets < 0)


def _by_labels(lengths: NDArray[np.int64], labels: Sequence[Mapping[str, int]]) -> Columns:
    """The shared labels, and the tokens between them as segments.

    Labels whose order differs among pairs stand side by side; what is between them is one segment.
    """
    groups = _ordered(labels)
    slots = np.arange(lengths.max())
    inside = slots < lengths[:, None]
    at = {name: np.array([pair[name] for pair in labels])[:, None] for g in groups for name in g}
    ends = [np.stack([at[n] for n in g]) for g in groups]
    firsts, lasts = [e.min(0) for e in ends], [e.max(0) for e in ends]
    labelled = np.any([slots == place for place in at.values()], axis=0)
    columns: list[tuple[str, Map]] = [(f"before {_said(groups[0])}", inside & (slots < firsts[0]))]
    for i, group in enumerate(groups):
        columns += [(name, slots == at[name]) for name in group]
        within = inside & (slots > firsts[i]) & (slots < lasts[i]) & ~labelled
        columns.append((f"among {_said(group)}", within))
        if i + 1 < len(groups):
            between = inside & (slots > lasts[i]) & (slots < firsts[i + 1])
            columns.append((f"{_said(group)}{BETWEEN}{_said(groups[i + 1])}", between))
    columns.append((f"after {_said(groups[-1])}", inside & (slots > lasts[-1])))
    kept = [(name, members) for name, members in columns if members.any()]
    names = tuple(name for name, _ in kept)
    single = np.array([name in at for name in names])
    return Columns("labels", names, np.stack([members for _, members in kept], 1), single)


def _shared(labels: Sequence[Mapping[str, int]]) -> list[str]:
    """The labels that all pairs have; of those that are the same token in all, the last."""
    shared = [name for name in labels[0] if all(name in pair for pair in labels)]
    place = {tuple(pair[name] for pair in labels): name for name in shared}
    return [name for name in shared if name in place.values()]


def _ordered(labels: Sequence[Mapping[str, int]]) -> list[list[str]]:
    """The shared labels in the order of the prompt, those together whose order differs."""
    names = _shared(labels)
    at = np.array([[pair[name] for name in names] for pair in labels])
    order = np.argsort(at.mean(0), kind="stable")
    names, at = [names[i] for i in order], at[:, order]
    groups = [[names[0]]]
    for i in range(1, len(names)):
        if (at[:, :i].max(1) <= at[:, i:].min(1)).all():
            groups.append([])
        groups[-1].append(names[i])
    return groups


def _said(group: Sequence[str]) -> str:
    return ", ".join(group)


def same_token(labels: Sequence[Mapping[str, int]]) -> list[str]:
    """Where two of the shared labels fall on one token in some pairs, a line each."""
    names = _shared(labels)
    found = []
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            count = sum(pair[one] == pair[other] for pair in labels)
            if count:
                found.append(f"{one} and {other} are one token in {count} of {len(labels)} pairs")
    return found
