"""Estimated effects and their agreement with what was run, against plain numpy and scipy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import patchsweep.results
from patchsweep.pairs import Pair
from patchsweep.results import Results
from patchsweep.sites import Grid, Status, blocks
from patchsweep.statistics.uncertainty import agreement
from patchsweep.store import Store

GRID = Grid("head_z", ("denoise", "noise"), 4, 2, 2, (0, 1), 3, 2, 2)
RNG = np.random.default_rng(0)
BASE = RNG.normal(size=(2, 4)) + np.array([[3.0], [-3.0]])
BASE[1, 2] = np.nan  # the corrupt run of one pair
EXACT, ESTIMATE = RNG.normal(size=(2, *GRID.shape))
ESTIMATE[:, 0, 0, 1, 0, 1, 1] = np.nan
ESTIMATE[0, 0, 0, 2] = np.nan
STATUS = RNG.choice([Status.EXACT, Status.AUDITED, Status.ESTIMATED], GRID.shape).astype(np.uint8)
STATUS[0, 0, 0, 2] = Status.NOT_FINITE


@pytest.fixture(params=["atp", "atp_star"])
def results(request: pytest.FixtureRequest, tmp_path: Path) -> Results:
    attrs = {"spec": {"model": "tiny"}, "estimators": {"head_z": request.param}}
    attrs["sources"] = [{"name": "other", "normalised": True, "samples": 1}]
    pairs = [Pair((5, 6), (5, 1), (2,), (3,))] * 4
    store = Store.create(tmp_path / "r", [GRID], ["m"], pairs, str, attrs, "float64")
    store.write_baseline(0, 0, range(4), {"m": BASE}, {"m": BASE * 0})
    for block in blocks(GRID):
        region = block.region(GRID)
        store.write_block(block, {"m": EXACT[region]}, {"m": STATUS[region]})
    store.write_estimates(0, 0, range(4), {"head_z": {"m": ESTIMATE}})
    return patchsweep.results.open(tmp_path / "r")


def test_estimated_effects(results: Results) -> None:
    """Ratios of sums over the pairs that have an estimate and both runs."""
    for d, (destination, source) in enumerate(((BASE[1], BASE[0]), (BASE[0], BASE[1]))):
        got = results.estimated_effect("head_z", "m", ("denoise", "noise")[d])
        for cell in np.ndindex(2, 2, 2):
            moved = span = 0.0
            for i in range(4):
                value = ESTIMATE[(d, 0, 0, i, *cell)]
                if np.isfinite([value, destination[i], source[i]]).all():
                    moved += value - destination[i]
                    span += source[i] - destination[i]
            assert got[cell] == pytest.approx(moved / span, rel=1e-12)


def test_agreement(results: Results) -> None:
    x, y = [], []
    for at in np.ndindex(GRID.shape):
        destination = BASE[1 - at[0], at[3]]
        change = [z[at] - destination for z in (ESTIMATE, EXACT)]
        if STATUS[at] in (Status.EXACT, Status.AUDITED) and np.isfinite(change).all():
            x.append(change[0])
            y.append(change[1])
    if results.store.estimators["head_z"] == "atp_star":  # has no signs
        y = [abs(value) for value in y]
    found = results.agreement("head_z", "m")
    assert found.cells == len(x)
    assert found.pearson == pytest.approx(stats.pearsonr(x, y).statistic, rel=1e-10)
    assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-10)


def test_agreement_of_few() -> None:
    """Three are enough; correlations are about the means, ranks by sign."""
    x, y = np.array([5.0, 7.0, -8.0]), np.array([2.0, 3.5, 1.0])
    found = agreement(x, y)
    assert found.pearson == pytest.approx(stats.pearsonr(x, y).statistic)
    assert found.spearman == pytest.approx(1)
    assert np.isnan(agreement(x[:2], y[:2]).pearson)
    assert np.isnan(agreement(np.full(4, 2.0), np.arange(4.0)).spearman)
    assert agreement(np.array([*x, np.nan, 1]), np.array([*y, 1, np.inf])) == found
