"""Blocks of waves put together into chunks of the results, each written once, when it is whole."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchsweep.engine import append
from patchsweep.passes import WaveResult
from patchsweep.plan import Wave
from patchsweep.sites import Block, blocks
from patchsweep.store import Store

Arrays = Mapping[str, NDArray[Any]]  # by metric
Region = tuple[slice, ...]


class Assembly:
    """What waves found, on its way into a store. The waves of a unit come one after another: what
    waits in memory is of one unit.

    done: by component, which chunks are not to be written again.
    """

    def __init__(self, store: Store, done: Mapping[str, NDArray[np.bool_]]) -> None:
        self._store = store
        self._done = done
        self._chunks = {name: blocks(grid) for name, grid in store.grids.items()}
        self._parts: dict[Hashable, _Part] = {}

    def take(self, wave: Wave, result: WaveResult) -> None:
        """Keep what a wave found; write what is whole by then. Baselines are whole before the
        blocks of their pairs, whose first wave in the unit owns them."""
        if wave.owner:
            self._take_baseline(wave, result)
        for block, values, status in result.blocks:
            self._take_block(block, values, status)

    def _take_baseline(self, wave: Wave, result: WaveResult) -> None:
        grid = next(iter(self._store.grids.values()))  # all hold the same pairs in a chunk
        first = wave.pairs.start // grid.pair_tile * grid.pair_tile
        stop = -(-wave.pairs.stop // grid.pair_tile) * grid.pair_tile
        pairs = range(first, min(stop, grid.pairs))
        whole = self._whole(
            ("baseline", wave.source, wave.sample, pairs),
            (slice(0, 2), slice(pairs.start, pairs.stop)),
            (slice(0, 2), slice(wave.pairs.start, wave.pairs.stop)),
            result.baseline,
            result.noise_floor,
        )
        if whole:
            at = (wave.source, wave.sample, pairs)
            self._store.write_baseline(*at, *append.kept_baseline(self._store, *at, *whole))

    def _take_block(self, block: Block, values: Arrays, status: Arrays) -> None:
        name, grid = block.component, self._store.grids[block.component]
        chunk = self._chunks[name][grid.number(block)]
        if self._done[name][chunk.index]:
            return
        of = (name, chunk.index)
        if whole := self._whole(of, chunk.region(grid), block.region(grid), values, status):
            self._store.write_block(chunk, *append.kept(self._store, chunk, *whole))

    def _whole(
        self, of: Hashable, region: Region, part: Region, *found: Arrays
    ) -> tuple[Arrays, Arrays] | None:
        """Put a part beside what there is of a region; all of it, once it is whole."""
        held = self._parts.setdefault(of, _Part(region))
        held.put(part, found)
        return self._parts.pop(of).arrays if not held.left else None


class _Part:
    """What there is of a region, in two sets of arrays; `left`: elements that are missing."""

    def __init__(self, region: Region) -> None:
        self._first = [along.start for along in region]
        self._shape = tuple(along.stop - along.start for along in region)
        self.left = math.prod(self._shape)
        self.arrays: tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]] = ({}, {})

    def put(self, part: Region, found: tuple[Arrays, ...]) -> None:
        pairs = zip(part, self._first, strict=True)
        at = tuple(slice(along.start - first, along.stop - first) for along, first in pairs)
        for whole, some in zip(self.arrays, found, strict=True):
            for name, array in some.items():
                if name not in whole:
                    whole[name] = np.empty(self._shape, array.dtype)
                whole[name][at] = array
        self.left -= math.prod(along.stop - along.start for along in part)
