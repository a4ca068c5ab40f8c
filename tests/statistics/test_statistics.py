"""Uncertainty over pairs against loops, scipy and simulated data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from patchsweep.errors import BadInput
from patchsweep.statistics.uncertainty import (
    adjusted,
    beyond_sd,
    bootstrap,
    p_values,
    standard_error,
)

RNG = np.random.default_rng(0)
ALONE = [""] * 12
PAIRED = [f"t{i // 2}" for i in range(12)]


@pytest.mark.parametrize("groups", [ALONE, PAIRED])
@pytest.mark.parametrize("normalised", [True, False])
def test_bootstrap_against_a_loop(groups: list[str], normalised: bool) -> None:
    change, span = RNG.standard_normal((12, 2, 3)), RNG.uniform(1, 2, 12)
    change[3, 0, 1] = np.nan
    found = bootstrap(change, span if normalised else None, groups, samples=200, seed=4)
    clusters = (
        [[i] for i in range(12)] if groups == ALONE else [[2 * i, 2 * i + 1] for i in range(6)]
    )
    rng = np.random.default_rng(4)
    effects = []
    for drawn in rng.integers(len(clusters), size=(200, len(clusters))):
        pairs = [pair for c in drawn for pair in clusters[c]]
        top, below = np.zeros((2, 3)), np.zeros((2, 3))
        for i in pairs:
            there = np.isfinite(change[i])
            top += np.where(there, change[i], 0)
            below += there * (span[i] if normalised else 1)
        effects.append(top / below)
    np.testing.assert_allclose(found.low, np.quantile(effects, 0.025, axis=0), rtol=1e-10)
    np.testing.assert_allclose(found.high, np.quantile(effects, 0.975, axis=0), rtol=1e-10)


def test_bootstrap_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    change = rng.normal(0.3, 1, (60, 400))
    low, high = bootstrap(change, np.ones(60), [""] * 60, samples=400)
    assert 0.90 < ((low < 0.3) & (high > 0.3)).mean() < 0.98
    # Pairs of one template that all say the same are one piece of evidence.
    same = np.repeat(change[:10], 6, axis=0)
    names = [f"t{i // 6}" for i in range(60)]
    narrow = bootstrap(same, np.ones(60), [""] * 60, samples=400)
    wide = bootstrap(same, np.ones(60), names, samples=400)
    assert np.mean(wide.high - wide.low) > 2 * np.mean(narrow.high - narrow.low)
    assert np.isnan(bootstrap(same[:6], None, names[:6]).low).all()


def test_a_cell_that_one_template_has_is_not_certain() -> None:
    change = RNG.standard_normal((12, 3))
    change[1:, 0] = np.nan  # one pair
    change[2:, 1] = np.nan  # two pairs of one template
    low, high = bootstrap(change, np.ones(12), PAIRED, samples=50)
    assert np.isnan([low[:2], high[:2]]).all()
    assert low[2] < high[2]
    assert np.isnan(p_values(change, PAIRED)).tolist() == [True, True, False]
    low, high = bootstrap(change, np.ones(12), ALONE, samples=50)
    assert np.isnan(low).tolist() == [True, False, False]


def test_a_pair_without_a_span_counts_in_neither_sum() -> None:
    change, span = RNG.standard_normal((12, 3)), RNG.uniform(1, 2, 12)
    without = change.copy()
    without[3] = np.nan
    expected = bootstrap(without, span, ALONE, samples=100)
    span[3] = np.nan
    found = bootstrap(change, span, ALONE, samples=100)
    assert np.isfinite(expected.low).all()
    np.testing.assert_array_equal(found, expected)


def test_tiles_do_not_change_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    change, span = RNG.standard_normal((12, 2, 5)), RNG.uniform(1, 2, 12)
    whole = bootstrap(change, span, PAIRED, samples=100)
    monkeypatch.setattr("patchsweep.statistics.uncertainty.VALUES", 300)  # three cells at a time
    tiled = bootstrap(change, span, PAIRED, samples=100)
    np.testing.assert_allclose(tiled, whole, rtol=1e-12)
    monkeypatch.setattr("patchsweep.statistics.uncertainty.VALUES", 1)
    np.testing.assert_allclose(bootstrap(change, span, PAIRED, samples=100), whole, rtol=1e-12)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"level": 0.0}, {"level": 1.0}, {"level": 95}])
def test_impossible_intervals_are_refused(wrong: dict[str, Any]) -> None:
    [(option, value)] = wrong.items()
    with pytest.raises(BadInput, match=f"{option} is {value}") as error:
        bootstrap(np.ones((2, 1)), None, ["", ""], **wrong)
    assert "\n" not in str(error.value)


def test_p_values_against_scipy() -> None:
    change = RNG.standard_normal((12, 5))
    change[:, 1], change[:, 2] = 0.0, 0.7
    change[2, 3] = np.nan
    found = p_values(change, ALONE)
    expected = stats.ttest_1samp(change[:, 0], 0).pvalue
    assert found[0] == pytest.approx(expected, rel=1e-10)
    assert found[1] == 1.0
    assert found[2] < 1e-12
    with_gap = change[np.isfinite(change[:, 3]), 3]
    assert found[3] == pytest.approx(stats.ttest_1samp(with_gap, 0).pvalue, rel=1e-10)
    means = change[:, 4].reshape(6, 2).mean(1)
    by_template = p_values(change, PAIRED)
    assert by_template[4] == pytest.approx(stats.ttest_1samp(means, 0).pvalue, rel=1e-10)
    assert np.isnan(p_values(change[:1], ALONE[:1])).all()


def test_adjusted_controls_false_discoveries() -> None:
    p = np.array([0.01, np.nan, 0.02, 0.9, 0.03])
    expected = [0.01 * 4 / 1, np.nan, 0.02 * 4 / 2, 0.9, 0.03 * 4 / 3]
    np.testing.assert_allclose(adjusted(p), expected)
    assert np.isnan(adjusted(np.array([np.nan]))).all()


def test_the_2_sd_rule() -> None:
    effect = np.concatenate([np.zeros(99), [1.0], [np.nan, np.inf]])
    assert np.flatnonzero(beyond_sd(effect)).tolist() == [99]
    # By hand: mean 2, population deviation 4, so 10 is 2 of them away and no more.
    effect = np.array([10.0, 0.0, 0.0, 0.0, 0.0])
    assert not beyond_sd(effect).any()
    assert beyond_sd(effect, 1.99).tolist() == [True, False, False, False, False]
    assert beyond_sd(-effect, 1.99).tolist() == [True, False, False, False, False]
    assert not beyond_sd(np.full(7, 0.1)).any()
    assert not beyond_sd(np.full(3, np.nan)).any()


def test_standard_error() -> None:
    values = RNG.standard_normal((5, 2))
    np.testing.assert_allclose(standard_error(values, 0), stats.sem(values, axis=0))
    assert np.isnan(standard_error(values[:1], 0)).all()
