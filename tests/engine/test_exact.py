"""Sweeps against the oracle: every kind of cell, source and metric, one full forward each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import patchsweep as ps
from cells import FEW, METRICS, check
from expected import Case
from inputs import (
    EXPERTS,
    MOVABLE,
    SOME,
    SOURCES,
    Letters,
    able,
    components_of,
    pair_of,
    three,
    unequal,
)
from oracle import heads, oracle
from oracle.families import EVERY, FAMILIES
from patchsweep.pairs import Pair
from patchsweep.report import families
from patchsweep.sites import COMPONENTS, parse_site

# Positions that are learnt, rotary ones, parallel blocks, norms after; experts and sinks.
FOUR = ("gpt2", "gemma2", "gpt_neox", "gpt_oss")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    """Every component and both directions, prompts of different lengths, several waves."""
    given = {"components": components_of(name), "direction": "both", "token_budget": 6000}
    assert check(Case(name, three()[:2], given), 60) > 10


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("kv_heads", [1, 3, 6])
def test_key_value_heads(name: str, kv_heads: int) -> None:
    """One for all query heads (multi-query), for groups of two, and one each."""
    given = {"components": ["head_k", "head_v", "head_q", "head_pattern"], "direction": "both"}
    case = Case(name, three(), given, overrides={"num_key_value_heads": kv_heads})
    assert check(case, 40) > 5


@pytest.mark.parametrize("name", FOUR)
def test_every_metric(name: str) -> None:
    given = {"components": ["head_z", "head_k"], "direction": "both"}
    assert check(Case(name, three(), {**given, "metrics": [*METRICS, "relative_prob"]}), 40) > 5


# Which table noise is measured by, and what a mean is over, is the same code for every family.
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for kind in ("noise", "ablations", "many") for name in FOUR),
        ("gemma2", "noise of the table"),
        ("gpt2", "mean over all"),
    ],
)
def test_every_source(name: str, kind: str) -> None:
    """Noise, ablations, resampling and further prompts, on every component."""
    rng = np.random.default_rng(2)
    pairs = [pair_of(rng, 6, 1), pair_of(rng, 6, 2), pair_of(rng, 5, 1), pair_of(rng, 5, 1)]
    given = {"components": able(name, kind), "direction": "both", **SOURCES[kind]}
    check(Case(name, pairs, given, layers=2), 30)


@pytest.mark.parametrize("name", FOUR)
def test_every_inner_metric(name: str) -> None:
    """Attention, neurons, probes and a callable, read in patched runs, on every component."""
    given = {"components": components_of(name), "direction": "both", "metrics": "inner"}
    check(Case(name, three(3)[:2], given), 50)


# Every place once; again where norms after attention and MLP or parallel blocks make it another.
PLACES = {
    "llama": ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head_z"),
    "gpt2": ("resid_post", "head_z"),
    "gemma2": ("resid_mid", "attn_out", "mlp_out"),
    "phi": ("resid_pre", "attn_out", "mlp_out"),
}


@pytest.mark.parametrize(("name", "at"), [(n, at) for n, places in PLACES.items() for at in places])
def test_sae_features(name: str, at: str) -> None:
    """At every place, alone and with others in sets, ablated, and read as a metric."""
    given = {
        "components": ["sae_feature", "head_z"],
        "direction": "both",
        "metrics": "inner",
        "sets": {
            "two": ["sae_feature.2@-1", "head_v.0.1@-2"],
            "one": ["sae_feature.3"],
            "at one token": ["sae_feature.2@-1", "sae_feature.3@-1", "sae_feature.6@-1"],
        },
    }
    check(Case(name, three(5)[:2], given, sae_at=at), 40)
    given = {"components": ["sae_feature"], "direction": "noise"}
    given["source"] = ["zero", {"mean": {"prompts": "clean"}}]
    check(Case(name, three(5)[:2], given, sae_at=at), 20)
    mixed = ["sae_feature.2@-1<second", "sae_feature.3@-1", "sae_feature.5@-1<zero"]
    given = {"sets": {"of several sources": mixed}, "direction": "noise"}
    given["source"] = ["other", "second", "zero"]
    assert check(Case(name, three(5)[:2], given, sae_at=at), None) == 6


SET_SITES = [
    ["head_z.0.1@2", "head_z.1.4@-1", "mlp_out.1@-2", "resid_pre.2@-2"],
    ["head_q.0.3@-1", "head_k.1.0@1", "head_v.1.1@-2", "head_q.2.2@-1", "attn_out.0"],
    ["head_pattern.0.2@-1", "head_v.0.0@1", "head_pattern.2.5", "resid_post.1@0"],
    ["embed@1", "resid_pre.1@-1", "head_pattern.1.1@-1", "head_q.1.1@-2", "resid_post.2@-1"],
    ["mlp_out.0@1", "mlp_out.0@2", "head_z.0.0@1", "head_z.0.1@2", "head_k.0.0@2"],
]


@pytest.mark.parametrize("name", [*SOME, "phi", "deepseek_v3"])
def test_sets(name: str) -> None:
    """Several sites at once: windows, complements, sites with sources of their own."""
    named = {f"{i}": sites for i, sites in enumerate(SET_SITES)}
    mixed = {
        "mixed": ["head_z.0.1@2<second", "mlp_out.1@-2", "head_q.1.1@-1<second", "embed@2<second"],
        "undone": ["resid_pre.0<second", "head_z.1.0@-1<other", "mlp_out.1@-1<other"],
    }
    outside = {
        "outside": {"within": ["head_z", "mlp_out"], "besides": ["head_z.1.2@2", "mlp_out.0"]}
    }
    if name not in EXPERTS:
        named["neurons"] = ["neuron.0.3@2", "neuron.1.5@-1", "head_z.1.0@-1"]
    given = {"components": ["mlp_out", "resid_pre"], "windows": [2, 3], "direction": "both"}
    check(Case(name, three(9), {**given, "sets": {**named, **outside}, "token_budget": 2500}), 60)
    check(Case(name, three(9), {**given, "sets": mixed, "source": ["other", "second"]}), 40)


@pytest.mark.parametrize("name", MOVABLE)
def test_prompts_of_unequal_length(name: str) -> None:
    """Aligned positions; queries and keys are rotated where they are put."""
    rng = np.random.default_rng(4)
    pairs = [unequal(rng, 6, 2), pair_of(rng, 6, 2)]
    components = ["embed", "resid_pre", "head_q", "head_k", "head_v", "head_z", "mlp_out"]
    given = {
        "components": components,
        "direction": "both",
        "metrics": [*FEW, "relative_prob"],
        "sets": {"a": ["head_q.1.2@-1", "head_k.0.1@2", "embed@3", "head_v.1.0@-2"]},
    }
    assert check(Case(name, pairs, given), 50) > 15


def test_patterns_of_unequal_lengths_are_refused(tmp_path: Path) -> None:
    pairs = [unequal(np.random.default_rng(0), 5, 2)]
    model = ps.wrap(FAMILIES["llama"].build(2), Letters())
    with pytest.raises(ps.BadInput, match="head_pattern needs prompts of equal length"):
        ps.sweep(model, pairs, components=["head_pattern"], out=tmp_path / "r")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi", "mistral", "gpt_oss"])
def test_answers_of_several_tokens(name: str) -> None:
    rng = np.random.default_rng(6)
    pairs = []
    for length, count in ((8, 3), (6, 1), (9, 2)):
        pair = pair_of(rng, length, 1)
        tail = pair.clean[length - count + 1 :]
        corrupt = (*pair.corrupt[: length - count + 1], *tail)
        if corrupt == pair.clean:
            corrupt = (3 + (pair.clean[0] - 2) % 40, *corrupt[1:])
        pairs.append(Pair(pair.clean, corrupt, pair.answer, pair.wrong, continuation=(*tail, 9)))
    metrics = [*FEW, "sequence_logprob", "relative_prob"]
    given = {"components": ["head_z", "head_k", "mlp_out"], "direction": "both", "metrics": metrics}
    assert check(Case(name, pairs, given), 40) > 5


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "opt", "mixtral", "phi3"])
@pytest.mark.parametrize("component", ["resid_pre", "mlp_out", "embed", "attn_out"])
def test_steering(name: str, component: str) -> None:
    rng = np.random.default_rng(8)
    vector = torch.from_numpy(rng.standard_normal(48))
    given = {"components": [component], "direction": "noise", "source": "vector", "_vector": vector}
    assert check(Case(name, three(8), given), 25) > 5


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_whole_grids(name: str) -> None:
    """Every single cell, the structural ones among them; and groups of positions."""
    rng = np.random.default_rng(3)
    pairs = [pair_of(rng, 5, 1), pair_of(rng, 4, 1)]
    components = [c for c in components_of(name) if c != "neuron"]
    given = {"components": components, "direction": "both", "metrics": ["logit_diff", "kl"]}
    assert check(Case(name, pairs, given, layers=2), None) > 100
    given["positions"] = {"ends": [0, -1], "middle": [2, 3]}
    assert check(Case(name, pairs, given, layers=2), 60) > 10


# In bfloat16 a token near a tie between experts goes to another one for a rounding.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, torch.float32) for n in FAMILIES]
    + [(n, torch.bfloat16) for n in FAMILIES if n not in EXPERTS],
    ids=str,
)
def test_every_family_in_other_dtypes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Where a conversion to float32 is no copy, or a real one: every place is still found."""
    pair = pair_of(np.random.default_rng(5), 6, 1)
    family, hf_model = FAMILIES[name], FAMILIES[name].build(3, dtype=dtype)
    exact = FAMILIES[name].build(3, dtype=dtype).double()
    components = components_of(name)
    results = ps.sweep(
        ps.wrap(hf_model, Letters()),
        [pair],
        components=components,
        metrics=["logit"],
        out=tmp_path / "r",
    )
    for component in components:
        found = results.store.read(f"{component}/logit")[0, 0, 0, 0]
        for layer, unit, position in ((0, 0, 5), (1, 1, 4), (2, 1, 5)):
            layer, unit = min(layer, found.shape[0] - 1), min(unit, found.shape[1] - 1)
            prompts_ = heads.Prompt(pair.corrupt), heads.Prompt(pair.clean)
            patch = heads.Patch(component, layer, unit, {position: position}, prompts_[1])
            model = hf_model if dtype == torch.float32 else exact
            logits = heads.logits(model, family, prompts_[0], [patch])[-1]
            expected = oracle.logit(logits, pair.answer)
            bound = 2e-5 if dtype == torch.float32 else 0.25
            assert abs(found[layer, unit, position] - expected) < bound


@settings(max_examples=12)
@given(st.data())
def test_any_sweep(data: st.DataObject) -> None:
    """Family, sizes, lengths, differing tokens, components, positions, sources, sets, metrics,
    direction, budget: drawn."""
    name = data.draw(st.sampled_from(sorted(FAMILIES)))
    seed = data.draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    kind = data.draw(st.sampled_from(sorted(SOURCES)))
    lengths = data.draw(st.lists(st.integers(3, 12), min_size=1, max_size=4))
    if kind == "ablations":
        lengths = [lengths[0]] * 3
    pairs = [pair_of(rng, n, int(rng.integers(1, n + 1))) for n in lengths]
    known = able(name, kind)
    components = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
    shortest = min(lengths)
    chosen = st.lists(st.integers(-shortest, shortest - 1), min_size=1, max_size=3, unique=True)
    layers = data.draw(st.integers(2, 4))
    units = {"head": 6, "kv_head": 2 if name not in ("gpt2", "opt") else 6, "neuron": 9, "": 1}
    drawn = [
        "{}{}{}@{}".format(
            c,
            "" if c == "embed" else f".{rng.integers(layers)}",
            f".{rng.integers(units[COMPONENTS[c].unit])}" if COMPONENTS[c].unit else "",
            rng.integers(-shortest, shortest),
        )
        for c in rng.choice(known, 4)
    ]
    assert all(parse_site(site) for site in drawn)
    given = {
        "components": components,
        "direction": data.draw(st.sampled_from(["denoise", "noise", "both"])),
        "positions": data.draw(st.sampled_from(["each", "all"]) | chosen),
        "sets": data.draw(st.sampled_from([{}, {"drawn": list(dict.fromkeys(drawn))}])),
        "metrics": data.draw(st.sampled_from([FEW, METRICS, "inner"])),
        "token_budget": data.draw(st.sampled_from([1500, 5000])),
        **SOURCES[kind],
    }
    check(Case(name, pairs, given, layers, seed), 14)


def test_parallel_blocks_have_no_resid_mid(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in (n for n in FAMILIES if FAMILIES[n].parallel):
        model = ps.wrap(FAMILIES[name].build(2), Letters())
        with pytest.raises(ps.BadInput, match=r"resid_mid cannot be patched.*parallel"):
            ps.sweep(model, [pair_of(rng, 5, 1)], components=["resid_mid"], out=tmp_path / name)
        assert not (tmp_path / name).exists()


def test_experts_have_no_neurons(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in EXPERTS:
        model = ps.wrap(FAMILIES[name].build(2), Letters())
        with pytest.raises(ps.BadInput, match=r"neuron cannot be patched.*experts"):
            ps.sweep(model, [pair_of(rng, 5, 1)], components=["neuron"], out=tmp_path / name)


def test_the_models_table_is_the_one_checked_here() -> None:
    assert {f.name: (f.parallel, f.tolerance) for f in families.FAMILIES} == {
        name: (f.parallel, f.tolerance) for name, f in EVERY.items()
    }


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    hf_model = FAMILIES["llama"].build(2)
    rng = np.random.default_rng(0)
    before = {k: v.clone() for k, v in hf_model.state_dict().items()}
    ps.sweep(
        ps.wrap(hf_model, Letters()),
        [pair_of(rng, 5, 1)],
        components=components_of("llama"),
        out=tmp_path / "r.zarr",
    )
    assert hf_model.config._attn_implementation == "sdpa"
    assert all(torch.equal(v, before[k]) for k, v in hf_model.state_dict().items())
    assert not any("forward" in vars(m) for m in hf_model.modules())
    assert not any(m._forward_pre_hooks for m in hf_model.modules())
