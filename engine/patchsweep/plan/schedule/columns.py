"""The runs and replacements of a wave, in columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchsweep.plan import Ints

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Edit:
    """Replacements of one component by values of one source, in columns [edit].

    target: the token of the layer call that is overwritten, in `unit`; donor: the token that has
    the source's value (−1 where the source takes no run). own: a token with the activation that the
    target has before. position: the target's. row: the runs, as numbers in RowTokens.
    """

    component: str
    source: int
    target: Ints
    donor: Ints
    own: Ints
    unit: Ints
    position: Ints
    row: Ints


@dataclass(frozen=True)
class Embedding:
    """The tokens that are embedded: those of the base rows, then embeddings that are patched in.

    tokens, positions [token]. Noise: token `noised` takes value `slot` (of the noised positions of
    its pair) times the standard deviations of its source. `edits` replace embeddings by constants.
    """

    tokens: Ints
    positions: Ints
    noised: Ints
    pair: Ints
    source: Ints
    slot: Ints
    edits: list[Edit]


@dataclass(frozen=True)
class Runs:
    """The patched rows of a wave in packed order, [run].

    `block` counts within the wave, `cell` is the flat index in the block's values, `pair` counts
    within the wave. dst is the first base token of the destination, `base` its number among the
    base rows; a row holds `length` tokens from position `start` on and is first carried into layer
    call `joins`. `set`: whether it patches a set of sites.
    """

    block: Ints
    cell: Ints
    pair: Ints
    direction: Ints
    start: Ints
    joins: Ints
    dst: Ints
    base: Ints
    length: Ints
    set: Ints


@dataclass(frozen=True)
class Patched:
    """Every replacement of every run, in columns [place]; `donor` is a base token, −1 for none;
    `climber` the one that is the donor instead, −1 for none; `slot` numbers the injected tokens,
    −1 for none; `moved`: the donor is to be rotated."""

    run: Ints
    component: Ints
    layer: Ints
    unit: Ints
    position: Ints
    source: Ints
    donor: Ints
    call: Ints
    slot: Ints
    moved: Bools
    climber: Ints
