"""Each diagnosis where it must speak, and where it must not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from patchsweep import diagnostics as d


def name(cell: Sequence[int]) -> str:
    return f"{cell[0]}.{cell[1]}@{cell[2]}"


SHAPE = (4, 3, 5)
EVERY = np.ones(SHAPE, bool)


def one(value: float, *others: tuple[tuple[int, int, int], float]) -> np.ndarray:
    """Small effects, with one cell of this value at 1.2@3 and others."""
    x = np.random.default_rng(0).uniform(-0.01, 0.01, SHAPE)
    x[1, 2, 3] = value
    for place, other in others:
        x[place] = other
    return x


def test_small_denominators() -> None:
    [line] = d.small_denominators(np.array([4.0, 0.1, -3.0]), "logit_diff")
    assert "below 5% of the largest in pair 1" in line
    assert d.small_denominators(np.array([4.0, 0.3]), "logit_diff") == []


def test_metrics_that_disagree() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal(SHAPE), rng.standard_normal(SHAPE)
    a[1, 2, 3] = 99.0
    [line] = d.disagreement({"logit_diff": a, "prob": b}, EVERY, name)
    assert line.startswith("logit_diff and prob disagree (rank correlation ")
    assert "1.2@3" in line.split("of logit_diff alone: ")[1].split(";")[0]
    assert d.disagreement({"logit_diff": a, "prob": a * 2}, EVERY, name) == []


def test_a_probability_that_cannot_fall() -> None:
    [line] = d.saturated("prob", np.array([0.001, 0.002]), "denoise")
    assert "negative components stay hidden" in line
    [line] = d.saturated("logprob", np.log([0.999, 0.998]), "noise")
    assert "cannot show what adds" in line
    assert d.saturated("prob", np.array([0.3, 0.6]), "noise") == []


def test_discrete_metrics_that_never_change() -> None:
    change, run = np.zeros((2, *SHAPE)), np.ones((2, *SHAPE), bool)
    [line] = d.never_changed("rank", change, run)
    assert "changed in none of the 120 cells" in line
    change[0, 1, 1, 1] = 3
    assert d.never_changed("rank", change, run) == []


def test_cells_below_the_noise_floor() -> None:
    change = np.full((2, *SHAPE), 1e-3)
    change[1, 0, 0, 0] = 1e-7
    run = np.ones_like(change, bool)
    [line] = d.below_noise("logit_diff", change, run, np.array([1e-6, 1e-6]))
    assert "1 of 120 cells" in line
    assert d.below_noise("logit_diff", change, run, np.array([1e-6, 1e-8])) == []


def test_and_or() -> None:
    lines = d.and_or(one(0.9), one(0.01, ((0, 0, 0), -0.8)), name)
    assert lines == [
        "matter when noised, not when denoised (parts of an AND): 0.0@0",
        "matter when denoised, not when noised (parts of an OR, or backed up): 1.2@3",
    ]
    assert d.and_or(one(0.9), one(0.8), name) == []


def test_negative_components() -> None:
    assert d.negative(one(0.9, ((3, 1, 4), -0.7)), name) == ["negative: 3.1@4"]
    assert d.negative(one(0.9), name) == []


def test_joint_effects() -> None:
    [line] = d.backup(0.9, [0.1, 0.2], "noise")
    assert "backup" in line
    [line] = d.backup(0.5, [0.5, 0.6], "denoise")
    assert "they overlap" in line
    assert d.backup(0.31, [0.1, 0.2], "noise") == []
