"""The arrays that say which runs there are, and what they replace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchsweep.plan.cone import Map
from patchsweep.sites import COMPONENTS

Ints = NDArray[np.int64]
OWN = -1  # a site whose value comes from the variant's own source
CODES = {name: code for code, name in enumerate(COMPONENTS)}
NAMES = tuple(COMPONENTS)


@dataclass(frozen=True)
class Features:
    """What a plan has to know of a sparse autoencoder: where it reads, and its sizes."""

    layer: int
    at: str
    features: int
    width: int


@dataclass(frozen=True)
class Variant:
    """A direction with a source and a sample, by their numbers."""

    direction: int
    source: int
    sample: int


@dataclass(frozen=True, eq=False)
class Frame:
    """One pair in one variant: the positions of its destination and source, by clean position.

    to_dst and to_src [clean position]: −1 where a position has no counterpart in the other run.
    """

    length: int  # of the destination
    to_dst: Ints
    to_src: Ints
    differs: Map  # [destination position]
    reads: Map  # [destination position]
    inner: Map  # [layer, destination position]


@dataclass(frozen=True, eq=False)
class Layout:
    """The runs of one component, or of the sets, in one variant. Arrays are [pair, layer, entry].

    exists: whether there is a run. start: its row's first position in the destination. joins: the
    layer call from which its row is carried. extra [pair, layer call, entry]: tokens that patches
    add to a call beside the rows. extra_reads, head_reads: keys that those tokens read with every
    head, and with one. encoded [pair, entry]: tokens whose features are computed beside those of
    the unpatched runs. inside [pair, entry]: whether the prompt has the entry.
    """

    exists: Map
    start: Ints
    joins: Ints
    extra: Ints
    extra_reads: Ints
    head_reads: Ints
    encoded: Ints
    inside: Map


@dataclass(frozen=True, eq=False)
class SiteTable:
    """The sites of all sets, in columns [site]; `entry` counts in members [pair, entry, position]
    and in `entries`, `source` in the sweep's sources (OWN: the variant's)."""

    names: tuple[str, ...]
    entries: tuple[str, ...]
    set: Ints
    component: Ints
    layer: Ints
    unit: Ints
    entry: Ints
    source: Ints
    members: Map


@dataclass(frozen=True, eq=False)
class Places:
    """What the runs of one pair replace, in columns [place].

    cell: which run, as a flat index over [layer, entry]. What is replaced (component, layer, unit:
    of a grid's cells 0, for they are alike in cost), at which clean position, and from which source
    (OWN or its number).
    """

    cell: Ints
    component: Ints
    layer: Ints
    unit: Ints
    position: Ints
    source: Ints


def injected_tokens(places: Places, position: Ints, call: Ints, joins: Ints) -> Ints:
    """Places, one per token, whose tokens pass a layer beside the rows, for their row is born from
    what comes out: those in the layer call before their run (`joins` by cell) is carried. Queries
    come first, for they attend."""
    late = np.flatnonzero(call == joins[places.cell] - 1)
    order = late[
        np.lexsort([places.component[late] != CODES["head_q"], position[late], places.cell[late]])
    ]
    key = np.stack([places.cell[order], position[order]])
    first = np.ones(len(order), bool)
    first[1:] = (key[:, 1:] != key[:, :-1]).any(0)
    return order[first]
