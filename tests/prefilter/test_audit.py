"""The audit's bounds: how often they hold, exactly, for every population of some sizes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.stats import binom, hypergeom

from patchsweep.prefilter.audit import Audit, Stratum, divided, draw, strata, upper

ALPHA = 0.05


def holds(cells: int, drawn: int, exceed: int, alpha: float) -> float:
    """Probability that the bound is not below the truth."""
    total = 0.0
    for hits in range(max(0, drawn - (cells - exceed)), min(drawn, exceed) + 1):
        if Stratum(cells, drawn, hits).missed(alpha) >= exceed - hits:
            total += float(hypergeom.pmf(hits, cells, exceed, drawn))
    return total


@pytest.mark.parametrize("alpha", [ALPHA, divided(ALPHA, 3, 2, 1)])
def test_one_stratum_is_covered(alpha: float) -> None:
    sizes = [*range(1, 16), 40]
    least = min(
        holds(cells, drawn, exceed, alpha)
        for cells in sizes
        for drawn in range(0, cells + 1, 1 if cells < 20 else 7)
        for exceed in range(cells + 1)
    )
    assert least >= 1 - alpha - 1e-12


@pytest.mark.parametrize("sizes", [(4, 9), (8, 8), (3, 12)])
def test_two_strata_are_covered_together(sizes: tuple[int, int]) -> None:
    """The sum of both bounds against the sum of what is left, for all numbers of hits."""
    drawn = [n // 2 for n in sizes]
    for exceed in product(*(range(n + 1) for n in sizes)):
        total = 0.0
        for hits in product(*(range(n + 1) for n in drawn)):
            p = np.prod(hypergeom.pmf(hits, sizes, exceed, drawn))
            if p > 0:
                parts = [Stratum(*x) for x in zip(sizes, drawn, hits, strict=True)]
                total += p * (Audit(parts, 0.1, ALPHA).missed >= sum(exceed) - sum(hits))
        assert total >= 1 - ALPHA - 1e-12, exceed


def test_the_bound_by_hand() -> None:
    assert upper(0, 300, ALPHA) == pytest.approx(1 - ALPHA ** (1 / 300))
    assert upper(3, 3, ALPHA) == upper(0, 0, ALPHA) == 1
    for hits in (1, 4):  # at the bound, so few hits have probability alpha
        assert binom.cdf(hits, 50, upper(hits, 50, ALPHA)) == pytest.approx(ALPHA)
    assert Stratum(10_000, 300, 0).missed(ALPHA) == 99
    assert Stratum(50, 50, 7).missed(ALPHA) == 0
    assert Stratum(50, 0, 0).missed(ALPHA) == 50
    # Of 1,000 at most 10.2 % exceed theta, and the five that were found are no longer missed.
    assert upper(5, 100, 0.05) == pytest.approx(0.1023, abs=1e-4)
    assert Stratum(1000, 100, 5).missed(0.05) == 102 - 5
    # Two strata, three components and five metrics are judged together, each with a thirtieth.
    both = [Stratum(10_000, 300, 0), Stratum(10_000, 300, 2)]
    assert Audit(both, 0.1, ALPHA, 3, 5).missed == sum(s.missed(ALPHA / 30) for s in both)
    assert divided(ALPHA, 2, 3, 5) == pytest.approx(ALPHA / 30)


def test_strata_are_quantiles_of_magnitude() -> None:
    score = np.array([0.3, -5.0, np.nan, 0.0, 1.0, -0.1, 0.3])
    assert strata(score, 3).tolist() == [0, 2, 2, 0, 1, 0, 1]
    sizes = np.bincount(strata(np.random.default_rng(0).normal(size=101), 4))
    assert sizes.max() - sizes.min() <= 1
    assert strata(np.zeros(0), 3).tolist() == []


def test_draws_are_uniform_and_repeatable() -> None:
    stratum = np.array([0, 0, 0, 0, 1, 1, 2])
    drawn = [draw(stratum, 2, seed) for seed in range(4000)]
    for cells in drawn:
        assert np.bincount(stratum[cells]).tolist() == [2, 2, 1]
    often = np.bincount(np.concatenate(drawn)) / len(drawn)
    np.testing.assert_allclose(often, [0.5] * 4 + [1.0] * 3, atol=0.04)
    np.testing.assert_array_equal(draw(stratum, 2, 7), draw(stratum, 2, 7))


def test_what_is_said() -> None:
    said = Audit([Stratum(10_000, 300, 0)], 0.05).statement
    assert said == (
        "with 95 % confidence at most 1.03 % of the cells not run (99 of 9,700) exceed 0.05; "
        "this bounds how many, not how far"
    )
    more = Audit([Stratum(10_000, 300, 0)], 0.05, components=2, metrics=3)
    assert more.missed > 99
    assert Audit([Stratum(5, 5, 1)], 0.05).statement == "every cell was run"
