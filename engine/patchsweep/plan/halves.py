"""A wave in parts: blocks halved until they fit a smaller budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from patchsweep.plan.costs import Costs
from patchsweep.plan.waves import Wave, alone, numbered
from patchsweep.sites import Block


def split_wave(wave: Wave, depth: int, costs: Costs, tail_weights: int) -> tuple[Wave, ...]:
    """The same as several waves, each with 1/2^depth of its tokens or with one cell. Their blocks
    are pieces of the wave's, of the same index: they have fewer pairs first, then positions, then
    units."""
    budget = wave.tokens >> depth
    beside = costs.beside(wave.source, wave.sample)

    def fits(b: Block) -> bool:
        part = beside.part(b.pairs, range(1), 1) + costs.of_block(b)
        return int(part.tokens.max()) <= budget

    pieces = (piece for block in wave.blocks for piece in _pieces(block, fits))
    units = numbered(alone(pieces, costs, budget, tail_weights))
    return tuple(wave for unit in units for wave in unit)


def _pieces(block: Block, fits: Callable[[Block], bool]) -> Iterator[Block]:
    """A block halved until its pieces fit, or are one cell."""
    halves = _halves(block)
    if not halves or fits(block):
        yield block
        return
    for half in halves:
        yield from _pieces(half, fits)


def _halves(b: Block) -> list[Block]:
    if len(b.pairs) > 1:
        return [replace(b, pairs=half) for half in _halved(b.pairs)]
    if len(b.positions) > 1:
        return [replace(b, positions=half) for half in _halved(b.positions)]
    if len(b.units) > 1:
        return [replace(b, units=half) for half in _halved(b.units)]
    return []


def _halved(whole: range) -> tuple[range, range]:
    return whole[: len(whole) // 2], whole[len(whole) // 2 :]
