"""The patched forwards of `heads.py` against the family's own attention, and against themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from oracle import heads, hooks, oracle
from oracle.families import FAMILIES, Family, prompts
from oracle.heads import Add, Patch, Prompt

LAYERS = 3
LENGTH = 9
LAST = LENGTH - 1
LAYER = 1
EVERYWHERE = {p: p for p in range(LENGTH)}
CLEAN, CORRUPT = (Prompt(ids) for ids in prompts(np.random.default_rng(0), 50, LENGTH, LENGTH))
# Tokens of the clean run two positions further on.
LONGER = Prompt((7, 11, *CLEAN.ids))
OTHER = Prompt(tuple(reversed(CORRUPT.ids)))
SAE_PLACES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head_z")


@dataclass(frozen=True)
class Case:
    """A model, and what every test wants to know of it."""

    model: PreTrainedModel
    family: Family
    counts: Mapping[str, int]  # units by component

    def logits(self, *patches: Patch, of: Prompt = CORRUPT) -> Tensor:
        return heads.logits(self.model, self.family, of, patches)

    def seen(
        self, of: Prompt, component: str, *patches: Patch, layer: int = LAYER, sae: object = None
    ) -> Tensor:
        args = (self.model, self.family, of, patches, component, layer, sae)
        return heads.activation(*args)  # type: ignore[arg-type]

    def effect(self, *patches: Patch) -> float:
        return distance(self.logits(*patches), self.logits())

    def units(self, component: str) -> list[int | None]:
        if component not in heads.HAS_UNITS:
            return [None]
        return list(range(self.counts[component]))

    def components(self) -> list[str]:
        absent = {"resid_mid"} if self.family.parallel else set()
        absent |= {"neuron"} if self.family.down is None else set()
        absent |= set() if self.family.qkv else set(heads.PROJECTED)
        known = (*oracle.COMPONENTS, "embed", "head_q", "head_k", "head_v", "head_pattern")
        return [c for c in (*known, "neuron", *heads.PROJECTED) if c not in absent]

    def whole(self, component: str, source: Prompt = CLEAN, layer: int = LAYER) -> list[Patch]:
        """Every unit at every position."""
        return [Patch(component, layer, u, EVERYWHERE, source) for u in self.units(component)]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return build(request.param)


def build(name: str) -> Case:
    family = FAMILIES[name]
    model = family.build(LAYERS, seed=1)
    seen = heads.activations(model, family, CLEAN)
    return Case(model, family, {c: x.shape[1] for (c, layer), x in seen.items() if layer == LAYER})


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def layer_of(component: str) -> int:
    return 0 if component == "embed" else LAYER


def embedding(model: PreTrainedModel, ids: tuple[int, ...]) -> Tensor:
    out: Tensor = model.get_input_embeddings()(torch.tensor(ids))
    return out


def swapped(ids: tuple[int, ...], position: int, token: int) -> tuple[int, ...]:
    return (*ids[:position], token, *ids[position + 1 :])


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


# Other positions.


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


# Sources.


def test_a_run_patched_with_itself_does_not_change(case: Case) -> None:
    base = case.logits()
    for component in case.components():
        patches = case.whole(component, CORRUPT, layer_of(component))
        assert torch.equal(case.logits(*patches), base), component


def test_every_unit_has_an_effect_and_none_before_its_position(case: Case) -> None:
    base = case.logits()
    for component in case.components():
        for unit in case.units(component)[:6]:
            patch = Patch(component, layer_of(component), unit, {5: 5}, CLEAN)
            effect = (case.logits(patch) - base).abs().amax(-1)
            assert effect[:5].max() <= (case.family.tolerance if component == "resid_mid" else 0)
            if component != "neuron":  # some are closed in both runs
                assert effect[5:].max() > 100 * case.family.tolerance, component


def test_constants_and_steering(case: Case) -> None:
    """The source's value as a constant, and what it has more than the destination as a vector."""
    for component in case.components():
        if component == "head_pattern":
            continue
        layer = layer_of(component)
        source, own = (case.seen(of, component, layer=layer) for of in (CLEAN, CORRUPT))
        if component in heads.PROJECTED:
            source, own = (
                heads.activations(case.model, case.family, of)[component, layer]
                for of in (CLEAN, CORRUPT)
            )
        for unit in case.units(component)[:2]:
            value, vector = (x[4] if unit is None else x[4, unit] for x in (source, source - own))
            expected = case.logits(Patch(component, layer, unit, {4: 4}, CLEAN))
            for given in (value, Add(vector)):
                patched = case.logits(Patch(component, layer, unit, {4: 4}, given))
                assert distance(patched, expected) <= case.family.tolerance, component


def test_steering_adds_to_the_destination() -> None:
    case = build("llama")
    vector = torch.linspace(-1, 1, 48, dtype=torch.float64)
    patch = Patch("mlp_out", LAYER, None, {2: 2, 5: 5}, Add(vector))
    before, after = (case.seen(CORRUPT, "mlp_out", *p) for p in ((), (patch,)))
    assert torch.equal(after[[2, 5]], before[[2, 5]] + vector)
    assert torch.equal(after[[0, 1, 3, 4, 6, 7, 8]], before[[0, 1, 3, 4, 6, 7, 8]])


def test_zero_is_zero() -> None:
    case = build("gpt2")
    patch = Patch("head_z", LAYER, 2, EVERYWHERE, torch.zeros(()))
    assert case.seen(CORRUPT, "head_z", patch)[:, 2].abs().max() == 0
    assert case.seen(CORRUPT, "head_z", patch)[:, 3].abs().max() > 0


# Autoencoders.


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


# Several patches.


def test_the_later_in_the_list_counts_in_one_place(case: Case) -> None:
    for component in case.components():
        unit, layer = case.units(component)[-1], layer_of(component)
        one, other = (Patch(component, layer, unit, {5: 5}, s) for s in (CLEAN, OTHER))
        assert torch.equal(case.logits(one, other), case.logits(other)), component
        assert torch.equal(case.logits(other, one), case.logits(one)), component


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


def test_in_the_order_of_the_forward(case: Case) -> None:
    """Whatever the order of the list: what comes later in the forward sees what came before."""
    parts = [
        Patch("embed", 0, None, {1: 1}, CLEAN),
        Patch("head_k", 0, 0, {2: 2}, CLEAN),
        Patch("head_z", 1, 3, {4: 4}, CLEAN),
        Patch("resid_post", 1, None, {3: 3}, OTHER),
        Patch("head_pattern", 2, 5, {LAST: LAST}, CLEAN),
    ]
    expected = case.logits(*parts)
    assert torch.equal(case.logits(*reversed(parts)), expected)
    alone = [case.logits(part) for part in parts]
    assert min(distance(expected, x) for x in alone) > 100 * case.family.tolerance
    stream = Patch("resid_pre", 2, None, EVERYWHERE, CLEAN)
    assert torch.equal(case.logits(stream, *parts[:4]), case.logits(stream))


def test_sources_are_unpatched_runs(case: Case) -> None:
    """What is patched below, from another run or by a constant, does not reach the source."""
    at_5 = case.seen(CLEAN, "head_z")[5, 2]
    z = Patch("head_z", LAYER, 2, {5: 5}, CLEAN)
    for source in (OTHER, torch.ones(())):
        stream = Patch("resid_pre", LAYER, None, EVERYWHERE, source)
        after = case.seen(CORRUPT, "head_z", stream, z)
        assert torch.equal(after[5, 2], at_5)
        assert distance(case.seen(CORRUPT, "head_z", stream)[5, 2], at_5) > 1e-2


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
