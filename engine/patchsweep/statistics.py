"""Uncertainty over pairs: bootstrap intervals, p-values, the 2-SD rule. Plain numpy and scipy.

`change` [pair, ...cells] is patched − destination, NaN where a pair has no value; `span` [pair] is
source − destination, None where effects are plain differences. `groups` [pair] name the templates
that pairs come from; pairs of one template are no independent evidence, so they are drawn and
averaged together. Without any names every pair is a group of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
TILE = 1 << 14  # cells that are resampled together


class Interval(NamedTuple):
    """Lower and upper ends, [...cells]."""

    low: Floats
    high: Floats


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

    The effect is the ratio of means, Σ change / Σ span over the pairs that have a value. NaN with
    fewer than two groups.
    """
    cells = change.shape[1:]
    flat = change.reshape(len(change), -1)
    member = _members(groups)
    if len(member) < 2:
        nothing = np.full(cells, np.nan)
        return Interval(nothing, nothing.copy())
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(member), size=(samples, len(member)))
    times = np.stack([np.bincount(row, minlength=len(member)) for row in drawn]).astype(float)
    weight = times @ member  # [sample, pair]
    low, high = np.empty(flat.shape[1]), np.empty(flat.shape[1])
    tail = (1 - level) / 2
    for start in range(0, flat.shape[1], TILE):
        part = slice(start, start + TILE)
        x = flat[:, part]
        there = np.isfinite(x)
        below = np.where(there, 1.0 if span is None else span[:, None], 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            effect = (weight @ np.where(there, x, 0.0)) / (weight @ below)
        effect[~np.isfinite(effect)] = np.nan
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
        p = 2 * stats.t.sf(t, n - 1)
    p = np.where((centre == 0) & (deviation == 0), 1.0, p)
    return np.where(n < 2, np.nan, p).reshape(change.shape[1:])


def adjusted(p: Floats) -> Floats:
    """P-values adjusted for the false discovery rate (Benjamini & Hochberg 1995); NaN stays."""
    out, known = np.full(p.shape, np.nan), np.isfinite(p)
    if known.any():
        out[known] = stats.false_discovery_control(p[known])
    return out


def beyond_sd(effect: Floats, sd: float = 2.0) -> NDArray[np.bool_]:
    """The cells more than `sd` (population) standard deviations from the mean over all finite
    cells: the rule of Zhang & Nanda 2023 (arXiv 2309.16042, section 2)."""
    finite = effect[np.isfinite(effect)]
    if not finite.size:
        return np.zeros(effect.shape, bool)
    far: NDArray[np.bool_] = np.abs(effect - finite.mean()) > sd * finite.std()
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
