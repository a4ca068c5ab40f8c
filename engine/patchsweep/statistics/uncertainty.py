"""Uncertainty over pairs: bootstrap intervals, p-values, the 2-SD rule; agreement of estimates with
what was run. Plain numpy and scipy.

`change` [pair, ...cells] is patched − destination, NaN where a pair has no value; `span` [pair] is
source − destination, None where effects are plain differences. `groups` [pair] name the templates
that pairs come from; pairs of one template are no independent evidence, so they are drawn and
averaged together. Without any names every pair is a group of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy  # its parts are imported when first used
from numpy.typing import NDArray

from patchsweep.errors import BadInput

Floats = NDArray[np.float64]
VALUES = 1 << 22  # resampled effects in memory at a time: 32 MiB for each of a few arrays


class Interval(NamedTuple):
    """Lower and upper ends, [...cells]."""

    low: Floats
    high: Floats


class Agreement(NamedTuple):
    """Correlations of estimated with exact changes over `cells`."""

    pearson: float
    spearman: float
    cells: int


def agreement(estimated: Floats, exact: Floats) -> Agreement:
    """How well changes [cell] are estimated; NaN where fewer than three cells have both, or where
    either is the same in all."""
    both = np.isfinite(estimated) & np.isfinite(exact)
    x, y = estimated[both], exact[both]
    if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
        return Agreement(np.nan, np.nan, len(x))
    return Agreement(_pearson(x, y), _pearson(_ranks(x), _ranks(y)), len(x))


def _ranks(values: Floats) -> Floats:
    """Equal ones share the mean of theirs. Without scipy.stats, whose import takes a second."""
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[at])


def _pearson(x: Floats, y: Floats) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)))


def bootstrap(
    change: Floats,
    span: Floats | None,
    groups: Sequence[str],
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile intervals of the effect over pairs, groups of pairs being resampled.

    The effect is the ratio of means, Σ change / Σ span over the pairs that have a value. NaN where
    fewer than two groups have one: nothing varies then. `level` is the share of resampled effects
    between the ends. BadInput without samples or for a level not between 0 and 1.
    """
    if samples < 1:
        raise BadInput(f"bootstrap: samples is {samples}: use 1 or more, 1000 are usual")
    if not 0 < level < 1:
        raise BadInput(f"bootstrap: level is {level}: use a share between 0 and 1, such as 0.95")
    cells = change.shape[1:]
    flat = change.reshape(len(change), -1)
    member = _members(groups)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(member), size=(samples, len(member)))
    times = np.stack([np.bincount(row, minlength=len(member)) for row in drawn]).astype(float)
    weight = times @ member  # [sample, pair]
    each = np.ones(len(flat)) if span is None else span
    low, high = np.empty(flat.shape[1]), np.empty(flat.shape[1])
    tail, tile = (1 - level) / 2, max(1, VALUES // samples)
    for start in range(0, flat.shape[1], tile):
        part = slice(start, start + tile)
        x = flat[:, part]
        there = np.isfinite(x) & np.isfinite(each)[:, None]
        below = np.where(there, each[:, None], 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            effect = (weight @ np.where(there, x, 0.0)) / (weight @ below)
        effect[~np.isfinite(effect)] = np.nan
        effect[:, (member @ there > 0).sum(0) < 2] = np.nan
        known = np.isfinite(effect).any(0)
        ends = np.full((2, x.shape[1]), np.nan)
        ends[:, known] = np.nanquantile(effect[:, known], [tail, 1 - tail], axis=0)
        low[part], high[part] = ends
    return Interval(low.reshape(cells), high.reshape(cells))


def p_values(change: Floats, groups: Sequence[str]) -> Floats:
    """Two-sided one-sample t-test of the groups' mean changes against 0, [...cells].

    1 where every change is exactly 0 (structural cells); 0 where all are equal and not 0; NaN with
    fewer than two groups that have a value.
    """
    flat = change.reshape(len(change), -1)
    member = _members(groups)
    there = np.isfinite(flat)
    count = member @ there
    with np.errstate(divide="ignore", invalid="ignore"):
        means = (member @ np.where(there, flat, 0.0)) / count  # NaN for a group without a value
        n = np.isfinite(means).sum(0)
        centre = np.nansum(means, 0) / n
        deviation = np.sqrt(np.nansum((means - centre) ** 2, 0) / (n - 1))
        t = np.abs(centre) / (deviation / np.sqrt(n))
        p = 2 * scipy.stats.t.sf(t, n - 1)
    p = np.where((centre == 0) & (deviation == 0), 1.0, p)
    return np.where(n < 2, np.nan, p).reshape(change.shape[1:])


def adjusted(p: Floats) -> Floats:
    """P-values adjusted for the false discovery rate (Benjamini & Hochberg 1995); NaN stays."""
    out, known = np.full(p.shape, np.nan), np.isfinite(p)
    if known.any():
        out[known] = scipy.stats.false_discovery_control(p[known])
    return out


def beyond_sd(effect: Floats, sd: float = 2.0) -> NDArray[np.bool_]:
    """The cells more than `sd` (population) standard deviations from the mean over all finite
    cells: the rule of Zhang & Nanda 2023 (arXiv 2309.16042)."""
    known = np.isfinite(effect)
    finite = effect[known]
    if not finite.size:
        return np.zeros(effect.shape, bool)
    far: NDArray[np.bool_] = known & (np.abs(effect - finite.mean()) > sd * finite.std())
    return far


def standard_error(values: Floats, axis: int) -> Floats:
    """Standard error of the mean over noise samples; NaN for one sample."""
    n = values.shape[axis]
    if n < 2:
        return np.full(np.delete(values.shape, axis), np.nan)
    error: Floats = values.std(axis, ddof=1) / np.sqrt(n)
    return error


def _members(groups: Sequence[str]) -> NDArray[Any]:
    """[group, pair]: 1.0 where a pair belongs to a group."""
    names = [name or f"\0{i}" for i, name in enumerate(groups)]
    known = list(dict.fromkeys(names))
    return np.array([[float(n == name) for n in names] for name in known])
