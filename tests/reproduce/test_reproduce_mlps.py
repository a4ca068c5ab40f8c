"""Reproductions over layers: every number against full forwards with plain hooks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import patchsweep as ps
from oracle import oracle
from oracle.families import FAMILIES
from patchsweep.model.loading import load_tokenizer
from patchsweep.reproduce import arithmetic, facts, mlps, places, windows
from patchsweep.reproduce.experiment import Report, Setting
from patchsweep.reproduce.resampled import Drawn
from tiny import build

LAYERS = 6
LLAMA = FAMILIES["llama"]


def known_model() -> ps.Model:
    """A small random model in float64 that reads the packaged tokenizer's texts."""
    hf_model = build(LAYERS, intermediate_size=32, vocab=49152).double()
    return ps.wrap(hf_model, load_tokenizer("smollm2-135m"), "tiny")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(known_model(), 3, 0, tmp_path_factory.mktemp("reproduce"))


@pytest.fixture(scope="module")
def report(setting: Setting) -> Report:
    return facts.run(setting)


def logits(setting: Setting, pair: ps.Pair, layers: range, positions: list[int]) -> Any:
    """The corrupt run with the MLPs' clean outputs at some layers and positions."""
    sites = [("mlp_out", layer, None, positions) for layer in layers]
    return oracle.run_set(setting.model.hf_model, LLAMA, pair.corrupt, pair.clean, sites)


def metric(name: str, pair: ps.Pair, of: Any) -> float:
    if name == "prob":
        return float(oracle.prob(of, pair.answer))
    return float(oracle.logit_diff(of, pair.answer, pair.wrong))


def ends(setting: Setting, pair: ps.Pair, name: str) -> tuple[float, float]:
    clean, corrupt = (
        metric(name, pair, oracle.baseline(setting.model.hf_model, ids))
        for ids in (pair.clean, pair.corrupt)
    )
    return clean, corrupt


def expected(setting: Setting, pairs: list[ps.Pair], name: str, size: int) -> np.ndarray:
    """The joint effect of every window at the last subject token under STR."""
    base = [ends(setting, pair, name) for pair in pairs]
    span = np.mean([clean - corrupt for clean, corrupt in base])
    moved = [
        np.mean(
            [
                metric(name, pair, logits(setting, pair, range(i, i + size), at)) - corrupt
                for pair, (_, corrupt) in zip(pairs, base, strict=True)
                for at in [[pair.labels["SUBJECT_LAST"]]]
            ]
        )
        for i in range(LAYERS - size + 1)
    ]
    return np.array(moved) / (span if name == "logit_diff" else 1)


def table(report: Report, title: str) -> list[dict[str, str]]:
    found = next(t for t in report.tables if t.title == title)
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


@pytest.mark.parametrize("name", ["logit_diff", "prob"])
def test_windows_do_what_full_forwards_do(setting: Setting, report: Report, name: str) -> None:
    pairs, _ = facts.long_subjects(setting)
    results = facts.subject_sweeps(setting, pairs)["STR"]
    single = expected(setting, pairs, name, 1)
    sums = np.convolve(single, np.ones(3), "valid")
    joint, total = mlps.by_window(results, name, 3)
    np.testing.assert_allclose(joint, expected(setting, pairs, name, 3), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(total, sums, rtol=1e-7, atol=1e-9)
    shown = [
        row["peak at layers"]
        for row in table(report, "Peaks at the last subject token")
        if (row["metric"], row["corruption"]) == (mlps.NAMES[name], "STR")
    ]
    first = int(joint.argmax())
    assert shown[0] == f"{single.max():+#.3g} at {single.argmax()}"
    assert shown[1] == f"{joint.max():+#.3g} at {first}–{first + 2}"


@pytest.mark.usefixtures("report")
def test_all_pairs_drawn_once_are_the_results(setting: Setting) -> None:
    pairs, _ = facts.long_subjects(setting)
    results = facts.subject_sweeps(setting, pairs)["STR"]
    drawn = Drawn(results.store, results.changes, results.baseline, (2, 0, 1, 4, 5, 3))
    for name in mlps.METRICS:
        for size in (1, 3, 5):
            for found, whole in zip(
                mlps.by_window(drawn, name, size),
                mlps.by_window(results, name, size),
                strict=True,
            ):
                np.testing.assert_allclose(found, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("report")
def test_a_joint_effect_is_set_against_the_sum(setting: Setting) -> None:
    found = windows.run(setting)  # on the sweeps that are there
    pairs, _ = facts.long_subjects(setting)
    for name in ("logit_diff", "prob"):
        single = expected(setting, pairs, name, 1)
        # Of six layers the middle half is from 1 to 4: where the middle of a window has to lie.
        holds = all(
            expected(setting, pairs, name, size)[first].max()
            > np.convolve(single, np.ones(size), "valid")[first].max()
            for size, first in ((3, slice(0, 4)), (5, slice(0, 2)))
        )
        claim = f"STR, {mlps.NAMES[name]}: at the middle layers a window's joint effect"
        (finding,) = [f for f in found.findings if f.claim.startswith(claim)]
        assert finding.holds == holds


def known(setting: Setting, pair: ps.Pair) -> bool:
    return metric("logit_diff", pair, oracle.baseline(setting.model.hf_model, pair.clean)) > 0


def test_facts_are_known_both_ways_round_and_have_long_subjects(setting: Setting) -> None:
    pairs, tried = facts.long_subjects(setting)
    drawn = [p for p in facts.facts.stream(setting.tokenizer, 0) if "SUBJECT_3" in p.labels]
    ways = {(p.clean, p.corrupt): p for p in drawn}  # the task has both, in any order
    first = list({frozenset((p.clean, p.corrupt)): p for p in reversed(drawn)}.values())[::-1]
    first.sort(key=drawn.index)
    wanted: list[ps.Pair] = []
    count = 0
    for pair in first:
        count += 1
        other = ways[pair.corrupt, pair.clean]
        if known(setting, pair) and known(setting, other):
            wanted += [pair, other]
        if len(wanted) == 2 * setting.n:
            break
    assert pairs == wanted
    assert tried == count > 3


def test_too_few_known_facts_are_refused(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, _ = facts.long_subjects(setting)
    monkeypatch.setattr(facts.facts, "stream", lambda *_: iter(pairs[:4]))
    few = r"knows 2 of 2 pairs of facts .*, 3 are asked for: ask for fewer"
    with pytest.raises(ps.BadInput, match=few):
        facts.long_subjects(setting)


def test_windows_need_layers(setting: Setting) -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    )
    small = ps.wrap(LlamaForCausalLM(config), setting.tokenizer, "small")
    with pytest.raises(ps.BadInput, match="at least 3 layers, small has 2: choose a larger model"):
        windows.run(replace(setting, model=small))


@pytest.mark.parametrize(("name", "size"), [("logit_diff", 1), ("logit_diff", 3), ("prob", 3)])
@pytest.mark.usefixtures("report")
def test_places_are_means_over_their_tokens(setting: Setting, name: str, size: int) -> None:
    pairs, _ = facts.long_subjects(setting)
    results = mlps.sweeps(
        setting,
        "positions",
        pairs,
        facts.subject_labels(pairs),
        metrics=facts.SHOWN,
        windows=[3, 5],
    )["STR"]
    found = places.effects(results, name, size, pairs)
    assert found.shape == (LAYERS - size + 1, len(places.PLACES))
    base = [ends(setting, pair, name) for pair in pairs]
    for place in ("middle subject", "further", "last"):
        have = [i for i, pair in enumerate(pairs) if places.tokens(pair)[place]]
        moved = [
            np.mean(
                [
                    metric(name, pairs[i], logits(setting, pairs[i], range(2, 2 + size), [at]))
                    - base[i][1]
                    for at in places.tokens(pairs[i])[place]
                ]
            )
            for i in have
        ]
        span = np.mean([base[i][0] - base[i][1] for i in have]) if name == "logit_diff" else 1
        here = found[2, places.PLACES.index(place)]
        if have:
            assert here == pytest.approx(np.mean(moved) / span, rel=1e-7, abs=1e-9)
        else:
            assert np.isnan(here)


@pytest.mark.parametrize(
    ("subject", "length", "wanted"),
    [
        ((1, 4), 8, [[1], [2, 3], [4], [5], [6], [7]]),
        ((1, 3), 5, [[1], [2], [3], [], [], [4]]),
        ((0, 2), 3, [[0], [1], [2], [], [], []]),
    ],
)
def test_places_of_a_prompt(subject: tuple[int, int], length: int, wanted: list[list[int]]) -> None:
    first, last = subject
    labels = {"SUBJECT_1": first, "SUBJECT_LAST": last}
    pair = ps.Pair(tuple(range(length)), (), (99,), labels=labels)
    assert list(places.tokens(pair).values()) == wanted


def test_a_place_that_no_fact_has_is_empty() -> None:
    values = np.array([[0.1, 0.2, 0.4, np.nan, 0.0, 0.3], [0.0, 0.1, 0.2, np.nan, -0.1, 0.5]])
    (row,) = places.table({("STR", "prob", 1): values}).rows
    assert row[3:] == ("+0.100", "+0.300", "+0.600", "", "-0.100", "+0.800", "2.00")


def test_peak() -> None:
    found = mlps.peak(np.array([3.0, 0.0, 1.0, 0.0]), 5)
    assert str(found) == "+3.00 at 0–4"
    assert found.past_first == 1
    assert found.deviations == pytest.approx(2 / np.std([3, 0, 1, 0]))


def test_the_terms_of_the_metric_of_stolfo(setting: Setting, tmp_path: Path) -> None:
    own = Setting(setting.model, 2, 0, tmp_path)
    pairs = own.pairs("arithmetic", only_correct=True, operation="addition")
    terms = arithmetic._terms(arithmetic._sweeps(own, "addition")["STR"])

    def halves(pair: ps.Pair, layer: int) -> tuple[float, float]:
        patched = logits(own, pair, range(layer, layer + 1), [len(pair) - 1])
        corrupt = oracle.baseline(own.model.hf_model, pair.corrupt)
        of = oracle.prob
        gain = of(patched, pair.answer) / of(corrupt, pair.answer) - 1
        loss = of(corrupt, pair.wrong) / of(patched, pair.wrong) - 1
        return float(gain) / 2, float(loss) / 2

    wanted = np.array([[halves(pair, layer) for pair in pairs] for layer in range(LAYERS)])
    layer = int(wanted.sum(2).mean(1).argmax())
    sizes = np.abs(wanted[layer]).mean(0)
    assert terms.layer == layer
    assert [terms.answer, terms.wrong] == pytest.approx(wanted[layer].mean(0).tolist(), rel=1e-6)
    assert terms.share == pytest.approx(sizes[0] / sizes.sum(), rel=1e-6)


class Ends:
    """Unpatched runs with these logit differences."""

    def __init__(self, clean: float, corrupt: float) -> None:
        self.ends = np.array([clean, corrupt]).reshape(2, 1, 1, 1)

    def baseline(self, _: str) -> np.ndarray:
        return self.ends


def test_what_the_corruption_leaves_as_it_was_decides_nothing() -> None:
    terms = {
        "addition": arithmetic.Terms(3, 9.0, 0.1, 0.99, 1e-4),
        "subtraction": arithmetic.Terms(3, 0.1, 0.1, 0.5, 0.1),
    }
    lost: Any = {"STR": Ends(4.0, 1.9)}
    left: Any = {"STR": Ends(4.0, 2.1)}

    def holds(**found: Any) -> bool | None:
        return arithmetic._term_finding(terms, found).holds

    assert holds(addition=lost, subtraction=left) is True
    assert holds(addition=lost, subtraction=lost) is False
    assert holds(addition=left, subtraction=left) is None


@pytest.mark.slow
@pytest.mark.parametrize("run", [facts.run, windows.run, arithmetic.run])
def test_on_a_trained_model(run: Any, tmp_path: Path) -> None:
    setting = Setting(ps.load_model("smollm2-135m"), 4, 0, tmp_path)
    report = run(setting)
    text = report.write(tmp_path / "report").read_text()
    assert "| here it |" in text
    assert "nan" not in text
