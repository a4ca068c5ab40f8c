"""What results say of several sources, samples, pairs and templates, against plain loops."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import patchsweep.results
from patchsweep.pairs import Pair
from patchsweep.results import Results
from patchsweep.sites import Grid, Status, blocks
from patchsweep.store import Store

EXACT, STRUCTURAL, OUTSIDE = Status.EXACT, Status.STRUCTURAL, Status.OUTSIDE
WAYS, SOURCES = ("denoise", "noise"), ("other", "resample", "zero")
SAMPLES = {"other": 2, "resample": 3, "zero": 1}
PAIRS, LAYERS, UNITS, POSITIONS = 6, 3, 2, 3
GRID = Grid("head_z", WAYS, PAIRS, LAYERS, UNITS, (0, 1, 2), 4, 2, 2, 0, SOURCES, 3)
TEMPLATES = ("a", "a", "b", "", "b", "")
GROUPS = ((0, 1), (2, 4), (3,), (5,))
UNKNOWN = 3  # the pair whose corrupt run is not finite

Made = tuple[np.ndarray, np.ndarray, np.ndarray]


def made(whole: bool = False) -> Made:
    """Values and statuses of GRID, baselines [run, source, sample, pair]; `whole`: all are
    finite."""
    rng = np.random.default_rng(7)
    values = rng.normal(size=GRID.shape)
    status = np.full(GRID.shape, EXACT, np.uint8)
    base = rng.normal(size=(2, 3, 3, PAIRS)) + np.array([3, -3])[:, None, None, None]
    base[0] = base[0, 0, 0]  # there is one clean run
    base[1, 2] = np.nan  # of zero there is no run
    status[..., 0, :, 0] = STRUCTURAL  # in all pairs
    status[:, :, :, 2, 1, 0, 1] = STRUCTURAL  # in one
    status[:, :, :, 4, :, :, 2] = OUTSIDE
    status[:, 1, :, 1, 2, 1, 1] = Status.AUDITED
    if not whole:
        base[1, 0, :, UNKNOWN] = np.nan
        status[0, 0, :, UNKNOWN] = Status.NOT_FINITE
        status[1, 1, 1, 0, 1, 1, 1] = Status.NOT_FINITE
        status[:, 1, 2, 5, 2, 0, 2] = Status.ESTIMATED
    for s, source in enumerate(SOURCES):
        status[:, s, SAMPLES[source] :] = OUTSIDE
        base[:, s, SAMPLES[source] :] = np.nan
    for d, destination in enumerate((base[1], base[0])):
        there = status[d] == STRUCTURAL
        # In another wave, so it has rounded differently.
        values[d] = np.where(there, destination[..., None, None, None] + 1e-7, values[d])
    values[np.isin(status, (OUTSIDE, Status.NOT_FINITE, Status.ESTIMATED))] = np.nan
    return values, status, base


def results(path: Path, values: Any, status: Any, base: Any) -> Results:
    said = [{"name": s, "normalised": s != "zero", "samples": SAMPLES[s]} for s in SOURCES]
    attrs = {"spec": {"model": "tiny"}, "model": "tiny", "sources": said}
    pairs = [Pair((5, 6, 7), (5, 1, 7), (2,), (3,), group=name) for name in TEMPLATES]
    store = Store.create(path, [GRID], ["m"], pairs, str, attrs, "float64")
    for s, n in product(range(3), range(3)):
        store.write_baseline(s, n, range(PAIRS), {"m": base[:, s, n]}, {"m": base[:, s, n] * 0})
    for block in blocks(GRID):
        region = block.region(GRID)
        store.write_block(block, {"m": values[region]}, {"m": status[region]})
    return patchsweep.results.open(path)


def cells() -> Iterator[tuple[int, ...]]:
    return np.ndindex(LAYERS, UNITS, POSITIONS)


def moved(of: Made, d: int, s: int, n: int, i: int, cell: tuple[int, ...]) -> tuple[float, float]:
    """Change and span of one run, by what the arrays say."""
    values, status, base = of
    clean, corrupt = base[:, s, n, i]
    start, end = (corrupt, clean) if WAYS[d] == "denoise" else (clean, corrupt)
    if SOURCES[s] == "zero":
        end = start + 1
    at = (d, s, n, i, *cell)
    if status[at] not in (EXACT, STRUCTURAL, Status.AUDITED):
        return np.nan, end - start
    return (0.0 if status[at] == STRUCTURAL else values[at] - start), end - start


def estimated(of: Made, d: int, s: int, cell: tuple[int, ...]) -> bool:
    return bool((of[1][(d, s, slice(None), slice(None), *cell)] == Status.ESTIMATED).any())


WAY = [(d, s) for d in range(2) for s in range(3) if (WAYS[d], SOURCES[s]) != ("denoise", "zero")]


@pytest.fixture(scope="module", params=[False, True], ids=["some not finite", "whole"])
def both(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Made, Results]:
    of = made(request.param)
    return of, results(tmp_path_factory.mktemp("loops") / "r.zarr", *of)


def over_pairs(of: Made, d: int, s: int, samples: range, cell: tuple[int, ...]) -> float:
    """The ratio of sums over the pairs and samples that have both."""
    runs = [moved(of, d, s, n, i, cell) for n in samples for i in range(PAIRS)]
    runs = [run for run in runs if np.isfinite(run).all()]
    if estimated(of, d, s, cell) or not runs:
        return np.nan
    change, span = np.sum(runs, 0)
    return float(change / span)


def of_cells(function: Any) -> np.ndarray:
    return np.array([function(cell) for cell in cells()]).reshape(LAYERS, UNITS, POSITIONS)


@pytest.mark.parametrize(("d", "s"), WAY)
def test_effects(both: tuple[Made, Results], d: int, s: int) -> None:
    of, found = both
    wanted = of_cells(lambda cell: over_pairs(of, d, s, range(SAMPLES[SOURCES[s]]), cell))
    effect = found.effect("head_z", "m", WAYS[d], SOURCES[s], align="start", min_pairs=1)
    np.testing.assert_allclose(effect, wanted, rtol=1e-12)
    assert np.isfinite(wanted).sum() >= LAYERS * UNITS * POSITIONS - 1


@pytest.mark.parametrize(("d", "s"), WAY)
def test_standard_errors(both: tuple[Made, Results], d: int, s: int) -> None:
    """Of the effect in each sample; a pair whose run is not finite is in none of them."""
    of, found = both
    samples = range(SAMPLES[SOURCES[s]])

    def error(cell: tuple[int, ...]) -> float:
        if estimated(of, d, s, cell) or len(samples) < 2:
            return np.nan
        each = [over_pairs(of, d, s, range(n, n + 1), cell) for n in samples]
        return float(np.std(each, ddof=1) / len(samples) ** 0.5)

    wanted = of_cells(error)
    got = found.standard_error("head_z", "m", WAYS[d], SOURCES[s])
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-15)


def test_a_pair_that_is_not_finite_blanks_no_error(tmp_path: Path) -> None:
    values, status, base = made(whole=True)
    base[1, 1, :, UNKNOWN] = np.nan
    found = results(tmp_path / "r", values, status, base)
    got = found.standard_error("head_z", "m", "noise", "resample")
    assert np.isfinite(got).all()
    assert (got[1:] > 0).any()


def changes(of: Made, d: int, s: int, cell: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of every pair, means over the samples that the source has."""
    runs = np.array(
        [[moved(of, d, s, n, i, cell) for i in range(PAIRS)] for n in range(SAMPLES[SOURCES[s]])]
    )
    change, span = runs.mean(0).T
    return (change * np.nan if estimated(of, d, s, cell) else change), span


@pytest.mark.parametrize(("d", "s"), WAY)
def test_changes_of_every_pair(both: tuple[Made, Results], d: int, s: int) -> None:
    of, found = both
    change, span = found.changes("head_z", "m", WAYS[d], SOURCES[s])
    for cell in cells():
        wanted = changes(of, d, s, cell)
        np.testing.assert_allclose(change[:, *cell], wanted[0], rtol=1e-12, atol=1e-15)
        if SOURCES[s] == "zero":
            assert span is None
        else:
            assert span is not None
            np.testing.assert_allclose(span, wanted[1], rtol=1e-12)


@pytest.mark.parametrize(("d", "s"), WAY)
def test_intervals(both: tuple[Made, Results], d: int, s: int) -> None:
    """Templates are drawn, all their pairs with them; the ends are quantiles of the effects."""
    of, found = both
    got = found.interval("head_z", "m", WAYS[d], SOURCES[s], samples=60, level=0.8, seed=3)
    drawn = np.random.default_rng(3).integers(len(GROUPS), size=(60, len(GROUPS)))
    for cell in cells():
        change, span = changes(of, d, s, cell)
        there = np.isfinite(change) & np.isfinite(span)
        groups = [[i for i in group if there[i]] for group in GROUPS]
        effects = []
        for row in drawn:
            pairs = [i for g in row for i in groups[g]]
            if pairs:
                effects.append(change[pairs].sum() / span[pairs].sum())
        enough = sum(map(bool, groups)) >= 2
        wanted = np.quantile(effects, [0.1, 0.9]) if enough else [np.nan, np.nan]
        np.testing.assert_allclose([end[cell] for end in got], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("d", "s"), WAY)
def test_p_values(both: tuple[Made, Results], d: int, s: int) -> None:
    """Of a t-test over templates; those of cells that cannot change are left out when the others
    are adjusted."""
    of, found = both

    def p(cell: tuple[int, ...]) -> float:
        change, _ = changes(of, d, s, cell)
        groups = [[change[i] for i in g if np.isfinite(change[i])] for g in GROUPS]
        means = [float(np.mean(some)) for some in groups if some]
        if len(means) < 2:
            return np.nan
        return 1.0 if not np.any(means) else float(stats.ttest_1samp(means, 0).pvalue)

    raw = of_cells(p)
    tested = np.isfinite(raw) & (raw != 1)
    assert 0 < tested.sum() < raw.size
    # Benjamini & Hochberg: of the k-th smallest of m the smallest of p·m/k from there on.
    order = np.argsort(raw[tested])
    scaled = raw[tested][order] * tested.sum() / np.arange(1, tested.sum() + 1)
    wanted, by_rank = raw.copy(), np.minimum.accumulate(scaled[::-1])[::-1]
    wanted[tested] = by_rank[np.argsort(order)].clip(max=1)
    got = found.p_values("head_z", "m", WAYS[d], SOURCES[s])
    np.testing.assert_allclose(got, wanted, rtol=1e-9)
    assert not np.allclose(
        got[tested], stats.false_discovery_control(np.nan_to_num(raw, nan=1))[tested]
    )


def test_arrays_and_tables(both: tuple[Made, Results]) -> None:
    of, found = both
    ds = found.to_xarray("head_z").load()
    frame = found.to_frame()
    names = {str(s.name).lower(): s for s in Status}
    assert ds.m_effect.shape == GRID.shape
    rows = 0
    for at in np.ndindex(GRID.shape):
        d, s, n, i, *cell = at
        change, span = moved(of, d, s, n, i, tuple(cell))
        wanted = change / span
        if of[1][at] in (EXACT, STRUCTURAL, Status.AUDITED):
            np.testing.assert_allclose(ds.m_effect.values[at], wanted, rtol=1e-12)
        rows += of[1][at] != OUTSIDE
    assert len(frame) == rows
    for row in frame.itertuples():
        at = (
            WAYS.index(row.direction), SOURCES.index(row.source), row.sample, row.pair,
            row.layer, row.unit, row.position,
        )  # fmt: skip
        assert names[row.m_status] == of[1][at]
        np.testing.assert_array_equal(row.m, of[0][at])
        np.testing.assert_array_equal(row.m_effect, ds.m_effect.values[at])


def test_counts(both: tuple[Made, Results]) -> None:
    of, found = both
    assert found.counts("head_z", "m") == {s: int((of[1] == s).sum()) for s in Status}


def test_the_largest(both: tuple[Made, Results]) -> None:
    """By magnitude, with the mean of what was measured; in a grid of few layers."""
    of, found = both
    for d, s in WAY:
        samples = range(SAMPLES[SOURCES[s]])
        effects = {cell: over_pairs(of, d, s, samples, cell) for cell in cells()}
        best = sorted(
            (c for c in effects if np.isfinite(effects[c])), key=lambda c: -abs(effects[c])
        )
        table = found.top("head_z", "m", WAYS[d], 5, SOURCES[s], align="start", min_pairs=1)
        top = list(table.itertuples())
        assert [(c.layer, c.head, c.position) for c in top] == best[:5]
        for cell in top:
            place = (cell.layer, cell.head, cell.position)
            assert cell.effect == pytest.approx(effects[place], rel=1e-12)
            used = [
                of[0][(d, s, n, i, *place)]
                for n in samples
                for i in range(PAIRS)
                if np.isfinite(moved(of, d, s, n, i, place)).all()
            ]
            assert cell.patched == pytest.approx(np.mean(used), rel=1e-6)


def test_parts_of_layers_are_the_whole(
    both: tuple[Made, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little memory there is."""
    _, found = both
    whole = [
        found.p_values("head_z", "m", "noise", "resample"),
        *found.interval("head_z", "m", "noise", "resample", samples=20),
    ]
    monkeypatch.setattr("patchsweep.results.effects.AT_ONCE", 1)
    parts = [
        found.p_values("head_z", "m", "noise", "resample"),
        *found.interval("head_z", "m", "noise", "resample", samples=20),
    ]
    np.testing.assert_allclose(parts, whole, rtol=1e-12)
