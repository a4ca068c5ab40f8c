"""What the prefilter says of the cells that were run, with numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from patchsweep.prefilter.audit import divided, upper
from patchsweep.prefilter.choice import NONE, Choice, choose, judge
from patchsweep.sites import Status
from patchsweep.spec import Prefilter

KEPT, DRAWN, LEFT = Status.EXACT, Status.AUDITED, Status.ESTIMATED
NAN = float("nan")
# Effect, what became of the cell, its stratum.
CELLS = [
    (0.9, KEPT, NONE), (-0.7, KEPT, NONE), (0.5, KEPT, NONE), (-0.3, KEPT, NONE),
    (0.2, KEPT, NONE), (0.1, KEPT, NONE),
    (0.0, DRAWN, 0), (0.1, DRAWN, 0), (NAN, LEFT, 0), (NAN, LEFT, 0), (NAN, LEFT, 0),
    (-0.8, DRAWN, 1), (0.2, DRAWN, 1), (0.75, DRAWN, 1), (-0.7, DRAWN, 1),
    (NAN, LEFT, 1), (NAN, LEFT, 1),
]  # fmt: skip


def judged(cells: Any = CELLS, components: int = 2, metrics: int = 3, **given: Any) -> Any:
    effect, status, stratum = (np.array(x) for x in zip(*cells, strict=True))
    chosen = Choice(*(x.astype(np.uint8)[:, None, None] for x in (status, stratum)))
    return judge(effect[:, None, None], chosen, Prefilter(**given), components, metrics)


def test_with_hits() -> None:
    """Of six that are kept the highest fifth are two: theta is the smaller. What equals it does not
    exceed it. Of stratum 1 two of four drawn do, which stand for three of six."""
    found = judged()
    assert found.theta == 0.7
    assert found.precision == 1 / 6
    assert [(s.cells, s.drawn, s.hits) for s in found.audit.strata] == [(5, 2, 0), (6, 4, 2)]
    assert found.recall == 1 / (1 + 2 * 6 / 4)
    assert found.audit.left == 5
    alpha = 0.05 / (2 * 2 * 3)
    bounds = [math.floor(upper(0, 2, alpha) * 5), math.floor(upper(2, 4, alpha) * 6) - 2]
    assert found.audit.missed == min(bounds[0], 3) + min(bounds[1], 2)


def test_with_a_theta_of_ones_own() -> None:
    found = judged(theta=0.2)
    assert found.precision == 4 / 6
    assert [s.hits for s in found.audit.strata] == [0, 3]
    assert found.recall == 4 / (4 + 3 * 6 / 4)


def test_discrete_effects_that_equal_theta() -> None:
    """Effects on an accuracy are few numbers: those at theta are no hits on either side."""
    cells = [(1, KEPT, NONE)] * 3 + [(1, DRAWN, 0), (0, DRAWN, 0), (0, DRAWN, 1)]
    found = judged(cells)
    assert found.theta == 1
    assert found.precision == 0
    assert [s.hits for s in found.audit.strata] == [0, 0]
    assert math.isnan(found.recall)


def test_what_is_not_finite_exceeds_any_theta() -> None:
    cells = [(NAN, KEPT, NONE), (0.5, KEPT, NONE), (0.1, KEPT, NONE), (NAN, DRAWN, 0)]
    found = judged([*cells, (-0.6, DRAWN, 0), (0.3, DRAWN, 1)])
    assert found.theta == 0.5
    assert found.precision == 1 / 3
    assert [s.hits for s in found.audit.strata] == [2, 0]
    assert found.recall == 1 / (1 + 2)


def test_a_threshold_in_any_metric() -> None:
    scores = np.array([[3.0, 0, -2, 1, 0], [0.0, 5, 0, 1.9, 0]])[:, None, None]
    possible = np.ones((1, 1, 5), bool)
    found = choose(scores, possible, Prefilter(keep={"threshold": 2}, audit=1))
    assert (found.status.ravel() == KEPT).tolist() == [True, True, True, False, False]
    assert sorted(found.stratum.ravel().tolist()) == [0, 1, NONE, NONE, NONE]


def test_strata_are_halves_of_what_is_not_kept() -> None:
    scores = np.arange(20.0)[None, None, None]
    found = choose(scores, np.ones((1, 1, 20), bool), Prefilter(keep=8, audit=2))
    assert found.stratum.ravel().tolist() == [0] * 6 + [1] * 6 + [NONE] * 8


def test_errors_are_divided_by_all_that_is_said() -> None:
    assert divided(0.05, 2, 3, 5) == pytest.approx(0.05 / 30)
    few, many = (judged(components=n, metrics=m).audit for n, m in ((1, 1), (1, 400)))
    assert (few.components, few.metrics, many.metrics) == (1, 1, 400)
