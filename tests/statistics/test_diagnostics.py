"""Each diagnosis where it must speak, and where it must not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from patchsweep.statistics import diagnostics as d


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
    [line] = d.small_denominators(np.array([4.0, 0.1, -3.0]))
    assert "below 5% of the largest in pair 1, whose" in line
    assert d.small_denominators(np.array([4.0, 0.3])) == []


def test_metrics_that_disagree() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal(SHAPE), rng.standard_normal(SHAPE)
    a[1, 2, 3] = 99.0
    [line] = d.disagreement({"logit_diff": a, "prob": b}, EVERY, name)
    assert line.startswith("logit_diff and prob disagree (rank correlation ")
    assert "1.2@3" in line.split("of logit_diff alone: ")[1].split(";")[0]
    assert d.disagreement({"logit_diff": a, "prob": a * 2}, EVERY, name) == []
    # A metric that falls where another rises ranks alike.
    assert d.disagreement({"logit_diff": a, "kl": -a}, EVERY, name) == []


def test_metrics_that_differ_only_below_the_top_agree() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.uniform(0, 0.01, SHAPE), rng.uniform(0, 0.01, SHAPE)
    a.flat[:50:5] = b.flat[:50:5] = np.arange(1, 11)
    assert d.disagreement({"logit_diff": a, "prob": b}, EVERY, name) == []
    b.flat[3] = 20.0
    [line] = d.disagreement({"logit_diff": a, "prob": b}, EVERY, name)
    assert line.endswith("of logit_diff alone: 0.0@0; of prob alone: 0.0@3")


def test_of_few_cells_all_are_at_the_top() -> None:
    a, b = np.arange(6.0).reshape(1, 2, 3), np.array([[[2.0, 5, 1], [4, 3, 0]]])
    [line] = d.disagreement({"logit_diff": a, "prob": b}, np.ones((1, 2, 3), bool), name)
    assert line.startswith("logit_diff and prob disagree (rank correlation -0.")
    assert line.endswith(")")


def test_structural_cells_make_no_agreement() -> None:
    rng = np.random.default_rng(1)
    a, b, run = np.zeros(SHAPE), np.zeros(SHAPE), np.zeros(SHAPE, bool)
    run[:2] = True
    a[:2], b[:2] = rng.uniform(1, 2, (2, 3, 5)), rng.uniform(1, 2, (2, 3, 5))
    assert len(d.disagreement({"logit_diff": a, "prob": b}, run, name)) == 1
    assert d.disagreement({"logit_diff": a, "prob": b}, EVERY, name) == []


def test_a_probability_that_cannot_fall() -> None:
    [line] = d.saturated("prob", np.array([0.001, 0.002]), "denoise")
    assert "negative components stay hidden" in line
    [line] = d.saturated("logprob", np.log([0.999, 0.998]), "noise")
    assert "cannot show what adds" in line
    assert d.saturated("prob", np.array([0.3, 0.6]), "noise") == []
    assert len(d.saturated("prob_at_S2", np.array([np.nan, 0.001]), "denoise")) == 1
    assert d.saturated("prob", np.array([np.nan, np.nan]), "denoise") == []
    # A log-probability falls without end, whatever it starts from.
    assert d.saturated("logprob", np.log([0.001, 0.002]), "denoise") == []
    # Other metrics have no such ends, whatever their names begin with.
    assert d.saturated("probe_head_z_3", np.array([-2.0, 3.0]), "denoise") == []
    assert d.saturated("prob_diff", np.array([0.0, 0.0]), "denoise") == []


def test_discrete_metrics_that_never_change() -> None:
    [line] = d.never_changed("rank", 0, 120)
    assert "changed in none of the 120 cells" in line
    assert d.never_changed("rank", 1, 120) == []
    assert d.never_changed("rank", 0, 0) == []


def test_cells_below_the_noise_floor() -> None:
    [line] = d.below_noise({"logit_diff": (1, 120, 1e-6), "kl": (0, 120, 1e-5), "prob": (3, 90, 0)})
    assert line.startswith("of 120 cells that were run some changed no more than a null patch does")
    assert "by logit_diff 1, prob 3:" in line  # of kl there is nothing to say
    assert "1.0e-06" in line
    assert d.below_noise({"logit_diff": (0, 120, 1e-6)}) == []


def test_pairs_that_are_few_wrong_or_unequal() -> None:
    assert d.few_pairs(20, 20) == []
    assert d.few_pairs(19, 20) == ["19 pairs: intervals over them are wide"]
    assert d.few_pairs(1, 20) == ["1 pair: how effects vary over prompts is not known"]
    assert d.wrong_answers(np.array([1.0, 2.0])) == []
    [line] = d.wrong_answers(np.array([1.0, 0.0, -2.0, np.nan]))
    assert "in 2 of 4 pairs" in line
    assert d.unlikely_answers(np.array([0.0, 0.0])) == []
    [line] = d.unlikely_answers(np.array([0.0, 3.0, 9.0]))
    assert "in 2 of 3 pairs (mean rank 4)" in line
    assert d.by_index(True, [3, 3]) == d.by_index(False, [3, 4]) == []
    [line] = d.by_index(True, [3, 5, 4])
    assert "3 to 5 tokens" in line


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
    assert "they may overlap" in line
    assert d.backup(0.31, [0.1, 0.2], "noise") == []
    assert d.backup(1e-9, [0.5, -0.5], "noise") == []  # they cancel, alone and together
    [line] = d.backup(-0.3, [0.1, 0.2], "noise")
    assert "act on one another" in line
    assert d.backup(float("nan"), [0.1], "noise") == []
