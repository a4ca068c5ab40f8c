"""Which cells are run after all have been estimated, and what a sample says of the others. Pure.

A cell stands for all pairs, at a column of positions that mean the same in each
(`results.columns`): it is run in every pair that has the column or in none, so that its effect over
pairs is that of all of them. By its score, the size of its estimated effect over pairs, the highest
are *kept*; of the rest some are drawn and run as well, the *audit*. Both are run in one go: the
draw follows from the scores and the seed alone, and theta from the kept cells alone, so neither
depends on what was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from patchsweep.prefilter.audit import Audit, Stratum, draw, ranks, strata
from patchsweep.sites import Status
from patchsweep.statistics import Array

if TYPE_CHECKING:
    from patchsweep.spec import Prefilter

STRATA = 2  # of the cells that are not kept, by their score
NONE = 255  # the stratum of cells that are not drawn from
HIGHEST = 5  # theta: the smallest effect of the highest fifth of what is kept
Bytes = NDArray[np.uint8]
Map = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Choice:
    """What becomes of cells [layer, unit, column]: their status where they are not structural
    (EXACT, AUDITED, ESTIMATED; NOT_FINITE if only estimated, without success), and the stratum of
    those that were not kept (NONE of all others)."""

    status: Bytes
    stratum: Bytes


def choose(scores: Array, possible: Map, given: Prefilter | None) -> Choice:
    """Choose by scores [metric, layer, unit, column] among the `possible` cells; none without a
    prefilter.

    A cell ranks by the metric that ranks it highest. A score that is infinite, its estimate not
    being finite, is the highest; one that is NaN, the runs not differing in that metric, says
    nothing.
    """
    failed = np.isinf(scores).any(0)
    status = np.where(failed, Status.NOT_FINITE, Status.ESTIMATED).astype(np.uint8)
    stratum = np.full(status.shape, NONE, np.uint8)
    if given is None:
        return Choice(status, stratum)
    cells = np.flatnonzero(possible)
    by_metric = np.abs(scores).reshape(len(scores), -1)[:, cells]
    best = np.max([np.where(np.isnan(row), -1, ranks(row)) for row in by_metric], axis=0)
    kept = np.zeros(len(cells), bool)
    if isinstance(given.keep, Mapping):
        kept[(by_metric >= given.keep["threshold"]).any(0)] = True
    else:
        count = how_many(given.keep, len(cells))
        kept[np.argsort(-best, kind="stable")[:count]] = True
    rest = cells[~kept]
    of_rest = strata(best[~kept], STRATA)
    status.ravel()[cells[kept]] = Status.EXACT
    status.ravel()[rest[draw(of_rest, given.audit, given.seed)]] = Status.AUDITED
    stratum.ravel()[rest] = of_rest
    return Choice(status, stratum)


def how_many(keep: str | int, cells: int) -> int:
    """The cells that are kept of so many."""
    if isinstance(keep, int):
        return min(keep, cells)
    return math.ceil(float(keep.rstrip("%")) / 100 * cells - 1e-9)


@dataclass(frozen=True)
class Verdict:
    """What was found by one metric: `precision` is the share of kept cells that exceed theta,
    `recall` the share of all that do which was kept, those drawn standing for their strata; NaN
    where there are none; `audit`: how many of the cells that were not kept may exceed it."""

    theta: float
    precision: float
    recall: float
    audit: Audit


def judge(
    effect: Array, chosen: Choice, given: Prefilter, components: int, metrics: int
) -> Verdict | None:
    """What the cells that were run say, by their effects [layer, unit, column], of so many
    components (with every direction and source) and metrics judged together; None where nothing
    was kept that has an effect. One that is not finite exceeds any theta."""
    size = np.where(np.isfinite(effect), np.abs(effect), np.inf)
    kept = size[chosen.status == Status.EXACT]
    known = kept[np.isfinite(kept)]
    if not len(known):
        return None
    highest = np.sort(known)[::-1][: math.ceil(len(known) / HIGHEST)]
    theta = float(highest[-1]) if given.theta == "auto" else given.theta
    found = []
    for number in range(STRATA):
        mine = chosen.stratum == number
        drawn = mine & (chosen.status == Status.AUDITED)
        found.append(Stratum(int(mine.sum()), int(drawn.sum()), int((size[drawn] > theta).sum())))
    hits = int((kept > theta).sum())
    missed = sum(s.hits * s.cells / s.drawn for s in found if s.drawn)
    return Verdict(
        theta=theta,
        precision=hits / len(kept),
        recall=hits / (hits + missed) if hits + missed else math.nan,
        audit=Audit(found, theta, components=components, metrics=metrics),
    )
