"""The patched forwards of `heads.py` against the family's own attention, and against themselves."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from oracle import heads, hooks, oracle
from oracle.cases import (
    CLEAN,
    CORRUPT,
    EVERYWHERE,
    LAST,
    LAYER,
    LENGTH,
    LONGER,
    OTHER,
    Case,
    build,
    distance,
    layer_of,
    swapped,
)
from oracle.heads import Patch, Prompt


def embedding(model: PreTrainedModel, ids: tuple[int, ...]) -> Tensor:
    out: Tensor = model.get_input_embeddings()(torch.tensor(ids))
    return out


# Against the family's own attention.


def test_own_attention_is_the_familys(case: Case) -> None:
    """Logits of all positions; windows, soft caps, sinks, groups and all."""
    with hooks.attention(case.model, case.family.attention), torch.no_grad():
        theirs = case.model(torch.tensor([CLEAN.ids]), use_cache=False).logits[0]
    own = case.logits(of=CLEAN)
    assert own.shape == (LENGTH, 50)
    assert own.dtype == torch.float64
    assert distance(own, theirs) <= case.family.tolerance


def test_cells_are_those_of_the_other_oracle(case: Case) -> None:
    model, family = case.model, case.family
    for component in oracle.COMPONENTS:
        if component not in case.components():
            continue
        for layer, unit, at in ((0, 1, [2]), (1, 5, [LAST]), (2, 3, [1, 4, LAST])):
            head = unit if component == "head_z" else None
            places = [(component, layer, head, at)]
            patch = Patch(component, layer, head, {p: p for p in at}, CLEAN)
            theirs = oracle.run_set(model, family, CORRUPT.ids, CLEAN.ids, places)
            assert distance(case.logits(patch)[-1], theirs) <= family.tolerance


def test_recorded_activations_are_those_of_the_other_oracle(case: Case) -> None:
    theirs = oracle.record(case.model, case.family, CLEAN.ids)
    own = heads.activations(case.model, case.family, CLEAN)
    for place, activation in theirs.items():
        assert distance(own[place].flatten(1), activation) <= case.family.tolerance


# Inputs.


def test_an_embedding_is_a_token(case: Case) -> None:
    for position in (0, 4, LAST):
        patched = case.logits(Patch("embed", 0, None, {position: position}, CLEAN))
        ids = swapped(CORRUPT.ids, position, CLEAN.ids[position])
        assert torch.equal(patched, case.logits(of=Prompt(ids)))
    # From another position: the token moves, its place in the prompt does not.
    patched = case.logits(Patch("embed", 0, None, {2: 6}, CLEAN))
    assert torch.equal(patched, case.logits(of=Prompt(swapped(CORRUPT.ids, 2, CLEAN.ids[6]))))


def test_noise_is_added_to_embeddings(case: Case) -> None:
    noise = embedding(case.model, CLEAN.ids) - embedding(case.model, CORRUPT.ids)
    noised = Prompt(CORRUPT.ids, noise)
    clean = case.logits(of=CLEAN)
    assert distance(case.logits(of=noised), clean) <= case.family.tolerance
    assert torch.equal(case.logits(of=Prompt(CLEAN.ids, 0 * noise)), clean)
    some = noise.clone()
    some[3:] = 0
    half = Prompt((*CLEAN.ids[:3], *CORRUPT.ids[3:]))
    at_half = case.logits(of=half)
    assert distance(case.logits(of=Prompt(CORRUPT.ids, some)), at_half) <= case.family.tolerance
    # A noised run as the source, and a clean embedding put back into a noised run.
    patch = Patch("resid_post", LAYER, None, EVERYWHERE, noised)
    assert distance(case.logits(patch, of=OTHER), clean) <= case.family.tolerance
    back = Patch("embed", 0, None, EVERYWHERE, CORRUPT)
    assert torch.equal(case.logits(back, of=noised), case.logits())


# Parts and wholes.


def test_queries_keys_and_values_make_attention(case: Case) -> None:
    expected = case.logits(*case.whole("attn_out"))
    read = [p for c in ("head_q", "head_k", "head_v") for p in case.whole(c)]
    assert distance(case.logits(*read), expected) <= case.family.tolerance
    for left_out in ("head_q", "head_k", "head_v"):
        some = [p for p in read if p.component != left_out]
        assert distance(case.logits(*some), expected) > 100 * case.family.tolerance


def test_patterns_and_values_make_heads(case: Case) -> None:
    expected = case.logits(*case.whole("head_z"))
    both = [*case.whole("head_pattern"), *case.whole("head_v")]
    assert distance(case.logits(*both), expected) <= case.family.tolerance
    assert distance(expected, case.logits(*case.whole("attn_out"))) <= case.family.tolerance
    queries_and_keys = [*case.whole("head_q"), *case.whole("head_k")]
    patterns = case.logits(*case.whole("head_pattern"))
    assert distance(case.logits(*queries_and_keys), patterns) <= case.family.tolerance


def test_neurons_make_the_mlp(case: Case) -> None:
    if case.family.down is None:
        pytest.skip("experts have no neurons of their own")
    for at in ({4: 4}, EVERYWHERE):
        neurons = [Patch("neuron", LAYER, u, at, CLEAN) for u in case.units("neuron")]
        assert len(neurons) == 64 if case.family.model_type != "gpt2" else 192
        expected = case.logits(Patch("mlp_out", LAYER, None, at, CLEAN))
        assert distance(case.logits(*neurons), expected) <= case.family.tolerance


def test_the_whole_stream_carries_the_whole_run(case: Case) -> None:
    clean = case.logits(of=CLEAN)
    for component in ("resid_pre", "resid_post", "embed"):
        patch = Patch(component, layer_of(component), None, EVERYWHERE, CLEAN)
        assert torch.equal(case.logits(patch), clean)


def test_one_key_or_value_reaches_its_group_alone(case: Case) -> None:
    before = case.seen(CORRUPT, "head_z")
    kv_heads = len(case.units("head_v"))
    assert kv_heads == (2 if case.family.grouped and case.family.qkv else 6)
    group = 6 // kv_heads
    for component, unit in itertools.product(("head_k", "head_v"), range(kv_heads)):
        patch = Patch(component, LAYER, unit, {3: 3}, CLEAN)
        moved = (case.seen(CORRUPT, "head_z", patch) - before).abs().amax(-1)
        inside = [unit * group <= head < (unit + 1) * group for head in range(6)]
        assert (moved.amax(0) > 0).tolist() == inside, component
        assert moved[:3].max() == 0  # earlier queries do not see it


def test_one_query_or_pattern_reaches_one_head_at_one_position(case: Case) -> None:
    before = case.seen(CORRUPT, "head_z")
    for component in ("head_q", "head_pattern"):
        patch = Patch(component, LAYER, 4, {5: 5}, CLEAN)
        moved = (case.seen(CORRUPT, "head_z", patch) - before).abs().amax(-1) > 0
        assert moved.nonzero().tolist() == [[5, 4]]


# Patterns.


def test_a_patched_pattern_weighs_the_destinations_values(case: Case) -> None:
    query, head = 6, 3
    patch = Patch("head_pattern", LAYER, head, {query: query}, CLEAN)
    rows, values = case.seen(CLEAN, "head_pattern"), case.seen(CORRUPT, "head_v")
    assert rows.shape == (6, LENGTH, LENGTH)
    group = 6 // values.shape[1]
    by_hand = rows[head, query] @ values[:, head // group]
    z = case.seen(CORRUPT, "head_z", patch)[query, head]
    torch.testing.assert_close(z, by_hand, rtol=0, atol=1e-12)
    after = case.seen(CORRUPT, "head_pattern", patch)
    assert torch.equal(after[head, query], rows[head, query])


def test_rows_of_attention_are_causal_and_sum_to_one(case: Case) -> None:
    rows = case.seen(CLEAN, "head_pattern")
    assert rows.triu(1).abs().max() == 0
    total = rows.sum(-1)
    if case.family.model_type == "gpt_oss":  # its sinks take a part
        assert total.max() < 1
        assert total.min() > 0
        sinks = case.model.model.layers[LAYER].self_attn.sinks
        own = torch.exp(sinks)  # the first token attends to itself and the sink alone
        score = heads_score(case)
        expected = torch.exp(score) / (torch.exp(score) + own)
        assert distance(rows[:, 0, 0], expected) <= case.family.tolerance
    else:
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


def heads_score(case: Case) -> Tensor:
    """Score [head] of the first token's query with its own key."""
    q, k = (case.seen(CLEAN, c)[0] for c in ("head_q", "head_k"))
    k = k.repeat_interleave(len(q) // len(k), 0)
    return (q * k).sum(-1) / math.sqrt(q.shape[-1])


@pytest.mark.parametrize(
    ("name", "windows"),
    [("mistral", [4, 4, 4]), ("gemma2", [4, 99, 4]), ("gemma3_text", [4, 99, 4])],
)
def test_windows_show_in_patterns(name: str, windows: list[int]) -> None:
    case = build(name)
    for layer, window in enumerate(windows):
        row = case.seen(CLEAN, "head_pattern", layer=layer)[:, LAST]
        assert (row > 0).all(0).tolist() == [k > LAST - window for k in range(LENGTH)]


# Shapes, traces left behind, wrong use.


def test_shapes(case: Case) -> None:
    kv_heads = len(case.units("head_k"))
    assert case.seen(CLEAN, "embed", layer=0).shape == (LENGTH, 48)
    assert case.seen(CLEAN, "resid_post").shape == (LENGTH, 48)
    assert case.seen(CLEAN, "head_q").shape[:2] == (LENGTH, 6)
    assert case.seen(CLEAN, "head_k").shape[:2] == (LENGTH, kv_heads)
    assert case.seen(CLEAN, "head_z").shape[:2] == (LENGTH, 6)
    assert case.seen(CLEAN, "head_pattern").shape == (6, LENGTH, LENGTH)
    if case.family.down is not None:
        assert case.seen(CLEAN, "neuron").dim() == 2


def test_the_model_is_left_as_it_was() -> None:
    case = build("llama")
    before = case.model.config._attn_implementation
    expected = oracle.baseline(case.model, CLEAN.ids)
    case.logits(*case.whole("head_q"), Patch("resid_mid", 0, None, {1: 1}, CLEAN))
    with pytest.raises(ValueError, match="neuron"):
        case.logits(Patch("neuron", 9, 0, {1: 1}, CLEAN))
    assert case.model.config._attn_implementation == before
    assert torch.equal(oracle.baseline(case.model, CLEAN.ids), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())


def test_what_a_model_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="no resid_mid in layer 1"):
        build("phi").logits(Patch("resid_mid", 1, None, {1: 1}, CLEAN))
    for name in ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"):
        with pytest.raises(ValueError, match="no neuron in layer 0"):
            build(name).logits(Patch("neuron", 0, 1, {1: 1}, CLEAN))
    for component in ("head_q", "head_k"):
        with pytest.raises(ValueError, match=r"deepseek_v3 has no ._proj in layer 1"):
            build("deepseek_v3").logits(Patch(component, 1, 0, {1: 2}, CLEAN))
    with pytest.raises(ValueError, match="no head_z in layer 3"):
        build("llama").logits(Patch("head_z", 3, 0, {1: 1}, CLEAN))


@pytest.mark.parametrize(
    ("patch", "says"),
    [
        (Patch("head_z", 1, None, {1: 1}, CLEAN), "head_z: unit None"),
        (Patch("mlp_out", 1, 2, {1: 1}, CLEAN), "mlp_out: unit 2"),
        (Patch("mlp_out", 1, None, {-1: 1}, CLEAN), "of 9 tokens"),
        (Patch("mlp_out", 1, None, {9: 1}, CLEAN), "of 9 tokens"),
        (Patch("mlp_out", 1, None, {1: 9}, CLEAN), "from 9 tokens"),
        (Patch("head_pattern", 1, 0, {5: 4}, CLEAN), "no meaning"),
        (Patch("head_pattern", 1, 0, {5: 5}, LONGER), "no meaning"),
        (Patch("sae_feature", 1, 0, {5: 5}, CLEAN), "no autoencoder"),
        (Patch("mlp_out", 1, None, {1: 1}, Prompt((5, 6), torch.zeros(1, 48))), "noise"),
    ],
)
def test_wrong_use(patch: Patch, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build("llama").logits(patch)
