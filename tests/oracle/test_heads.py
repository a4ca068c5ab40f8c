"""The oracle of heads against the one that runs a family's own attention, and against itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oracle import heads, oracle
from oracle.families import FAMILIES, prompts

LENGTH = 7
ALL = {i: i for i in range(LENGTH)}


@pytest.mark.parametrize("name", FAMILIES)
def test_against_the_familys_own_attention(name: str) -> None:
    family = FAMILIES[name]
    model = family.build(2)
    clean, corrupt = prompts(np.random.default_rng(0), 50, LENGTH, 2)
    source, destination = heads.Prompt(clean), heads.Prompt(corrupt)

    def far(patches: list[heads.Patch], places: list[oracle.Place]) -> float:
        found = heads.logits(model, family, destination, patches)[-1]
        return float((found - oracle.run_set(model, family, corrupt, clean, places)).abs().max())

    assert far([], []) <= family.tolerance
    for component in oracle.COMPONENTS:
        if component == "resid_mid" and family.parallel:
            continue
        unit = 1 if component == "head_z" else None
        patch = heads.Patch(component, 1, unit or 0, {3: 3, 5: 5}, source)
        assert far([patch], [(component, 1, unit, [3, 5])]) <= family.tolerance

    # What attention reads, all of it, makes what attention writes.
    seen = heads.activations(model, family, source)
    units = {c: seen[c, 1].shape[1] for c in ("head_q", "head_k", "head_v", "head_pattern")}
    attention: list[oracle.Place] = [("attn_out", 1, None, range(LENGTH))]
    for components in (("head_q", "head_k", "head_v"), ("head_pattern", "head_v")):
        patches = [
            heads.Patch(c, 1, unit, ALL, source) for c in components for unit in range(units[c])
        ]
        assert far(patches, attention) <= family.tolerance
    if ("neuron", 1) in seen:
        every = range(seen["neuron", 1].shape[1])
        patches = [heads.Patch("neuron", 1, unit, {6: 6}, source) for unit in every]
        assert far(patches, [("mlp_out", 1, None, [6])]) <= family.tolerance


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "olmo2", "mistral"])
def test_queries_and_keys_are_rotated_where_they_are_put(name: str) -> None:
    """The same tokens one position further on: their first-layer queries and keys, moved back."""
    family = FAMILIES[name]
    model = family.build(1)
    tokens = tuple(range(5, 12))
    far_on, here = heads.Prompt((4, *tokens)), heads.Prompt(tokens)
    units = heads.activations(model, family, here)
    moved = {i: i + 1 for i in range(LENGTH)}
    for component in ("head_q", "head_k"):
        patches = [
            heads.Patch(component, 0, unit, moved, far_on)
            for unit in range(units[component, 0].shape[1])
        ]
        plain = heads.logits(model, family, here)
        assert torch.allclose(heads.logits(model, family, here, patches), plain, atol=1e-6)
