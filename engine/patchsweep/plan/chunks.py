"""Chunks of the results: whole numbers of blocks, so that large sweeps do not make millions of
files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from patchsweep.sites import Grid

MOST_FILES = 100_000  # what a sweep makes at most, if MOST_BLOCKS and MOST_BYTES let it
MOST_BLOCKS = 128  # in a chunk, or in a unit of small ones: what a process that is killed loses
MOST_BYTES = 4 << 20  # in a chunk of several blocks; what is decoded to read one of its cells


@dataclass(frozen=True)
class Chunks:
    """The arrays of every component, cut into chunks. `blocks`: in a chunk, at most; `files`: that
    hold cells, their records and baselines."""

    grids: dict[str, Grid]
    blocks: int
    files: int


def chunked(
    grids: Mapping[str, Grid], *, arrays: int, baselines: int, value: int, blocks: int | None
) -> Chunks:
    """As few blocks in a chunk as make MOST_FILES suffice, or as make the fewest files; or so many
    `blocks`.

    arrays: of a component, and `baselines` over pairs; value: bytes of a number.
    """

    def cut(most: int) -> Chunks:
        chunks = _cut(grids, most, MOST_BYTES // value)
        of_pairs = math.prod(next(iter(chunks.values())).tiles[1:4]) * baselines
        of_cells = sum(math.prod(grid.tiles) for grid in chunks.values()) * (arrays + 1)
        return Chunks(chunks, most, of_cells + of_pairs)

    one = cut(blocks or 1)
    if blocks is not None or one.files <= MOST_FILES:
        return one
    return min(
        map(cut, range(1, MOST_BLOCKS + 1)), key=lambda c: (max(c.files, MOST_FILES), c.blocks)
    )


def _cut(grids: Mapping[str, Grid], most: int, cells: int) -> dict[str, Grid]:
    """Chunks of at most `most` blocks and `cells`: adjacent positions first, then units; then
    pairs, equally many in all grids, where chunks hold all units and positions of each."""
    wider, pairs = {}, most
    for name, grid in grids.items():
        *_, units, positions = grid.tiles
        room = max(1, min(most, cells // math.prod(grid.chunks)))
        along = min(room, positions)
        across = min(room // along, units) if along == positions else 1
        whole = (across, along) == (units, positions)
        pairs = min(pairs, room // (across * along) if whole else 1)
        wider[name] = replace(
            grid,
            unit_tile=min(across * grid.unit_tile, grid.units),
            position_tile=min(along * grid.position_tile, len(grid.positions)),
        )
    return {
        name: replace(grid, pair_tile=min(pairs * grid.pair_tile, grid.pairs))
        for name, grid in wider.items()
    }
