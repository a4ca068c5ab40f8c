"""What the patched forwards of `heads.py` put at another position."""

from __future__ import annotations

import pytest
import torch

from oracle import heads
from oracle.cases import (
    CLEAN,
    CORRUPT,
    LAST,
    LAYER,
    LENGTH,
    LONGER,
    Case,
    build,
    distance,
    layer_of,
    swapped,
)
from oracle.families import FAMILIES
from oracle.heads import Patch, Prompt

# Families whose first layer sees nothing of a position but its rotation.
ROTARY = [n for n, f in FAMILIES.items() if f.qkv and n not in ("gpt2", "opt")]


def test_as_attention_uses_them_and_as_projected_agree(case: Case) -> None:
    """Replacing before norms and rotary is replacing after, where the position stays."""
    if not case.family.qkv:
        pytest.skip("latent attention: no one module makes queries")
    for used, projected in zip(("head_q", "head_k", "head_v"), heads.PROJECTED, strict=True):
        assert len(case.units(used)) == len(case.units(projected))
        for unit in case.units(used):
            one, other = (Patch(c, LAYER, unit, {2: 2, 6: 6}, CLEAN) for c in (used, projected))
            assert distance(case.logits(one), case.logits(other)) <= case.family.tolerance
            assert case.effect(one) > 100 * case.family.tolerance


@pytest.mark.parametrize("name", ROTARY)
def test_queries_and_keys_are_rotated_where_they_are_put(name: str) -> None:
    """In the first layer they depend on the token alone: from wherever it stands, they become what
    that token has at the destination."""
    case = build(name)
    for component, dst, src in (("head_q", 6, 2), ("head_k", 3, 8), ("head_k", 1, 5)):
        here = Prompt(swapped(CORRUPT.ids, dst, CLEAN.ids[src]))
        for unit in case.units(component):
            moved = Patch(component, 0, unit, {dst: src}, CLEAN)
            equal = Patch(component, 0, unit, {dst: dst}, here)
            assert distance(case.logits(moved), case.logits(equal)) <= case.family.tolerance
            as_it_was = case.seen(CLEAN, component, layer=0)[src, unit]
            raw = Patch(component, 0, unit, {dst: 0}, as_it_was)
            assert distance(case.logits(moved), case.logits(raw)) > 100 * case.family.tolerance


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3", "olmo2", "phi", "phi3", "cohere"])
def test_a_longer_prefix_moves_everything(name: str) -> None:
    """All that attention reads, from a run whose prompt has two more tokens in front."""
    case = build(name)
    further = {p: p + 2 for p in range(LENGTH)}
    parts = ("head_q", "head_k", "head_v")
    patches = [Patch(c, 0, u, further, LONGER) for c in parts for u in case.units(c)]
    # The first layer reads tokens alone: the same tokens without the prefix.
    expected = case.logits(*(p for c in parts for p in case.whole(c, layer=0)))
    assert distance(case.logits(*patches), expected) <= case.family.tolerance
    # Further up values and streams carry the prefix along; the row of one query, worked out.
    moved = [Patch(c, LAYER, u, further, LONGER) for c in parts for u in case.units(c)]
    z = case.seen(CORRUPT, "head_z", *moved)
    q, k = (case.seen(CORRUPT, c, *moved) for c in ("head_q", "head_k"))
    there_q, there_k = (case.seen(LONGER, c)[2:] for c in ("head_q", "head_k"))
    group = q.shape[1] // k.shape[1]
    # Rotary scores depend on the distance of two positions alone; its angles are float32.
    scores, there = (
        torch.einsum("qhd,khd->hqk", a, b.repeat_interleave(group, 1))
        for a, b in ((q, k), (there_q, there_k))
    )
    torch.testing.assert_close(scores, there, rtol=0, atol=1e-5)
    assert distance(q, there_q) > 1e-2
    rows = case.seen(CORRUPT, "head_pattern", *moved)
    v = case.seen(LONGER, "head_v")[2:].repeat_interleave(group, 1)
    torch.testing.assert_close(z, torch.einsum("hqk,khd->qhd", rows, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_without_rotary_a_moved_query_or_key_is_as_it_was(name: str) -> None:
    case = build(name)
    for component in ("head_q", "head_k"):
        for unit in case.units(component):
            value = case.seen(LONGER, component)[7, unit]
            moved = Patch(component, LAYER, unit, {3: 7}, LONGER)
            raw = Patch(component, LAYER, unit, {3: 0}, value)
            assert distance(case.logits(moved), case.logits(raw)) <= case.family.tolerance


def test_other_components_are_carried_as_they_are(case: Case) -> None:
    for component in case.components():
        if component in ("head_q", "head_k", "head_pattern", *heads.PROJECTED):
            continue
        unit, layer = case.units(component)[-1], layer_of(component)
        value = case.seen(LONGER, component, layer=layer)
        there = value[10] if unit is None else value[10, unit]
        moved = Patch(component, layer, unit, {LAST: 10}, LONGER)
        constant = Patch(component, layer, unit, {LAST: 0}, there)
        assert torch.equal(case.logits(moved), case.logits(constant)), component


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2", "phi3"])
def test_the_later_counts_among_moved_and_unmoved(name: str) -> None:
    case = build(name)
    for component in ("head_q", "head_k"):
        still = Patch(component, LAYER, 1, {5: 5, 3: 3}, CLEAN)
        moved = Patch(component, LAYER, 1, {5: 8}, CLEAN)
        rest = Patch(component, LAYER, 1, {3: 3}, CLEAN)
        assert torch.equal(case.logits(moved, still), case.logits(still))
        assert torch.equal(case.logits(still, moved), case.logits(rest, moved))
        assert distance(case.logits(still, moved), case.logits(still)) > 1e-4
