"""The tokens that runs of edges and paths begin with, in every layer call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from patchsweep.plan import Ints
from patchsweep.plan.layout import CODES, OWN
from patchsweep.plan.schedule.columns import Bools, Edit


@dataclass(frozen=True)
class Climbers:
    """The tokens that runs of edges and paths begin with, in columns [climber], and what they carry
    up, [send].

    A climber stands for the base token `dst`, at `position`; `first` is the first layer call that
    it is in, of a head that sends its own, `last` the last one that reads it; `mlps`: it goes
    through MLPs, else through nothing but the residual stream. Climber `of` carries the output of
    `component`, `layer` and `unit` in the base token `src` in place of that in its own.
    """

    dst: Ints
    position: Ints
    first: Ints
    last: Ints
    mlps: Bools
    of: Ints
    component: Ints
    layer: Ints
    unit: Ints
    src: Ints

    def __len__(self) -> int:
        return len(self.dst)


@dataclass(frozen=True)
class Climb:
    """What climbers do in one layer call. By the place where it is seen, what is sent: (climber,
    token with it, token without), [sent] each, by which the climber's change grows. To what the
    tokens `lifted` were gathered from, the changes `by` (climbers) are added."""

    sent: dict[str, tuple[Ints, Ints, Ints]]
    lifted: Ints
    by: Ints


def given(c: Climbers, layer: int, climber: Ints) -> list[Edit]:
    """What climbers, the tokens `climber` of a layer call, are given in it: heads, and MLPs where
    one goes through them."""
    edits = []
    late = c.mlps & (c.first <= layer)  # an MLP that a climber begins with is added to it
    for name, which in (("head_z", True), ("mlp_out", late[c.of])):
        own = (c.component == CODES[name]) & (c.layer == layer) & which
        if len(sent := np.flatnonzero(own)):
            of, src, unit = c.of[sent], c.src[sent], c.unit[sent]
            at, row = climber[of], np.zeros_like(of)
            edits.append(Edit(name, OWN, at, src, at, unit, c.position[of], row))
    return edits


def climb_of(c: Climbers, layer: int, up: Ints, climber: Ints) -> Climb:
    """What climbers do in a layer call, of which the ones `up` are in it."""
    sent = {}
    here, begins = c.layer == layer, c.first[c.of] == layer + (c.component == CODES["mlp_out"])
    added = ~c.mlps[c.of] | begins
    for place, name in (("resid_pre", "embed"), ("mlp_out", "mlp_out")):
        some = np.flatnonzero((c.component == CODES[name]) & here & added)
        if len(some):
            sent[place] = (c.of[some], c.src[some], c.dst[c.of[some]])
    heads = (c.component == CODES["head_z"]) & here & ~c.mlps[c.of]
    if len(of := np.unique(c.of[heads])):  # several of a layer go together
        sent["attn_out"] = (of, climber[of], c.dst[of])
    # Through MLPs a change is added once, and the climber goes on with what it has become. What
    # heads send is in their own layer's call already.
    late = c.first[up] < layer
    by = up[np.where(c.mlps[up], ~late, True)]
    return Climb(sent, climber[by], by)
