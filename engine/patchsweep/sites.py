"""What can be patched and how it is addressed: the one vocabulary of the engine.

A *cell* is one patching experiment of a grid: (component, direction, source, sample, pair, layer,
unit, position). A *site* is one place that a set patches together with others.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from patchsweep.errors import BadInput

Direction = Literal["denoise", "noise"]
DIRECTIONS: tuple[Direction, ...] = ("denoise", "noise")

# The dimensions of every result array, in this order.
DIMENSIONS = ("direction", "source", "sample", "pair", "layer", "unit", "position")
# What the last three are in the arrays of edges.
EDGE_DIMENSIONS = (*DIMENSIONS[:4], "position", "receiver", "sender")


Unit = Literal["", "head", "kv_head", "neuron", "feature"]
# How a patch enters the forward: it replaces the stream that a layer receives; it is an activation
# of one token that nothing else in its layer reads; or it is one that later tokens attend to.
Enters = Literal["stream", "token", "keys"]


@dataclass(frozen=True)
class Component:
    """A kind of activation. `unit` names what a layer holds several of; empty if it holds one."""

    name: str
    unit: Unit
    enters: Enters


COMPONENTS = {
    c.name: c
    for c in (
        Component("embed", "", "stream"),
        Component("resid_pre", "", "stream"),
        Component("resid_mid", "", "token"),
        Component("resid_post", "", "stream"),
        Component("attn_out", "", "token"),
        Component("mlp_out", "", "token"),
        Component("head_q", "head", "token"),
        Component("head_k", "kv_head", "keys"),
        Component("head_v", "kv_head", "keys"),
        Component("head_pattern", "head", "token"),
        Component("head_z", "head", "token"),
        Component("neuron", "neuron", "token"),
        Component("sae_feature", "feature", "token"),  # enters where its autoencoder reads
    )
}
# Runs that patch several sites at once: a grid of their own, whose positions are the sets' names.
SETS = "sets"
# Runs that patch one edge each: a grid of their own, of positions × receivers × senders.
EDGES = "edges"
# What sliding windows of adjacent layers are over.
WINDOWED = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


class Status(IntEnum):
    """What the value of a cell is."""

    NOT_DONE = 0
    EXACT = 1
    STRUCTURAL = 2  # equals the destination's baseline by construction: nothing was run
    ESTIMATED = 3
    OUTSIDE = 4  # outside the prompt; no edge
    AUDITED = 5
    NOT_FINITE = 6


# The statuses of cells that were run, and of all whose value is that of a patched run.
RUN = (Status.EXACT, Status.AUDITED)
MEASURED = (*RUN, Status.STRUCTURAL)


@dataclass(frozen=True)
class Grid:
    """The result arrays of one component: their size and how they are cut into blocks.

    A block is every layer of a range of pairs, a tile of units and a tile of positions, in one
    direction, from one source, of one sample. Blocks are numbered in C order over (direction,
    source, sample, pair, unit, position) tiles. A plan cuts them as they are run; the results are
    cut into chunks, which are blocks of that kind too and hold a whole number of the plan's.

    `directions`, `sources`, `samples`, `pairs`, `layers` from `first_layer` on, `units` and
    `positions` are what the axes hold; `pair_tile`, `unit_tile`, `position_tile` how many of them a
    block does. Positions are token indices, names of labels or groups, or "all".
    """

    component: str
    directions: tuple[Direction, ...]
    pairs: int
    layers: int
    units: int
    positions: tuple[int, ...] | tuple[str, ...]
    pair_tile: int
    unit_tile: int
    position_tile: int
    first_layer: int = 0
    sources: tuple[str, ...] = ("other",)
    samples: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes along DIMENSIONS."""
        return (
            len(self.directions),
            len(self.sources),
            self.samples,
            self.pairs,
            self.layers,
            self.units,
            len(self.positions),
        )

    @property
    def chunks(self) -> tuple[int, ...]:
        """Sizes of one block along DIMENSIONS."""
        return (1, 1, 1, self.pair_tile, self.layers, self.unit_tile, self.position_tile)

    @property
    def tiles(self) -> tuple[int, ...]:
        """Number of blocks along (direction, source, sample, pair, unit, position)."""
        return (
            len(self.directions),
            len(self.sources),
            self.samples,
            -(-self.pairs // self.pair_tile),
            -(-self.units // self.unit_tile),
            -(-len(self.positions) // self.position_tile),
        )

    def number(self, part: Block) -> int:
        """The number of the block that a part of it lies in."""
        place = (
            part.direction,
            part.source,
            part.sample,
            part.pairs.start // self.pair_tile,
            part.units.start // self.unit_tile,
            part.positions.start // self.position_tile,
        )
        number = 0
        for at, count in zip(place, self.tiles, strict=True):
            number = number * count + at
        return number

    def pair_tiles(self) -> list[range]:
        """The ranges of pairs that blocks hold."""
        return _cut(self.pairs, self.pair_tile)


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a component's grid, as ranges. `index` is its number within the grid."""

    component: str
    index: int
    direction: int
    source: int
    sample: int
    pairs: range
    units: range
    positions: range

    def region(self, grid: Grid) -> tuple[slice, ...]:
        """Where its values lie in the arrays with DIMENSIONS."""
        return (
            slice(self.direction, self.direction + 1),
            slice(self.source, self.source + 1),
            slice(self.sample, self.sample + 1),
            slice(self.pairs.start, self.pairs.stop),
            slice(0, grid.layers),
            slice(self.units.start, self.units.stop),
            slice(self.positions.start, self.positions.stop),
        )


def component(name: str) -> Component:
    """The component of this name; BadInput with the known ones if there is none."""
    if name not in COMPONENTS:
        raise BadInput(f"unknown component '{name}': use one of {', '.join(COMPONENTS)}")
    return COMPONENTS[name]


def unit_name(name: str) -> str:
    """What a layer of a component holds several of; empty if it holds one. Sets and edges have
    none; paths have those of what they begin in."""
    begins, _, path = name.partition(".")
    return "" if begins in (SETS, EDGES) or (path and begins == "set") else component(begins).unit


def dimensions(name: str) -> tuple[str, ...]:
    """The names of the dimensions of a grid's arrays."""
    return EDGE_DIMENSIONS if name == EDGES else DIMENSIONS


def blocks(grid: Grid) -> list[Block]:
    """All blocks of a grid, numbered in C order over its tiles."""
    tiles = itertools.product(
        range(len(grid.directions)),
        range(len(grid.sources)),
        range(grid.samples),
        grid.pair_tiles(),
        _cut(grid.units, grid.unit_tile),
        _cut(len(grid.positions), grid.position_tile),
    )
    return [Block(grid.component, index, *tile) for index, tile in enumerate(tiles)]


def _cut(length: int, tile: int) -> list[range]:
    return [range(i, min(i + tile, length)) for i in range(0, length, tile)]


@dataclass(frozen=True)
class Site:
    """One place that a set of sites patches, an activation of the kind `component`.

    `layer` and `unit` are None where the component has none. `position` is an index or a label of
    the clean prompt, or "all". `source` names where the value comes from; None: the sweep's own.
    """

    component: str
    layer: int | None = None
    unit: int | None = None
    position: int | str = "all"
    source: str | None = None

    def __str__(self) -> str:
        parts = [self.component, *(str(n) for n in (self.layer, self.unit) if n is not None)]
        from_source = f"<{self.source}" if self.source else ""
        return f"{'.'.join(parts)}@{self.position}{from_source}"


_SITE = re.compile(r"([a-z_]+)(?:\.(\d+))?(?:\.(\d+))?(?:@([^<]+))?(?:<(.+))?")


def parse_site(text: str) -> Site:
    """The site that `text` says: component.layer.unit@position<source, all but the first optional.

    Examples: `head_z.9.6@END`, `mlp_out.5`, `embed@3`, `resid_pre.2@S2<zero`. BadInput if it is not
    of that form, or has a layer or a unit too few or too many.
    """
    found = _SITE.fullmatch(text.strip())
    if not found:
        raise BadInput(f"'{text}' is no site: write component.layer.unit@position")
    name, layer, unit, position, source = found.groups()
    kind = component(name)
    needs = [] if name in ("embed", "sae_feature") else ["layer"]
    needs += [kind.unit] if kind.unit else []
    given = [int(n) for n in (layer, unit) if n is not None]
    if len(given) != len(needs):
        form = ".".join([name, *needs])
        raise BadInput(
            f"site '{text}' does not have the form of its component: write {form}@position"
        )
    place = dict(zip((("unit" if n == kind.unit else n) for n in needs), given, strict=True))
    index = position if position is None or not re.fullmatch(r"-?\d+", position) else int(position)
    return Site(name, **place, position="all" if index is None else index, source=source)


def window_name(component: str, layers: range, entry: int | str) -> str:
    """The name of the set of a window's sites."""
    return f"{component}.{layers[0]}-{layers[-1]}@{entry}"


@dataclass(frozen=True)
class Node:
    """One end of an edge; `layer` and `unit` are None where the component has none."""

    component: str
    layer: int | None = None
    unit: int | None = None

    def __str__(self) -> str:
        numbers = (str(n) for n in (self.layer, self.unit) if n is not None)
        return ".".join([self.component, *numbers])


# What edges and paths begin and end in, with what each has beside its name.
SENDERS = {"embed": (), "head_z": ("layer", "head"), "mlp_out": ("layer",)}
RECEIVERS = {
    "head_q": ("layer", "head"),
    "head_k": ("layer", "kv_head"),
    "head_v": ("layer", "kv_head"),
    "mlp_in": ("layer",),
    "resid_pre": ("layer",),
    "logits": (),
}


def parse_node(text: str, known: Mapping[str, tuple[str, ...]]) -> Node:
    """A node as it is written, one of the `known` ones (SENDERS, RECEIVERS). BadInput if it is of
    another kind, or has a layer or a unit too few or too many."""
    name, *numbers = text.strip().split(".")
    what = "sender" if known is SENDERS else "receiver"
    if name not in known:
        raise BadInput(f"'{text}' is no {what}: use one of {', '.join(known)}")
    if len(numbers) != len(known[name]) or not all(n.isdecimal() for n in numbers):
        raise BadInput(f"{what} '{text}': write {'.'.join([name, *known[name]])}")
    return Node(name, *map(int, numbers))


def path_grid(senders: str, name: str) -> str:
    """The grid of a path from every unit of a component, or from a set ("set")."""
    return f"{senders}.{name}"


def is_path(name: str) -> bool:
    """Whether a grid is that of a path."""
    return "." in name
