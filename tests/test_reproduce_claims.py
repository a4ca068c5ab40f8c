"""What is said to hold of the papers' claims: on planted effects, where the truth is known, and in
resamples of the pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pytest

from patchsweep.reproduce import arithmetic, docstring, facts, ioi, movers, places
from patchsweep.reproduce.experiment import Finding, Report, markdown
from patchsweep.reproduce.heads import METRICS, Heads
from patchsweep.reproduce.resampled import DRAWS, Drawn, sure
from patchsweep.results import Results
from patchsweep.store import Store

NEGATIVE = {"10.7": -0.7}
MANY = {"9.6": 0.8, "9.9": 0.9}


def heads(corruption: str, metric: str, planted: Mapping[str, float]) -> Heads:
    """Effects of 12 × 12 heads: small noise, and some large ones."""
    effect = np.random.default_rng(0).normal(0, 0.01, (12, 12))
    for head, value in planted.items():
        layer, number = map(int, head.split("."))
        effect[layer, number] = value
    return Heads(corruption, metric, effect)


def every(**by: Mapping[str, float]) -> list[Heads]:
    """The same heads by all metrics, but for those named as CORRUPTION_metric."""
    return [
        heads(c, m, by.get(f"{c}_{m}", MANY | NEGATIVE)) for c in ("STR", "GN") for m in METRICS
    ]


def results(values: np.ndarray, ends: Sequence[Sequence[float]] = ((1.0,), (0.0,))) -> Results:
    """Planted results of MLPs: their changes are `values` [pair, layer] by all metrics, the
    baselines `ends` [run, pair]."""
    pairs = len(values)
    both = np.broadcast_to(np.array(ends)[:, None, None], (2, 1, 1, pairs))
    return Drawn(
        cast(Store, None),
        lambda *_: (values[:, :, None, None], (both[0] - both[1])[0, 0]),
        lambda _: both,
        tuple(range(pairs)),
    )


def test_negative_heads_that_probability_misses() -> None:
    holds = ioi._no_negative(every(STR_prob=MANY), "S2", "Table").holds
    assert holds is True
    assert ioi._no_negative(every(), "S2", "Table").holds is False
    none = every(STR_prob=MANY, STR_logit_diff=MANY)
    assert ioi._no_negative(none, "S2", "Table").holds is False


def test_negative_heads_of_the_first_layer() -> None:
    first = MANY | {"0.10": -0.7}
    assert ioi._first_layer(every(GN_prob=first)).holds is True
    assert ioi._first_layer(every()).holds is False
    assert ioi._first_layer(every(GN_prob=first, STR_kl=first)).holds is False
    assert ioi._first_layer(every(GN_prob=MANY | {"0.10": 0.7})).holds is False


def test_the_same_heads_by_all_metrics() -> None:
    assert ioi._same_by_noise(every()).holds is True
    assert ioi._same_by_noise(every(GN_prob=MANY)).holds is False
    positive = {f"GN_{metric}": MANY for metric in METRICS}
    assert ioi._same_by_noise(every(**positive)).holds is False


def test_heads_of_docstrings() -> None:
    none: dict[str, float] = {}
    quiet = [Heads(h.corruption, h.metric, h.effect * 0) for h in every()]
    assert docstring._no_head_by_probability(quiet).holds is True
    assert docstring._no_head_by_probability(every(STR_prob=none)).holds is False
    few = every(GN_logit_diff=NEGATIVE | {"9.9": 0.9}, GN_kl=NEGATIVE | {"9.9": 0.9})
    assert docstring._fewer_by_noise(few).holds is True
    assert docstring._fewer_by_noise(every()).holds is False


def test_peaks_of_arithmetic() -> None:
    sharp, flat = np.zeros((2, 12)), np.tile(np.arange(12) / 12, (2, 1))
    sharp[:, 7] = 1
    by = {"STR": results(sharp), "GN": results(flat)}

    def holds(found: Mapping[str, Results]) -> list[bool | None]:
        return [f.holds for f in arithmetic._peak_findings(dict.fromkeys(found_of, found))]

    found_of = ("addition", "subtraction", "multiplication")
    assert holds(by) == [True, True, False]
    assert holds({"STR": by["STR"], "GN": by["STR"]}) == [False, False, True]
    assert holds({"STR": by["GN"], "GN": by["STR"]}) == [False, False, False]
    left = results(flat, [[1.0], [0.9]])
    assert holds({"STR": by["STR"], "GN": left}) == [None, None, None]


def test_peaks_of_facts() -> None:
    flat = np.tile(np.arange(12) / 12, (2, 1))
    peak = flat / 10
    peak[:, 7] = 3.0
    for token, noise, holds in ((flat, peak, [True, True]), (peak, peak, [False, False])):
        found = {"STR": results(token), "GN": results(noise)}
        assert [f.holds for f in facts._peak_findings(found, 1)] == holds
    high = {"STR": results(flat), "GN": results(peak * 3)}
    assert [f.holds for f in facts._peak_findings(high, 1)] == [True, False]


def test_weights_of_places() -> None:
    def holds(last: float, middle: float) -> bool | None:
        row = np.array([[0.1, middle, last, 0.0, 0.0, 0.0]])
        other = np.array([[0.1, 0.1, 0.2, 0.0, 0.0, 0.0]])
        [found] = places.findings({("STR", "prob"): row, ("STR", "logit_diff"): other})
        return found.holds

    assert [holds(0.3, 0.1), holds(0.1, 0.1), holds(0.3, -0.1)] == [True, False, None]


def test_what_is_recovered_is_decided_by_what_was_lost() -> None:
    lost = movers.Gain(2.0, 1.0, 1.75, 0.1)
    left = movers.Gain(2.0, 1.0, 1.25, 0.1)
    assert ioi._recovers(lost, left) is True
    assert ioi._recovers(left, left) is False
    assert ioi._recovers(lost, lost) is False
    for error in (0.6, np.nan):
        unsure = movers.Gain(2.0, 1.0, 1.25, error)
        assert np.isnan(unsure.share)
        assert ioi._recovers(lost, unsure) is None


def test_how_often_a_claim_holds() -> None:
    values = np.array([[1.0], [1.0], [1.0], [-1.0]])
    both = {"a": results(values), "b": results(values)}

    def claims(found: Mapping[str, Results], pairs: Sequence[int]) -> list[Finding]:
        means = [float(x.changes("mlp_out", "prob", "denoise")[0].mean()) for x in found.values()]
        said: list[Any] = [means[0] > 0, True, False, None, means[0] == means[1]]
        said.append(means[0] == values[list(pairs)].mean())
        return [Finding("", "", "", holds) for holds in said]

    first, *others = (f.sure for f in sure(claims, both, 4))
    assert others == [1.0, 0.0, None, 1.0, 1.0]
    assert first is not None
    odds = 0.75**4 + 4 * 0.75**3 * 0.25  # three or four of four draws
    assert abs(first - odds) < 5 * np.sqrt(odds * (1 - odds) / DRAWS)
    assert sure(claims, both, 4) == sure(claims, both, 4)
    one = {name: results(values[:1]) for name in both}
    assert {f.sure for f in sure(claims, one, 1)} == {None}


def test_the_report_says_how_often() -> None:
    said = (Finding("it is so", "§1", "0.5", True, 0.625), Finding("it is not", "§2", "0.1", None))
    text = markdown(Report("A title", (), findings=said))
    assert "| it is so | §1 | 0.5 | holds | 62% |" in text
    assert "| it is not | §2 | 0.1 | not decided |  |" in text


@pytest.mark.parametrize("pairs", [(0, 1, 2), (2, 0, 2)])
def test_resampled_effects(pairs: tuple[int, ...]) -> None:
    """A ratio of means over the drawn pairs; pairs without the cell are left out of both."""
    rng = np.random.default_rng(0)
    moved, span = rng.normal(size=(3, 4, 2, 1)), rng.uniform(1, 2, 3)
    moved[0, 1] = np.nan
    drawn = Drawn(cast(Store, None), lambda *_: (moved, span), lambda _: span, pairs)
    found = drawn.effect("head_z", "logit_diff", "denoise")
    for layer in range(4):
        use = [p for p in pairs if np.isfinite(moved[p, layer, 0, 0])]
        by_hand = sum(moved[p, layer, :, 0] for p in use) / sum(span[p] for p in use)
        np.testing.assert_allclose(found[layer, :, 0], by_hand, rtol=1e-12)
