"""Edges that are run against two full forwards for each, with plain hooks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from edge_runs import Ran, ran
from estimates import built, logit_diff, runs
from inputs import pair_of, unequal
from oracle import paths
from oracle.families import EXACT, FAMILIES, Family
from patchsweep.pairs import Pair
from patchsweep.plan import Node
from patchsweep.sites import Status

LAYERS = 3


@cache
def two_pairs() -> list[Pair]:
    """Of equal length, and of unequal length with an alignment that leaves some tokens out."""
    rng = np.random.default_rng(5)
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
                logits, would_be = two.first(a, positions, through)
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
