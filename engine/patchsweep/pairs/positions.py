"""The entries of a position axis, over pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from patchsweep.errors import BadInput
from patchsweep.pairs.pair import Pair

if TYPE_CHECKING:
    from numpy.typing import NDArray

Entry = int | str


@dataclass(frozen=True, eq=False)
class Positions:
    """The entries of a position axis: their names, and members [pair, entry, clean position], which
    positions an entry stands for in each pair (none: it is outside the prompt)."""

    names: tuple[int, ...] | tuple[str, ...]
    members: NDArray[np.bool_]


def resolve_positions(
    pairs: Sequence[Pair], positions: str | Sequence[Entry] | Mapping[str, Sequence[Entry]]
) -> Positions:
    """The entries that `positions` stands for.

    "each" (entries 0 .. longest prompt - 1), "all" (one entry: every position), a list of indices
    (negative from the end of the prompt, before a continuation) and labels, or named groups of
    them, {name: [...]}, each one entry of the positions that a pair has of it. The names are all
    integers, or all strings if there is a label. A pair without a label that others have is
    outside. BadInput for a label no pair has, an index outside every prompt, a repeat, an empty
    list, a group named as a label, "all" or "each".
    """
    if not pairs:
        raise BadInput("positions: there are no pairs: give at least one")
    lengths = np.array([len(pair) for pair in pairs])
    places = np.arange(lengths.max())
    inside = (places < lengths[:, None])[:, None]
    if positions == "all":
        return Positions(("all",), inside)
    if positions == "each":
        return Positions(tuple(places.tolist()), inside & np.eye(len(places), dtype=np.bool_))
    if isinstance(positions, Mapping):
        if not positions:
            raise BadInput("positions: the mapping is empty: name at least one group")
        groups = [_group(pairs, name, entries) for name, entries in positions.items()]
        return Positions(tuple(positions), np.stack(groups, 1))
    if isinstance(positions, str):
        raise BadInput(f"positions '{positions}': use each, all, or a list such as [{positions}]")
    names = (
        tuple(int(e) for e in positions)
        if all(not isinstance(e, str) for e in positions)
        else tuple(str(e) for e in positions)
    )
    return Positions(names, _members(pairs, positions, "positions"))


def _group(pairs: Sequence[Pair], name: str, entries: Sequence[Entry]) -> NDArray[np.bool_]:
    """Members [pair, position] of a named group; BadInput if its name means something else."""
    what = f"positions: group '{name}'"
    if isinstance(entries, str):
        raise BadInput(f"{what} is no list of indices or labels: write [{entries}]")
    named_so = name in ("", "all", "each") or any(name in pair.labels for pair in pairs)
    if named_so and list(entries) != [name]:
        raise BadInput(f"{what} has a name that means something else: choose another name")
    found: NDArray[np.bool_] = np.any(_members(pairs, entries, what), axis=1)
    return found


def _members(pairs: Sequence[Pair], entries: Sequence[Entry], what: str) -> NDArray[np.bool_]:
    """Members [pair, entry, position] of single positions."""
    if not entries:
        raise BadInput(f"{what}: the list is empty: give some indices or labels")
    if repeats := [e for i, e in enumerate(entries) if e in entries[:i]]:
        raise BadInput(f"{what}: {repeats[0]!r} is there twice: keep one")
    index = np.stack([_column(pairs, entry, what) for entry in entries], axis=1)
    found: NDArray[np.bool_] = index[:, :, None] == np.arange(max(map(len, pairs)))
    return found


def _column(pairs: Sequence[Pair], entry: Entry, what: str) -> NDArray[np.int64]:
    """Token index [pair] of one entry, −1 where it is outside."""
    if isinstance(entry, str):
        known = list(dict.fromkeys(name for pair in pairs for name in pair.labels))
        if entry not in known:
            hint = f"use one of {', '.join(known)}" if known else "the pairs have no labels"
            raise BadInput(f"{what}: unknown label '{entry}': {hint}")
        return np.array([pair.labels.get(entry, -1) for pair in pairs], dtype=np.int64)
    lengths = np.array([len(pair) for pair in pairs])
    # From the end means from where the answer is read: before a continuation.
    ends = np.array([pair.read + 1 for pair in pairs])
    index = entry + ends if entry < 0 else np.full(len(pairs), entry)
    index = np.where((index >= 0) & (index < lengths), index, -1).astype(np.int64)
    if (index < 0).all():
        raise BadInput(
            f"{what}: {entry} is outside every prompt: "
            f"the longest has {lengths.max()} tokens, use {-ends.max()} to {lengths.max() - 1}"
        )
    return index
