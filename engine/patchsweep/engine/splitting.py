"""Waves that do not fit the memory after all, computed in parts.

A wave that runs out of memory is computed again, all of it, in parts of at most half its tokens; if
that does not help, of a quarter, and so on: of 1/2^depth. The depth is recorded before the wave is
computed, so that who computes it again does it alike and finds the same bits: parts of another size
may round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchsweep.device import MEND, OutOfMemory, within_memory
from patchsweep.errors import BadInput
from patchsweep.passes import Launched, WaveResult
from patchsweep.plan import Plan, Wave
from patchsweep.sites import Block
from patchsweep.spec import Metric

Launch = Callable[[Plan, Wave, Sequence[Metric]], Launched]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Splitting:
    """Computes the waves of a plan, those that do not fit the memory in parts. `depth` says what is
    recorded of a wave, 0 for nothing; `record` keeps another."""

    launch: Launch
    plan: Plan
    metrics: Sequence[Metric]
    depth: Callable[[Wave], int]
    record: Callable[[Wave, int], None]

    def begin(self, wave: Wave) -> Callable[[], WaveResult]:
        """Launch a wave; what is returned waits for what it finds. A wave in parts is done when
        this returns. Both raise BadInput if not even one cell fits."""
        depth = self.depth(wave)
        if not depth:
            launched = within_memory(partial(self.launch, self.plan, wave, self.metrics))
            if not isinstance(launched, OutOfMemory):
                return partial(self._finish, wave, launched)
            depth = self._deeper(wave, depth, launched)
        found = self._in_parts(wave, depth)
        return lambda: found

    def _finish(self, wave: Wave, launched: Launched) -> WaveResult:
        found = within_memory(launched.result)
        if isinstance(found, OutOfMemory):
            return self._in_parts(wave, self._deeper(wave, 0, found))
        return found

    def _in_parts(self, wave: Wave, depth: int) -> WaveResult:
        while True:
            found = within_memory(partial(self._computed, wave, self.plan.split(wave, depth)))
            if not isinstance(found, OutOfMemory):
                return found
            depth = self._deeper(wave, depth, found)

    def _computed(self, wave: Wave, parts: Sequence[Wave]) -> WaveResult:
        results = [self.launch(self.plan, part, self.metrics).result() for part in parts]
        return _together(wave, parts, results)

    def _deeper(self, wave: Wave, depth: int, why: OutOfMemory) -> int:
        """The next depth at which a wave has other parts, recorded."""
        before = self._cut(wave, depth)
        while wave.tokens >> depth:
            depth += 1
            if self._cut(wave, depth) != before:
                self.record(wave, depth)
                return depth
        names = ", ".join(dict.fromkeys(b.component for b in wave.blocks))
        raise BadInput(f"{why}, with one cell of {names} at a time: {MEND}")

    def _cut(self, wave: Wave, depth: int) -> list[tuple[Block, ...]]:
        return [w.blocks for w in (self.plan.split(wave, depth) if depth else [wave])]


def _together(wave: Wave, parts: Sequence[Wave], results: Sequence[WaveResult]) -> WaveResult:
    """What the parts of a wave found, as the wave would have found it."""
    pieces = [piece for result in results for piece in result.blocks]
    blocks = []
    for block in wave.blocks:
        mine = [p for p in pieces if (p[0].component, p[0].index) == (block.component, block.index)]
        values = _whole(block, [(piece, found) for piece, found, _ in mine])
        statuses = _whole(block, [(piece, status) for piece, _, status in mine])
        blocks.append((block, values, statuses))
    baseline = _by_pair(wave, parts, [r.baseline for r in results])
    return WaveResult(blocks, baseline, _by_pair(wave, parts, [r.noise_floor for r in results]))


def _whole(block: Block, pieces: Sequence[tuple[Block, Arrays]]) -> dict[str, NDArray[Any]]:
    """A block's arrays [1, 1, 1, pair, layer, unit, position], of its pieces'."""
    whole = {}
    for name, first in pieces[0][1].items():
        layers = first.shape[4]
        sizes = (len(block.pairs), layers, len(block.units), len(block.positions))
        whole[name] = np.empty((1, 1, 1, *sizes), first.dtype)
        for piece, arrays in pieces:
            pairs = _within(piece.pairs, block.pairs)
            units, positions = (
                _within(piece.units, block.units),
                _within(piece.positions, block.positions),
            )
            whole[name][:, :, :, pairs, :, units, positions] = arrays[name]
    return whole


def _by_pair(wave: Wave, parts: Sequence[Wave], found: Sequence[Arrays]) -> dict[str, NDArray[Any]]:
    """Arrays [run, pair] of a wave, of its parts'."""
    whole = {}
    for name, first in found[0].items():
        whole[name] = np.empty((len(first), len(wave.pairs)), first.dtype)
        for part, arrays in zip(parts, found, strict=True):
            whole[name][:, _within(part.pairs, wave.pairs)] = arrays[name]
    return whole


def _within(inner: range, outer: range) -> slice:
    return slice(inner.start - outer.start, inner.stop - outer.start)
