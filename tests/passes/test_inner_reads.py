"""Metrics that read inside the model, and what constants are put where, against full forwards."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchsweep as ps
from inputs import Letters
from oracle import heads
from oracle.families import FAMILIES
from oracle.heads import Add, Patch, Prompt
from patchsweep.pairs import Pair
from patchsweep.sites import Status

LLAMA = FAMILIES["llama"]
CLEAN, CORRUPT = (5, 6, 7, 8, 9), (5, 11, 7, 8, 9)
PAIR = Pair(CLEAN, CORRUPT, (12,), (13,))


def swept(hf_model: Any, out: Path, pair: Pair = PAIR, **given: Any) -> ps.Results:
    settings = {"direction": "noise", "metrics": ["logit"], **given}
    return ps.sweep(ps.wrap(hf_model, Letters()), [pair], out=out, **settings)


@pytest.mark.parametrize(("layer", "head"), [(1, 0), (2, 4)])
def test_an_attention_probability_alone(layer: int, head: int, tmp_path: Path) -> None:
    """Where nothing else is read: keys are patched where only they are seen, patterns where they
    are read, of that head and query alone."""
    hf_model = LLAMA.build(3, 1)
    metric = {"attention": {"layer": layer, "head": head, "query": 3, "key": 1}}
    given = {"components": ["head_k", "head_q", "head_pattern", "resid_pre"], "metrics": [metric]}
    found = swept(hf_model, tmp_path / "r", **given)
    [column] = found.metrics
    moved = 0
    for component in given["components"]:
        value = found.store.read(f"{component}/{column}")[0, 0, 0, 0]
        status = found.store.read(f"{component}/{column}_status")[0, 0, 0, 0]
        for at, unit, position in np.ndindex(value.shape):
            own = unit if component in heads.HAS_UNITS else None
            patch = Patch(component, at, own, {position: position}, Prompt(CORRUPT))
            pattern = heads.activation(
                hf_model, LLAMA, Prompt(CLEAN), [patch], "head_pattern", layer
            )
            assert value[at, unit, position] == pytest.approx(float(pattern[head, 3, 1]), abs=1e-7)
            assert status[at, unit, position] in (Status.EXACT, Status.STRUCTURAL)
            moved += status[at, unit, position] == Status.EXACT
    assert moved > 10


def test_patterns_of_zero(tmp_path: Path) -> None:
    hf_model = LLAMA.build(2, 1)
    found = swept(
        hf_model, tmp_path / "r", components=["head_pattern", "embed"], source="zero"
    ).store
    for component, layers, units in (("head_pattern", 2, 6), ("embed", 1, 1)):
        values = found.read(f"{component}/logit")[0, 0, 0, 0]
        for layer, unit, position in product(range(layers), range(units), range(5)):
            own = unit if component in heads.HAS_UNITS else None
            patch = Patch(component, layer, own, {position: 0}, torch.zeros(()))
            logits = heads.logits(hf_model, LLAMA, Prompt(CLEAN), [patch])[-1]
            assert values[layer, unit, position] == pytest.approx(float(logits[12]), abs=1e-6)


@pytest.mark.parametrize("component", ["resid_pre", "resid_post", "attn_out"])
def test_a_vector_of_every_layer(component: str, tmp_path: Path) -> None:
    hf_model = LLAMA.build(3, 1)
    vectors = np.random.default_rng(0).normal(size=(3, 48))
    np.save(tmp_path / "v.npy", vectors)
    source = {"vector": {"file": tmp_path / "v.npy"}}
    found = swept(hf_model, tmp_path / "r", components=[component], source=source).store
    values = found.read(f"{component}/logit")[0, 0, 0, 0]
    for layer, position in product(range(3), range(5)):
        patch = Patch(component, layer, None, {position: 0}, Add(torch.from_numpy(vectors[layer])))
        logits = heads.logits(hf_model, LLAMA, Prompt(CLEAN), [patch])[-1]
        assert values[layer, 0, position] == pytest.approx(float(logits[12]), abs=1e-6)


def test_sites_with_constants_of_their_own(tmp_path: Path) -> None:
    """Zero in a site, and the sweep's own source in another of the same component."""
    hf_model = LLAMA.build(2, 1)
    sets = {
        "a": ["head_z.0.1@-1<zero", "head_z.0.3@-1", "head_z.1.2@-1"],
        "b": ["mlp_out.0@1<other", "embed@2"],
    }
    found = swept(hf_model, tmp_path / "r", sets=sets, source=["other", "zero"]).store
    values = found.read("sets/logit")[0, :, 0, 0, 0, 0]
    other, zero = Prompt(CORRUPT), torch.zeros(())
    for s, own in enumerate((other, zero)):
        patches = {
            "a": [
                Patch("head_z", 0, 1, {4: 4}, zero),
                Patch("head_z", 0, 3, {4: 4}, own),
                Patch("head_z", 1, 2, {4: 4}, own),
            ],
            "b": [Patch("mlp_out", 0, None, {1: 1}, other), Patch("embed", 0, None, {2: 2}, own)],
        }
        for k, some in enumerate(patches.values()):
            logits = heads.logits(hf_model, LLAMA, Prompt(CLEAN), some)[-1]
            assert values[s, k] == pytest.approx(float(logits[12]), abs=1e-6)


def test_what_the_other_run_does_not_have_is_no_number(tmp_path: Path) -> None:
    """A metric at a position without a counterpart: refused, for it is read in both runs."""
    pair = Pair(CLEAN, (5, *CORRUPT), (12,), (13,), align=(0, -1, 3, 4, 5))
    metric = {"neuron": {"layer": 1, "neuron": 3, "position": 1}}
    hf_model = LLAMA.build(2, 1)
    given = {"components": ["mlp_out"], "metrics": [metric]}
    found = swept(hf_model, tmp_path / "r", pair, **given)
    [column] = found.metrics
    clean, corrupt = found.baseline(column)
    seen = heads.activation(hf_model, LLAMA, Prompt(CLEAN), [], "neuron", 1)
    assert clean.item() == pytest.approx(float(seen[1, 3]), abs=1e-6)
    assert np.isnan(corrupt.item())
    with pytest.raises(ps.BadInput, match="no counterpart in the corrupt one"):
        swept(hf_model, tmp_path / "d", pair, **given, direction="denoise")
