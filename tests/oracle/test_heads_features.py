"""Patched features of autoencoders, worked out by hand."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from oracle import heads
from oracle.cases import CLEAN, CORRUPT, LAYER, LENGTH, Case, build, distance
from oracle.heads import Add, Patch, Prompt

SAE_PLACES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head_z")


@dataclass(frozen=True)
class Dictionary:
    """An autoencoder with ReLU and no decoder bias; plain: its features are its input."""

    at: str
    encoder: Tensor
    decoder: Tensor
    plain: bool = False
    layer: int = LAYER

    def encode(self, x: Tensor) -> Tensor:
        return x if self.plain else torch.relu(x @ self.encoder)


def dictionary(case: Case, at: str) -> Dictionary:
    width = case.seen(CLEAN, at).flatten(1).shape[1]
    rng = torch.Generator().manual_seed(0)
    encoder, decoder = (
        torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((width, 5), (5, width))
    )
    return Dictionary(at, encoder, decoder)


@pytest.mark.parametrize("at", SAE_PLACES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi", "qwen3", "granite"])
def test_features(name: str, at: str) -> None:
    case = build(name)
    if at not in case.components():
        pytest.skip("parallel blocks have no such place")
    sae = dictionary(case, at)
    tolerance = case.family.tolerance

    def logits(*patches: Patch, use: Dictionary = sae) -> Tensor:
        return heads.logits(case.model, case.family, CORRUPT, patches, use)

    x = case.seen(CORRUPT, at).flatten(1)
    features, others = (case.seen(of, "sae_feature", sae=sae) for of in (CORRUPT, CLEAN))
    assert torch.equal(features, torch.relu(x @ sae.encoder))
    # Two features that are open in the destination, one of them in the source as well.
    position, from_position, i, j = next(
        (p, q, i, j)
        for p, q in itertools.product(range(3, LENGTH), repeat=2)
        for i, j in itertools.permutations(range(features.shape[1]), 2)
        if features[p, i] > 0 and features[p, j] > 0 and others[q, i] > 0 and p != q
    )

    def by_hand(*changes: tuple[int, Tensor]) -> Tensor:
        """Logits with x plus changes of features, put in their place as constants."""
        new = x[position] + sum(change * sae.decoder[f] for f, change in changes)
        heads_of = new.view(6, -1) if at == "head_z" else new[None]
        units = range(6) if at == "head_z" else [None]
        given = zip(units, heads_of, strict=True)
        return case.logits(*(Patch(at, LAYER, u, {position: 0}, v) for u, v in given))

    def feature(number: int, source: Prompt | Tensor | Add) -> Patch:
        return Patch("sae_feature", LAYER, number, {position: from_position}, source)

    change = others[from_position, i] - features[position, i]
    patch = feature(i, CLEAN)
    assert distance(logits(patch), by_hand((i, change))) <= tolerance
    assert distance(logits(patch), logits()) > 100 * tolerance
    # A constant, and another feature: both measured before either changes.
    two = [patch, feature(j, torch.zeros(()))]
    expected = by_hand((i, change), (j, -features[position, j]))
    assert distance(logits(*two), expected) <= tolerance
    assert distance(logits(*reversed(two)), expected) <= tolerance
    added = logits(feature(i, Add(torch.tensor(0.5))))
    assert distance(added, by_hand((i, torch.tensor(0.5)))) <= tolerance
    # Of two patches of one feature the later counts.
    assert distance(logits(feature(i, torch.tensor(3.0)), patch), logits(patch)) <= tolerance
    # Every direction a feature: all of them are the activation itself.
    one = torch.eye(x.shape[1], dtype=torch.float64)
    whole = Dictionary(at, one, one, plain=True)
    all_features = [Patch("sae_feature", LAYER, i, {4: 4}, CLEAN) for i in range(x.shape[1])]
    same = [Patch(at, LAYER, unit, {4: 4}, CLEAN) for unit in case.units(at)]
    assert distance(logits(*all_features, use=whole), case.logits(*same)) <= tolerance
