"""What can be patched and how it is addressed: the one vocabulary of the engine.

A *cell* is one patching experiment of a grid: (component, direction, pair, layer, unit, position).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from patchsweep.errors import BadInput

Direction = Literal["denoise", "noise"]
DIRECTIONS: tuple[Direction, ...] = ("denoise", "noise")

# The dimensions of every result array, in this order.
DIMENSIONS = ("direction", "source", "sample", "pair", "layer", "unit", "position")


@dataclass(frozen=True)
class Component:
    """A kind of activation. `unit` names what a layer holds several of; empty if it holds one."""

    name: str
    unit: Literal["", "head"]


COMPONENTS = {
    c.name: c
    for c in (
        Component("resid_pre", ""),
        Component("resid_mid", ""),
        Component("resid_post", ""),
        Component("attn_out", ""),
        Component("mlp_out", ""),
        Component("head_z", "head"),
    )
}


class Status(IntEnum):
    """What the value of a cell is."""

    NOT_DONE = 0
    EXACT = 1
    STRUCTURAL = 2  # equals the destination's baseline by construction: nothing was run
    ESTIMATED = 3
    OUTSIDE = 4  # outside the prompt
    AUDITED = 5
    NOT_FINITE = 6


@dataclass(frozen=True)
class Grid:
    """The result arrays of one component: their size and how they are cut into chunks.

    A chunk is a block: every layer of a range of pairs, a tile of units and a tile of positions, in
    one direction. Blocks are numbered in C order over (direction, pair, unit, position) tiles.
    """

    component: str
    directions: tuple[Direction, ...]
    pairs: int
    layers: int
    units: int
    positions: tuple[int, ...] | tuple[str, ...]  # token indices, label names, or ("all",)
    pair_tile: int
    unit_tile: int
    position_tile: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes along DIMENSIONS."""
        return (
            len(self.directions),
            1,
            1,
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
    def tiles(self) -> tuple[int, int, int, int]:
        """Number of blocks along (direction, pair, unit, position)."""
        return (
            len(self.directions),
            -(-self.pairs // self.pair_tile),
            -(-self.units // self.unit_tile),
            -(-len(self.positions) // self.position_tile),
        )

    def pair_tiles(self) -> list[range]:
        """The ranges of pairs that blocks hold."""
        starts = range(0, self.pairs, self.pair_tile)
        return [range(p, min(p + self.pair_tile, self.pairs)) for p in starts]


@dataclass(frozen=True)
class Block:
    """One block of a component's grid, as ranges. `index` is its number within the grid."""

    component: str
    index: int
    direction: int
    pairs: range
    units: range
    positions: range

    def region(self, grid: Grid) -> tuple[slice, ...]:
        """Where its values lie in the arrays with DIMENSIONS."""
        return (
            slice(self.direction, self.direction + 1),
            slice(0, 1),
            slice(0, 1),
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


def blocks(grid: Grid) -> list[Block]:
    """All blocks of a grid, numbered in C order over its tiles."""
    out: list[Block] = []
    for d in range(len(grid.directions)):
        for pairs in grid.pair_tiles():
            for u in range(0, grid.units, grid.unit_tile):
                for s in range(0, len(grid.positions), grid.position_tile):
                    out.append(
                        Block(
                            component=grid.component,
                            index=len(out),
                            direction=d,
                            pairs=pairs,
                            units=range(u, min(u + grid.unit_tile, grid.units)),
                            positions=range(s, min(s + grid.position_tile, len(grid.positions))),
                        )
                    )
    return out
