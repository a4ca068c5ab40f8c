"""What is said to hold of the papers' claims: on planted effects, where the truth is known, and in
resamples of the pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pytest

from patchsweep.reproduce import (
    arithmetic,
    docstring,
    facts,
    ioi,
    mlps,
    movers,
    places,
    published,
    roles,
    windows,
)
from patchsweep.reproduce.experiment import Finding, Report, markdown
from patchsweep.reproduce.heads import METRICS, Heads
from patchsweep.reproduce.resampled import DRAWS, Drawn, effect_of, sure
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
        lambda *_, **__: (values[:, :, None, None], (both[0] - both[1])[0, 0]),
        lambda _: both,
        tuple(range(pairs)),
    )


def test_negative_heads_that_probability_misses() -> None:
    assert ioi._no_negative(every(STR_prob=MANY)).holds is True
    assert ioi._no_negative(every()).holds is False
    none = every(STR_prob=MANY, STR_logit_diff=MANY)
    assert ioi._no_negative(none).holds is False


@pytest.mark.parametrize("corruption", ["STR", "GN"])
def test_negative_name_movers_that_probability_misses(corruption: str) -> None:
    movers = ("10.7", "11.10")
    both, first = MANY | NEGATIVE | {"11.10": -0.6}, MANY | NEGATIVE
    missed = {"logit_diff": both, "prob": MANY, "kl": both}

    def holds(heads: Sequence[str] = movers, **changed: Mapping[str, float]) -> bool | None:
        by = {f"{corruption}_{m}": planted for m, planted in (missed | changed).items()}
        return ioi._missed(heads, every(**by), corruption).holds

    assert holds() is True
    assert holds(prob=first) is False
    assert holds(kl=first) is False
    assert holds(logit_diff=MANY) is False
    assert holds(heads=()) is None


def test_the_papers_lists_say_what_is_claimed_of_them() -> None:
    """The claims on the lists that they were read from: all of them hold."""
    known = published.circuit("gpt2-small")
    assert known
    circuit = roles.Circuit(known, 1, known=True)
    lists = published.lists(ioi.NAME)
    table4, table5 = ([s for s in lists if s.corrupted == kind] for kind in ("s1_io", "s2"))
    for corruption in ("STR", "GN"):
        assert ioi._missed(known[roles.NEGATIVE], table4, corruption).holds is True
    assert ioi._first_layer(table5).holds is True
    assert [f.holds for f in roles.findings(circuit, table5)] == [True, True]


def test_negative_heads_of_the_first_layer() -> None:
    first = MANY | {"0.10": -0.7}
    assert ioi._first_layer(every(GN_prob=first, GN_kl=first)).holds is True
    assert ioi._first_layer(every(GN_prob=first)).holds is False
    assert ioi._first_layer(every()).holds is False
    assert ioi._first_layer(every(GN_prob=first, GN_kl=first, STR_kl=first)).holds is False
    positive = MANY | {"0.10": 0.7}
    assert ioi._first_layer(every(GN_prob=positive, GN_kl=positive)).holds is False


def test_heads_by_class() -> None:
    known = published.circuit("gpt2-small")
    assert known
    circuit = roles.Circuit(known, 1, known=True)
    table5 = [said for said in published.lists(ioi.NAME) if said.corrupted == "s2"]
    here = heads("GN", "prob", MANY | {"0.10": -0.7, "4.4": 0.8})
    found = roles.table(circuit, [here], table5, "S2 corrupted")
    # name movers, duplicate token, S-inhibition, negative name movers, induction; by hand
    assert [row[:3] for row in found.rows] == [
        ("GN", "probability", "here"),
        ("GN", "probability", "Table 5"),
    ]
    assert [row[3:] for row in found.rows] == [
        ("2 of 3: +9.6 +9.9", "1 of 3: −0.10", "0 of 4", "0 of 2", "0 of 4", "1: +4.4"),
        (
            "0 of 3",
            "2 of 3: −0.10 +3.0",
            "2 of 4: +7.9 +8.6",
            "2 of 2: −10.7 −11.10",
            "1 of 4: +5.5",
            "0",
        ),
    ]


def test_claims_of_classes() -> None:
    known = published.circuit("gpt2-small")
    assert known
    circuit = roles.Circuit(known, 1, known=True)
    duplicate, other = {"3.0": 0.8}, {"4.4": 0.8}
    as_in_the_paper = {f"GN_{m}": duplicate for m in METRICS}
    as_in_the_paper["GN_logit_diff"] = duplicate | MANY

    def holds(of: roles.Circuit = circuit, **by: Mapping[str, float]) -> list[bool | None]:
        return [f.holds for f in roles.findings(of, every(**(as_in_the_paper | by)))]

    assert holds() == [True, True]
    assert holds(GN_kl=other) == [False, True]
    assert holds(STR_kl=MANY | duplicate) == [False, True]
    assert holds(STR_prob=other) == [True, False]
    assert holds(GN_prob=duplicate | MANY) == [True, False]
    none = roles.Circuit(dict.fromkeys(roles.CLASSES, ()), 1)
    assert holds(none) == [None, None]


def test_what_a_head_attends_to() -> None:
    def look(**to: float) -> dict[tuple[str, str], float]:
        given = {"IO": 0.1, "S1": 0.1, "S2": 0.1, "same": 0.1, "after": 0.1} | to
        return dict(zip(roles.LOOKS, given.values(), strict=True))

    assert roles.inhibits(look(S2=0.2))
    assert not roles.inhibits(look(S2=0.2, S1=0.3))
    assert not roles.inhibits(look(S2=0.2, IO=0.3))
    assert roles.repeats(look(same=0.4, after=0.3)) == roles.DUPLICATE
    assert roles.repeats(look(same=0.3, after=0.4)) == roles.INDUCTION
    assert roles.repeats(look(same=0.19, after=0.19, S2=0.9)) is None


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


def by_place(last: Sequence[float], middle: Sequence[float]) -> np.ndarray:
    """Effects [layer, place] with these at the last and at the middle subject tokens."""
    values = np.full((len(last), len(places.PLACES)), 0.1)
    values[:, places.PLACES.index("last subject")] = last
    values[:, places.PLACES.index("middle subject")] = middle
    return values


def test_a_weight_is_a_ratio_of_sums_over_layers() -> None:
    values = by_place([0.5, 0.0, 0.1], [0.1, 0.1, 0.1])
    assert places.weight(values) == pytest.approx(2.0)  # of the largest effects: 5
    assert np.isnan(places.weight(by_place([0.5, 0.1], [0.3, -0.4])))
    (row,) = places.table({("STR", "prob", 5): values}).rows
    assert row == ("STR", "probability", "5", "+0.300", "+0.300", "+0.600", *["+0.300"] * 3, "2.00")


def test_weights_of_places() -> None:
    other = by_place([0.2, 0.2], [0.1, 0.1])

    def holds(at: int, last: Sequence[float], middle: Sequence[float]) -> list[bool | None]:
        """With these in the windows of so many layers, by probability; a ratio of 3 in others."""
        found = {("STR", "logit_diff", size): other for size in (1, 3, 5)}
        found |= {("STR", "prob", size): by_place([0.3, 0.3], [0.1, 0.1]) for size in (1, 3, 5)}
        found["STR", "prob", at] = by_place(last, middle)
        return [f.holds for f in places.findings(found, 5)]

    assert holds(5, [0.3, 0.3], [0.1, 0.1]) == [True, True]
    # The largest effect is three times that of the middle ones, the sum only one and a half.
    assert holds(5, [0.3, 0.0], [0.1, 0.1]) == [False, True]
    assert holds(1, [0.1, 0.1], [0.1, 0.1]) == [True, False]
    assert holds(5, [0.3, 0.3], [-0.1, 0.0]) == [None, True]


class Windows:
    """Planted windows: size -> the joint effects and the sums of single layers, [first layer]."""

    def __init__(self, **by: tuple[np.ndarray, np.ndarray]) -> None:
        self.by = {int(name[1:]): curves for name, curves in by.items()}

    def window_sizes(self, _: str) -> tuple[int, ...]:
        return tuple(size for size in self.by if size > 1)


def curve(size: int, **peaks: float) -> np.ndarray:
    """A flat curve over the windows of `size` of 24 layers, with peaks at first layers (_9=0.5)."""
    values = np.full(24 - size + 1, 0.1)
    for first, height in peaks.items():
        values[int(first[1:])] = height
    return values


def test_windows_of_the_middle_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlps, "by_window", lambda results, _, size: results.by[size])
    single = (curve(1, _0=0.9), curve(1))
    joint = curve(5, _9=0.6)
    large = curve(5, _0=2.0)  # the largest sum is at the first layers

    def holds(joint: np.ndarray, total: np.ndarray, single: Any = single) -> list[bool | None]:
        planted = cast(Results, Windows(_1=single, _5=(joint, total)))
        return [f.holds for f in windows._findings({"STR": planted}, 24)]

    # for both metrics: joint above the sum, no peak of single layers; then the median of all
    assert holds(joint, large) == [True, True] * 2 + [True]
    assert holds(joint, curve(5, _9=0.7)) == [False, True] * 2 + [False]
    assert holds(curve(5, _0=2.0), curve(5, _9=0.3)) == [False, False] * 2 + [False]
    high = (curve(1, _9=0.5), curve(1))
    assert holds(joint, large, high) == [True, False] * 2 + [True]
    assert holds(joint, -large)[-1] is None


def test_middle_layers() -> None:
    """By hand: of 48 layers 12 to 35, of 30 layers 7 to 22, are the middle of a window."""
    assert mlps.middle(48, 1) == range(12, 36)
    assert mlps.middle(48, 5) == range(10, 34)
    assert mlps.middle(30, 5) == range(5, 21)
    assert mlps.middle(3, 3) == range(1)
    found = mlps.peak(np.array([9.0, 0.0, 1.0, 0.0, 5.0]), 1, range(1, 4))
    assert (found.height, found.layers) == (1.0, range(2, 3))


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


def test_both_ways_of_a_pair_are_drawn_together() -> None:
    values = np.arange(6.0)[:, None]
    drawn: list[tuple[int, ...]] = []

    def claims(_: Mapping[str, Results], pairs: Sequence[int]) -> list[Finding]:
        drawn.append(tuple(pairs))
        return [Finding("", "", "", True)]

    sure(claims, {"a": results(values)}, 3, ways=2)
    assert drawn[0] == tuple(range(6))
    assert len(drawn) == DRAWS + 1
    for pairs in drawn:
        assert all(b == a + 1 and a % 2 == 0 for a, b in zip(pairs[::2], pairs[1::2], strict=True))
    assert len({pairs[::2] for pairs in drawn}) == 3**3  # every draw of three with replacement


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
    drawn = Drawn(cast(Store, None), lambda *_, **__: (moved, span), lambda _: span, pairs)
    found, _ = effect_of(*drawn.changes("head_z", "logit_diff", "denoise"))
    for layer in range(4):
        use = [p for p in pairs if np.isfinite(moved[p, layer, 0, 0])]
        by_hand = sum(moved[p, layer, :, 0] for p in use) / sum(span[p] for p in use)
        np.testing.assert_allclose(found[layer, :, 0], by_hand, rtol=1e-12)
