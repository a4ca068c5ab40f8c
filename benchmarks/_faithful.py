"""How well estimates stand for exact effects: correlations, and what a ranking by them keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchsweep.results import UNSIGNED, Results
from patchsweep.sites import Status
from patchsweep.statistics.uncertainty import agreement

Floats = NDArray[np.float64]
# Of the largest true effects, and of the largest estimates that are kept; in percent of the cells.
RECALLS = ((1, 5), (1, 10), (5, 5), (5, 10))


@dataclass(frozen=True)
class Score:
    """One estimator of one component over the cells of a pair that need a run; means over pairs.

    pearson, spearman: of estimated with exact changes of the metric; of their magnitudes where the
    estimator has no sign. recall: by (largest true, kept) of RECALLS, both in percent.
    pairs: those with three such cells or more; the others say nothing and are left out.
    """

    component: str
    estimator: str
    pairs: int
    cells: int
    pearson: float
    spearman: float
    recall: tuple[float, ...]


def score(
    component: str, estimator: str, estimated: Sequence[Floats], exact: Sequence[Floats]
) -> Score:
    """From the changes [cell] of every pair."""
    found = []
    for x, y in zip(estimated, exact, strict=True):
        each = agreement(x, np.abs(y) if estimator == UNSIGNED else y)
        if np.isfinite(each.pearson):
            found.append((each.pearson, each.spearman, *(recall(x, y, *of) for of in RECALLS)))
    mean = np.mean(found, 0).tolist() if found else [math.nan] * (2 + len(RECALLS))
    cells = sum(map(len, exact))
    return Score(component, estimator, len(found), cells, mean[0], mean[1], tuple(mean[2:]))


def recall(estimated: Floats, exact: Floats, true: float, kept: float) -> float:
    """The share of the `true` % cells of largest |exact| that is among the `kept` % of largest
    |estimated|; both are rounded up to whole cells."""
    want, have = largest(exact, true), largest(estimated, kept)
    return len(np.intersect1d(want, have)) / len(want)


def largest(values: Floats, percent: float) -> NDArray[np.int64]:
    """The cells of largest magnitude."""
    order: NDArray[np.int64] = np.argsort(-np.abs(values), kind="stable")
    return order[: math.ceil(len(values) * percent / 100)]


@dataclass(frozen=True)
class Kept:
    """What a prefilter kept of a component's `cells` that could matter in some pair, by effects
    over all pairs: `recall` is the share of the `largest` 1 % of true ones that it ran."""

    component: str
    estimator: str
    cells: int
    kept: int
    largest: int
    recall: float


def kept_by(filtered: Results, exact: Results, component: str) -> Kept:
    """Of a prefiltered sweep, held against the exact one of the same cells."""
    [metric], [direction] = exact.metrics, exact.grid(component).directions
    status = exact.store.read(f"{component}/{metric}_status", (0, 0, 0))
    possible = (status == Status.EXACT).any(0)
    effect = exact.effect(component, metric, direction, align="start", min_pairs=1).values[possible]
    kept = (filtered.store.read(f"choice/{component}_status", (0, 0)) == Status.EXACT)[possible]
    true = largest(effect, 1)
    return Kept(
        component=component,
        estimator=filtered.store.estimators[component],
        cells=len(effect),
        kept=int(kept.sum()),
        largest=len(true),
        recall=float(kept[true].mean()),
    )
