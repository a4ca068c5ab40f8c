"""How sure a finding is: how often it holds when the pairs are drawn again (bootstrap)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from patchsweep.reproduce.experiment import Finding
from patchsweep.results import Results
from patchsweep.statistics import Array, ratio

DRAWS = 200
K = TypeVar("K")
# Results by name, and the number of every pair that they are of -> what is found in them.
Claims = Callable[[Mapping[K, Results], Sequence[int]], Iterable[Finding]]


@dataclass(frozen=True)
class Drawn(Results):
    """Results of the pairs numbered `pairs`, the same one perhaps several times: their changes,
    effects and baselines, from functions that read those of all pairs."""

    whole_changes: Callable[..., tuple[Array, Array | None]]
    whole_baseline: Callable[[str], Array]
    pairs: tuple[int, ...]

    def changes(
        self,
        component: str,
        metric: str,
        direction: str | None = None,
        source: str | None = None,
        layers: slice = slice(None),
        align: str | None = "start",
    ) -> tuple[Array, Array | None]:
        """As of Results, of these pairs."""
        moved, span = self.whole_changes(component, metric, direction, source, align=align)
        pairs = list(self.pairs)
        return moved[pairs][:, layers], None if span is None else span[pairs]

    def effect(
        self,
        component: str,
        metric: str,
        direction: str | None = None,
        source: str | None = None,
        *,
        align: str | None = None,
        min_pairs: int | None = None,
    ) -> xr.DataArray:
        """As of Results, of these pairs; without the names of places."""
        moved, span = self.changes(component, metric, direction, source, align=align)
        found, count = effect_of(moved, span)
        found[count < (-(-len(moved) // 2) if min_pairs is None else min_pairs)] = np.nan
        return xr.DataArray(found, dims=("layer", "unit", "position"))

    def baseline(self, metric: str) -> Array:
        """As of Results, of these pairs."""
        return self.whole_baseline(metric)[..., list(self.pairs)]


def effect_of(moved: Array, span: Array | None) -> tuple[Array, NDArray[np.int64]]:
    """The ratio of means of changes [pair, ...], and over how many pairs it is."""
    there = np.isfinite(moved)
    below = np.ones(len(moved)) if span is None else span
    total = np.where(there, below[:, None, None, None], 0.0).sum(0)
    return ratio(np.where(there, moved, 0.0).sum(0), total), there.sum(0)


def sure(
    claims: Claims[K], results: Mapping[K, Results], n: int, seed: int = 0, ways: int = 1
) -> tuple[Finding, ...]:
    """What is found in results that are all of the same `n` pairs, each finding with the share of
    DRAWS resamples of the pairs in which it holds, of those that decide it; without one where it is
    not decided, and for a single pair. ways: how often every pair comes in the results, one after
    another, drawn together."""
    found = tuple(claims(results, range(n * ways)))
    if n < 2:
        return found
    readers = {name: (r.store, cache(r.changes), cache(r.baseline)) for name, r in results.items()}
    rng = np.random.default_rng(seed)
    held: list[list[bool]] = [[] for _ in found]
    for _ in range(DRAWS):
        pairs = tuple((rng.integers(n, size=n)[:, None] * ways + np.arange(ways)).ravel().tolist())
        drawn = {name: Drawn(*reader, pairs) for name, reader in readers.items()}
        for each, finding in zip(held, claims(drawn, pairs), strict=True):
            if finding.holds is not None:
                each.append(finding.holds)
    return tuple(
        f if f.holds is None or not each else replace(f, sure=float(np.mean(each)))
        for f, each in zip(found, held, strict=True)
    )
