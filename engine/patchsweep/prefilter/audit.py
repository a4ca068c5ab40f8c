"""What a sample of the cells that were not run says of all of them. Plain numpy and scipy.

Cells are strata by their score; of each some are drawn uniformly and run exactly; a *hit* is one
whose exact effect exceeds the threshold theta, which is fixed before drawing. Nothing is assumed of
the model or of the scores. The number of misses is bounded, not the largest of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # its parts are imported when first used
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def strata(score: NDArray[np.floating], count: int) -> Ints:
    """The stratum of every cell [cell], 0 the lowest magnitudes: quantiles, whose sizes differ by
    at most one. A score that is not a number counts as the highest."""
    return ranks(np.abs(score)) * count // max(1, len(score))


def ranks(score: NDArray[np.floating]) -> Ints:
    """The rank of every score [cell], 0 the lowest; equal ones in order, NaN the highest."""
    rank = np.empty(len(score), np.int64)
    rank[np.argsort(score, kind="stable")] = np.arange(len(score))
    return rank


def draw(stratum: Ints, each: int, seed: int) -> Ints:
    """The numbers of the cells to run, in order: of each stratum `each` at random, or all of a
    smaller one."""
    rng = np.random.default_rng(seed)
    found = []
    for number in np.unique(stratum):
        cells = np.flatnonzero(stratum == number)
        found.append(rng.permutation(cells)[:each])
    return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)


def divided(alpha: float, strata: int, components: int, metrics: int) -> float:
    """The error that each bound may have, so that all of them hold together with 1 − alpha."""
    return alpha / (strata * components * metrics)


def upper(hits: int, drawn: int, alpha: float) -> float:
    """Upper bound of a share, of which `hits` of `drawn` were seen (Clopper & Pearson 1934, one
    side): too low with probability alpha at most; without a hit 1 − alpha^(1/drawn)."""
    return 1.0 if hits == drawn else float(scipy.stats.beta.ppf(1 - alpha, hits + 1, drawn - hits))


@dataclass(frozen=True)
class Stratum:
    """Cells that had not been run, how many of them were drawn and run, and their hits."""

    cells: int
    drawn: int
    hits: int

    def __post_init__(self) -> None:
        assert 0 <= self.hits <= self.drawn <= self.cells, self

    @property
    def left(self) -> int:
        """Cells that are still not run."""
        return self.cells - self.drawn

    def missed(self, alpha: float) -> int:
        """Upper bound of how many of the cells left exceed theta."""
        most = math.floor(upper(self.hits, self.drawn, alpha) * self.cells + 1e-9)
        return min(max(0, most - self.hits), self.left)


@dataclass(frozen=True)
class Audit:
    """The audit of one component and metric, one of `components` × `metrics` that are judged
    together with confidence 1 − alpha."""

    strata: Sequence[Stratum]
    theta: float
    alpha: float = 0.05
    components: int = 1
    metrics: int = 1

    @property
    def left(self) -> int:
        """Cells that are still not run."""
        return sum(s.left for s in self.strata)

    @property
    def missed(self) -> int:
        """Upper bound of how many of them exceed theta."""
        alpha = divided(self.alpha, max(1, len(self.strata)), self.components, self.metrics)
        return sum(s.missed(alpha) for s in self.strata)

    @property
    def statement(self) -> str:
        """What may be said, in words."""
        if not self.left:
            return "every cell was run"
        percent = math.ceil(1e4 * self.missed / self.left - 1e-9) / 100  # never rounded down
        return (
            f"with {100 * (1 - self.alpha):g} % confidence at most {percent:g} % of the cells "
            f"not run ({self.missed:,} of {self.left:,}) exceed {self.theta:.3g}; this bounds how "
            "many, not how far"
        )
