"""Edges that are run against two full forwards for each, with plain hooks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import patchsweep as ps
from edge_runs import Ran, ran
from estimates import built, linear_model, logit_diff, runs
from inputs import Letters, pair_of, three, unequal
from oracle import paths
from oracle.families import EXACT, FAMILIES, Family
from patchsweep.pairs import Pair
from patchsweep.sites import Node, Status

LAYERS = 3


@cache
def two_pairs() -> list[Pair]:
    """Of equal length, and of unequal length with an alignment that leaves some tokens out."""
    rng = np.random.default_rng(0)  # the first two differ from their second token on
    return [pair_of(rng, 8, 1, labels={"END": 7, "S": 3}), unequal(rng, 7, 2)]


def place(node: Node) -> tuple[str, int, int]:
    return node.component, node.layer or 0, node.unit or 0


def aligned(pair: Pair, direction: str, clean: Sequence[int]) -> dict[int, int]:
    """The destination's positions, with the source's, that these of the clean prompt are."""
    other = pair.alignment
    both = {int(p): int(other[p]) for p in clean if p < len(pair) and other[p] >= 0}
    return both if direction == "noise" else {o: p for p, o in both.items()}


def check(
    found: Ran, hf_model: Any, family: Family, through: str, tolerance: float, edges: int = 10
) -> None:
    """Some random edges of every direction, pair and entry again."""
    plan, rng = found.plan, np.random.default_rng(0)
    table = plan.layouts.edges
    assert table is not None
    for d, direction in enumerate(plan.directions):
        for i, pair in enumerate(plan.pairs):
            two = paths.two(hf_model, family, *runs(pair, direction))
            metric, status = logit_diff(pair), found.status["logit_diff"][d, 0, 0, i]
            drawn = rng.permutation(np.argwhere(status == Status.EXACT))[:edges]
            still = rng.permutation(np.argwhere(status == Status.STRUCTURAL))[: edges // 4]
            assert len(drawn) == edges
            for entry, receiver, sender in (*drawn, *still):
                members = np.flatnonzero(table.positions.members[i, entry])
                positions = aligned(pair, direction, members)
                a, b = (place(x) for x in (found.senders[sender], found.receivers[receiver]))
                logits, would_be = two.first([a], positions, through)
                if b[0] != "logits":
                    logits = two.second([b], list(positions), would_be)
                if direction == "denoise":  # where the answer is read
                    at = pair.alignment[pair.read]
                    logits = logits.roll(int(pair.read - at), 0)
                want = float(metric(logits, {}))
                got = found.values["logit_diff"][d, 0, 0, i, entry, receiver, sender]
                assert abs(got - want) <= tolerance, (direction, i, entry, a, b, got, want)


@pytest.mark.parametrize("through", ["nothing", "mlps"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, through: str) -> None:
    hf_model, family = built(name)
    tolerance = max(family.tolerance, EXACT)
    found = ran(hf_model, two_pairs(), {"exact": {"through": through}})
    check(found, hf_model, family, through, tolerance)


def test_positions_and_sources() -> None:
    """Of each position, labels, groups that share some; from further runs, noised ones too."""
    hf_model, family = built("gpt_neox")
    entries = {"END": ["END"], "both": ["S", 5]}
    found = ran(hf_model, two_pairs()[:1], {"exact": {"positions": entries}})
    check(found, hf_model, family, "nothing", EXACT)
    each = {"exact": {"positions": "each", "through": "mlps"}}
    found = ran(hf_model, two_pairs(), each, token_budget=300)
    assert len(found.plan.waves) > 10
    check(found, hf_model, family, "mlps", EXACT, edges=6)


def test_sources_and_samples() -> None:
    """Every source and sample for itself, as alone; the samples of noise differ."""
    hf_model, pairs = built("llama")[0], two_pairs()[:1]
    both = ran(hf_model, pairs, source=["other", "second"]).changes()
    second = [Pair(p.clean, p.others["second"], p.answer, p.wrong) for p in pairs]
    np.testing.assert_allclose(both[:, 1], ran(hf_model, second).changes()[:, 0], atol=EXACT)
    assert np.nanmax(np.abs(both[:, 1] - both[:, 0])) > 1e-2
    noise = {"corrupt": {"gaussian": {"tokens": [1, -2], "samples": 2}}}
    first, other = ran(hf_model, pairs, **noise).changes()[:, 0].swapaxes(0, 1)
    assert np.nanmax(np.abs(first - other)) > 1e-2


def test_neither_waves_nor_other_metrics_matter() -> None:
    hf_model, pairs = built("mistral")[0], two_pairs()
    attention = {"attention": {"layer": 2, "head": 1, "query": -1, "key": 5}}
    metrics = ["logit_diff", "kl", attention]
    whole, small = (
        ran(hf_model, pairs, metrics=metrics, token_budget=budget) for budget in (4000, 60)
    )
    assert len(small.plan.waves) > 10 * len(whole.plan.waves)
    for column, values in whole.values.items():
        np.testing.assert_allclose(small.values[column], values, rtol=0, atol=EXACT)
        np.testing.assert_array_equal(small.status[column], whole.status[column])
    probability = whole.changes("attention_2_1_-1_5")
    above = [r.layer is None or (r.component == "mlp_in" and r.layer == 2) for r in whole.receivers]
    assert not np.nan_to_num(probability[..., above, :]).any()  # they come after it
    assert np.nanmax(np.abs(probability)) > 1e-4


def node_changes(hf_model: Any, pairs: Sequence[Pair], found: Ran, tmp_path: Path) -> Any:
    """What patching every sender over all positions changes, [direction, pair, sender]."""
    names = ["resid_pre", "head_z", "mlp_out"]
    results = ps.sweep(
        ps.wrap(hf_model, Letters()),
        pairs,
        out=tmp_path / "nodes",
        components=names,
        positions="all",
        direction="both",
    )
    out = np.empty((2, len(pairs), len(found.senders)))
    for d, direction in enumerate(found.plan.directions):
        stream, z, mlp = (
            results.changes(name, "logit_diff", direction)[0][..., 0] for name in names
        )
        by_layer = np.concatenate([z, mlp], -1).reshape(len(pairs), -1)
        out[d] = np.concatenate([stream[:, 0], by_layer], -1)
    return out


def test_the_edges_of_a_sender_are_its_node(tmp_path: Path) -> None:
    """Where a sender's receivers do not read each other, and logits are linear in the stream."""
    hf_model = FAMILIES["gpt2"].build(LAYERS, 1)
    hf_model.transformer.ln_f.forward = lambda x: x  # type: ignore[method-assign]
    found = ran(hf_model, three())
    together = np.nansum(found.changes()[:, 0, 0, :, 0], 2)
    nodes = node_changes(hf_model, three(), found, tmp_path)
    last = [s.layer == LAYERS - 1 for s in found.senders]
    np.testing.assert_allclose(together[..., last], nodes[..., last], rtol=0, atol=EXACT)
    assert np.abs(nodes[..., last]).max() > 1e-3


def test_a_linear_model(tmp_path: Path) -> None:
    """There edges are as they are estimated, and add up to their nodes."""
    hf_model, pairs = linear_model(), three()
    found = ran(hf_model, pairs)
    exact = found.changes()[:, 0, 0, :, 0].swapaxes(2, 3)
    results = ps.sweep(
        ps.wrap(hf_model, Letters()),
        pairs,
        out=tmp_path / "eap",
        components=["mlp_out"],
        direction="both",
        edges="eap",
    )
    scores = results.store.read("edges/logit_diff")[:, 0, 0]
    np.testing.assert_allclose(exact, scores, rtol=0, atol=EXACT)
    nodes = node_changes(hf_model, pairs, found, tmp_path)
    np.testing.assert_allclose(np.nansum(exact, 3), nodes, rtol=0, atol=EXACT)


def test_through_mlps_that_are_not_there() -> None:
    """In a model of attention alone there is nothing to go through."""
    hf_model = FAMILIES["gemma2"].build(LAYERS, 1)
    other = ran(hf_model, three(), {"exact": {"through": "mlps"}}).changes()
    for layer in hf_model.model.layers:
        layer.post_feedforward_layernorm.weight.fill_(-1)  # it multiplies by 1 + weight
    nothing, mlps = (
        ran(hf_model, three(), {"exact": {"through": through}}).changes()
        for through in ("nothing", "mlps")
    )
    np.testing.assert_allclose(mlps, nothing, rtol=0, atol=EXACT)
    assert np.nanmax(np.abs(nothing)) > 1e-2
    assert np.nanmax(np.abs(other - mlps)) > 1e-2
